//! The list of scenarios in this crate's `README.md` names what there is.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Every scenario, and whether it is a long one.
fn scenarios(dir: &Path, found: &mut BTreeMap<String, bool>) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            scenarios(&path, found)?;
            continue;
        }
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let text = std::fs::read_to_string(&path)?;
        let mut attributes = String::new();
        for line in text.lines().map(str::trim) {
            let function = line.strip_prefix("async fn ").or_else(|| line.strip_prefix("fn "));
            match function.and_then(|rest| rest.split_once('(')) {
                Some((name, _)) if attributes.contains("test]") => {
                    found.insert(name.to_owned(), attributes.contains("#[ignore"));
                    attributes.clear();
                }
                _ if line.starts_with("#[") => attributes.push_str(line),
                _ => attributes.clear(),
            }
        }
    }
    Ok(())
}

#[test]
fn every_scenario_of_the_list_is_there_and_runs_where_it_says() -> Result<()> {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut known = BTreeMap::new();
    scenarios(&crate_dir.join("tests"), &mut known)?;
    let list = std::fs::read_to_string(crate_dir.join("README.md"))?;
    let rows = list.lines().filter_map(|line| {
        let mut cells = line.trim_matches('|').split('|').map(str::trim).skip(1);
        let name = cells.next()?.strip_prefix('`')?.strip_suffix('`')?;
        Some((name, cells.next()?))
    });
    let mut named = 0;
    for (name, place) in rows {
        let long = known
            .get(name)
            .with_context(|| format!("there is no scenario {name}"))?;
        let expected = if *long { "long" } else { "test" };
        ensure!(
            place == expected,
            "{name} is said to be in {place:?}, and is in {expected:?}"
        );
        named += 1;
    }
    ensure!(named >= 50, "only {named} rows of the list were read");
    Ok(())
}

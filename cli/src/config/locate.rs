//! Finds the configuration and reads it into one tree.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::yaml;

/// Where configurations are looked for when none is named.
const PLACES: [&str; 6] = [
    "/etc/pgherd/pgherd.yml",
    "/etc/pgherd.yml",
    "/etc/patroni/patroni.yml",
    "/etc/patroni.yml",
    "pgherd.yml",
    "patroni.yml",
];

/// Where a configuration comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A file, or a directory of files.
    File(PathBuf),
    /// Nothing but variables.
    Environment,
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Environment => f.write_str("the environment"),
        }
    }
}

/// Chooses the source: the named file, `PGHERD_CONFIG`, the first of the usual places, or the environment when it says who
/// we are.
///
/// # Errors
/// A sentence that names every place tried.
pub(crate) fn choose(named: Option<PathBuf>, variable: impl Fn(&str) -> Option<OsString>) -> Result<Source, String> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    if let Some(path) = named.or_else(|| set("PGHERD_CONFIG").map(PathBuf::from)) {
        return Ok(Source::File(path));
    }
    if let Some(path) = PLACES.iter().map(Path::new).find(|path| path.exists()) {
        return Ok(Source::File(path.to_owned()));
    }
    if set("PATRONI_CONFIGURATION").is_some() || set("PATRONI_SCOPE").is_some() {
        return Ok(Source::Environment);
    }
    Err(format!(
        "no configuration found: PGHERD_CONFIG is not set, and there is no {}; name one with --config FILE",
        PLACES.join(", ")
    ))
}

/// Reads the source into one tree, without variables.
///
/// # Errors
/// A sentence that names the file.
pub(crate) fn read(source: &Source, variable: impl Fn(&str) -> Option<OsString>) -> Result<Map<String, Value>, String> {
    let path = match source {
        Source::File(path) => path,
        Source::Environment => {
            let text = variable("PATRONI_CONFIGURATION")
                .and_then(|text| text.into_string().ok())
                .unwrap_or_default();
            return yaml::parse(&text).map_err(|error| format!("PATRONI_CONFIGURATION: {error}"));
        }
    };
    if !path.is_dir() {
        return read_file(path);
    }
    let mut merged = Map::new();
    for file in files_of(path)? {
        merge(&mut merged, read_file(&file)?);
    }
    Ok(merged)
}

fn read_file(path: &Path) -> Result<Map<String, Value>, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: cannot be read: {error}", path.display()))?;
    yaml::parse(&text).map_err(|error| format!("{}: {error}", path.display()))
}

fn files_of(directory: &Path) -> Result<Vec<PathBuf>, String> {
    let failed = |error: std::io::Error| format!("{}: cannot be read: {error}", directory.display());
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let is_yaml = path
            .extension()
            .is_some_and(|extension| extension == "yml" || extension == "yaml");
        if is_yaml && path.is_file() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(format!("{}: a directory without .yml files", directory.display()));
    }
    files.sort();
    Ok(files)
}

/// Puts `over` on top of `base`, section by section; an explicit nothing deletes.
fn merge(base: &mut Map<String, Value>, over: Map<String, Value>) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(_), Value::Null) => {
                base.shift_remove(&key);
            }
            (Some(Value::Object(below)), Value::Object(above)) => merge(below, above),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_named_file_wins_and_then_the_variable() {
        let variable = |name: &str| (name == "PGHERD_CONFIG").then(|| OsString::from("/env.yml"));
        assert_eq!(
            choose(Some("/named.yml".into()), variable),
            Ok(Source::File("/named.yml".into()))
        );
        assert_eq!(choose(None, variable), Ok(Source::File("/env.yml".into())));
    }

    #[test]
    fn a_missing_file_and_an_empty_directory_are_told_by_name() {
        let none = |_: &str| None;
        let error = read(&Source::File("/nowhere/x.yml".into()), none).expect_err("missing");
        assert!(
            error.starts_with("/nowhere/x.yml: cannot be read: No such file"),
            "{error}"
        );
        let directory = tempfile::tempdir().expect("a directory");
        let error = read(&Source::File(directory.path().into()), none).expect_err("empty");
        assert!(error.ends_with("a directory without .yml files"), "{error}");
    }

    #[test]
    fn the_files_of_a_directory_are_merged_in_order_and_nothing_deletes() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("10-base.yml"), "a: {x: 1, y: 2}\nb: 1\n").expect("written");
        fs::write(directory.path().join("20-more.yaml"), "a: {y: 3, z: 4}\nb: ~\n").expect("written");
        fs::write(directory.path().join("ignored.txt"), "c: 1\n").expect("written");
        let merged = read(&Source::File(directory.path().into()), |_| None);
        assert_eq!(merged.map(Value::Object), Ok(json!({"a": {"x": 1, "y": 3, "z": 4}})));
    }

    #[test]
    fn a_configuration_may_come_whole_from_a_variable() {
        let variable = |name: &str| (name == "PATRONI_CONFIGURATION").then(|| OsString::from("scope: c"));
        assert_eq!(
            read(&Source::Environment, variable).map(Value::Object),
            Ok(json!({"scope": "c"}))
        );
    }
}

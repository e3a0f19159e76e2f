//! `pgherd show-config` and `pgherd edit-config`: the dynamic configuration, read from etcd and written there, guarded by the
//! revision that was read.

use std::io::{IsTerminal, Read, Write};
use std::path::Path;
use std::process::Command;

use pgherd_cluster::etcd::Txn;
use pgherd_cluster::key::Key;
use pgherd_cluster::record::DynamicConfig;
use serde_json::{Map, Value};

use super::site::{Scene, Site};
use super::{diff, yaml_text};
use crate::args::{ClusterArgs, EditConfigArgs};
use crate::config::yaml;
use crate::failure::Failure;
use crate::terminal::say;

/// Runs `show-config`.
///
/// # Errors
/// Bad configuration; etcd that does not answer.
pub(crate) async fn show(scene: &Scene, args: &ClusterArgs) -> Result<(), Failure> {
    let site = scene.site(args.cluster.as_deref(), args.group)?;
    let view = site.view().await?;
    if let Some(config) = &view.config.value {
        // Patronictl's ends with an empty line.
        say(yaml_text::document(&Value::Object(config.document().clone())));
    }
    Ok(())
}

/// Runs `edit-config`.
///
/// # Errors
/// When a value, a file or the edited text makes no sense, when it was not confirmed, or when somebody else changed it
/// meanwhile.
pub(crate) async fn edit(scene: &Scene, args: &EditConfigArgs) -> Result<(), Failure> {
    let by_editor = args.set.is_empty() && args.pg.is_empty() && args.apply.is_none() && args.replace.is_none();
    let from_stdin = [&args.apply, &args.replace]
        .into_iter()
        .flatten()
        .any(|file| *file == Path::new("-"));
    let mut prompter = scene.prompter(if by_editor {
        "-s KEY=VALUE or --apply FILE, and --force"
    } else {
        "--force"
    });
    // Standard input holds the values, and cannot answer as well.
    if (by_editor || !args.force) && !from_stdin {
        prompter.ensure_somebody_answers()?;
    }
    let site = scene.site(args.cluster.cluster.as_deref(), args.cluster.group)?;
    let view = site.view().await?;
    let Some(config) = &view.config.value else {
        return Err(Failure::Refused(format!(
            "The config key does not exist in the cluster {}",
            site.name()
        )));
    };
    let before = config.document().clone();
    let after = if by_editor {
        edited(&site, &before)?
    } else {
        changed(args, before.clone())?
    };
    if after == before {
        say("Not changed");
        return Ok(());
    }
    if !args.quiet {
        let text = |map: &Map<String, Value>| yaml_text::document(&Value::Object(map.clone()));
        say(diff::unified(&text(&before), &text(&after)).trim_end_matches('\n'));
    }
    if let Err(error) = DynamicConfig::new(after.clone()).timing() {
        eprintln!("warning: {error}; members will adjust these times");
    }
    if !args.force {
        if from_stdin {
            return Err(Failure::Refused("Use --force option to apply changes".to_owned()));
        }
        if !prompter.confirms("Apply these changes?")? {
            return Err(Failure::Refused("Aborted: nothing was changed".to_owned()));
        }
    }
    store(&site, after, view.config.mod_revision).await?;
    say("Configuration changed");
    Ok(())
}

async fn store(site: &Site, config: Map<String, Value>, mod_revision: i64) -> Result<(), Failure> {
    let key = site.keys().of(&Key::Config);
    let value = Value::Object(config).to_string();
    let txn = Txn::put_over(key, value.clone(), mod_revision);
    let outcome = site.etcd.txn(&txn, site.budget()).await;
    match outcome.map_err(|error| site.store_failure(&error))? {
        outcome if outcome.has_put(&value) => Ok(()),
        _ => Err(Failure::Refused(
            "Config modification aborted due to concurrent changes".to_owned(),
        )),
    }
}

/// What the arguments make of it: first `--replace`, then `--apply`, then single values.
fn changed(args: &EditConfigArgs, mut config: Map<String, Value>) -> Result<Map<String, Value>, Failure> {
    if let Some(file) = &args.replace {
        config = read(file)?;
    }
    if let Some(file) = &args.apply {
        merge(&mut config, read(file)?);
    }
    for pair in &args.pg {
        set(&mut config, &format!("postgresql.parameters.{pair}"), pair)?;
    }
    for pair in &args.set {
        set(&mut config, pair, pair)?;
    }
    Ok(config)
}

fn read(file: &Path) -> Result<Map<String, Value>, Failure> {
    let mut text = String::new();
    let read = if file == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).map(|_| ())
    } else {
        std::fs::read_to_string(file).map(|found| text = found)
    };
    read.map_err(|error| Failure::configuration(format!("{}: cannot be read: {error}", file.display())))?;
    yaml::parse(&text).map_err(|error| Failure::configuration(format!("{}: {error}", file.display())))
}

/// Patroni's merge: nothing deletes, sections merge.
fn merge(config: &mut Map<String, Value>, over: Map<String, Value>) {
    for (key, value) in over {
        match (config.get_mut(&key), value) {
            (_, Value::Null) => {
                config.shift_remove(&key);
            }
            (Some(Value::Object(below)), Value::Object(over)) => merge(below, over),
            (_, value) => {
                config.insert(key, value);
            }
        }
    }
}

/// Sets `a.b.c=VALUE`, the value read as YAML; `typed` is how it was written, for the error. Parameters of PostgreSQL may have
/// dots in their names.
fn set(config: &mut Map<String, Value>, pair: &str, typed: &str) -> Result<(), Failure> {
    let invalid = || Failure::configuration(format!("Invalid parameter setting {typed}: write KEY=VALUE"));
    let (path, text) = pair.split_once('=').ok_or_else(invalid)?;
    let path = path.trim();
    let words: Vec<&str> = match path.strip_prefix("postgresql.parameters.") {
        Some(name) => vec!["postgresql", "parameters", name],
        None => path.split('.').collect(),
    };
    if words.iter().any(|word| word.is_empty()) {
        return Err(invalid());
    }
    let value = yaml::parse(&format!("value: {}\n", text.trim()))
        .map_err(|_| invalid())?
        .shift_remove("value")
        .unwrap_or_default();
    put(config, &words, value);
    Ok(())
}

fn put(config: &mut Map<String, Value>, words: &[&str], value: Value) {
    let Some((first, rest)) = words.split_first() else {
        return;
    };
    if rest.is_empty() {
        match value {
            Value::Null => drop(config.shift_remove(*first)),
            value => drop(config.insert((*first).to_owned(), value)),
        }
        return;
    }
    // What is deleted below a section that is not there needs no section.
    if value.is_null() && !config.get(*first).is_some_and(Value::is_object) {
        return;
    }
    let section = config
        .entry((*first).to_owned())
        .or_insert_with(|| Value::Object(Map::new()));
    if !section.is_object() {
        *section = Value::Object(Map::new());
    }
    if let Value::Object(section) = section {
        put(section, rest, value);
    }
}

/// What the operator makes of it in an editor.
fn edited(site: &Site, before: &Map<String, Value>) -> Result<Map<String, Value>, Failure> {
    if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
        return Err(Failure::configuration(
            "an editor needs a terminal; say -s KEY=VALUE or --apply FILE instead",
        ));
    }
    let failed = |what: &str, error: &dyn std::fmt::Display| Failure::Unavailable(format!("{what}: {error}"));
    let mut file = tempfile::Builder::new()
        .prefix(&format!("{}-config-", site.name()))
        .suffix(".yaml")
        .tempfile()
        .map_err(|error| failed("making a file to edit", &error))?;
    file.write_all(yaml_text::document(&Value::Object(before.clone())).as_bytes())
        .and_then(|()| file.flush())
        .map_err(|error| failed("writing the file to edit", &error))?;
    let editor = editor().ok_or_else(|| {
        Failure::configuration("there is no editor: set EDITOR to one, or say -s KEY=VALUE or --apply FILE")
    })?;
    let ended = Command::new("sh")
        .args(["-c", &format!("{editor} \"$1\""), "sh"])
        .arg(file.path())
        .status()
        .map_err(|error| failed(&editor, &error))?;
    if !ended.success() {
        return Err(Failure::Refused(format!(
            "{editor} ended with {ended}: nothing was changed"
        )));
    }
    read(file.path())
}

fn editor() -> Option<String> {
    let set = std::env::var("EDITOR").ok().filter(|editor| !editor.trim().is_empty());
    set.or_else(|| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let is_there = |name: &&str| std::env::split_paths(&path).any(|dir| dir.join(name).is_file());
        ["editor", "vi"].into_iter().find(is_there).map(str::to_owned)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(value: Value) -> Map<String, Value> {
        value.as_object().cloned().expect("a map")
    }

    #[test]
    fn values_are_set_by_their_path_and_deleted_by_null() {
        let mut config = of(json!({"ttl": 30, "postgresql": {"parameters": {"max_connections": 50, "a.b": 1}}}));
        for pair in [
            "ttl=20",
            "pause=null",
            "x.y=on",
            "postgresql.parameters.max_connections=60",
            "postgresql.parameters.a.b=null",
            "postgresql.parameters.pg_stat.track='all'",
            "gone.deep=null",
            "postgresql.pg_hba=[local all all trust]",
        ] {
            set(&mut config, pair, pair).expect(pair);
        }
        let expected = json!({
            "ttl": 20, "x": {"y": true},
            "postgresql": {
                "parameters": {"max_connections": 60, "pg_stat.track": "all"},
                "pg_hba": ["local all all trust"],
            },
        });
        assert_eq!(Value::Object(config.clone()), expected);
        for pair in ["ttl", "=1", "a..b=1", "a=[1"] {
            assert!(set(&mut config, pair, pair).is_err(), "{pair}");
        }
    }

    #[test]
    fn files_merge_before_single_values() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(b"loop_wait: 5\npostgresql: {parameters: {work_mem: 8MB, max_connections: ~}}\n")
            .expect("written");
        let args = EditConfigArgs {
            cluster: ClusterArgs {
                cluster: None,
                group: crate::args::Group::default(),
            },
            quiet: false,
            set: vec!["loop_wait=6".to_owned()],
            pg: vec!["work_mem=9MB".to_owned()],
            apply: Some(file.path().to_owned()),
            replace: None,
            force: true,
        };
        let before = of(json!({"ttl": 30, "postgresql": {"parameters": {"max_connections": 50}}}));
        let after = changed(&args, before.clone()).expect("it makes sense");
        assert_eq!(
            Value::Object(after),
            json!({"ttl": 30, "postgresql": {"parameters": {"work_mem": "9MB"}}, "loop_wait": 6})
        );
        let args = EditConfigArgs {
            replace: args.apply.clone(),
            apply: None,
            ..args
        };
        let after = changed(&args, before).expect("it makes sense");
        assert!(!after.contains_key("ttl"), "{after:?}");
    }
}

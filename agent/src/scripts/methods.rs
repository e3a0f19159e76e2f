//! What operators configure of their own programs, out of the YAML's or the dynamic configuration's values.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::told::Event;
use super::words::Words;
use crate::record::is_set;

/// A value that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The key, from the section on.
    pub key: String,
    /// A sentence with the value and the fix.
    pub text: String,
}

/// An option of initdb or `pg_basebackup`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolOption {
    /// Without the dashes.
    pub name: String,
    /// Absent for a flag.
    pub value: Option<String>,
}

impl ToolOption {
    /// As it is passed.
    #[must_use]
    pub fn argument(&self) -> String {
        match &self.value {
            Some(value) => format!("--{}={value}", self.name),
            None => format!("--{}", self.name),
        }
    }
}

/// The programs that are called when something happens, and the ways to make a replica.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scripts {
    /// `callbacks`.
    pub callbacks: BTreeMap<Event, Words>,
    /// `pre_promote`.
    pub pre_promote: Option<Words>,
    /// `before_stop`.
    pub before_stop: Option<Words>,
    /// `create_replica_methods`, in their order; never empty.
    pub replica_methods: Vec<ReplicaMethod>,
    /// Options of `pg_basebackup`.
    pub basebackup: Vec<ToolOption>,
}

/// A way to make a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplicaMethod {
    /// `pg_basebackup`.
    BaseBackup,
    /// A program of the operator's.
    Custom(CustomMethod),
}

/// A program that makes a data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CustomMethod {
    /// Its name in the configuration.
    pub name: String,
    /// What is run.
    pub command: Words,
    /// Its own keys, passed as `--key=value` in their order.
    pub own: Vec<(String, String)>,
    /// Whether it is told nothing but its own keys.
    pub no_params: bool,
    /// Whether it needs no member to copy from.
    pub no_leader: bool,
    /// Whether it works on the data directory that is there.
    pub keep_data: bool,
}

impl CustomMethod {
    /// Its arguments: its own keys, and what it is told of the cluster, which goes over keys of the same name.
    #[must_use]
    pub fn arguments(&self, told: &[(&str, String)]) -> Vec<String> {
        let told = if self.no_params { &[][..] } else { told };
        let mut all: Vec<(&str, &str)> = self
            .own
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        for (key, value) in told {
            match all.iter_mut().find(|(own, _)| own == key) {
                Some(own) => own.1 = value,
                None => all.push((key, value)),
            }
        }
        all.iter().map(|(key, value)| format!("--{key}={value}")).collect()
    }
}

/// `bootstrap.method`, where it is not initdb.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootstrapMethod {
    /// The program.
    pub program: CustomMethod,
    /// Whether the recovery configuration that it leaves is kept as it is.
    pub keep_existing_recovery_conf: bool,
    /// What recovery is to do at the first start; nothing for a start without.
    pub recovery_conf: Map<String, Value>,
}

/// Options that pgherd gives to initdb itself, or must know what they would do.
pub const INITDB_RESERVED: &[&str] = &["pgdata", "nosync", "pwfile", "sync-only", "version"];
/// The same of `pg_basebackup`. Its `compress` is refused too unless the server does it: a compressed copy is no directory.
pub const BASEBACKUP_RESERVED: &[&str] = &[
    "pgdata",
    "format",
    "wal-method",
    "xlog-method",
    "gzip",
    "version",
    "dbname",
    "host",
    "port",
    "username",
    "password",
];

/// The keys of the `postgresql` section that [`Scripts::read`] reads, beside sections of the methods' own names.
const KEYS: [&str; 6] = [
    "callbacks",
    "pre_promote",
    "before_stop",
    "create_replica_methods",
    "create_replica_method",
    "basebackup",
];

impl Scripts {
    /// What of a `postgresql` section is read here, to be kept until the dynamic configuration is known.
    #[must_use]
    pub fn keys_of(section: &Map<String, Value>) -> Map<String, Value> {
        let methods = method_names(section);
        // The dynamic configuration may list a method whose program is known here only.
        let is_method = |value: &Value| value.get("command").is_some();
        let ours = |key: &str| KEYS.contains(&key) || methods.iter().any(|method| method == key);
        let kept = section
            .iter()
            .filter(|(key, value)| (ours(key) || is_method(value)) && !value.is_null());
        kept.map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// What is in force: a local key replaces the dynamic one whole. What cannot be used is left out, and told.
    #[must_use]
    pub fn in_force(local: &Map<String, Value>, dynamic: &Map<String, Value>) -> (Self, Vec<Finding>) {
        let mut merged = dynamic.clone();
        merged.extend(local.clone());
        Self::read(&merged)
    }

    /// Reads a `postgresql` section.
    #[must_use]
    pub fn read(section: &Map<String, Value>) -> (Self, Vec<Finding>) {
        let mut findings = Vec::new();
        let mut command = |key: &str, value: Option<&Value>| command(key, value?, &mut findings);
        let callbacks = section.get("callbacks").and_then(Value::as_object);
        let of_event = |event: Event| callbacks.and_then(|callbacks| callbacks.get(event.as_str()));
        let mut called = BTreeMap::new();
        for event in Event::ALL {
            let key = format!("callbacks.{event}");
            if let Some(words) = command(&key, of_event(event)) {
                called.insert(event, words);
            }
        }
        let mut scripts = Self {
            callbacks: called,
            pre_promote: command("pre_promote", section.get("pre_promote")),
            before_stop: command("before_stop", section.get("before_stop")),
            replica_methods: Vec::new(),
            basebackup: Vec::new(),
        };
        if let Some(options) = section.get("basebackup") {
            let (read, refused) = tool_options("basebackup", options, BASEBACKUP_RESERVED, "pg_basebackup");
            let (compressing, others): (Vec<_>, Vec<_>) = read.into_iter().partition(is_compressing);
            scripts.basebackup = others;
            findings.extend(refused);
            findings.extend(compressing.iter().map(|option| Finding {
                key: "basebackup".to_owned(),
                text: format!(
                    "{:?} would leave no data directory; use one that begins with server-, or remove it",
                    option.argument()
                ),
            }));
        }
        for name in method_names(section) {
            if name == "basebackup" {
                scripts.replica_methods.push(ReplicaMethod::BaseBackup);
                continue;
            }
            let empty = Map::new();
            let options = section.get(&name).and_then(Value::as_object).unwrap_or(&empty);
            let read = custom_method(&name, options, &["no_params", "no_leader", "keep_data"], &mut findings);
            scripts.replica_methods.extend(read.map(ReplicaMethod::Custom));
        }
        if scripts.replica_methods.is_empty() {
            scripts.replica_methods.push(ReplicaMethod::BaseBackup);
        }
        (scripts, findings)
    }

    /// Whether a member can be made while nobody leads.
    #[must_use]
    pub fn can_do_without_leader(&self) -> bool {
        let alone = |method: &ReplicaMethod| matches!(method, ReplicaMethod::Custom(custom) if custom.no_leader);
        self.replica_methods.iter().any(alone)
    }
}

impl BootstrapMethod {
    /// Reads a `bootstrap` section; nothing where initdb makes the cluster.
    #[must_use]
    pub fn read(section: &Map<String, Value>) -> (Option<Self>, Vec<Finding>) {
        let mut findings = Vec::new();
        let name = section
            .get("method")
            .and_then(Value::as_str)
            .filter(|name| *name != "initdb");
        let Some(name) = name else { return (None, findings) };
        let empty = Map::new();
        let options = section.get(name).and_then(Value::as_object).unwrap_or(&empty);
        if !options.contains_key("command") {
            let key = format!("{name}.command");
            let text = format!("missing; write the command that makes the cluster, since bootstrap.method is {name}");
            return (None, vec![Finding { key, text }]);
        }
        let reserved = [
            "no_params",
            "keep_existing_recovery_conf",
            "recovery_conf",
            "scope",
            "datadir",
        ];
        let mut own: Map<String, Value> = options.clone();
        own.retain(|key, _| !reserved.contains(&key.as_str()));
        let program = custom_method(name, &own, &[], &mut findings).map(|program| CustomMethod {
            no_params: is_set(options, "no_params"),
            ..program
        });
        let method = program.map(|program| Self {
            program,
            keep_existing_recovery_conf: is_set(options, "keep_existing_recovery_conf"),
            recovery_conf: options
                .get("recovery_conf")
                .and_then(Value::as_object)
                .cloned()
                .unwrap_or_default(),
        });
        (method, findings)
    }
}

/// Which ways to make a replica a section lists. The older name of the key counts where the newer is not there.
fn method_names(section: &Map<String, Value>) -> Vec<String> {
    let listed = section
        .get("create_replica_methods")
        .or_else(|| section.get("create_replica_method"));
    match listed {
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        Some(Value::String(names)) => {
            let names = names.split([',', '[', ']', ' ', '\'', '"']);
            names.filter(|name| !name.is_empty()).map(str::to_owned).collect()
        }
        _ => Vec::new(),
    }
}

/// A command line. A null is none.
fn command(key: &str, value: &Value, findings: &mut Vec<Finding>) -> Option<Words> {
    let mut refuse = |text: String| {
        let key = key.to_owned();
        findings.push(Finding { key, text });
    };
    match value {
        Value::Null => None,
        Value::String(line) => Words::parse(line)
            .map_err(|why| {
                refuse(format!(
                    "the command {why}; write a program and its arguments, quoted as in a shell"
                ))
            })
            .ok(),
        _ => {
            refuse("is no command; write a program and its arguments as one text".to_owned());
            None
        }
    }
}

/// One method's section. `own_switches` are told to a program only beside what it is told of the cluster, as Patroni does.
fn custom_method(
    name: &str,
    options: &Map<String, Value>,
    own_switches: &[&str],
    findings: &mut Vec<Finding>,
) -> Option<CustomMethod> {
    let by_name = Value::from(name);
    let command = command(
        &format!("{name}.command"),
        options.get("command").unwrap_or(&by_name),
        findings,
    )?;
    let no_params = is_set(options, "no_params");
    let mut own = Vec::new();
    for (key, value) in options {
        if key == "command" || (no_params && own_switches.contains(&key.as_str())) {
            continue;
        }
        match python_text(value) {
            Some(text) => own.push((key.clone(), text)),
            None => findings.push(Finding {
                key: format!("{name}.{key}"),
                text: "is neither a text nor a number and cannot be an argument; write one, or remove it".to_owned(),
            }),
        }
    }
    Some(CustomMethod {
        name: name.to_owned(),
        command,
        own,
        no_params,
        no_leader: is_set(options, "no_leader"),
        keep_data: is_set(options, "keep_data"),
    })
}

/// As Patroni's own programs are used to it.
fn python_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(true) => Some("True".to_owned()),
        Value::Bool(false) => Some("False".to_owned()),
        Value::Null => Some("None".to_owned()),
        Value::Array(_) | Value::Object(_) => None,
    }
}

fn is_compressing(option: &ToolOption) -> bool {
    match option.name.as_str() {
        "compress" => !option
            .value
            .as_deref()
            .is_some_and(|value| value.starts_with("server-")),
        "gzip" | "z" | "Z" => true,
        _ => false,
    }
}

/// Options as a list of texts and single pairs, or as a map; those in `reserved` are refused.
#[must_use]
pub fn tool_options(key: &str, value: &Value, reserved: &[&str], tool: &str) -> (Vec<ToolOption>, Vec<Finding>) {
    let mut findings = Vec::new();
    let mut options = Vec::new();
    let mut add = |name: &str, value: Option<String>| {
        let name = name.trim_start_matches('-').to_owned();
        if reserved.contains(&name.as_str()) {
            findings.push(Finding {
                key: key.to_owned(),
                text: format!("{name:?} cannot be set here, pgherd gives it to {tool} itself; remove it"),
            });
        } else {
            options.push(ToolOption { name, value });
        }
    };
    let mut unusable = Vec::new();
    match value {
        Value::Array(items) => {
            for item in items {
                match item {
                    Value::String(name) => add(name, None),
                    Value::Object(map) if map.len() == 1 && map.values().all(|value| scalar(value).is_some()) => {
                        for (name, value) in map {
                            add(name, scalar(value));
                        }
                    }
                    other => unusable.push(other),
                }
            }
        }
        Value::Object(map) => {
            for (name, value) in map {
                match value {
                    Value::Null | Value::Bool(false) => {}
                    Value::Bool(true) => add(name, None),
                    other if scalar(other).is_some() => add(name, scalar(other)),
                    other => unusable.push(other),
                }
            }
        }
        other => unusable.push(other),
    }
    findings.extend(unusable.into_iter().map(|found| Finding {
        key: key.to_owned(),
        text: format!(
            "{} is not an option; write one `- option` or `- option: value` per line",
            short(found)
        ),
    }));
    (options, findings)
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(set) => Some(if *set { "on" } else { "off" }.to_owned()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

fn short(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a section".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map(value: Value) -> Map<String, Value> {
        value.as_object().cloned().expect("a map")
    }

    fn read(value: Value) -> (Scripts, Vec<String>) {
        let (scripts, findings) = Scripts::read(&map(value));
        (
            scripts,
            findings
                .into_iter()
                .map(|finding| format!("{}: {}", finding.key, finding.text))
                .collect(),
        )
    }

    #[test]
    fn nothing_configured_is_a_base_backup_and_no_program() {
        let (scripts, findings) = read(json!({}));
        assert_eq!(findings, [""; 0]);
        assert_eq!(scripts.replica_methods, [ReplicaMethod::BaseBackup]);
        assert!(scripts.callbacks.is_empty() && scripts.pre_promote.is_none() && scripts.before_stop.is_none());
    }

    #[test]
    fn a_local_key_replaces_the_dynamic_one_whole() {
        let local = map(json!({"callbacks": {"on_stop": "/x/stop"}}));
        let dynamic = map(json!({"callbacks": {"on_start": "/x/start"}, "pre_promote": "/x/pre 'a b'"}));
        let (scripts, findings) = Scripts::in_force(&local, &dynamic);
        assert!(findings.is_empty());
        assert_eq!(scripts.callbacks.keys().copied().collect::<Vec<_>>(), [Event::OnStop]);
        assert_eq!(
            scripts.pre_promote.map(|words| words.arguments().to_vec()),
            Some(vec!["a b".to_owned()])
        );
    }

    #[test]
    fn a_method_gets_its_own_keys_and_what_it_is_told_of_the_cluster() {
        let (scripts, findings) = read(json!({
            "create_replica_methods": ["wal_e", "pgbackrest", "basebackup"],
            "wal_e": {"command": "/x/wal_e.sh -v", "no_leader": 1, "envdir": "/etc/wal e", "scope": "mine", "on": true},
            "pgbackrest": {"command": "/usr/bin/pgbackrest --delta restore", "keep_data": true, "no_params": true, "stanza": "main"},
        }));
        assert_eq!(findings, [""; 0]);
        let told = [("scope", "batman".to_owned()), ("datadir", "/d".to_owned())];
        let [
            ReplicaMethod::Custom(wal_e),
            ReplicaMethod::Custom(pgbackrest),
            ReplicaMethod::BaseBackup,
        ] = scripts.replica_methods.as_slice()
        else {
            panic!("{:?}", scripts.replica_methods);
        };
        assert_eq!(
            wal_e.arguments(&told),
            [
                "--no_leader=1",
                "--envdir=/etc/wal e",
                "--scope=batman",
                "--on=True",
                "--datadir=/d"
            ]
        );
        assert_eq!((wal_e.no_leader, wal_e.keep_data), (true, false));
        assert_eq!(pgbackrest.arguments(&told), ["--stanza=main"]);
        assert_eq!((pgbackrest.no_leader, pgbackrest.keep_data), (false, true));
        assert!(scripts.can_do_without_leader());
    }

    #[test]
    fn a_method_without_a_section_is_its_own_command() {
        let (scripts, _) = read(json!({"create_replica_method": ["/opt/restore.sh"]}));
        assert!(
            matches!(&scripts.replica_methods[..], [ReplicaMethod::Custom(custom)] if custom.command.program() == "/opt/restore.sh")
        );
    }

    #[test]
    fn what_cannot_be_used_is_told_with_its_fix() {
        let (_, findings) = read(json!({
            "callbacks": {"on_start": "/x 'y"},
            "pre_promote": ["x"],
            "basebackup": [{"format": "t"}, {"compress": "9"}, {"compress": "server-lz4"}, {"max-rate": "1M"}, ["x"]],
            "create_replica_methods": ["m"], "m": {"list": [1]},
        }));
        assert_eq!(
            findings,
            [
                "callbacks.on_start: the command has a quotation mark without a second one; write a program and its arguments, quoted as in a shell",
                "pre_promote: is no command; write a program and its arguments as one text",
                "basebackup: \"format\" cannot be set here, pgherd gives it to pg_basebackup itself; remove it",
                "basebackup: a list is not an option; write one `- option` or `- option: value` per line",
                "basebackup: \"--compress=9\" would leave no data directory; use one that begins with server-, or remove it",
                "m.list: is neither a text nor a number and cannot be an argument; write one, or remove it",
            ]
        );
    }

    #[test]
    fn a_custom_bootstrap_gets_every_key_that_is_not_for_us() {
        let section = map(json!({"method": "restore", "restore": {
            "command": "/x/restore", "no_params": false, "keep_existing_recovery_conf": "on",
            "recovery_conf": {"restore_command": "cp"}, "source": "s3://b", "scope": "x",
        }}));
        let (method, findings) = BootstrapMethod::read(&section);
        assert!(findings.is_empty(), "{findings:?}");
        let method = method.expect("a method");
        assert!(method.keep_existing_recovery_conf && method.recovery_conf.contains_key("restore_command"));
        let told = [("scope", "c".to_owned()), ("datadir", "/d".to_owned())];
        assert_eq!(
            method.program.arguments(&told),
            ["--source=s3://b", "--scope=c", "--datadir=/d"]
        );
        let (none, findings) = BootstrapMethod::read(&map(json!({"method": "restore"})));
        assert!(
            none.is_none() && findings.len() == 1 && findings[0].key == "restore.command",
            "{findings:?}"
        );
        assert_eq!(BootstrapMethod::read(&map(json!({"method": "initdb"}))).0, None);
    }
}

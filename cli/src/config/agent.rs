//! One member's configuration, out of the sections that Patroni reads.

use std::path::{Path, PathBuf};

use pgherd_agent::config::{AgentConfig, BootstrapConfig, Credentials};
use pgherd_agent::scripts::{BootstrapMethod, Finding, INITDB_RESERVED, ToolOption, Words, tool_options};
use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::DynamicConfig;
use pgherd_cluster::timing::{LeaseTiming, TimingError};
use serde_json::{Map, Value};

use super::ClusterConfig;
use super::section::{Section, shown};
use super::{postgresql, rest, value, watchdog};

/// Where PostgreSQL's official image looks for the first scripts of a new cluster.
const IMAGE_INITDB_D: &str = "/docker-entrypoint-initdb.d";

/// Reads one member's configuration; `runtime_dir` chooses the directory when none is configured.
pub(crate) fn read(
    root: &Section<'_>,
    cluster: Option<ClusterConfig>,
    runtime_dir: impl Fn(&str) -> PathBuf,
) -> Option<AgentConfig> {
    let name = name(root);
    let restapi = rest::read(root);
    let mut bootstrap = bootstrap(&root.section("bootstrap"));
    bootstrap.initdb_d = initdb_d(&root.section("pgherd"));
    let tags = tags(root);
    let watchdog = watchdog::read(&root.section("watchdog"));
    let configured = root.section("pgherd").text("runtime_dir").map(PathBuf::from);
    let member = cluster
        .as_ref()
        .zip(name.as_ref())
        .map(|(cluster, name)| format!("{}-{name}", cluster.scope));
    let runtime_dir = configured.or_else(|| member.map(|member| runtime_dir(&member)));
    // Without the names there is an error already; what follows is read all the same, for its own findings.
    let placeholder = Path::new("/");
    let postgresql = postgresql::read(root, runtime_dir.as_deref().or(Some(placeholder)));
    let cluster = cluster?;
    Some(AgentConfig {
        scope: cluster.scope,
        name: name?,
        namespace: cluster.namespace,
        etcd: cluster.etcd,
        restapi: restapi?,
        bootstrap,
        postgresql: postgresql?,
        by_role: postgresql::by_role(root),
        tags,
        watchdog,
        runtime_dir: runtime_dir?,
    })
}

fn name(root: &Section<'_>) -> Option<MemberName> {
    let text = root.required_text("name", "this member's name, different on every member")?;
    MemberName::new(text.as_str())
        .map_err(|error| {
            root.error(
                "name",
                format!("{text:?} cannot be used: {error}; write one such as node1"),
            )
        })
        .ok()
}

/// User and password of an `authentication` section; one without the other guards nothing.
pub(crate) fn credentials(section: &Section<'_>) -> Option<Credentials> {
    let (username, password) = (section.text("username"), section.secret("password"));
    match (&username, &password) {
        (Some(_), None) => section.missing("password", "the password of that user, or remove the username"),
        (None, Some(_)) => section.missing("username", "the user that the password belongs to"),
        _ => {}
    }
    username.zip(password).map(|(username, password)| Credentials {
        username,
        password: Some(password),
    })
}

fn tags(root: &Section<'_>) -> Map<String, Value> {
    let section = root.section("tags");
    for key in ["nofailover", "noloadbalance", "clonefrom", "nosync", "nostream"] {
        section.boolean(key); // For its finding: the record keeps the tag as it is written.
    }
    for (key, value) in section
        .entries()
        .filter(|(_, value)| value.is_array() || value.is_object())
    {
        section.error(
            key,
            format!("{} is not a tag; write a yes or no, a number or a text", shown(value)),
        );
    }
    if let (Some(false), Some(priority)) = (
        section.get("nofailover").and_then(value::boolean),
        section.get("failover_priority"),
    ) && value::integer(priority).is_some_and(|priority| priority <= 0)
    {
        section.warn(
            "failover_priority",
            format!("{priority} contradicts nofailover: false, which wins"),
        );
    }
    if let (Some(true), Some(priority)) = (
        section.get("nofailover").and_then(value::boolean),
        section.get("failover_priority"),
    ) && value::integer(priority).is_some_and(|priority| priority > 0)
    {
        section.warn(
            "failover_priority",
            format!("{priority} contradicts nofailover: true, which wins"),
        );
    }
    root.map("tags")
}

fn bootstrap(section: &Section<'_>) -> BootstrapConfig {
    let mut dcs = section.map("dcs");
    if let Some(Value::Object(postgresql)) = dcs.get_mut("postgresql")
        && let Some(Value::Object(parameters)) = postgresql.get_mut("parameters")
    {
        *parameters = postgresql::parameters(std::mem::take(parameters));
    }
    check_timing(&section.section("dcs"), &dcs);
    let (method, findings) = BootstrapMethod::read(&section.as_map());
    report(section, findings);
    check_slots(&section.section("dcs"), &dcs);
    BootstrapConfig {
        dcs,
        initdb: initdb(section),
        pg_hba: section.texts("pg_hba").unwrap_or_default(),
        method,
        post_bootstrap: ["post_bootstrap", "post_init"]
            .into_iter()
            .find(|key| section.has(key))
            .and_then(|key| command(section, key)),
        initdb_d: None,
    }
}

fn report(section: &Section<'_>, findings: Vec<Finding>) {
    for finding in findings {
        section.error(&finding.key, finding.text);
    }
}

fn command(section: &Section<'_>, key: &str) -> Option<Words> {
    let line = section.text(key)?;
    let refused = |why| {
        let fix = "write a program and its arguments, quoted as in a shell";
        section.error(key, format!("the command {why}; {fix}"));
    };
    Words::parse(&line).map_err(refused).ok()
}

/// The directory of first scripts: as configured, or that of the official image where there is one.
fn initdb_d(section: &Section<'_>) -> Option<PathBuf> {
    if let Some(dir) = section.text("initdb_d").map(PathBuf::from) {
        if !dir.is_dir() {
            section.error(
                "initdb_d",
                format!(
                    "{:?} is no directory; write one that holds .sql and .sh files",
                    dir.display().to_string()
                ),
            );
        }
        return Some(dir);
    }
    Some(PathBuf::from(IMAGE_INITDB_D)).filter(|dir| dir.is_dir())
}

/// The three times must fit each other. When none is given there is nothing to check: the agent has defaults that do.
fn check_timing(section: &Section<'_>, dcs: &Map<String, Value>) {
    let keys = ["ttl", "loop_wait", "retry_timeout"];
    if !keys.iter().any(|key| section.has(key)) {
        return;
    }
    let readable = keys.map(|key| !section.has(key) || section.duration(key).is_some());
    if readable.contains(&false) {
        return;
    }
    let told = |key: &str| section.get(key).map_or_else(|| "its default".to_owned(), shown);
    match DynamicConfig::new(dcs.clone()).timing() {
        Ok(_) => {}
        Err(TimingError::TtlTooShort { .. }) => section.error(
            "ttl",
            format!(
                "{} is too short for a lease; use at least {} (seconds)",
                told("ttl"),
                LeaseTiming::TTL_MIN.as_secs()
            ),
        ),
        Err(TimingError::Zero { name }) => {
            section.error(name, format!("{} is too short; use at least 1 (second)", told(name)))
        }
        Err(TimingError::LeaseTooShort { needed, .. }) => {
            let (ttl, needed) = (told("ttl"), needed.as_secs());
            section.error(
                "ttl",
                format!(
                    "{ttl} is shorter than loop_wait + 2 * retry_timeout, which is {needed} (each is 10 unless set); \
                     use at least {needed}, or set those lower"
                ),
            );
        }
    }
}

/// An entry that cannot be a slot is passed over, as with Patroni; a word of ours that is none is a mistake.
fn check_slots(section: &Section<'_>, dcs: &Map<String, Value>) {
    let config = DynamicConfig::new(dcs.clone());
    for refused in config.permanent_slots().refused {
        if let Some((key, what)) = refused.split_once(": ") {
            section.warn(key, format!("{what}; it is passed over"));
        }
    }
    let ours = section.section("pgherd");
    let set = ours.get("failover_slots");
    if let Some(set) = set.filter(|set| !matches!(set.as_str(), Some("warn" | "require"))) {
        ours.unusable("failover_slots", set, "warn or require", "one of the two");
    }
}

fn initdb(section: &Section<'_>) -> Vec<ToolOption> {
    let Some(found) = section.get("initdb") else {
        return Vec::new();
    };
    let (options, findings) = tool_options("initdb", found, INITDB_RESERVED, "initdb");
    report(section, findings);
    options
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::section::Findings;

    fn complete() -> Value {
        json!({
            "scope": "c", "name": "n1", "etcd3": {"host": "a"},
            "restapi": {"listen": "10.0.0.1:8008"},
            "postgresql": {"listen": "10.0.0.1:5432", "data_dir": "/d"},
        })
    }

    fn read_from(tree: &Value) -> (Option<AgentConfig>, Vec<String>) {
        let findings = Findings::default();
        let root = Section::root(tree.as_object().expect("a map"), &findings);
        let cluster = ClusterConfig::read(&root, None);
        let config = read(&root, cluster, |member| PathBuf::from(format!("/run/pgherd/{member}")));
        (config, findings.errors())
    }

    #[test]
    fn what_is_required_is_enough() {
        let (config, errors) = read_from(&complete());
        assert_eq!(errors, Vec::<String>::new());
        let config = config.expect("no errors");
        assert_eq!(config.runtime_dir, Path::new("/run/pgherd/c-n1"));
        assert_eq!(config.postgresql.pgpass, Path::new("/run/pgherd/c-n1/pgpass"));
        assert_eq!(config.restapi.connect_address.to_string(), "10.0.0.1:8008");
        assert_eq!(config.namespace, "service");
    }

    /// Sets one value in a good configuration, and expects one finding.
    fn assert_findings(cases: &[(&str, Value, &str)]) {
        for (pointer, value, expected) in cases {
            let mut tree = complete();
            let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
            let target = if parent.is_empty() {
                &mut tree
            } else {
                tree.pointer_mut(parent).expect("present")
            };
            target[key] = value.clone();
            assert_eq!(read_from(&tree).1, [*expected], "{pointer}");
        }
    }

    #[test]
    fn each_mistake_is_told_with_key_value_and_fix() {
        assert_findings(&[
            (
                "/name",
                json!("a/b"),
                "name: \"a/b\" cannot be used: it contains '/', which cannot be part of a key; write one such as node1",
            ),
            (
                "/name",
                json!(null),
                "name: missing; write this member's name, different on every member",
            ),
            (
                "/scope",
                json!(null),
                "scope: missing; write the cluster's name, the same on every member",
            ),
            (
                "/restapi/listen",
                json!(null),
                "restapi.listen: missing; write the address for other members and checks, such as 10.0.0.1:8008",
            ),
            (
                "/restapi/listen",
                json!("a:99999"),
                "restapi.listen: \"a:99999\": \"99999\" is not a port; write a number from 1 to 65535 after the last colon",
            ),
            (
                "/restapi/authentication",
                json!({"username": "u"}),
                "restapi.authentication.password: missing; write the password of that user, or remove the username",
            ),
            (
                "/tags",
                json!({"x": [1]}),
                "tags.x: a list is not a tag; write a yes or no, a number or a text",
            ),
        ]);
    }

    #[test]
    fn each_mistake_about_bootstrap_is_told_with_key_value_and_fix() {
        assert_findings(&[
            (
                "/bootstrap",
                json!({"dcs": {"ttl": 2, "loop_wait": 1, "retry_timeout": 1}}),
                "bootstrap.dcs.ttl: 2 is too short for a lease; use at least 3 (seconds)",
            ),
            (
                "/bootstrap",
                json!({"dcs": {"ttl": "soon"}}),
                "bootstrap.dcs.ttl: \"soon\" is not a duration; write one such as 10s, 500ms or 2min",
            ),
            (
                "/bootstrap",
                json!({"dcs": {"loop_wait": 0}}),
                "bootstrap.dcs.loop_wait: 0 is too short; use at least 1 (second)",
            ),
            (
                "/bootstrap",
                json!({"dcs": {"ttl": 20}}),
                "bootstrap.dcs.ttl: 20 is shorter than loop_wait + 2 * retry_timeout, which is 30 (each is 10 unless set); use at least 30, or set those lower",
            ),
            (
                "/bootstrap",
                json!({"initdb": "utf8"}),
                "bootstrap.initdb: \"utf8\" is not an option; write one `- option` or `- option: value` per line",
            ),
            (
                "/bootstrap",
                json!({"initdb": [{"pwfile": "/x"}]}),
                "bootstrap.initdb: \"pwfile\" cannot be set here, pgherd gives it to initdb itself; remove it",
            ),
        ]);
    }

    #[test]
    fn all_findings_are_told_at_once() {
        let (config, errors) = read_from(&json!({}));
        assert!(config.is_none());
        let keys: Vec<&str> = errors.iter().filter_map(|error| error.split(':').next()).collect();
        assert_eq!(
            keys,
            [
                "scope",
                "etcd3",
                "name",
                "restapi.listen",
                "postgresql.listen",
                "postgresql.data_dir"
            ]
        );
    }

    #[test]
    fn what_is_run_for_a_new_cluster_is_read_as_commands() {
        let mut tree = complete();
        tree["bootstrap"] = json!({
            "method": "restore", "restore": {"command": "/x/restore -v", "from": "s3"}, "post_init": "/x/post 'a b'",
        });
        let (config, errors) = read_from(&tree);
        assert_eq!(errors, Vec::<String>::new());
        let bootstrap = config.expect("no errors").bootstrap;
        let post = bootstrap.post_bootstrap.expect("a command");
        assert_eq!((post.program(), post.arguments()), ("/x/post", &["a b".to_owned()][..]));
        let method = bootstrap.method.expect("a method");
        assert_eq!(method.program.arguments(&[]), ["--from=s3"]);
        assert_findings(&[
            (
                "/bootstrap",
                json!({"method": "restore"}),
                "bootstrap.restore.command: missing; write the command that makes the cluster, since bootstrap.method is restore",
            ),
            (
                "/bootstrap",
                json!({"post_bootstrap": "/x 'y"}),
                "bootstrap.post_bootstrap: the command has a quotation mark without a second one; write a program and its arguments, quoted as in a shell",
            ),
            (
                "/postgresql/callbacks",
                json!({"on_start": "\"x"}),
                "postgresql.callbacks.on_start: the command has a quotation mark without a second one; write a program and its arguments, quoted as in a shell",
            ),
            (
                "/pgherd",
                json!({"initdb_d": "/nonexistent"}),
                "pgherd.initdb_d: \"/nonexistent\" is no directory; write one that holds .sql and .sh files",
            ),
        ]);
    }

    #[test]
    fn initdb_options_come_as_flags_and_pairs() {
        let mut tree = complete();
        tree["bootstrap"] =
            json!({"initdb": [{"encoding": "UTF8"}, "data-checksums", {"wal-segsize": 16}, "--no-locale"]});
        let option = |name: &str, value: Option<&str>| ToolOption {
            name: name.into(),
            value: value.map(Into::into),
        };
        let expected = [
            option("encoding", Some("UTF8")),
            option("data-checksums", None),
            option("wal-segsize", Some("16")),
            option("no-locale", None),
        ];
        assert_eq!(
            read_from(&tree).0.map(|config| config.bootstrap.initdb),
            Some(expected.to_vec())
        );
    }
}

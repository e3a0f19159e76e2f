//! The `postgresql` section.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pgherd_agent::config::{
    ConnectionOptions, Connections, Credentials, DivergenceConfig, PostgresConfig, RoleParameters,
};
use pgherd_agent::scripts::Scripts;
use pgherd_cluster::record::Address;
use serde_json::{Map, Value};

use super::section::Section;
use super::value;

const PORT: u16 = 5432;

/// Reads the section. Every key is read before the first missing one ends it, so that all findings are told.
pub(crate) fn read(root: &Section<'_>, runtime_dir: Option<&Path>) -> Option<PostgresConfig> {
    let section = root.section("postgresql");
    if !section.has("listen") {
        section.missing("listen", "the addresses to listen on, such as 10.0.0.1:5432 or *:5432");
    }
    let listen = section.listen("listen", PORT);
    let connect_address = listen
        .as_ref()
        .and_then(|(hosts, port)| connect_address(&section, hosts, *port));
    let data_dir = section.required_text("data_dir", "the data directory, such as /var/lib/postgresql/data");
    let data_dir = data_dir.map(|dir| absolute(&section, "data_dir", &dir));
    let authentication = section.section("authentication");
    let superuser = login(&authentication.section("superuser"), "postgres");
    let replication = login(&authentication.section("replication"), "replicator");
    let connections = connections(&authentication, section.text("krbsrvname"));
    let rewind = authentication
        .has("rewind")
        .then(|| login(&authentication.section("rewind"), "rewind_user"));
    let start_timeout = section
        .integer("pg_ctl_timeout", 1)
        .map(seconds)
        .unwrap_or(Duration::from_secs(60));
    let divergence = divergence(&section);
    let database = section.text("database").unwrap_or_else(|| "postgres".to_owned());
    let bin_dir = section.text("bin_dir").map(Into::into);
    let pgpass = section.text("pgpass").map(|file| absolute(&section, "pgpass", &file));
    let pg_hba = section.texts("pg_hba");
    let pg_ident = section.texts("pg_ident");
    let own_parameters = parameters(section.map("parameters"));
    let recovery_conf = section
        .has("recovery_conf")
        .then(|| parameters(section.map("recovery_conf")));
    let proxy_address = section.address("proxy_address", PORT);
    let config_dir = section
        .text("config_dir")
        .map(|dir| absolute(&section, "config_dir", &dir));
    let config_base_name = base_name(&section);
    let custom_conf = section.text("custom_conf").map(PathBuf::from);
    let use_unix_socket = section.boolean("use_unix_socket").unwrap_or(false);
    let use_unix_socket_repl = section.boolean("use_unix_socket_repl").unwrap_or(false);
    let bin_name = bin_name(&section.section("bin_name"));
    let scripts = scripts(&section);

    let (listen_addresses, port) = listen?;
    let data_dir = data_dir?;
    Some(PostgresConfig {
        listen_addresses,
        port,
        connect_address: connect_address?,
        proxy_address,
        config_dir: config_dir.unwrap_or_else(|| data_dir.clone()),
        config_base_name,
        custom_conf,
        data_dir,
        bin_dir,
        bin_name,
        use_unix_socket,
        use_unix_socket_repl,
        pgpass: pgpass.or_else(|| runtime_dir.map(|dir| dir.join("pgpass")))?,
        database,
        superuser,
        replication,
        rewind,
        connections,
        parameters: own_parameters,
        recovery_conf,
        pg_hba,
        pg_ident,
        scripts,
        start_timeout,
        divergence,
    })
}

/// A path that means the same whatever directory a process is in.
fn absolute(section: &Section<'_>, key: &str, path: &str) -> PathBuf {
    let made = std::path::absolute(path).unwrap_or_else(|_| path.into());
    if made.as_os_str() != path {
        section.warn(
            key,
            format!(
                "{path:?} is taken as {}, from the working directory on; write a path from / on",
                made.display()
            ),
        );
    }
    made
}

/// What others connect to: as configured, or the first address that is listened on.
pub(super) fn connect_address(section: &Section<'_>, hosts: &[String], port: u16) -> Option<Address> {
    let own = section.address("connect_address", port);
    if section.has("connect_address") {
        if let Some(address) = own.as_ref().filter(|address| value::is_wildcard(&address.host)) {
            section.error(
                "connect_address",
                format!("\"{address}\" is not one address that others can connect to; write this machine's own, such as 10.0.0.1:{port}"),
            );
        }
        return own;
    }
    match hosts.first() {
        Some(host) if !value::is_wildcard(host) => Some(Address {
            host: host.clone(),
            port,
        }),
        _ => {
            section.missing(
                "connect_address",
                &format!("this machine's own address, such as 10.0.0.1:{port}, since listen names every interface"),
            );
            None
        }
    }
}

fn login(section: &Section<'_>, username: &str) -> Credentials {
    Credentials {
        username: section.text("username").unwrap_or_else(|| username.to_owned()),
        password: section.secret("password"),
    }
}

/// What libpq is told of each user, beside name and password.
const CONNECTION_OPTIONS: [&str; 9] = [
    "sslmode",
    "sslcert",
    "sslkey",
    "sslrootcert",
    "sslcrl",
    "sslcrldir",
    "gssencmode",
    "channel_binding",
    "sslnegotiation",
];
/// Those that take one of a few words.
const WORDS: [(&str, &[&str]); 4] = [
    (
        "sslmode",
        &["disable", "allow", "prefer", "require", "verify-ca", "verify-full"],
    ),
    ("gssencmode", &["disable", "prefer", "require"]),
    ("channel_binding", &["disable", "prefer", "require"]),
    ("sslnegotiation", &["postgres", "direct"]),
];

/// `krbsrvname`: what the servers are called towards Kerberos, the same for every user.
fn connections(authentication: &Section<'_>, krbsrvname: Option<String>) -> Connections {
    let options = |user: &str| {
        let mut options = connection_options(&authentication.section(user));
        let service = krbsrvname.iter().map(|name| ("krbsrvname".to_owned(), name.clone()));
        options.0.extend(service);
        options
    };
    Connections {
        superuser: options("superuser"),
        replication: options("replication"),
        rewind: options("rewind"),
    }
}

fn connection_options(section: &Section<'_>) -> ConnectionOptions {
    if section.has("sslpassword") {
        section.error(
            "sslpassword",
            "the command lines of PostgreSQL's programs would show it to every user of this machine; remove it, and write as \
             sslkey the file of a key that is not encrypted",
        );
    }
    let mut options = Vec::new();
    for key in CONNECTION_OPTIONS {
        let Some(value) = section.text(key) else { continue };
        let words = WORDS.iter().find(|(known, _)| *known == key);
        match words {
            Some((_, words)) if !words.contains(&value.as_str()) => {
                section.error(
                    key,
                    format!("{value:?} is not known; write one of {}", words.join(", ")),
                );
            }
            _ => options.push((key.to_owned(), value)),
        }
    }
    if section.has("sslcert") != section.has("sslkey") {
        let (there, missing) = if section.has("sslcert") {
            ("certificate", "sslkey")
        } else {
            ("key", "sslcert")
        };
        section.missing(missing, &format!("the file that belongs to the {there}"));
    }
    warn_of_libpqs_own(section);
    ConnectionOptions(options)
}

/// What counts where libpq connects, as for streaming, pg_basebackup and pg_rewind, and not where we do ourselves.
fn warn_of_libpqs_own(section: &Section<'_>) {
    let only_there = "counts for streaming, pg_basebackup and pg_rewind only; pgherd's own connections";
    for key in ["sslcrl", "sslcrldir"].into_iter().filter(|key| section.has(key)) {
        section.warn(key, format!("{only_there} look at no list of revoked certificates"));
    }
    let requires = |key: &str| section.get(key).and_then(Value::as_str) == Some("require");
    if requires("gssencmode") {
        section.warn(
            "gssencmode",
            format!("{only_there} are encrypted by TLS, where sslmode says so"),
        );
    }
    if requires("channel_binding") {
        section.warn(
            "channel_binding",
            format!("{only_there} do not bind; sslmode: verify-full protects them"),
        );
    }
}

fn base_name(section: &Section<'_>) -> String {
    let name = section
        .text("config_base_name")
        .unwrap_or_else(|| "postgresql".to_owned());
    if name.contains('/') {
        section.error(
            "config_base_name",
            format!("{name:?} is not the stem of a file's name; write one such as postgresql, and the directory as config_dir"),
        );
    }
    name
}

fn divergence(section: &Section<'_>) -> DivergenceConfig {
    DivergenceConfig {
        use_pg_rewind: section.boolean("use_pg_rewind"),
        remove_on_rewind_failure: section.boolean("remove_data_directory_on_rewind_failure"),
        remove_on_diverged_timelines: section.boolean("remove_data_directory_on_diverged_timelines"),
    }
}

/// The keys of operators' programs as they are written, which the agent reads anew; here for their findings.
fn scripts(section: &Section<'_>) -> Map<String, Value> {
    let keys = Scripts::keys_of(&section.as_map());
    for finding in Scripts::read(&keys).1 {
        section.error(&finding.key, finding.text);
    }
    keys
}

fn bin_name(section: &Section<'_>) -> BTreeMap<String, String> {
    let names = section
        .entries()
        .filter_map(|(key, _)| Some((key.clone(), section.text(key)?)));
    names.collect()
}

/// `pgherd.parameters`: what holds in one role only.
pub(super) fn by_role(root: &Section<'_>) -> RoleParameters {
    let section = root.section("pgherd").section("parameters");
    RoleParameters {
        primary: parameters(section.map("primary")),
        replica: parameters(section.map("replica")),
    }
}

fn seconds(number: i64) -> Duration {
    Duration::from_secs(u64::try_from(number).unwrap_or_default())
}

/// YAML takes `on` for true; PostgreSQL calls it `on`, and some of its enumerations know `on` but not `true`.
pub(super) fn parameters(map: Map<String, Value>) -> Map<String, Value> {
    let word = |value: Value| match value {
        Value::Bool(true) => Value::from("on"),
        Value::Bool(false) => Value::from("off"),
        other => other,
    };
    map.into_iter().map(|(name, value)| (name, word(value))).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::section::Findings;
    use crate::config::yaml;

    fn read_from(section: &Value) -> (Option<PostgresConfig>, Vec<String>) {
        let tree = json!({ "postgresql": section });
        let findings = Findings::default();
        let config = read(
            &Section::root(tree.as_object().expect("a map"), &findings),
            Some(Path::new("/run/x")),
        );
        (config, findings.errors())
    }

    #[test]
    fn little_is_enough() {
        let (config, errors) = read_from(&json!({"listen": "10.0.0.1,127.0.0.1:5433", "data_dir": "/d"}));
        assert_eq!(errors, Vec::<String>::new());
        let config = config.expect("no errors");
        assert_eq!(config.listen_addresses, ["10.0.0.1", "127.0.0.1"]);
        assert_eq!(config.connect_address.to_string(), "10.0.0.1:5433");
        assert_eq!(
            (config.superuser.username.as_str(), config.replication.username.as_str()),
            ("postgres", "replicator")
        );
        assert_eq!(config.pgpass, Path::new("/run/x/pgpass"));
        assert!(config.rewind.is_none() && config.superuser.password.is_none());
    }

    #[test]
    fn mistakes_are_told_with_key_value_and_fix() {
        let (_, errors) = read_from(
            &json!({"listen": "*:54x2", "data_dir": "data", "authentication": {"superuser": {"password": true}}}),
        );
        assert_eq!(
            errors,
            [
                "postgresql.listen: \"*:54x2\": \"54x2\" is not a port; write a number from 1 to 65535 after the last colon",
                "postgresql.authentication.superuser.password: YAML takes it for a yes or no; put it in quotes",
            ]
        );
        let (_, errors) = read_from(&json!({}));
        assert_eq!(
            errors,
            [
                "postgresql.listen: missing; write the addresses to listen on, such as 10.0.0.1:5432 or *:5432",
                "postgresql.data_dir: missing; write the data directory, such as /var/lib/postgresql/data",
            ]
        );
    }

    #[test]
    fn every_key_of_the_section_is_read() {
        let (config, errors) = read_from(&json!({
            "listen": "10.0.0.1:5432", "data_dir": "/d", "config_dir": "/etc/pg", "config_base_name": "pg",
            "custom_conf": "/etc/pg/site.conf", "proxy_address": "10.0.0.9:6432", "use_unix_socket": "yes",
            "use_unix_socket_repl": true, "bin_name": {"postgres": "postgres17"},
            "recovery_conf": {"recovery_min_apply_delay": "1h", "recovery_target_inclusive": true},
            "authentication": {"replication": {"sslmode": "verify-full", "sslrootcert": "/ca.pem"}},
        }));
        assert_eq!(errors, Vec::<String>::new());
        let config = config.expect("no errors");
        assert_eq!(config.conf_file(), Path::new("/etc/pg/pg.conf"));
        assert_eq!(config.custom_conf.as_deref(), Some(Path::new("/etc/pg/site.conf")));
        assert_eq!(config.proxy_address.map(|address| address.port), Some(6432));
        assert!(config.use_unix_socket && config.use_unix_socket_repl);
        assert_eq!(config.bin_name.get("postgres").map(String::as_str), Some("postgres17"));
        assert_eq!(config.connections.replication.get("sslmode"), Some("verify-full"));
        let recovery = config.recovery_conf.map(Value::Object);
        let expected = json!({"recovery_min_apply_delay": "1h", "recovery_target_inclusive": "on"});
        assert_eq!(recovery, Some(expected));
    }

    #[test]
    fn a_wrong_way_to_connect_is_told_with_what_would_be_right() {
        let user = json!({"sslmode": "always", "sslcert": "/c.pem", "sslpassword": "hunter2"});
        let (_, errors) = read_from(&json!({
            "listen": "10.0.0.1:5432", "data_dir": "/d", "authentication": {"superuser": user},
        }));
        let path = "postgresql.authentication.superuser";
        assert_eq!(
            errors,
            [
                format!(
                    "{path}.sslpassword: the command lines of PostgreSQL's programs would show it to every user of this machine; \
                     remove it, and write as sslkey the file of a key that is not encrypted"
                ),
                format!(
                    "{path}.sslmode: \"always\" is not known; write one of disable, allow, prefer, require, verify-ca, verify-full"
                ),
                format!("{path}.sslkey: missing; write the file that belongs to the certificate"),
            ]
        );
    }

    #[test]
    fn an_address_that_nobody_can_connect_to_is_refused() {
        for (section, expected) in [
            (
                json!({"listen": "*:5432", "data_dir": "/d"}),
                "postgresql.connect_address: missing; write this machine's own address, such as 10.0.0.1:5432, since listen names every interface",
            ),
            (
                json!({"listen": "*:5432", "data_dir": "/d", "connect_address": "0.0.0.0:5432"}),
                "postgresql.connect_address: \"0.0.0.0:5432\" is not one address that others can connect to; write this machine's own, such as 10.0.0.1:5432",
            ),
        ] {
            assert_eq!(read_from(&section).1, [expected]);
        }
    }

    #[test]
    fn parameters_keep_their_meaning() {
        let text = "a: on\nb: off\nc: 'on'\nd: 0640\ne: 128MB\nf: 0.9\ng: 100\n";
        let read = parameters(yaml::parse(text).expect("valid"));
        assert_eq!(
            Value::Object(read),
            json!({"a": "on", "b": "off", "c": "on", "d": 416, "e": "128MB", "f": 0.9, "g": 100})
        );
    }

    #[test]
    fn no_password_is_ever_formatted() {
        let (config, _) = read_from(&json!({
            "listen": "a:1", "data_dir": "/d",
            "authentication": {"superuser": {"password": "hunter2"}, "replication": {"password": "hunter2"}, "rewind": {"password": "hunter2"}},
        }));
        let config = config.expect("no errors");
        assert_eq!(
            config.rewind.as_ref().and_then(|rewind| rewind.password.as_deref()),
            Some("hunter2")
        );
        assert!(!format!("{config:?}").contains("hunter2"));
    }
}

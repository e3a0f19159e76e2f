//! `PATRONI_*` variables, which go over the file.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::known::nearest;
use super::secrets;
use super::section::Findings;

/// Variables without their prefix and the places in the tree that they fill.
const VARIABLES: &[(&str, &str)] = &[
    ("NAME", "name"),
    ("SCOPE", "scope"),
    ("NAMESPACE", "namespace"),
    ("THREAD_POOL_SIZE", "thread_pool_size"),
    ("THREAD_STACK_SIZE", "thread_stack_size"),
    ("LOGLEVEL", "log.level"),
    ("LOGFORMAT", "log.format"),
    ("LOG_DATEFMT", "log.dateformat"),
    ("POSTGRESQL_BIN_DIR", "postgresql.bin_dir"),
    // Names that public guides have, and that Patroni ignores.
    ("POSTGRESQL_USERNAME", "postgresql.authentication.superuser.username"),
    ("POSTGRESQL_PASSWORD", "postgresql.authentication.superuser.password"),
    (
        "POSTGRESQL_REPLICATION_USERNAME",
        "postgresql.authentication.replication.username",
    ),
    (
        "POSTGRESQL_REPLICATION_PASSWORD",
        "postgresql.authentication.replication.password",
    ),
    ("CITUS_GROUP", "citus.group"),
    ("CITUS_DATABASE", "citus.database"),
];

/// Groups: the variables' prefix, the section, the keys in it in lower case.
const GROUPS: &[(&str, &str, &str)] = &[
    (
        "LOG_",
        "log",
        "type level traceback_level format dateformat static_fields max_queue_size dir mode file_size file_num loggers \
         deduplicate_heartbeat_logs",
    ),
    (
        "RESTAPI_",
        "restapi",
        "listen connect_address certfile keyfile keyfile_password cafile ciphers verify_client http_extra_headers \
         https_extra_headers allowlist allowlist_include_members request_queue_size server_tokens",
    ),
    ("RESTAPI_", "restapi.authentication", "username password"),
    ("CTL_", "ctl", "insecure cacert certfile keyfile keyfile_password"),
    ("CTL_", "ctl.authentication", "username password"),
    (
        "POSTGRESQL_",
        "postgresql",
        "listen connect_address proxy_address config_dir data_dir pgpass",
    ),
    (
        "POSTGRESQL_BIN_",
        "postgresql.bin_name",
        "pg_ctl initdb pg_controldata pg_basebackup postgres pg_isready pg_rewind",
    ),
    ("SUPERUSER_", "postgresql.authentication.superuser", LOGIN),
    ("REPLICATION_", "postgresql.authentication.replication", LOGIN),
    ("REWIND_", "postgresql.authentication.rewind", LOGIN),
    ("ETCD3_", "etcd3", ETCD),
    ("ETCD_", "etcd", ETCD),
];

const LOGIN: &str = "username password sslmode sslcert sslkey sslpassword sslrootcert sslcrl sslcrldir gssencmode \
                     channel_binding sslnegotiation";
const ETCD: &str = "host hosts port url proxy srv srv_suffix protocol use_proxies cacert cert key username password";

/// Variables of other programs that images and guides set; they fill what neither the file nor a variable of ours says, in
/// sections that are there.
const OTHERS: [(&str, &str); 4] = [
    ("POSTGRES_USER", "postgresql.authentication.superuser.username"),
    ("POSTGRES_PASSWORD", "postgresql.authentication.superuser.password"),
    ("HAPROXY_STATS_USER", "proxy.stats.username"),
    ("HAPROXY_STATS_PASSWORD", "proxy.stats.password"),
];

/// Set for programs beside, and of no use here.
const NEEDLESS: [(&str, &str); 1] = [(
    "RESTAPI_AUTH_HEADER",
    "not needed: no check of pgherd's asks with credentials, and HAProxy's need none",
)];

/// Sets any PostgreSQL parameter, as public guides have it.
const PARAMETER_PREFIX: &str = "POSTGRESQL_PARAMETERS_";

/// Ours that are read elsewhere.
const OURS: [&str; 4] = ["PGHERD_CONFIG", "PGHERD_KEEPER_LINK", "PGHERD_SENTINEL", "PGHERD_LOG"];

/// Puts `variables` over `tree`: those that begin with `PGHERD_` over those that begin with `PATRONI_`. Empty values count
/// as absent, as they do for Patroni. Gives the files that secrets were read from.
pub(crate) fn apply(
    tree: &mut Map<String, Value>,
    variables: impl IntoIterator<Item = (String, String)>,
    findings: &Findings,
) -> Vec<PathBuf> {
    let mut variables: Vec<(String, String)> = variables.into_iter().collect();
    variables.sort(); // So that messages come in one order, and X_FILE after X.
    let mut files = Vec::new();
    for (name, value) in &variables {
        if value.trim().is_empty() {
            continue;
        }
        let known = OTHERS
            .iter()
            .find(|(known, _)| name.strip_suffix("_FILE").unwrap_or(name) == *known);
        let Some((known, path)) = known else { continue };
        let path = split(path);
        if path.first().is_some_and(|section| !tree.contains_key(section)) || is_set(tree, &path) {
            continue;
        }
        if name == known {
            put(tree, &path, value.clone());
        } else {
            files.extend(put_secret(tree, name, &path, value, findings));
        }
    }
    for prefix in ["PATRONI_", "PGHERD_"] {
        for (name, value) in &variables {
            let Some(rest) = name.strip_prefix(prefix) else {
                continue;
            };
            let elsewhere = rest == "CONFIGURATION"
                || OURS.contains(&name.as_str())
                || ["PATRONICTL_", "PGHERD_TEST_"]
                    .iter()
                    .any(|other| name.starts_with(other));
            if elsewhere || value.trim().is_empty() {
                continue;
            }
            match place_of(rest) {
                Some(path) => put(tree, &path, value.clone()),
                None => files.extend(apply_file_or_warn(tree, (prefix, rest), value, findings)),
            }
        }
    }
    files
}

fn split(path: &str) -> Vec<String> {
    path.split('.').map(str::to_owned).collect()
}

fn is_set(tree: &Map<String, Value>, path: &[String]) -> bool {
    let Some((first, rest)) = path.split_first() else {
        return true;
    };
    match tree.get(first) {
        None | Some(Value::Null) => false,
        Some(Value::Object(inner)) if !rest.is_empty() => is_set(inner, rest),
        Some(_) => true,
    }
}

fn place_of(name: &str) -> Option<Vec<String>> {
    if let Some(parameter) = name.strip_prefix(PARAMETER_PREFIX) {
        let mut path = split("postgresql.parameters");
        path.push(parameter.to_lowercase());
        return Some(path);
    }
    if let Some((_, path)) = VARIABLES.iter().find(|(variable, _)| *variable == name) {
        return Some(split(path));
    }
    GROUPS.iter().find_map(|(prefix, section, keys)| {
        let key = name.strip_prefix(prefix)?.to_lowercase();
        let known = keys.split_whitespace().any(|known| known == key);
        known.then(|| [split(section), vec![key]].concat())
    })
}

/// `..._PASSWORD_FILE` names a file that holds the password, so that it need not stand in the environment.
fn apply_file_or_warn(
    tree: &mut Map<String, Value>,
    (prefix, rest): (&str, &str),
    value: &str,
    findings: &Findings,
) -> Option<PathBuf> {
    let name = format!("{prefix}{rest}");
    let place = rest
        .strip_suffix("_FILE")
        .filter(|rest| rest.ends_with("PASSWORD"))
        .and_then(place_of);
    if let Some(path) = place {
        return put_secret(tree, &name, &path, value, findings);
    }
    if let Some((_, why)) = NEEDLESS.iter().find(|(known, _)| *known == rest) {
        findings.warn(format!("{name}: {why}"));
        return None;
    }
    let known = all_names().into_iter().map(|known| format!("{prefix}{known}"));
    let known: Vec<String> = known.chain(OURS.map(str::to_owned)).collect();
    findings.warn(unknown(
        &name,
        nearest(&name, known.iter().map(String::as_str)).map(str::to_owned),
    ));
    None
}

fn put_secret(
    tree: &mut Map<String, Value>,
    name: &str,
    path: &[String],
    file: &str,
    findings: &Findings,
) -> Option<PathBuf> {
    let file = PathBuf::from(file);
    match secrets::read(&file) {
        Ok(secret) => put(tree, path, secret),
        Err(why) => findings.error(format!("{name}: {why}")),
    }
    Some(file)
}

fn all_names() -> Vec<String> {
    let grouped = GROUPS.iter().flat_map(|(prefix, _, keys)| {
        keys.split_whitespace()
            .map(move |key| format!("{prefix}{}", key.to_uppercase()))
    });
    VARIABLES
        .iter()
        .map(|(name, _)| (*name).to_owned())
        .chain(grouped)
        .collect()
}

fn unknown(name: &str, meant: Option<String>) -> String {
    match meant {
        Some(meant) => format!("{name}: unknown environment variable; did you mean {meant}?"),
        None => format!("{name}: unknown environment variable; it has no effect"),
    }
}

fn put(tree: &mut Map<String, Value>, path: &[String], value: String) {
    let Some((last, sections)) = path.split_last() else {
        return;
    };
    let mut map = tree;
    for section in sections {
        let entry = map.entry(section.clone()).or_insert_with(|| Value::Object(Map::new()));
        if !entry.is_object() {
            *entry = Value::Object(Map::new()); // An explicit nothing, or a mistake that the variable corrects.
        }
        match entry {
            Value::Object(inner) => map = inner,
            _ => return,
        }
    }
    map.insert(last.clone(), Value::String(value));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn applied(tree: Value, variables: &[(&str, &str)]) -> (Value, Vec<String>, Vec<String>) {
        let Value::Object(mut tree) = tree else { panic!("a map") };
        let findings = Findings::default();
        let variables = variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        apply(&mut tree, variables, &findings);
        (Value::Object(tree), findings.warnings(), findings.errors())
    }

    #[test]
    fn variables_go_over_the_file_and_empty_ones_do_not() {
        let file =
            json!({"name": "file", "scope": "c", "etcd3": null, "postgresql": {"listen": "a:1", "data_dir": "/d"}});
        let (tree, warnings, errors) = applied(
            file,
            &[
                ("PATRONI_NAME", "env"),
                ("PATRONI_SCOPE", ""),
                ("PATRONI_ETCD3_HOSTS", "a:1,b:2"),
                ("PATRONI_POSTGRESQL_LISTEN", "b:2"),
                ("PATRONI_POSTGRESQL_BIN_DIR", "/bin"),
                ("PATRONI_SUPERUSER_PASSWORD", "secret"),
                ("PATRONI_RESTAPI_USERNAME", "admin"),
                ("PATRONI_POSTGRESQL_PARAMETERS_SHARED_PRELOAD_LIBRARIES", "timescaledb"),
            ],
        );
        let expected = json!({
            "name": "env", "scope": "c", "etcd3": {"hosts": "a:1,b:2"},
            "postgresql": {
                "listen": "b:2", "data_dir": "/d", "bin_dir": "/bin",
                "authentication": {"superuser": {"password": "secret"}},
                "parameters": {"shared_preload_libraries": "timescaledb"},
            },
            "restapi": {"authentication": {"username": "admin"}},
        });
        assert_eq!((tree, warnings, errors), (expected, vec![], vec![]));
    }

    #[test]
    fn an_unknown_variable_is_told_with_what_was_meant() {
        let (tree, warnings, _) = applied(
            json!({}),
            &[
                ("PATRONI_POSTGRESQL_LISTN", "a:1"),
                ("PATRONI_RESTAPI_AUTH_HEADER", "x"),
                ("PATRONI_RESTAPI_AUTH_HEADR", "x"),
                ("PGHERD_CONFG", "x"),
                ("PGHERD_TEST_X", "x"),
                ("PGHERD_KEEPER_LINK", "stdin"),
                ("PATH", "/bin"),
            ],
        );
        assert_eq!(tree, json!({}));
        assert_eq!(
            warnings,
            [
                "PATRONI_POSTGRESQL_LISTN: unknown environment variable; did you mean PATRONI_POSTGRESQL_LISTEN?",
                "PATRONI_RESTAPI_AUTH_HEADER: not needed: no check of pgherd's asks with credentials, and HAProxy's need none",
                "PATRONI_RESTAPI_AUTH_HEADR: unknown environment variable; it has no effect",
                "PGHERD_CONFG: unknown environment variable; did you mean PGHERD_CONFIG?",
            ]
        );
    }

    #[test]
    fn a_password_may_lie_in_a_file() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), "secret\n").expect("written");
        let path = file.path().display().to_string();
        let (tree, _, errors) = applied(json!({}), &[("PATRONI_ETCD3_PASSWORD_FILE", &path)]);
        assert_eq!((tree, errors), (json!({"etcd3": {"password": "secret"}}), vec![]));
        let (_, _, errors) = applied(json!({}), &[("PATRONI_ETCD3_PASSWORD_FILE", "/nowhere/x")]);
        assert!(
            errors[0].starts_with("PATRONI_ETCD3_PASSWORD_FILE: \"/nowhere/x\" cannot be read"),
            "{errors:?}"
        );
    }

    #[test]
    fn our_own_prefix_goes_over_patronis_and_the_guides_names_are_known() {
        let (tree, warnings, errors) = applied(
            json!({"proxy": {}, "postgresql": {}}),
            &[
                ("PGHERD_NAME", "ours"),
                ("PATRONI_NAME", "theirs"),
                ("PATRONI_POSTGRESQL_USERNAME", "admin"),
                ("PATRONI_POSTGRESQL_REPLICATION_USERNAME", "repl"),
                ("POSTGRES_USER", "not used"),
                ("POSTGRES_PASSWORD", "of the image"),
                ("HAPROXY_STATS_USER", "stats"),
            ],
        );
        let expected = json!({
            "name": "ours",
            "proxy": {"stats": {"username": "stats"}},
            "postgresql": {"authentication": {
                "superuser": {"username": "admin", "password": "of the image"},
                "replication": {"username": "repl"},
            }},
        });
        assert_eq!((tree, warnings, errors), (expected, vec![], vec![]));
    }

    #[test]
    fn variables_of_other_programs_make_no_section() {
        let (tree, _, errors) = applied(
            json!({"scope": "c"}),
            &[("POSTGRES_PASSWORD_FILE", "/nowhere"), ("HAPROXY_STATS_PASSWORD", "x")],
        );
        assert_eq!((tree, errors), (json!({"scope": "c"}), vec![]));
    }
}

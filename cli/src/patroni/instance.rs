//! The configuration of a PostgreSQL that runs: what it would take to have it as the first member of a cluster.

use std::time::Duration;

use pgherd_agent::config::Credentials;
use pgherd_agent::postgres::sql::{Row, Target, ask_once};
use pgherd_cluster::record::Address;
use serde_json::{Map, Value, json};

use super::generate::{host_name, local_address, sample};
use crate::failure::Failure;

const ANSWER_MAX: Duration = Duration::from_secs(10);
const PORT: u16 = 5432;
const SOCKETS: &str = "/var/run/postgresql";
/// Parameters on which members must agree: they belong into the cluster's configuration.
const CONTROLLED: [&str; 10] = [
    "wal_level",
    "hot_standby",
    "max_connections",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
    "track_commit_timestamp",
    "max_replication_slots",
    "max_worker_processes",
    "wal_log_hints",
];
/// Parameters that pgherd writes itself.
const OURS: [&str; 14] = [
    "listen_addresses",
    "port",
    "cluster_name",
    "config_file",
    "data_directory",
    "hba_file",
    "ident_file",
    "external_pid_file",
    "primary_conninfo",
    "primary_slot_name",
    "recovery_target_timeline",
    "synchronous_standby_names",
    "server_version",
    "unix_socket_directories",
];

/// How to reach it.
#[derive(Debug)]
struct Reached {
    host: String,
    port: u16,
    database: String,
    user: Credentials,
}

/// Asks it.
///
/// # Errors
/// When it cannot be reached, or the user may not see everything.
pub(super) async fn describe(dsn: Option<&str>) -> Result<Map<String, Value>, Failure> {
    let reached = reached(dsn, |name| std::env::var(name).ok().filter(|value| !value.is_empty()))?;
    let address = Address {
        host: reached.host.clone(),
        port: reached.port,
    };
    let target = Target::new(&address, &reached.database, &reached.user);
    let ask = async |what: &'static str, sql: &str| {
        let asked = ask_once(&target, what, sql, ANSWER_MAX).await;
        asked.map_err(|error| Failure::Unavailable(format!("{address}: {}", error.chain())))
    };
    let super_user = ask(
        "asking who we are",
        "SELECT rolsuper FROM pg_roles WHERE rolname = current_user",
    )
    .await?;
    if first(&super_user) != Some("t") {
        return Err(Failure::Refused(format!(
            "{} is not a superuser, and only one sees the whole configuration; name one as user=... in --dsn, or in PGUSER",
            reached.user.username
        )));
    }
    let set = ask(
        "asking for its parameters",
        "SELECT name, current_setting(name) FROM pg_settings \
         WHERE source IN ('configuration file', 'command line', 'environment variable') ORDER BY name",
    )
    .await?;
    let places = ask(
        "asking where it is",
        "SELECT current_setting('data_directory'), current_setting('listen_addresses'), current_setting('port'), \
         pg_read_file(current_setting('hba_file')), pg_read_file(current_setting('ident_file')), \
         current_setting('cluster_name')",
    )
    .await?;
    let place = places.into_iter().next().unwrap_or_default();
    Ok(configuration(&set, &place, &reached.user.username))
}

fn first(rows: &[Row]) -> Option<&str> {
    rows.first()?.first()?.as_deref()
}

fn configuration(set: &[Row], place: &Row, superuser: &str) -> Map<String, Value> {
    let text = |index: usize| place.get(index).and_then(Option::as_deref).unwrap_or_default();
    let (mut cluster, mut own) = (Map::new(), Map::new());
    for row in set {
        let [Some(name), Some(value)] = row.as_slice() else {
            continue;
        };
        if OURS.contains(&name.as_str()) {
            continue;
        }
        // What names files and commands of this machine is this member's own.
        let is_local = name.ends_with("_file") || name.ends_with("_command") || name.ends_with("_directory");
        let into = if is_local && !CONTROLLED.contains(&name.as_str()) {
            &mut own
        } else {
            &mut cluster
        };
        into.insert(name.clone(), value.clone().into());
    }
    let address = local_address();
    let listen = if text(1).is_empty() { address.as_str() } else { text(1) };
    let mut config = sample(&address);
    let scope = if text(5).is_empty() { "#FIXME" } else { text(5) };
    config.insert("scope".to_owned(), scope.into());
    config.insert("name".to_owned(), host_name().into());
    let port = text(2);
    config["bootstrap"]["dcs"]["postgresql"]["parameters"] = Value::Object(cluster);
    let postgresql = &mut config["postgresql"];
    postgresql["data_dir"] = text(0).into();
    postgresql["listen"] = format!("{listen}:{port}").into();
    postgresql["connect_address"] = format!("{address}:{port}").into();
    postgresql["authentication"]["superuser"]["username"] = superuser.into();
    postgresql["pg_hba"] = lines(text(3));
    if lines(text(4)) != json!([]) {
        postgresql["pg_ident"] = lines(text(4));
    }
    if !own.is_empty() {
        postgresql["parameters"] = Value::Object(own);
    }
    config
}

/// The lines that say something.
fn lines(text: &str) -> Value {
    let lines = text.lines().map(str::trim);
    lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(Value::from)
        .collect()
}

/// Reads `key=value ...`, and libpq's variables for what it does not say.
fn reached(dsn: Option<&str>, variable: impl Fn(&str) -> Option<String>) -> Result<Reached, Failure> {
    let mut said = Map::new();
    for pair in dsn.unwrap_or_default().split_whitespace() {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(Failure::configuration(format!(
                "--dsn: {pair:?} is not key=value; write host=... port=... user=... password=..."
            )));
        };
        said.insert(key.to_owned(), value.trim_matches('\'').into());
    }
    let get = |key: &str, name: &str| {
        let own = said.get(key).and_then(Value::as_str).map(str::to_owned);
        own.or_else(|| variable(name))
    };
    let port = get("port", "PGPORT").map_or(Ok(PORT), |text| {
        text.parse()
            .map_err(|_| Failure::configuration(format!("port: {text:?} is not a port; write a number")))
    })?;
    let user = get("user", "PGUSER").unwrap_or_else(|| "postgres".to_owned());
    Ok(Reached {
        host: get("host", "PGHOST").unwrap_or_else(|| SOCKETS.to_owned()),
        port,
        database: get("dbname", "PGDATABASE").unwrap_or_else(|| "postgres".to_owned()),
        user: Credentials {
            username: user,
            password: get("password", "PGPASSWORD"),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dsn_goes_over_the_variables() {
        let variable = |name: &str| match name {
            "PGHOST" => Some("/sockets".to_owned()),
            "PGPORT" => Some("5433".to_owned()),
            _ => None,
        };
        let found = reached(Some("port=5434 user='admin'"), variable).expect("it is one");
        assert_eq!((found.host.as_str(), found.port), ("/sockets", 5434));
        assert_eq!(found.user.username, "admin");
        assert!(reached(Some("nonsense"), variable).is_err());
        assert!(reached(Some("port=x"), |_| None).is_err());
    }

    #[test]
    fn what_members_must_agree_on_goes_to_the_cluster_and_files_stay_with_the_member() {
        let row = |name: &str, value: &str| vec![Some(name.to_owned()), Some(value.to_owned())];
        let set = [
            row("archive_command", "cp %p /a/%f"),
            row("max_connections", "200"),
            row("port", "5432"),
            row("work_mem", "8MB"),
        ];
        let place = ["/data", "*", "5433", "# x\nhost all all all md5\n", "", "main"];
        let place: Row = place.iter().map(|text| Some((*text).to_owned())).collect();
        let config = configuration(&set, &place, "admin");
        let cluster = &config["bootstrap"]["dcs"]["postgresql"]["parameters"];
        assert_eq!(*cluster, json!({"max_connections": "200", "work_mem": "8MB"}));
        let postgresql = &config["postgresql"];
        assert_eq!(postgresql["parameters"], json!({"archive_command": "cp %p /a/%f"}));
        assert_eq!(
            (&postgresql["listen"], &postgresql["data_dir"]),
            (&json!("*:5433"), &json!("/data"))
        );
        assert_eq!(postgresql["pg_hba"], json!(["host all all all md5"]));
        assert_eq!(config["scope"], "main");
    }
}

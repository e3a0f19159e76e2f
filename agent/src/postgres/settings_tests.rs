use pgherd_cluster::name::{Lsn, SystemId, Timeline};
use pgherd_cluster::record::{Address, StandbyCluster};
use serde_json::json;

use super::*;
use crate::postgres::ControlState;

fn local(parameters: Value) -> PostgresConfig {
    PostgresConfig {
        parameters: parameters.as_object().cloned().unwrap_or_default(),
        ..crate::config::tests::agent().postgresql
    }
}

fn dynamic(parameters: Value) -> DynamicConfig {
    let document = json!({ "postgresql": { "parameters": parameters } });
    DynamicConfig::new(document.as_object().cloned().unwrap_or_else(Map::new))
}

fn render(
    local_parameters: Value,
    dynamic_parameters: Value,
    upstream: Option<&Upstream>,
    floors: Option<&Control>,
) -> (Settings, Vec<String>) {
    Settings::render(Inputs {
        sync_names: None,
        feedback: false,
        scope: &Scope::new("batman").expect("a plain name"),
        name: &MemberName::new("n1").expect("a plain name"),
        postgresql: &local(local_parameters),
        dynamic: &dynamic(dynamic_parameters),
        upstream,
        floors,
        by_role: &RoleParameters::default(),
    })
}

fn controlled(settings: &Settings, name: &str) -> String {
    settings
        .controlled
        .iter()
        .find(|(known, _)| known == name)
        .map(|(_, value)| value.clone())
        .unwrap_or_default()
}

#[test]
fn controlled_parameters_come_from_the_dynamic_configuration_only() {
    let (settings, warnings) = render(
        json!({"max_connections": 999, "wal_level": "logical"}),
        json!({"max_connections": 60}),
        None,
        None,
    );
    assert_eq!(controlled(&settings, "max_connections"), "60");
    assert_eq!(controlled(&settings, "wal_level"), "replica");
    assert!(settings.conf.contains("max_connections = '60'\n"));
    assert!(warnings.is_empty());
}

#[test]
fn a_value_that_is_not_allowed_gives_the_default_and_a_warning() {
    let (settings, warnings) = render(
        json!({}),
        json!({"max_connections": 5, "wal_level": "minimal"}),
        None,
        None,
    );
    assert_eq!(controlled(&settings, "max_connections"), "100");
    assert_eq!(warnings.len(), 2);
    assert!(
        warnings
            .iter()
            .any(|warning| warning.contains("postgresql.parameters.wal_level")),
        "{warnings:?}"
    );
}

#[test]
fn other_parameters_merge_with_the_local_ones_on_top() {
    let (settings, _) = render(
        json!({"work_mem": "8MB", "log_line_prefix": "it's \\ %m", "port": 1}),
        json!({"work_mem": "4MB", "jit": false, "wal_keep_segments": 4, "primary_conninfo": "x"}),
        None,
        None,
    );
    let conf = settings.conf;
    for line in [
        "work_mem = '8MB'\n",
        "jit = 'off'\n",
        "wal_keep_size = '64MB'\n",
        "log_line_prefix = 'it''s \\\\ %m'\n",
        "port = '5432'\n",
    ] {
        assert!(conf.contains(line), "{line} in {conf}");
    }
    assert!(!conf.contains("'x'"));
}

#[test]
fn a_standby_never_undercuts_its_primary() {
    let control = Control {
        state: ControlState::InArchiveRecovery,
        system_id: SystemId(1),
        checkpoint: Lsn(1),
        timeline: Timeline(1),
        floors: vec![("max_connections", 200), ("max_wal_senders", 3)],
    };
    let (settings, _) = render(json!({}), json!({"max_connections": 60}), None, Some(&control));
    assert_eq!(controlled(&settings, "max_connections"), "200");
    assert_eq!(controlled(&settings, "max_wal_senders"), "10");
}

#[test]
fn a_standby_streams_from_its_upstream_by_its_own_name_and_slot() {
    let upstream = Upstream::Member(Address {
        host: "127.0.0.2".to_owned(),
        port: 5433,
    });
    let (settings, _) = render(json!({}), json!({}), Some(&upstream), None);
    assert!(settings.conf.contains(
        "primary_conninfo = 'dbname=postgres user=replicator passfile=/run/pgpass host=127.0.0.2 port=5433 sslmode=prefer \
         application_name=n1 gssencmode=prefer channel_binding=prefer'\n"
    ));
    assert!(settings.conf.contains("primary_slot_name = 'n1'\n"));
    assert!(
        !settings.conf.contains("secret"),
        "a password belongs into the password file"
    );
}

#[test]
fn the_leader_of_a_standby_cluster_streams_by_the_slot_that_was_named_and_reads_the_others_archive() {
    let remote = |section: Value| {
        let section = StandbyCluster::read(section.as_object().expect("a map")).expect("a source");
        let upstream = Upstream::Remote(section);
        render(json!({"restore_command": "own"}), json!({}), Some(&upstream), None)
            .0
            .conf
    };
    let conf =
        remote(json!({"host": "a,b", "port": 5433, "primary_slot_name": "Of-Us", "recovery_min_apply_delay": 5000}));
    assert!(
        conf.contains(" host=a,b port=5433,5433 target_session_attrs=read-write sslmode=prefer application_name=n1 ")
    );
    assert!(conf.contains("primary_slot_name = 'of_us'\n") && conf.contains("recovery_min_apply_delay = '5000'\n"));
    assert!(conf.contains("restore_command = 'own'\n"));
    let without_slot = remote(json!({"host": "a"}));
    assert!(
        without_slot.contains("primary_slot_name = ''\n") && without_slot.contains(" host=a port=5432 sslmode=prefer")
    );
    let archive = remote(json!({"restore_command": "cp /archive/%f %p", "primary_slot_name": "s"}));
    assert!(archive.contains("primary_conninfo = ''\n") && archive.contains("primary_slot_name = ''\n"));
    assert_eq!(
        archive.lines().rfind(|line| line.starts_with("restore_command")),
        Some("restore_command = 'cp /archive/%f %p'")
    );
}

#[test]
fn arguments_are_those_that_patroni_passes() {
    let (settings, _) = render(json!({}), json!({}), None, None);
    let arguments = settings
        .arguments(Path::new("/data/n1"), Path::new("/data/n1/postgresql.conf"))
        .join(" ");
    assert_eq!(
        arguments,
        "-D /data/n1 --config-file=/data/n1/postgresql.conf --listen_addresses=127.0.0.1 --port=5432 --cluster_name=batman \
         --wal_level=replica --hot_standby=on --max_connections=100 --max_wal_senders=10 --max_prepared_transactions=0 \
         --max_locks_per_transaction=64 --track_commit_timestamp=off --max_replication_slots=10 --max_worker_processes=8 \
         --wal_log_hints=on"
    );
}

#[test]
fn conninfo_values_are_quoted_where_needed() {
    assert_eq!(quote("plain"), "plain");
    assert_eq!(quote(""), "''");
    assert_eq!(quote("it's a \\"), r"'it\'s a \\'");
}

fn conf(postgresql: PostgresConfig, document: Value, by_role: &RoleParameters, floors: Option<&Control>) -> String {
    let dynamic = DynamicConfig::new(document.as_object().cloned().unwrap_or_default());
    let upstream = Upstream::Member(Address {
        host: "10.0.0.2".to_owned(),
        port: 5432,
    });
    let inputs = Inputs {
        sync_names: None,
        scope: &Scope::new("batman").expect("a plain name"),
        name: &MemberName::new("n1").expect("a plain name"),
        postgresql: &postgresql,
        dynamic: &dynamic,
        upstream: floors.map(|_| &upstream),
        by_role,
        floors,
        feedback: false,
    };
    Settings::render(inputs).0.conf
}

fn standby() -> Control {
    Control {
        state: ControlState::InArchiveRecovery,
        system_id: SystemId(1),
        checkpoint: Lsn(1),
        timeline: Timeline(1),
        floors: vec![],
    }
}

#[test]
fn each_role_has_its_own_parameters_and_the_members_win() {
    let by_role = RoleParameters {
        replica: json!({"work_mem": "3MB"}).as_object().cloned().unwrap_or_default(),
        ..RoleParameters::default()
    };
    let document = json!({
        "postgresql": {"parameters": {"work_mem": "1MB", "jit": "off"}},
        "pgherd": {"parameters": {"primary": {"jit": "on"}, "replica": {"work_mem": "2MB", "statement_timeout": 5}}},
    });
    let primary = conf(local(json!({})), document.clone(), &by_role, None);
    assert!(
        primary.contains("work_mem = '1MB'\n") && primary.contains("jit = 'on'\n"),
        "{primary}"
    );
    assert!(!primary.contains("statement_timeout"));
    let replica = conf(local(json!({})), document, &by_role, Some(&standby()));
    assert!(
        replica.contains("work_mem = '3MB'\n") && replica.contains("jit = 'off'\n"),
        "{replica}"
    );
    assert!(replica.contains("statement_timeout = '5'\n"));
}

#[test]
fn a_members_own_read_only_ends_with_its_following_and_that_of_the_cluster_does_not() {
    let own = || local(json!({"default_transaction_read_only": "on"}));
    let none = RoleParameters::default();
    let (on, off) = (
        "default_transaction_read_only = 'on'\n",
        "default_transaction_read_only = 'off'\n",
    );
    assert!(conf(own(), json!({}), &none, Some(&standby())).contains(on));
    assert!(conf(own(), json!({}), &none, None).contains(off));
    let cluster = json!({"postgresql": {"parameters": {"default_transaction_read_only": true}}});
    assert!(conf(local(json!({})), cluster, &none, None).contains(on));
}

#[test]
fn files_have_their_configured_places_and_the_recovery_its_own_parameters() {
    let postgresql = PostgresConfig {
        config_dir: "/etc/pg".into(),
        custom_conf: Some("/etc/pg/site's.conf".into()),
        recovery_conf:
            json!({"restore_command": "cp /a/%f %p", "recovery_target_time": "now", "primary_conninfo": "x"})
                .as_object()
                .cloned(),
        ..local(json!({"ident_file": "/etc/ident"}))
    };
    let conf = conf(postgresql, json!({}), &RoleParameters::default(), Some(&standby()));
    for line in [
        "include '/etc/pg/site''s.conf'\n",
        "hba_file = '/etc/pg/pg_hba.conf'\n",
        "ident_file = '/etc/ident'\n",
        "restore_command = 'cp /a/%f %p'\n",
    ] {
        assert!(conf.contains(line), "{line} in {conf}");
    }
    assert!(!conf.contains("recovery_target_time ") && !conf.contains("'x'"));
}

#[test]
fn options_of_the_replication_user_go_into_the_connection() {
    let mut postgresql = local(json!({}));
    let options = [("sslmode", "verify-full"), ("sslrootcert", "/ca it.pem")];
    let owned = options.map(|(name, value)| (name.to_owned(), value.to_owned()));
    postgresql.connections.replication.0 = owned.to_vec();
    let conf = conf(postgresql, json!({}), &RoleParameters::default(), Some(&standby()));
    assert!(conf.contains(" sslmode=verify-full application_name=n1 "), "{conf}");
    assert!(conf.contains(" sslrootcert=''/ca it.pem''"), "{conf}");
}

#[test]
fn authentication_is_the_members_own_or_else_the_clusters() {
    let lines = |own: Option<Vec<String>>, parameters: Value| {
        let postgresql = PostgresConfig {
            pg_hba: own,
            ..local(parameters)
        };
        let document = json!({"postgresql": {"pg_hba": ["host all all all md5"]}});
        let dynamic = DynamicConfig::new(document.as_object().cloned().unwrap_or_default());
        let inputs = Inputs {
            sync_names: None,
            scope: &Scope::new("batman").expect("a plain name"),
            name: &MemberName::new("n1").expect("a plain name"),
            postgresql: &postgresql,
            dynamic: &dynamic,
            upstream: None,
            by_role: &RoleParameters::default(),
            floors: None,
            feedback: false,
        };
        lines_of(inputs, "pg_hba")
    };
    assert_eq!(lines(None, json!({})), Some(vec!["host all all all md5".to_owned()]));
    let own = vec!["local all all peer".to_owned()];
    assert_eq!(lines(Some(own.clone()), json!({})), Some(own));
    assert_eq!(
        lines(None, json!({"hba_file": "/etc/hba"})),
        None,
        "that file is the operator's"
    );
    assert!(lines(None, json!({"hba_file": "/data/n1/pg_hba.conf"})).is_some());
}

//! Against what patronictl 4.1.4 printed for the same keys.

use pgherd_cluster::key::Keys;
use pgherd_cluster::name::Scope;
use pgherd_cluster::view::Entry;
use serde_json::json;

use super::*;

fn view(scope: &str, values: &[(&str, String)]) -> View {
    let scope = Scope::new(scope).expect("a plain name");
    let keys = Keys::new("service", &scope);
    let entries = values.iter().enumerate().map(|(index, (key, value))| Entry {
        key: format!("{}{key}", keys.prefix()),
        value: value.clone(),
        create_revision: i64::try_from(index).expect("few"),
        mod_revision: i64::try_from(index).expect("few"),
        lease: 0,
    });
    View::from_entries(scope.clone(), &keys, entries.collect::<Vec<_>>(), 1)
}

fn member(name: &str, more: Value) -> (String, String) {
    let number = name.trim_start_matches("node");
    let mut record = json!({
        "conn_url": format!("postgres://127.0.3.{number}:23432/postgres"),
        "api_url": format!("http://127.0.3.{number}:23008/patroni"),
        "state": "running", "role": "replica", "version": "4.1.4", "timeline": 1,
    });
    for (key, value) in more.as_object().expect("an object") {
        record[key] = value.clone();
    }
    (format!("members/{name}"), record.to_string())
}

fn replica(more: Value) -> Value {
    let mut record = json!({
        "receive_lsn": 67_108_960, "replay_lsn": 67_108_960, "xlog_location": 67_108_960, "replication_state": "streaming",
    });
    for (key, value) in more.as_object().expect("an object") {
        record[key] = value.clone();
    }
    record
}

fn batman_with(extra: &[(&str, String)], members: Vec<(String, String)>) -> View {
    let mut values = vec![
        ("initialize", "7710403737510608197".to_owned()),
        ("leader", "node1".to_owned()),
        ("status", json!({"optime": 67_108_960}).to_string()),
    ];
    values.extend(members.iter().map(|(key, value)| (key.as_str(), value.clone())));
    values.extend(extra.iter().cloned());
    view("batman", &values)
}

fn batman() -> View {
    batman_with(
        &[],
        vec![
            member("node1", json!({"role": "primary", "xlog_location": 67_108_960})),
            member("node2", replica(json!({"tags": {"clonefrom": true, "my_tag": "abc"}}))),
            member("node3", replica(json!({"tags": {"failover_priority": 2}}))),
        ],
    )
}

#[test]
fn the_table_is_patronictls() {
    let expected = "\
+ Cluster: batman (7710403737510608197) ---------+----+-------------+-----+------------+-----+----------------------+
| Member | Host            | Role    | State     | TL | Receive LSN | Lag | Replay LSN | Lag | Tags                 |
+--------+-----------------+---------+-----------+----+-------------+-----+------------+-----+----------------------+
| node1  | 127.0.3.1:23432 | Leader  | running   |  1 |             |     |            |     |                      |
+--------+-----------------+---------+-----------+----+-------------+-----+------------+-----+----------------------+
| node2  | 127.0.3.2:23432 | Replica | streaming |  1 |   0/4000060 |   0 |  0/4000060 |   0 | clonefrom: true      |
|        |                 |         |           |    |             |     |            |     | my_tag: abc          |
+--------+-----------------+---------+-----------+----+-------------+-----+------------+-----+----------------------+
| node3  | 127.0.3.3:23432 | Replica | streaming |  1 |   0/4000060 |   0 |  0/4000060 |   0 | failover_priority: 2 |
+--------+-----------------+---------+-----------+----+-------------+-----+------------+-----+----------------------+
";
    assert_eq!(render(&batman(), Format::Pretty, false), expected);
}

#[test]
fn a_cluster_that_nobody_knows_is_an_empty_table() {
    let expected = "\
+ Cluster: nosuchcluster (uninitialized) ---------+-----+------------+-----+
| Member | Host | Role | State | TL | Receive LSN | Lag | Replay LSN | Lag |
+--------+------+------+-------+----+-------------+-----+------------+-----+
+--------+------+------+-------+----+-------------+-----+------------+-----+
";
    assert_eq!(render(&view("nosuchcluster", &[]), Format::Pretty, false), expected);
    assert_eq!(render(&view("nosuchcluster", &[]), Format::Json, false), "[]\n");
}

#[test]
fn tsv_is_patronictls() {
    let expected = "\
Cluster	Member	Host	Role	State	TL	Receive LSN	Receive Lag	Replay LSN	Replay Lag	Tags
batman	node1	127.0.3.1:23432	Leader	running	1					
batman	node2	127.0.3.2:23432	Replica	streaming	1	0/4000060	0	0/4000060	0	{clonefrom: true, my_tag: abc}
batman	node3	127.0.3.3:23432	Replica	streaming	1	0/4000060	0	0/4000060	0	{failover_priority: 2}
";
    assert_eq!(render(&batman(), Format::Tsv, false), expected);
}

#[test]
fn json_is_patronictls() {
    let expected = concat!(
        r#"[{"Cluster": "batman", "Member": "node1", "Host": "127.0.3.1:23432", "Role": "Leader", "State": "running", "TL": 1}, "#,
        r#"{"Cluster": "batman", "Member": "node2", "Host": "127.0.3.2:23432", "Role": "Replica", "State": "streaming", "TL": 1, "#,
        r#""Receive LSN": "0/4000060", "Receive Lag": 0, "Replay LSN": "0/4000060", "Replay Lag": 0, "#,
        r#""Tags": {"clonefrom": true, "my_tag": "abc"}}, "#,
        r#"{"Cluster": "batman", "Member": "node3", "Host": "127.0.3.3:23432", "Role": "Replica", "State": "streaming", "TL": 1, "#,
        r#""Receive LSN": "0/4000060", "Receive Lag": 0, "Replay LSN": "0/4000060", "Replay Lag": 0, "#,
        r#""Tags": {"failover_priority": 2}}]"#,
        "\n"
    );
    assert_eq!(render(&batman(), Format::Json, false), expected);
}

#[test]
fn a_stopped_member_has_unknown_positions_and_a_lag_is_in_mebibytes() {
    let stopped = json!({"state": "stopped", "timeline": null});
    let behind = replica(json!({"receive_lsn": 50_331_744, "replay_lsn": 33_554_432}));
    let view = batman_with(
        &[],
        vec![
            member("node1", json!({})),
            member("node2", behind),
            member("node3", stopped),
        ],
    );
    let text = render(&view, Format::Pretty, false);
    let lines: Vec<&str> = text.lines().skip(3).take(3).collect();
    assert_eq!(
        lines,
        [
            "| node1  | 127.0.3.1:23432 | Leader  | running   |  1 |             |     |            |     |",
            "| node2  | 127.0.3.2:23432 | Replica | streaming |  1 |   0/3000060 |  16 |  0/2000000 |  32 |",
            "| node3  | 127.0.3.3:23432 | Replica | stopped   |    |     unknown |     |    unknown |     |",
        ]
    );
}

#[test]
fn pending_and_scheduled_restarts_have_columns_of_their_own() {
    let waits = json!({
        "pending_restart": true,
        "pending_restart_reason": {
            "max_connections": {"old_value": "50", "new_value": "60"},
            "shared_preload_libraries": {"old_value": "", "new_value": "x".repeat(60)},
        },
        "scheduled_restart": {"schedule": "2040-01-01T00:00:00+00:00", "postgres_version": "16.0"},
    });
    let view = batman_with(&[], vec![member("node1", waits)]);
    let text = render(&view, Format::Pretty, false);
    assert!(text.contains("| Pending restart | Pending restart reason "), "{text}");
    assert!(text.contains("| *               | max_connections: 50->60  "), "{text}");
    assert!(
        text.contains("| shared_preload_libraries: [hidden - too long] |"),
        "{text}"
    );
    assert!(
        text.contains("| 2040-01-01T00:00:00+00:00 if version < 16.0 |"),
        "{text}"
    );
    let json = render(&view, Format::Json, false);
    assert!(
        json.contains(r#""Pending restart": "*", "Pending restart reason": "max_connections: 50->60\nshared"#),
        "{json}"
    );
}

#[test]
fn roles_of_synchronous_standbys_are_told() {
    for (quorum, expected) in [(0, "Sync Standby"), (1, "Quorum Standby")] {
        let sync = json!({"leader": "node1", "sync_standby": "node2", "quorum": quorum}).to_string();
        let members = vec![member("node1", json!({})), member("node2", replica(json!({})))];
        let text = render(&batman_with(&[("sync", sync)], members), Format::Pretty, false);
        assert!(text.contains(&format!("| {expected} ")), "{text}");
    }
}

#[test]
fn maintenance_and_a_scheduled_switchover_stand_below() {
    let view = batman_with(
        &[
            ("config", json!({"pause": true}).to_string()),
            (
                "failover",
                json!({"leader": "node3", "member": "node2", "scheduled_at": "2040-01-01T00:00:00+00:00"}).to_string(),
            ),
        ],
        vec![],
    );
    let expected = " Maintenance mode: on
 Switchover scheduled at: 2040-01-01T00:00:00+00:00
                    from: node3
                      to: node2
";
    let text = render(&view, Format::Pretty, false);
    assert!(text.ends_with(expected), "{text}");
}

#[test]
fn ports_are_left_out_when_they_tell_nobody_apart() {
    let usual = |name: &str, host: &str| {
        (
            format!("members/{name}"),
            json!({"conn_url": format!("postgres://{host}:5432/postgres"), "api_url": "", "state": "running"})
                .to_string(),
        )
    };
    let view = batman_with(&[], vec![usual("node1", "10.0.0.1"), usual("node2", "10.0.0.2")]);
    assert!(render(&view, Format::Pretty, false).contains("| node1  | 10.0.0.1 | Leader "));
    let view = batman_with(&[], vec![usual("node1", "10.0.0.1"), usual("node2", "10.0.0.1")]);
    assert!(render(&view, Format::Pretty, false).contains("| node1  | 10.0.0.1:5432 | Leader "));
}

#[test]
fn extended_shows_all_columns() {
    let view = view("c", &[]);
    let header = render(&view, Format::Tsv, true);
    assert!(
        header.ends_with("Replay Lag\tPending restart\tPending restart reason\tScheduled restart\tTags\n"),
        "{header}"
    );
}

#[test]
fn tags_that_yaml_would_misread_are_quoted() {
    for (value, expected) in [
        (json!("abc"), "abc"),
        (json!("true"), "'true'"),
        (json!("5"), "'5'"),
        (json!("a: b"), "'a: b'"),
        (json!("it's: x"), "'it''s: x'"),
        (json!(5), "5"),
        (json!(true), "true"),
    ] {
        assert_eq!(yaml_text::scalar(&value), expected);
    }
}

#[test]
fn a_topology_is_patronictls() {
    let at = |timeline: u32, more: Value| {
        let mut record = replica(json!({
            "timeline": timeline, "receive_lsn": 70_262_512, "replay_lsn": 70_262_512, "xlog_location": 70_262_512,
        }));
        for (key, value) in more.as_object().expect("an object") {
            record[key] = value.clone();
        }
        record
    };
    let view = view(
        "batman",
        &[
            ("initialize", "7710403737510608197".to_owned()),
            ("leader", "node2".to_owned()),
            ("status", json!({"optime": 70_262_512}).to_string()),
        ]
        .into_iter()
        .chain([
            ("members/node1", member("node1", at(11, json!({}))).1),
            (
                "members/node2",
                member(
                    "node2",
                    json!({"timeline": 11, "tags": {"clonefrom": true, "my_tag": "abc"}}),
                )
                .1,
            ),
            (
                "members/node3",
                member(
                    "node3",
                    at(
                        11,
                        json!({"tags": {"nofailover": true, "noloadbalance": true, "replicatefrom": "node1"}}),
                    ),
                )
                .1,
            ),
        ])
        .collect::<Vec<_>>(),
    );
    let expected = "\
+ Cluster: batman (7710403737510608197) +-----------+----+-------------+-----+------------+-----+---------------------------------------------------------------+
| Member    | Host            | Role    | State     | TL | Receive LSN | Lag | Replay LSN | Lag | Tags                                                          |
+-----------+-----------------+---------+-----------+----+-------------+-----+------------+-----+---------------------------------------------------------------+
| node2     | 127.0.3.2:23432 | Leader  | running   | 11 |             |     |            |     | {clonefrom: true, my_tag: abc}                                |
| + node1   | 127.0.3.1:23432 | Replica | streaming | 11 |   0/4301EF0 |   0 |  0/4301EF0 |   0 |                                                               |
|   + node3 | 127.0.3.3:23432 | Replica | streaming | 11 |   0/4301EF0 |   0 |  0/4301EF0 |   0 | {nofailover: true, noloadbalance: true, replicatefrom: node1} |
+-----------+-----------------+---------+-----------+----+-------------+-----+------------+-----+---------------------------------------------------------------+
";
    assert_eq!(tree(&view), expected);
}

#[test]
fn members_that_name_each_other_or_nobody_are_in_the_topology_all_the_same() {
    let from = |name: &str, upstream: &str| member(name, replica(json!({"tags": {"replicatefrom": upstream}})));
    let members = vec![
        member("node1", json!({})),
        from("node2", "node3"),
        from("node3", "node2"),
        from("node4", "nobody"),
        from("node5", "node1"),
    ];
    let text = tree(&batman_with(&[], members));
    let names: Vec<&str> = text
        .lines()
        .skip(3)
        .filter_map(|line| line.get(2..9))
        .map(str::trim_end)
        .collect();
    assert_eq!(
        names[..5],
        ["node1", "+ node4", "+ node5", "+ node2", "+ node3"],
        "{text}"
    );
}

#[test]
fn yaml_is_patronictls() {
    let view = batman_with(
        &[],
        vec![member("node3", replica(json!({"tags": {"failover_priority": 2}})))],
    );
    let expected = "\
- Cluster: batman
  Host: 127.0.3.3:23432
  Member: node3
  Receive LSN: 0/4000060
  Receive Lag: 0
  Replay LSN: 0/4000060
  Replay Lag: 0
  Role: Replica
  State: streaming
  TL: 1
  Tags:
    failover_priority: 2

";
    assert_eq!(render(&view, Format::Yaml, false), expected);
}

//! Bodies against Patroni's captures.

use std::sync::Arc;

use pgherd_cluster::name::Timeline;
use serde_json::json;

use super::super::fixtures::{
    DEADLINE, NOW, entry, facts, facts_of, leader_status, member_entry, replica, replica_status, stopped, view,
    view_with, without_store,
};
use super::super::json::spaced;
use super::*;
use crate::status::MemberStatus;

/// A capture ends where our own fields begin.
fn assert_begins(body: &Value, capture: &str) {
    let text = spaced(body);
    let (theirs, ours) = text.split_once(r#", "pgherd": "#).expect("our own fields");
    assert_eq!(format!("{theirs}}}"), capture);
    assert!(ours.starts_with(r#"{"version": ""#), "{ours}");
}

#[test]
fn a_leaders_status_is_as_captured() {
    assert_begins(
        &status(&facts()),
        r#"{"state": "running", "postmaster_start_time": "2026-11-20 23:44:29.498882+00:00", "role": "primary", "server_version": 150020, "xlog": {"location": 67108960}, "timeline": 1, "replication": [{"usename": "replicator", "application_name": "node3", "client_addr": "127.0.0.1", "state": "streaming", "sync_state": "async", "sync_priority": 0}, {"usename": "replicator", "application_name": "node2", "client_addr": "127.0.0.1", "state": "streaming", "sync_state": "async", "sync_priority": 0}], "dcs_last_seen": 1795218335, "database_system_identifier": "7710403737510608197", "patroni": {"version": "4.1.4", "scope": "batman", "name": "node1"}}"#,
    );
}

#[test]
fn a_replicas_status_is_as_captured() {
    assert_begins(
        &status(&replica()),
        r#"{"state": "running", "postmaster_start_time": "2026-11-20 23:44:37.694913+00:00", "role": "replica", "server_version": 150020, "xlog": {"received_location": 67108960, "replayed_location": 67108960, "replayed_timestamp": null, "paused": false}, "timeline": 1, "replication_state": "streaming", "dcs_last_seen": 1795218335, "tags": {"clonefrom": true, "my_tag": "abc"}, "database_system_identifier": "7710403737510608197", "patroni": {"version": "4.1.4", "scope": "batman", "name": "node2"}}"#,
    );
}

#[test]
fn a_stopped_members_status_is_as_captured() {
    let mut facts = stopped();
    facts.view = Arc::new(view_with(Some("node1"), json!({"pause": true}), vec![]));
    assert_begins(
        &status(&facts),
        r#"{"state": "stopped", "role": "replica", "pause": true, "dcs_last_seen": 1795218335, "tags": {"clonefrom": true, "my_tag": "abc"}, "database_system_identifier": "7710403737510608197", "patroni": {"version": "4.1.4", "scope": "batman", "name": "node2"}}"#,
    );
}

#[test]
fn a_server_that_does_not_answer_is_in_an_unknown_state() {
    let silent = MemberStatus {
        server: None,
        ..replica_status(NOW)
    };
    let body = status(&facts_of(silent, view()));
    assert_eq!((&body["state"], &body["role"]), (&json!("unknown"), &json!("replica")));
    assert_eq!(body.get("xlog"), None);
}

#[test]
fn a_listed_standby_says_so_after_its_positions() {
    let sync = entry(
        "sync",
        json!({"leader": "node1", "quorum": 0, "sync_standby": "node2"}),
        48,
    );
    for (mode, field) in [(json!(true), "sync_standby"), (json!("quorum"), "quorum_standby")] {
        let view = view_with(Some("node1"), json!({"synchronous_mode": mode}), vec![sync.clone()]);
        let body = spaced(&status(&facts_of(replica_status(NOW), view)));
        let expected = format!(r#""paused": false}}, "{field}": true, "timeline": 1"#);
        assert!(body.contains(&expected), "{body}");
    }
}

#[test]
fn our_fields_tell_what_is_left_of_the_holding() {
    let leads = status(&facts());
    assert_eq!(leads["pgherd"]["deadline_ms"], json!(4200));
    assert_eq!(leads["pgherd"]["reason"], "still leading");
    assert_eq!(status(&replica())["pgherd"].get("deadline_ms"), None);
    let keys: Vec<String> = leads.as_object().expect("an object").keys().cloned().collect();
    assert_eq!(keys.last().map(String::as_str), Some("pgherd"));
}

#[test]
fn a_cluster_without_a_known_leader_is_unlocked() {
    let no_leader = facts_of(replica_status(NOW), view_with(None, json!({}), vec![]));
    for (facts, unlocked) in [
        (facts(), None),
        (no_leader, Some(true)),
        (without_store(facts()), Some(true)),
    ] {
        let body = status(&facts);
        assert_eq!(body.get("cluster_unlocked"), unlocked.map(Value::from).as_ref());
    }
}

#[test]
fn tags_that_say_no_are_left_out_unless_they_mean_something() {
    let tags = |value: Value| Value::Object(published_tags(value.as_object().expect("an object")));
    assert_eq!(
        tags(json!({"clonefrom": false, "nofailover": false, "nosync": false, "mine": false})),
        json!({"mine": false})
    );
    let meant = json!({"nofailover": false, "failover_priority": 2, "nosync": true, "noloadbalance": true});
    assert_eq!(tags(meant.clone()), meant);
}

#[test]
fn a_warrant_tells_what_is_left_at_the_moment_of_answering() {
    let mut facts = facts();
    facts.now = NOW + DEADLINE - Duration::from_micros(1500);
    let expected = json!({"name": "node1", "epoch": {"holder": "node1", "create_revision": 33},
        "remaining_ms": 1, "role": "primary", "writable": true});
    assert_eq!(warrant(&facts), (200, expected));
    facts.now = NOW + DEADLINE;
    let none = json!({"name": "node1", "epoch": null, "remaining_ms": 0, "role": "primary", "writable": false});
    assert_eq!(warrant(&facts), (503, none));
}

#[test]
fn a_view_that_shows_the_end_of_the_holding_ends_the_warrant() {
    let code = |view: View| warrant(&facts_of(leader_status(NOW), view)).0;
    assert_eq!(code(view_with(None, json!({}), vec![])), 503);
    assert_eq!(code(view_with(Some("node2"), json!({}), vec![])), 503);
    assert_eq!(
        code(view_with(None, json!({}), vec![entry("leader", "node1", 44)])),
        503
    );
    // Built before the key was won.
    let mut older = view_with(None, json!({}), vec![]);
    older.revision = 32;
    assert_eq!(code(older), 200);
}

#[test]
fn a_holder_whose_postgresql_takes_no_writes_says_so() {
    let unpromoted = MemberStatus {
        holding: leader_status(NOW).holding,
        ..replica_status(NOW)
    };
    let dead = MemberStatus {
        server: None,
        ..leader_status(NOW)
    };
    for status in [unpromoted, dead] {
        let (code, body) = warrant(&facts_of(status, view()));
        assert_eq!((code, &body["writable"]), (200, &json!(false)));
    }
}

#[test]
fn the_cluster_is_as_captured() {
    let mut view = view();
    view.members.retain(|name, _| name.as_str() != "node3");
    assert_eq!(
        spaced(&cluster(&view)),
        r#"{"members": [{"name": "node1", "role": "leader", "state": "running", "api_url": "http://127.0.3.1:23008/patroni", "host": "127.0.3.1", "port": 23432, "timeline": 1}, {"name": "node2", "role": "replica", "state": "streaming", "api_url": "http://127.0.3.2:23008/patroni", "host": "127.0.3.2", "port": 23432, "timeline": 1, "tags": {"clonefrom": true, "my_tag": "abc"}, "receive_lag": 0, "receive_lsn": "0/4000060", "replay_lag": 0, "replay_lsn": "0/4000060", "lag": 0, "lsn": "0/4000060"}], "scope": "batman"}"#
    );
}

#[test]
fn the_cluster_shows_lag_pause_and_what_is_scheduled() {
    let request = json!({"leader": "node1", "member": "node2", "scheduled_at": "2040-01-01T00:00:00+00:00"});
    let late = member_entry(
        2,
        "replica",
        json!({"xlog_location": 67_108_864, "replay_lsn": 67_200_000}),
    );
    let view = view_with(
        Some("node1"),
        json!({"pause": true}),
        vec![late, entry("failover", request, 47)],
    );
    let body = cluster(&view);
    let member = &body["members"][1];
    assert_eq!((&member["lag"], &member["lsn"]), (&json!(96), &json!("0/4000000")));
    assert_eq!(member["replay_lag"], json!(0)); // Ahead of what the leader last stored, never negative.
    assert_eq!(
        (&member["receive_lag"], &member["receive_lsn"]),
        (&json!("unknown"), &json!("unknown"))
    );
    assert_eq!(body["pause"], json!(true));
    let scheduled = json!({"at": "2040-01-01T00:00:00+00:00", "from": "node1", "to": "node2"});
    assert_eq!(body["scheduled_switchover"], scheduled);
}

#[test]
fn roles_are_shown_as_the_keys_say() {
    let sync = |quorum: u32| {
        entry(
            "sync",
            json!({"leader": "node1", "quorum": quorum, "sync_standby": "node2"}),
            48,
        )
    };
    let roles = |config: Value, quorum: u32| {
        let view = view_with(Some("node1"), config, vec![sync(quorum)]);
        view.members
            .values()
            .map(|member| shown_role(&view, member))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        roles(json!({"synchronous_mode": true}), 0),
        ["leader", "sync_standby", "replica"]
    );
    assert_eq!(
        roles(json!({"synchronous_mode": "quorum"}), 0),
        ["leader", "quorum_standby", "replica"]
    );
    assert_eq!(
        roles(json!({"synchronous_mode": false}), 0),
        ["leader", "replica", "replica"]
    );
    let standby = json!({"standby_cluster": {"host": "elsewhere"}, "synchronous_mode": true});
    assert_eq!(roles(standby, 0), ["standby_leader", "replica", "replica"]);
}

#[test]
fn history_is_answered_as_stored() {
    assert_eq!(spaced(&history(&view())), "[]");
    let stored = json!([[
        1,
        67_533_552,
        "no recovery target specified",
        "2026-11-20T23:47:37.317976+00:00",
        "node3"
    ]]);
    let view = view_with(Some("node1"), json!({}), vec![entry("history", stored.clone(), 47)]);
    assert_eq!(history(&view), stored);
    assert_eq!(view.timeline(), Some(Timeline(2)));
}

//! Members and clusters for this module's tests, as in Patroni's captures: node1 leads, node2 and node3 stream.

use std::sync::Arc;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::key::Keys;
use pgherd_cluster::name::{Lsn, MemberName, Scope, SystemId, Timeline};
use pgherd_cluster::record::{PgState, Role};
use pgherd_cluster::view::{Entry, Epoch, View};
use serde_json::{Map, Value, json};

use super::facts::Facts;
use crate::status::{Holding, MemberStatus, ServerStatus, WalSender, WalStatus};

pub(super) const AT: Lsn = Lsn(67_108_960);
pub(super) const NOW: Boottime = Boottime::from_nanos(1_000_000_000_000);
pub(super) const DEADLINE: Duration = Duration::from_millis(4_200);

pub(super) fn name(text: &str) -> MemberName {
    MemberName::new(text).expect("a plain name")
}

pub(super) fn scope() -> Scope {
    Scope::new("batman").expect("a plain name")
}

pub(super) fn keys() -> Keys {
    Keys::new("service", &scope())
}

pub(super) fn object(value: Value) -> Map<String, Value> {
    value.as_object().expect("an object").clone()
}

pub(super) fn entry(key: &str, value: impl ToString, revision: i64) -> Entry {
    Entry {
        key: format!("{}{key}", keys().prefix()),
        value: value.to_string(),
        create_revision: revision,
        mod_revision: revision,
        lease: 7,
    }
}

pub(super) fn member_entry(number: u8, role: &str, more: Value) -> Entry {
    let mut record = object(json!({
        "conn_url": format!("postgres://127.0.3.{number}:23432/postgres"),
        "api_url": format!("http://127.0.3.{number}:23008/patroni"),
        "state": "running",
        "role": role,
        "version": "4.1.4",
        "pgherd": "0.1.0",
    }));
    record.extend(object(more));
    entry(&format!("members/node{number}"), Value::Object(record), 46)
}

/// The cluster of the captures, with more `config` and more keys; `leader` holds the key.
pub(super) fn view_with(leader: Option<&str>, config: Value, more: Vec<Entry>) -> View {
    let streams = json!({"xlog_location": AT.0, "replay_lsn": AT.0, "receive_lsn": AT.0,
        "replication_state": "streaming", "timeline": 1});
    let mut tagged = object(streams.clone());
    tagged.insert("tags".to_owned(), json!({"clonefrom": true, "my_tag": "abc"}));
    let mut document = object(json!({"ttl": 30, "loop_wait": 10, "retry_timeout": 10}));
    document.extend(object(config));
    let mut entries = vec![
        entry("config", Value::Object(document), 32),
        entry("status", json!({"optime": AT.0}), 45),
        member_entry(1, "primary", json!({"xlog_location": AT.0, "timeline": 1})),
        member_entry(2, "replica", Value::Object(tagged)),
        member_entry(3, "replica", streams),
    ];
    entries.extend(leader.map(|leader| entry("leader", leader, 33)));
    entries.extend(more);
    View::from_entries(scope(), &keys(), entries, 50)
}

pub(super) fn view() -> View {
    view_with(Some("node1"), json!({}), vec![])
}

fn sender(application: &str) -> WalSender {
    WalSender {
        usename: "replicator".into(),
        application_name: application.into(),
        client_addr: "127.0.0.1".into(),
        state: "streaming".into(),
        sync_state: "async".into(),
        sync_priority: 0,
        ..WalSender::default()
    }
}

pub(super) fn primary_server() -> ServerStatus {
    ServerStatus {
        postmaster_start_time: "2026-11-20 23:44:29.498882+00:00".into(),
        server_version: 150_020,
        wal: WalStatus::Primary { location: AT },
        timeline: Some(Timeline(1)),
        replication_state: None,
        replication: vec![sender("node3"), sender("node2")],
        waiting: crate::status::CommitWaiting::default(),
    }
}

pub(super) fn replica_server() -> ServerStatus {
    ServerStatus {
        postmaster_start_time: "2026-11-20 23:44:37.694913+00:00".into(),
        wal: WalStatus::Standby {
            received: AT,
            replayed: AT,
            replayed_at: None,
            paused: false,
            latest_end: Some(AT),
        },
        replication_state: Some("streaming".into()),
        replication: vec![],
        ..primary_server()
    }
}

pub(super) fn holding(now: Boottime) -> Holding {
    Holding {
        epoch: Epoch {
            holder: name("node1"),
            create_revision: 33,
        },
        deadline: now + DEADLINE,
        by_vouches: false,
    }
}

/// node1, which leads.
pub(crate) fn leader_status(now: Boottime) -> MemberStatus {
    MemberStatus {
        name: name("node1"),
        scope: scope(),
        state: PgState::Running,
        role: Role::Primary,
        server: Some(primary_server()),
        holding: Some(holding(now)),
        tags: Map::new(),
        system_id: Some(SystemId(7_710_403_737_510_608_197)),
        dcs_last_seen: 1_795_218_335,
        next_cycle_at: now + Duration::from_secs(5),
        watchdog_failed: false,
        scheduled_restart: None,
        reinitialize_failed: None,
        pending_restart: Map::new(),
        reason: "still leading".into(),
    }
}

/// node2, which streams from node1.
pub(crate) fn replica_status(now: Boottime) -> MemberStatus {
    MemberStatus {
        name: name("node2"),
        role: Role::Replica,
        server: Some(replica_server()),
        holding: None,
        tags: object(json!({"clonefrom": true, "my_tag": "abc"})),
        ..leader_status(now)
    }
}

pub(super) fn facts_of(status: MemberStatus, view: View) -> Facts {
    Facts {
        status: Arc::new(status),
        view: Arc::new(view),
        failing_since: None,
        now: NOW,
    }
}

/// The leader.
pub(super) fn facts() -> Facts {
    facts_of(leader_status(NOW), view())
}

/// A streaming replica.
pub(super) fn replica() -> Facts {
    facts_of(replica_status(NOW), view())
}

/// A replica whose PostgreSQL was stopped.
pub(super) fn stopped() -> Facts {
    let status = MemberStatus {
        state: PgState::Stopped,
        server: None,
        ..replica_status(NOW)
    };
    facts_of(status, view())
}

/// The same, out of touch with the store for longer than any lease.
pub(super) fn without_store(mut facts: Facts) -> Facts {
    facts.failing_since = Some(Boottime::from_nanos(1));
    facts
}

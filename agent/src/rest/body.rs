//! What the read endpoints say. Pure: facts in, JSON out, in Patroni's order of fields.

use std::time::Duration;

use pgherd_cluster::PATRONI_VERSION;
use pgherd_cluster::VERSION;
use pgherd_cluster::name::Lsn;
use pgherd_cluster::record::{PgState, Role};
use pgherd_cluster::view::{Epoch, Member, View};
use serde_json::{Map, Value, json};

use super::facts::{Facts, is_standby_cluster, sync_standing};
use crate::record::published_tags;
use crate::status::{ServerStatus, WalSender, WalStatus};

/// The status of this member: Patroni's fields, and ours at the end.
pub(super) fn status(facts: &Facts) -> Value {
    let mut body = Map::new();
    let mut put = |name: &str, value: Value| body.insert(name.to_owned(), value);
    put("state", facts.state().as_str().into());
    if let Some(server) = facts.server() {
        put("postmaster_start_time", server.postmaster_start_time.clone().into());
        put("role", facts.role().as_str().into());
        put("server_version", server.server_version.into());
        put("xlog", xlog(&server.wal));
        if let Some(standing) = facts.sync_standing() {
            put(standing.as_str(), true.into());
        }
        put("timeline", json!(server.timeline));
        if let Some(state) = &server.replication_state {
            put("replication_state", state.clone().into());
        }
        if !server.replication.is_empty() {
            put("replication", senders(server));
        }
    } else {
        put("role", facts.role().as_str().into());
    }
    if facts.is_paused() {
        put("pause", true.into());
    }
    if is_unlocked(facts) {
        put("cluster_unlocked", true.into());
    }
    if facts.is_failsafe_active() {
        put("failsafe_mode_is_active", true.into());
    }
    if facts.status.watchdog_failed {
        put("watchdog_failed", true.into());
    }
    if let Some(Value::Object(document)) = &facts.status.scheduled_restart {
        let mut document = document.clone();
        document.remove("postmaster_start_time");
        put("scheduled_restart", Value::Object(document));
    }
    if !facts.status.pending_restart.is_empty() {
        put("pending_restart", true.into());
        put(
            "pending_restart_reason",
            Value::Object(facts.status.pending_restart.clone()),
        );
    }
    put("dcs_last_seen", facts.status.dcs_last_seen.into());
    let tags = published_tags(&facts.status.tags);
    if !tags.is_empty() {
        put("tags", Value::Object(tags));
    }
    if let Some(id) = facts.status.system_id {
        put("database_system_identifier", id.to_string().into());
    }
    let (scope, name) = (facts.status.scope.as_str(), facts.status.name.as_str());
    put(
        "patroni",
        json!({"version": PATRONI_VERSION, "scope": scope, "name": name}),
    );
    put("pgherd", ours(facts));
    Value::Object(body)
}

fn ours(facts: &Facts) -> Value {
    let mut ours = Map::new();
    ours.insert("version".to_owned(), VERSION.into());
    ours.insert("reason".to_owned(), facts.status.reason.clone().into());
    if let Some(why) = &facts.status.reinitialize_failed {
        ours.insert("reinitialize_failed".to_owned(), why.clone().into());
    }
    if let Some((_, remaining)) = holding(facts) {
        ours.insert("deadline_ms".to_owned(), millis(remaining).into());
    }
    Value::Object(ours)
}

fn xlog(wal: &WalStatus) -> Value {
    match wal {
        WalStatus::Primary { location } => json!({"location": location}),
        WalStatus::Standby {
            received,
            replayed,
            replayed_at,
            paused,
            latest_end: _,
        } => json!({
            "received_location": received,
            "replayed_location": replayed,
            "replayed_timestamp": replayed_at,
            "paused": paused,
        }),
    }
}

fn senders(server: &ServerStatus) -> Value {
    let row = |sender: &WalSender| {
        json!({
            "usename": sender.usename,
            "application_name": sender.application_name,
            // PostgreSQL has no address for a unix socket.
            "client_addr": (!sender.client_addr.is_empty()).then_some(&sender.client_addr),
            "state": sender.state,
            "sync_state": sender.sync_state,
            "sync_priority": sender.sync_priority,
        })
    };
    server.replication.iter().map(row).collect()
}

/// Whether no leader is known, or nothing is.
pub(super) fn is_unlocked(facts: &Facts) -> bool {
    facts.known_view().is_none_or(|view| view.leader.is_none())
}

/// The holding of the leader key and what is left of it, while it lasts. The view may know of its end before the status
/// does; one from before the holding began knows nothing of it.
fn holding(facts: &Facts) -> Option<(&Epoch, Duration)> {
    let holding = facts.status.holding.as_ref().filter(|_| facts.leads())?;
    let told = facts.view.revision >= holding.epoch.create_revision;
    if told && facts.view.epoch() != Some(&holding.epoch) {
        return None;
    }
    Some((&holding.epoch, holding.deadline.since(facts.now)))
}

/// Rounded down: what is promised is never more than what is left.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What this member may vouch for at the moment of answering, and the code that goes with it.
pub(super) fn warrant(facts: &Facts) -> (u16, Value) {
    let holding = holding(facts);
    let takes_writes = facts.role() == Role::Primary && facts.state() == PgState::Running;
    let body = json!({
        "name": facts.status.name,
        "epoch": holding.map(|(epoch, _)| self::epoch(epoch)),
        "remaining_ms": holding.map_or(0, |(_, remaining)| millis(remaining)),
        "role": facts.role().as_str(),
        "writable": holding.is_some() && takes_writes,
    });
    (if holding.is_some() { 200 } else { 503 }, body)
}

fn epoch(epoch: &Epoch) -> Value {
    json!({"holder": epoch.holder, "create_revision": epoch.create_revision})
}

/// The cluster as operators see it.
pub(super) fn cluster(view: &View) -> Value {
    let mut body = Map::new();
    body.insert(
        "members".to_owned(),
        view.members.values().map(|one| member(view, one)).collect(),
    );
    body.insert("scope".to_owned(), view.scope.as_str().into());
    if view.config.value.as_ref().is_some_and(|config| config.is_paused()) {
        body.insert("pause".to_owned(), true.into());
    }
    if let Some(request) = &view.failover.value
        && let Some(at) = &request.scheduled_at
    {
        let mut scheduled = Map::from_iter([("at".to_owned(), Value::from(at.clone()))]);
        let ends = [("from", &request.leader), ("to", &request.member)];
        for (name, value) in ends.into_iter().filter_map(|(name, end)| Some((name, end.as_ref()?))) {
            scheduled.insert(name.to_owned(), value.clone().into());
        }
        body.insert("scheduled_switchover".to_owned(), Value::Object(scheduled));
    }
    Value::Object(body)
}

/// How a member is shown: by the leader key and the synchronous set, not by what it says of itself.
pub(super) fn shown_role(view: &View, member: &Member) -> &'static str {
    if view.epoch().is_some_and(|epoch| epoch.holder == member.name) {
        return if is_standby_cluster(view) {
            "standby_leader"
        } else {
            "leader"
        };
    }
    sync_standing(view, &member.name).map_or("replica", |standing| standing.as_str())
}

fn member(view: &View, member: &Member) -> Value {
    let record = &member.record;
    let role = shown_role(view, member);
    let streaming = record.replication_state.as_deref().filter(|_| role != "leader");
    let mut body = Map::new();
    let mut put = |name: &str, value: Value| body.insert(name.to_owned(), value);
    put("name", member.name.as_str().into());
    put("role", role.into());
    put("state", streaming.unwrap_or(record.state.as_str()).into());
    put("api_url", record.api_url.clone().into());
    if let Some(address) = record.postgres_address() {
        put("host", address.host.into());
        put("port", address.port.into());
    }
    let optional = [
        ("timeline", record.timeline.map(|timeline| timeline.0.into())),
        ("pending_restart", record.pending_restart.map(Value::from)),
        ("pending_restart_reason", record.pending_restart_reason.clone()),
        ("scheduled_restart", record.scheduled_restart.clone()),
        (
            "tags",
            (!record.tags.is_empty()).then(|| Value::Object(record.tags.clone())),
        ),
    ];
    for (name, value) in optional {
        value.and_then(|value| put(name, value));
    }
    if view.epoch().is_none_or(|epoch| epoch.holder != member.name) {
        let leader_at = view.status.optime.unwrap_or_default();
        let positions = [
            ("receive_lag", "receive_lsn", record.receive_lsn),
            ("replay_lag", "replay_lsn", record.replay_lsn),
            ("lag", "lsn", record.xlog_location),
        ];
        for (lag, lsn, position) in positions {
            let unknown = || Value::from("unknown");
            put(
                lag,
                position.map_or_else(unknown, |at: Lsn| at.behind(leader_at).into()),
            );
            put(lsn, position.map_or_else(unknown, |at| at.to_string().into()));
        }
    }
    Value::Object(body)
}

/// Ended timelines; none while the key is absent.
pub(super) fn history(view: &View) -> Value {
    view.history
        .as_ref()
        .map_or_else(|| json!([]), |history| history.to_json())
}

#[cfg(test)]
mod tests;

//! What a member publishes: its key, and, while it leads, `status` and `history`.

use std::collections::BTreeMap;
use std::path::Path;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::{Lsn, MemberName, Timeline};
use pgherd_cluster::record::{History, HistoryEntry, MemberRecord, PgState, Role, Status};
use pgherd_cluster::view::View;
use pgherd_cluster::{PATRONI_VERSION, VERSION};
use serde_json::{Map, Value};

use crate::config::AgentConfig;
use crate::decide::published_role;
use crate::memory::Memory;
use crate::observation::{JobKind, Observation, Postgres};
use crate::postgres::{ControlState, DataDir};
use crate::status::WalStatus;

/// The state of PostgreSQL in the words of records.
#[must_use]
pub fn published_state(seen: &Observation, memory: &Memory) -> PgState {
    match (seen.job, &seen.postgres) {
        (Some(JobKind::Initdb), _) => PgState::Initializing,
        (Some(JobKind::CustomBootstrap), _) => PgState::CustomBootstrap,
        (Some(JobKind::StartPrimary), _) if memory.restored => PgState::StartingAfterCustomBootstrap,
        (Some(JobKind::Clone), _) => PgState::CreatingReplica,
        (Some(JobKind::Stop), Postgres::Running(_) | Postgres::Silent { .. }) => PgState::Stopping,
        (Some(JobKind::StartPrimary | JobKind::StartStandby), Postgres::Down | Postgres::Silent { .. })
        | (None, Postgres::Down)
            if memory.restart.is_some() =>
        {
            PgState::Restarting
        }
        (_, Postgres::Running(_)) => PgState::Running,
        (Some(JobKind::StartPrimary | JobKind::StartStandby), _) => PgState::Starting,
        (_, Postgres::Silent { .. }) => PgState::Unknown,
        (_, Postgres::Ending) => PgState::Stopping,
        (_, Postgres::Down) if memory.start_failures > 0 => PgState::StartFailed,
        (_, Postgres::Down) => match &seen.data {
            // A primary that was not stopped in order has ended unasked.
            DataDir::Cluster {
                control,
                standby: false,
            } if control.state == ControlState::InProduction => PgState::Crashed,
            _ => PgState::Stopped,
        },
    }
}

/// Whether a setting or tag is there and says yes; both may come as texts.
pub(crate) fn is_set(map: &Map<String, Value>, name: &str) -> bool {
    match map.get(name) {
        Some(Value::Bool(set)) => *set,
        Some(Value::Number(number)) => number.as_f64() != Some(0.0),
        Some(Value::String(text)) => !matches!(text.to_lowercase().as_str(), "" | "false" | "off" | "no" | "0"),
        Some(Value::Null) | None => false,
        Some(Value::Array(_) | Value::Object(_)) => true,
    }
}

/// Tags that Patroni leaves out when they say no, unless the other tag gives the no a meaning.
const TAGS_DROPPED_WHEN_FALSE: [(&str, Option<&str>); 5] = [
    ("clonefrom", None),
    ("nofailover", Some("failover_priority")),
    ("noloadbalance", None),
    ("nosync", Some("sync_priority")),
    ("nostream", None),
];

/// The tags as others are told of them.
#[must_use]
pub fn published_tags(tags: &Map<String, Value>) -> Map<String, Value> {
    let keeps = |name: &str| {
        let rule = TAGS_DROPPED_WHEN_FALSE.iter().find(|(tag, _)| *tag == name);
        rule.is_none_or(|(_, unless)| is_set(tags, name) || unless.is_some_and(|other| tags.contains_key(other)))
    };
    let kept = tags.iter().filter(|(name, _)| keeps(name));
    kept.map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// A record with nothing but this member's own tags.
#[must_use]
pub fn own_tags(config: &AgentConfig) -> MemberRecord {
    MemberRecord {
        tags: config.tags.clone(),
        ..MemberRecord::new(String::new(), String::new())
    }
}

/// Where our REST interface is, as others are told.
#[must_use]
pub fn api_url(config: &AgentConfig) -> String {
    let scheme = if config.restapi.tls.is_some() { "https" } else { "http" };
    format!("{scheme}://{}/patroni", config.restapi.connect_address)
}

/// The value of our member key.
#[must_use]
pub fn member_record(
    config: &AgentConfig,
    seen: &Observation,
    memory: &Memory,
    scheduled_restart: Option<Value>,
    pending_restart: &Map<String, Value>,
) -> MemberRecord {
    let postgresql = &config.postgresql;
    let conn_url = format!("postgres://{}/{}", postgresql.connect_address, postgresql.database);
    let mut record = MemberRecord::new(conn_url, api_url(config));
    record.state = published_state(seen, memory);
    record.role = published_role(seen, memory);
    record.scheduled_restart = scheduled_restart;
    if !pending_restart.is_empty() {
        record.pending_restart = Some(true);
        record.pending_restart_reason = Some(Value::Object(pending_restart.clone()));
    }
    let proxy = postgresql.proxy_address.as_ref();
    record.proxy_url = proxy.map(|proxy| format!("postgres://{proxy}/{}", postgresql.database));
    record.version = Some(PATRONI_VERSION.to_owned());
    record.pgherd = Some(VERSION.to_owned());
    record.tags = published_tags(&config.tags);
    if !seen.lacks_slots.is_empty() {
        // Whoever chooses a next leader, of whatever kind, passes over it.
        record.tags.insert("nofailover".to_owned(), Value::Bool(true));
    }
    if seen.stopping && seen.view.sync.value.lists(&seen.me) {
        // The leader is to choose another before commits begin to wait for nobody.
        record.tags.insert("nosync".to_owned(), Value::Bool(true));
        record.tags.insert("sync_priority".to_owned(), 0.into());
    }
    record.pause = seen
        .view
        .config
        .value
        .as_ref()
        .is_some_and(pgherd_cluster::record::DynamicConfig::is_paused)
        .then_some(true);
    if record.role == Role::Primary && memory.proven != memory.checkpointed {
        record.checkpoint_after_promote = Some(false);
    }
    if let Postgres::Running(server) = &seen.postgres {
        record.timeline = server.timeline;
        record.replication_state.clone_from(&server.replication_state);
        record.xlog_location = Some(server.wal.position());
        if let WalStatus::Standby { received, replayed, .. } = server.wal {
            record.replay_lsn = Some(replayed);
            record.receive_lsn = Some(received);
        }
    }
    record
}

/// The value of `status`: our position, the slots with our own name among them, and the slots to retain.
#[must_use]
pub fn leader_status(
    own: &MemberName,
    position: Lsn,
    mut slots: BTreeMap<String, Lsn>,
    view: &View,
    last_seen: &mut BTreeMap<String, Boottime>,
    now: Boottime,
) -> Status {
    let config = view.config.value.clone().unwrap_or_default();
    let keep = config.member_slots_ttl();
    if keep.is_zero() {
        // Nobody has a slot but where it streams from.
        last_seen.clear();
        return Status {
            optime: Some(position),
            slots,
            ..Status::default()
        };
    }
    slots.insert(own.slot_name(), position);
    let streams = view.members.values().filter(|member| !member.record.tag("nostream"));
    for slot in streams.map(|member| member.name.slot_name()).chain([own.slot_name()]) {
        last_seen.insert(slot, now);
    }
    // A new leader takes over what the former one retained, and counts anew.
    for slot in &view.status.retain_slots {
        last_seen.entry(slot.clone()).or_insert(now);
    }
    last_seen.retain(|_, seen_at| now.since(*seen_at) <= keep);
    let permanent = config.permanent_slots().slots;
    let retained = last_seen.keys().filter(|name| !permanent.contains_key(*name));
    Status {
        optime: Some(position),
        slots,
        retain_slots: retained.cloned().collect(),
        ..Status::default()
    }
}

/// The history with the timelines that ended before `timeline`, as the history file in our own WAL directory tells, the
/// last one with its time and the new leader's name. Nothing when the file cannot be read.
#[must_use]
pub fn history_of(
    data_dir: &Path,
    timeline: Timeline,
    own: &MemberName,
    known: &History,
    keep: usize,
) -> Option<History> {
    if timeline.0 <= 1 {
        return Some(History::default());
    }
    let path = data_dir.join("pg_wal").join(format!("{:08X}.history", timeline.0));
    let text = std::fs::read_to_string(&path).ok()?;
    let written = std::fs::metadata(&path).and_then(|meta| meta.modified()).ok()?;
    let timestamp = jiff::Timestamp::try_from(written)
        .ok()
        // Microseconds, as Patroni writes them.
        .and_then(|at| jiff::Timestamp::from_microsecond(at.as_microsecond()).ok())
        .map(|at| at.display_with_offset(jiff::tz::Offset::UTC).to_string());
    let mut entries = parse_history(&text);
    if let Some(last) = entries.last_mut() {
        last.timestamp = timestamp;
        last.new_leader = Some(own.to_string());
    }
    // Who led and when is not in the file: what the key already tells of earlier timelines stays.
    for entry in &mut entries {
        if let Some(before) = known
            .0
            .iter()
            .find(|before| before.timeline == entry.timeline && before.lsn == entry.lsn)
        {
            *entry = before.clone();
        }
    }
    if keep > 0 && entries.len() > keep {
        entries.drain(..entries.len() - keep);
    }
    Some(History(entries))
}

fn parse_history(text: &str) -> Vec<HistoryEntry> {
    let line = |line: &str| {
        let mut columns = line.splitn(3, '\t');
        let timeline = columns.next()?.trim().parse().ok()?;
        let lsn = columns.next()?.trim().parse().ok()?;
        let reason = columns.next().unwrap_or_default().trim().to_owned();
        Some(HistoryEntry {
            timeline: Timeline(timeline),
            lsn,
            reason,
            timestamp: None,
            new_leader: None,
        })
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::name::Scope;

    use super::*;

    fn name(text: &str) -> MemberName {
        MemberName::new(text).expect("a plain name")
    }

    #[test]
    fn history_keeps_what_is_known_and_names_the_new_leader() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(dir.path().join("pg_wal")).expect("made");
        let text = "1\t0/4067EA0\tno recovery target specified\n\n2\t0/406EFB0\tno recovery target specified\n";
        std::fs::write(dir.path().join("pg_wal/00000003.history"), text).expect("written");
        let known = History::parse(r#"[[1,67534496,"no recovery target specified","2026-11-20T23:47:37+00:00","n3"]]"#);
        let history = history_of(dir.path(), Timeline(3), &name("n2"), &known, 0).expect("readable");
        assert_eq!(history.0.len(), 2);
        assert_eq!(
            history.0.first().and_then(|entry| entry.new_leader.as_deref()),
            Some("n3")
        );
        assert_eq!(
            history.0.last().and_then(|entry| entry.new_leader.as_deref()),
            Some("n2")
        );
        assert_eq!(history.timeline(), Timeline(3));
        let short = history_of(dir.path(), Timeline(3), &name("n2"), &known, 1).expect("readable");
        assert_eq!(short.0.len(), 1);
        assert_eq!(history_of(dir.path(), Timeline(9), &name("n2"), &known, 0), None);
    }

    #[test]
    fn slots_are_retained_for_a_while_after_a_member_is_gone() {
        let view = View {
            status: Status {
                retain_slots: vec!["n2".into()],
                ..Status::default()
            },
            ..View::empty(Scope::new("c").expect("a plain name"))
        };
        let mut last_seen = BTreeMap::new();
        let at = |seconds: u64| Boottime::from_nanos(seconds * 1_000_000_000);
        let status = leader_status(&name("n1"), Lsn(5), BTreeMap::new(), &view, &mut last_seen, at(10));
        assert_eq!(status.retain_slots, ["n1", "n2"]);
        assert_eq!(status.slots.get("n1"), Some(&Lsn(5)));
        let without = View::empty(Scope::new("c").expect("a plain name"));
        let status = leader_status(&name("n1"), Lsn(5), BTreeMap::new(), &without, &mut last_seen, at(1811));
        assert_eq!(status.retain_slots, ["n1"]);
    }

    #[test]
    fn without_a_time_for_members_slots_only_the_permanent_ones_are_told_of() {
        let mut view = View::empty(Scope::new("c").expect("a plain name"));
        let told = |view: &View| {
            let slots = BTreeMap::from([("perm".to_owned(), Lsn(3))]);
            let mut last_seen = BTreeMap::from([("perm".to_owned(), Boottime::default())]);
            let status = leader_status(&name("n1"), Lsn(5), slots, view, &mut last_seen, Boottime::default());
            (status.slots.into_keys().collect::<Vec<_>>(), status.retain_slots)
        };
        let config = |text: &str| pgherd_cluster::record::DynamicConfig::parse(text);
        view.config.value = Some(config(r#"{"slots": {"perm": null}}"#));
        assert_eq!(
            told(&view),
            (vec!["n1".to_owned(), "perm".to_owned()], vec!["n1".to_owned()])
        );
        view.config.value = Some(config(r#"{"slots": {"perm": null}, "member_slots_ttl": 0}"#));
        assert_eq!(told(&view), (vec!["perm".to_owned()], vec![]));
    }
}

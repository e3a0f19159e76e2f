//! One picture of the proxy, from which page, JSON and metrics all speak.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::source::SourceHealth;
use pgherd_cluster::view::Member;
use serde::Serialize;

use crate::balance::{self, LeftOut, Load, Standing};
use crate::config::{ListenerConfig, ListenerRole, ReadRules};
use crate::counters::RouteCounts;
use crate::lag::Behind;
use crate::panics;
use crate::refusal::{self, Knowledge};
use crate::route::{self, Decision, Policy, Why};
use crate::shared::{ListenerState, Seen, Shared};

#[derive(Serialize)]
pub(crate) struct State {
    pub(crate) scope: String,
    pub(crate) version: &'static str,
    pub(crate) uptime_seconds: f64,
    pub(crate) writable: bool,
    pub(crate) paused: bool,
    pub(crate) verdict: Verdict,
    pub(crate) view: ViewState,
    pub(crate) leader: Option<LeaderState>,
    pub(crate) held_clients: usize,
    /// Defects of the proxy itself.
    pub(crate) panics: u64,
    pub(crate) members: Vec<MemberState>,
    pub(crate) listeners: Vec<ListenerRow>,
    pub(crate) events: Vec<EventRow>,
}

/// The answer to the first question of all: can one write?
#[derive(Serialize)]
pub(crate) struct Verdict {
    pub(crate) word: &'static str,
    pub(crate) sentence: String,
}

#[derive(Serialize)]
pub(crate) struct ViewState {
    pub(crate) revision: i64,
    /// Of the last proof that the leader leads.
    pub(crate) age_seconds: Option<f64>,
    pub(crate) warrant_left_seconds: f64,
    pub(crate) store: &'static str,
    pub(crate) store_error: Option<String>,
    pub(crate) relists: u64,
}

#[derive(Serialize)]
pub(crate) struct LeaderState {
    pub(crate) name: String,
    pub(crate) epoch: i64,
    /// Nothing when it led before this proxy looked.
    pub(crate) since: Option<String>,
    pub(crate) since_seconds: f64,
    pub(crate) timeline: Option<u32>,
}

#[derive(Serialize)]
pub(crate) struct MemberState {
    pub(crate) name: String,
    pub(crate) role: &'static str,
    pub(crate) state: String,
    pub(crate) timeline: Option<u32>,
    pub(crate) lsn: Option<String>,
    pub(crate) lag_bytes: Option<u64>,
    /// Since when the leader is past it; nothing when that is not known.
    pub(crate) lag_seconds: Option<f64>,
    pub(crate) zone: Option<String>,
    /// How long readers took to connect lately.
    pub(crate) connect_seconds: Option<f64>,
    /// Its share of readers in relation to one that is quick and has been there for long; 0 while it gets none because it
    /// failed.
    pub(crate) weight: f64,
    pub(crate) sessions_write: usize,
    pub(crate) sessions_read: usize,
    /// `write`, `read`, or nothing.
    pub(crate) takes: Option<&'static str>,
    pub(crate) left_out: Option<String>,
}

#[derive(Serialize)]
pub(crate) struct ListenerRow {
    pub(crate) name: String,
    pub(crate) role: &'static str,
    pub(crate) connections: usize,
    pub(crate) startups: usize,
    pub(crate) held: usize,
    pub(crate) sessions: usize,
    pub(crate) sessions_total: u64,
    pub(crate) accepted_total: u64,
    pub(crate) refused_total: u64,
    pub(crate) hold_expired_total: u64,
    pub(crate) ended_total: u64,
}

#[derive(Serialize)]
pub(crate) struct EventRow {
    /// Under which the log and clients were told of it.
    pub(crate) id: String,
    pub(crate) at: String,
    pub(crate) age_seconds: f64,
    pub(crate) kind: &'static str,
    pub(crate) text: String,
    pub(crate) count: usize,
}

impl State {
    pub(crate) fn of(shared: &Shared) -> Self {
        let seen = shared.seen();
        let decision = where_writes_go(&seen);
        let counts = shared.routes.counts();
        let leader = leader_state(shared, &seen);
        Self {
            scope: seen.view.scope.to_string(),
            version: pgherd_cluster::VERSION,
            uptime_seconds: seen.now.since(shared.started).as_secs_f64(),
            writable: matches!(decision, Decision::To(_)) || is_idle(shared, &seen),
            paused: seen.view.config.value.as_ref().is_some_and(|config| config.is_paused()),
            verdict: verdict(shared, &seen, &decision, leader.as_ref()),
            view: view_state(shared, &seen),
            leader,
            held_clients: shared.held.get(),
            panics: panics::total(&shared.panics),
            members: members(shared, &seen, &decision, &counts),
            listeners: listeners(shared, &counts),
            events: events(shared, seen.now),
        }
    }
}

fn where_writes_go(seen: &Seen) -> Decision {
    let policy = Policy {
        role: ListenerRole::Write,
        rules: &ReadRules::none(),
        hold_until: Boottime::from_nanos(u64::MAX),
    };
    route::route(policy, seen.evidence(), Load::IDLE)
}

/// Whether the leader would be asked for its word if somebody came, and says that it takes writes.
fn is_idle(shared: &Shared, seen: &Seen) -> bool {
    seen.warrant.by_word_alone() && shared.is_idle() && seen.view.writable_leader().is_some()
}

fn verdict(shared: &Shared, seen: &Seen, decision: &Decision, leader: Option<&LeaderState>) -> Verdict {
    let why = match decision {
        Decision::To(target) => {
            let timeline = leader
                .and_then(|leader| leader.timeline)
                .map(|timeline| format!(", timeline {timeline}"));
            let since = match leader.and_then(|leader| leader.since.as_ref().map(|since| (leader, since))) {
                Some((leader, since)) => format!("leader for {} (since {since})", span(leader.since_seconds)),
                None => "leader since before this proxy started".to_owned(),
            };
            let left = span(seen.warrant.left(seen.now).as_secs_f64());
            let timeline = timeline.unwrap_or_default();
            let sentence = format!("{}{timeline}, {since}, warrant {left} left", target.member);
            return Verdict {
                word: "WRITABLE",
                sentence,
            };
        }
        Decision::Hold(Why::NoWord { leader }) if is_idle(shared, seen) => {
            return Verdict {
                word: "IDLE",
                sentence: format!("{leader} leads; it is asked itself once a client comes for it"),
            };
        }
        Decision::Hold(why) | Decision::Refuse(why) => why,
    };
    let because = refusal::cannot_route(why, Duration::ZERO, shared.knowledge())
        .message()
        .to_owned();
    let held = match shared.held.get() {
        0 => String::new(),
        1 => ", 1 client is held".to_owned(),
        held => format!(", {held} clients are held"),
    };
    let word = match why {
        _ if !held.is_empty() => "HOLDING",
        Why::NothingKnown => "STARTING",
        Why::NoLeader => "NO LEADER",
        Why::StandbyCluster { .. } => "STANDBY CLUSTER",
        Why::WarrantLapsed { .. } | Why::NoWord { .. } => "UNCERTAIN",
        _ => "NOT WRITABLE",
    };
    Verdict {
        word,
        sentence: format!("{because}{held}"),
    }
}

fn view_state(shared: &Shared, seen: &Seen) -> ViewState {
    let (store, store_error) = match &*shared.view.health().borrow() {
        SourceHealth::Starting => ("starting", None),
        SourceHealth::Following => ("following", None),
        SourceHealth::Failing(error) => ("failing", Some(error.to_string())),
    };
    ViewState {
        revision: seen.view.revision,
        age_seconds: seen.warrant.age(seen.now).map(|age| age.as_secs_f64()),
        warrant_left_seconds: seen.warrant.left(seen.now).as_secs_f64(),
        store,
        store_error,
        relists: shared.view.relists(),
    }
}

fn leader_state(shared: &Shared, seen: &Seen) -> Option<LeaderState> {
    let epoch = seen.view.epoch()?;
    let leadership = shared.leadership();
    // The fence may not have noted the newest epoch yet.
    let noted = leadership.epoch.as_ref() == Some(epoch);
    let record = seen.view.leader_member().and_then(|member| member.record.timeline);
    Some(LeaderState {
        name: epoch.holder.to_string(),
        epoch: epoch.create_revision,
        since: (noted && !leadership.from_the_start).then(|| utc(leadership.since_wall)),
        since_seconds: if noted {
            seen.now.since(leadership.since).as_secs_f64()
        } else {
            0.0
        },
        timeline: record.or_else(|| seen.view.timeline()).map(|timeline| timeline.0),
    })
}

fn members(shared: &Shared, seen: &Seen, decision: &Decision, counts: &[RouteCounts]) -> Vec<MemberState> {
    let listeners = shared.listeners();
    let role_of = |route: &RouteCounts| {
        listeners
            .get(route.listener)
            .map(|listener| listener.config.load().role)
    };
    let sessions = |name: &MemberName, writers: bool| {
        let routes = counts.iter().filter(|route| {
            let role = role_of(route);
            route.member == *name && role.is_some_and(|role| (role == ListenerRole::Write) == writers)
        });
        routes.map(|route| route.open).sum()
    };
    let open = listeners.iter().filter(|listener| listener.is_open());
    let configs = open.map(|listener| listener.config.load_full());
    let mut readers: Vec<Arc<ListenerConfig>> = configs.filter(|config| config.role.is_balanced()).collect();
    if readers.is_empty() {
        readers.push(Arc::new(ListenerConfig::new("", ListenerRole::Read)));
    }
    let slow_start = shared.config.load().slow_start;
    let experience = shared.experience();
    let row = |member: &Member| {
        let (takes, left_out) = takes(seen, member, decision, &readers);
        MemberState {
            name: member.name.to_string(),
            role: seen.view.shown_role(member).as_str(),
            state: seen.view.shown_state(member).to_owned(),
            timeline: member.record.timeline.map(|timeline| timeline.0),
            lsn: member
                .record
                .replay_lsn
                .or(member.record.xlog_location)
                .map(|lsn| lsn.to_string()),
            lag_bytes: balance::lag_bytes(&seen.view, member),
            lag_seconds: lag_seconds(seen, member),
            zone: balance::zone_of(member),
            connect_seconds: experience
                .latency(&member.name, seen.now)
                .map(|latency| latency.as_secs_f64()),
            weight: match experience.standing(&member.name, seen.now, slow_start) {
                Standing::Takes(weight) => weight.as_f64(),
                Standing::Trial | Standing::Out => 0.0,
            },
            sessions_write: sessions(&member.name, true),
            sessions_read: sessions(&member.name, false),
            takes,
            left_out,
        }
    };
    seen.view.members.values().map(row).collect()
}

fn lag_seconds(seen: &Seen, member: &Member) -> Option<f64> {
    let as_of = seen.now - seen.warrant.age(seen.now)?;
    match balance::lag_time(member, &seen.positions, as_of)? {
        Behind::For(time) => Some(time.as_secs_f64()),
        Behind::AtLeast(_) => None,
    }
}

/// What a member takes, from any of the listeners for readers, or why nothing from the first of them.
fn takes(
    seen: &Seen,
    member: &Member,
    decision: &Decision,
    readers: &[Arc<ListenerConfig>],
) -> (Option<&'static str>, Option<String>) {
    if seen.view.epoch().is_some_and(|epoch| epoch.holder == member.name) {
        return match decision {
            Decision::To(_) => (Some("write"), None),
            Decision::Hold(why) | Decision::Refuse(why) => (
                None,
                Some(
                    refusal::cannot_route(why, Duration::ZERO, Knowledge::default())
                        .message()
                        .to_owned(),
                ),
            ),
        };
    }
    if seen.silent.contains(&member.name) {
        return (None, Some(LeftOut::Silent.to_string()));
    }
    let last_resort = balance::nobody_to_stream_from(&seen.view, &[]);
    let mut why = None;
    for reader in readers {
        let wanted = seen.evidence().wanted(reader.role, &reader.reads);
        match balance::readable(&seen.view, member, wanted) {
            Ok(()) => return (Some("read"), None),
            Err(_) if last_resort && balance::last_resort(&seen.view, member, wanted).is_ok() => {
                return (Some("read"), None);
            }
            Err(left_out) => why = why.or(Some(left_out)),
        }
    }
    (None, why.map(|left_out| left_out.to_string()))
}

fn listeners(shared: &Shared, counts: &[RouteCounts]) -> Vec<ListenerRow> {
    let row = |(index, listener): (usize, &Arc<ListenerState>)| {
        let routes = || counts.iter().filter(move |route| route.listener == index);
        ListenerRow {
            name: listener.name.clone(),
            role: listener.config.load().role.as_str(),
            connections: listener.connections.get(),
            startups: listener.startups.crowd().inside,
            held: listener.held.get(),
            sessions: routes().map(|route| route.open).sum(),
            sessions_total: routes().map(|route| route.total).sum(),
            accepted_total: listener.accepted.load(Ordering::Relaxed),
            refused_total: listener.refused.load(Ordering::Relaxed),
            hold_expired_total: listener.hold_expired.load(Ordering::Relaxed),
            ended_total: listener.ended.load(Ordering::Relaxed),
        }
    };
    // One that a reload has closed is shown for as long as somebody is connected through it.
    let shown = |(_, listener): &(usize, &Arc<ListenerState>)| listener.is_open() || listener.connections.get() > 0;
    shared.listeners().iter().enumerate().filter(shown).map(row).collect()
}

fn events(shared: &Shared, now: Boottime) -> Vec<EventRow> {
    let events = shared.events.latest().into_iter();
    let row = |event: crate::events::Event| EventRow {
        id: event.id.to_string(),
        at: utc(event.at),
        age_seconds: now.since(event.at_boottime).as_secs_f64(),
        kind: event.kind.label(),
        text: event.kind.to_string(),
        count: event.count,
    };
    events.map(row).collect()
}

/// As `2026-01-02T03:04:05.678Z`.
fn utc(time: SystemTime) -> String {
    match jiff::Timestamp::try_from(time) {
        Ok(time) => format!("{time:.3}"),
        Err(_) => "unknown".to_owned(), // A clock set to a year that no calendar has.
    }
}

/// A duration as people say it, in its two largest units.
pub(crate) fn span(seconds: f64) -> String {
    if seconds < 10.0 {
        return format!("{seconds:.1} s");
    }
    let whole = Duration::from_secs_f64(seconds.min(1e12)).as_secs();
    match (whole / 86_400, whole / 3600 % 24, whole / 60 % 60, whole % 60) {
        (0, 0, 0, seconds) => format!("{seconds} s"),
        (0, 0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (0, hours, minutes, _) => format!("{hours} h {minutes} min"),
        (days, hours, _, _) => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_told_in_their_two_largest_units() {
        let cases = [
            (0.04, "0.0 s"),
            (9.96, "10.0 s"),
            (59.0, "59 s"),
            (61.0, "1 min 1 s"),
            (7_384.0, "2 h 3 min"),
            (273_600.0, "3 d 4 h"),
        ];
        for (seconds, text) in cases {
            assert_eq!(span(seconds), text);
        }
    }

    #[test]
    fn times_are_utc() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_767_323_045_678);
        assert_eq!(utc(time), "2026-01-02T03:04:05.678Z");
    }
}

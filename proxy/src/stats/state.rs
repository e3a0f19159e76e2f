//! One picture of the proxy, from which page, JSON and metrics all speak.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::source::{Proof, SourceHealth};
use pgherd_cluster::view::Member;
pub(crate) use pgherd_page::model::MemberState;
use pgherd_page::model::{self, LeaderState, ListenerRow, Mood, Outcome, RouteRow, Teller, Verdict, ViewState};
use pgherd_page::of_view;
use pgherd_page::words::{span, utc};

use super::changes;
use crate::balance::{self, LeftOut, Load, Standing};
use crate::config::{ListenerConfig, ListenerRole, ReadRules};
use crate::counters::RouteCounts;
use crate::lag::Behind;
use crate::panics;
use crate::refusal::{self, Knowledge};
use crate::route::{self, Decision, Policy, Why};
use crate::shared::{ListenerState, Seen, Shared};

/// A text of another length stands for none.
const SQLSTATE_LEN: usize = 5;

/// The page's state, as a proxy makes it.
pub(crate) struct State(pub(crate) model::State);

impl Deref for State {
    type Target = model::State;

    fn deref(&self) -> &model::State {
        &self.0
    }
}

impl State {
    pub(crate) fn of(shared: &Shared) -> Self {
        let seen = shared.seen();
        let decision = where_writes_go(&seen);
        let counts = shared.routes.counts();
        let leader = leader_state(shared, &seen);
        let verdict = verdict(shared, &seen, &decision, leader.as_ref());
        let events = shared.events.latest();
        Self(model::State {
            format: model::FORMAT,
            scope: seen.view.scope.to_string(),
            version: pgherd_cluster::VERSION,
            teller: Teller::Proxy,
            uptime_seconds: seen.now.since(shared.started).as_secs_f64(),
            writable: matches!(decision, Decision::To(_)) || is_idle(shared, &seen),
            paused: seen.view.config.value.as_ref().is_some_and(|config| config.is_paused()),
            verdict,
            safety: of_view::safety(&seen.view),
            view: view_state(shared, &seen),
            leader,
            asked: of_view::asked(&seen.view),
            held_clients: shared.held.get(),
            panics: panics::total(&shared.panics),
            members: members(shared, &seen, &decision, &counts),
            listeners: listeners(shared, &counts),
            routes: routes(shared, &counts),
            outcomes: outcomes(shared),
            changes: changes::of_events(&events, seen.now),
            events: changes::rows(&events, seen.now),
            history: of_view::history(&seen.view),
        })
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
            let timeline = timeline.unwrap_or_default();
            let sentence = format!("{}{timeline}, {since}", target.member);
            return Verdict {
                word: "WRITABLE",
                mood: Mood::Good,
                sentence,
            };
        }
        Decision::Hold(Why::NoWord { leader }) if is_idle(shared, seen) => {
            return Verdict {
                word: "IDLE",
                mood: Mood::Good,
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
    let (word, mood) = match why {
        _ if !held.is_empty() => ("HOLDING", Mood::Wait),
        Why::NothingKnown => ("STARTING", Mood::Wait),
        Why::NoLeader => ("NO LEADER", Mood::Bad),
        Why::StandbyCluster { .. } => ("STANDBY CLUSTER", Mood::Wait),
        Why::WarrantLapsed { .. } | Why::NoWord { .. } => ("UNCERTAIN", Mood::Bad),
        _ => ("NOT WRITABLE", Mood::Bad),
    };
    Verdict {
        word,
        mood,
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
        warrant_seconds: warrant_seconds(shared, seen),
        store,
        store_error,
        relists: shared.view.relists(),
        ttl_seconds: seen.view.timing().ttl().as_secs_f64(),
    }
}

/// For how long writes may be routed on a proof of this moment.
fn warrant_seconds(shared: &Shared, seen: &Seen) -> f64 {
    let timing = seen.view.timing();
    match shared.view.proof() {
        Proof::Server(good_for) => good_for.as_secs_f64(),
        Proof::Store | Proof::Hearsay => (timing.ttl() - timing.margin()).as_secs_f64(),
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
        let moved = counts.iter().filter(|route| route.member == member.name);
        MemberState {
            lag_bytes: balance::lag_bytes(&seen.view, member),
            lag_seconds: lag_seconds(seen, member),
            connect_seconds: experience
                .latency(&member.name, seen.now)
                .map(|latency| latency.as_secs_f64()),
            weight: match experience.standing(&member.name, seen.now, slow_start) {
                Standing::Takes(weight) => weight.as_f64(),
                Standing::Trial | Standing::Out => 0.0,
            },
            sessions_write: sessions(&member.name, true),
            sessions_read: sessions(&member.name, false),
            bytes_total: moved.map(|route| route.bytes_to_server + route.bytes_to_client).sum(),
            takes,
            left_out,
            ..of_view::member(&seen.view, member)
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

fn routes(shared: &Shared, counts: &[RouteCounts]) -> Vec<RouteRow> {
    let listeners = shared.listeners();
    let row = |route: &RouteCounts| {
        let listener = listeners.get(route.listener)?;
        Some(RouteRow {
            listener: listener.name.clone(),
            member: route.member.to_string(),
            open: route.open,
            total: route.total,
            bytes_to_server: route.bytes_to_server,
            bytes_to_client: route.bytes_to_client,
        })
    };
    counts.iter().filter_map(row).collect()
}

fn outcomes(shared: &Shared) -> Vec<Outcome> {
    let outcome = |what| {
        move |((reason, sqlstate), count): ((&'static str, &'static str), u64)| Outcome {
            what,
            reason,
            sqlstate: (sqlstate.len() == SQLSTATE_LEN).then_some(sqlstate),
            count,
        }
    };
    let ended = shared.ended.counts().into_iter().map(outcome("ended"));
    let refused = shared.limited.counts().into_iter().map(outcome("refused"));
    ended.chain(refused).collect()
}

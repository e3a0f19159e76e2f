//! A cluster for this crate's tests: n1 leads, n2 streams, n3 is behind.

use pgherd_cluster::clock::Boottime;

use crate::headers::Paths;
use crate::model::{
    EventRow, LeaderChange, LeaderState, ListenerRow, MemberState, Mood, Phase, RouteRow, Safety, State, Teller,
    Verdict, ViewState,
};
use crate::render::{Acting, Page};
use crate::ring::Ring;

pub(crate) const NOW: Boottime = Boottime::from_nanos(9_000_000_000_000);

pub(crate) fn page<'a>(state: &'a State, ring: &'a Ring) -> Page<'a> {
    Page {
        state,
        ring,
        now: NOW,
        acting: &Acting::Allowed,
        paths: Paths { root: "/stats" },
    }
}

fn member(name: &str, role: &'static str, state: &str, lag: Option<u64>) -> MemberState {
    MemberState {
        name: name.to_owned(),
        role,
        state: state.to_owned(),
        timeline: Some(9),
        lsn: Some("0/5000060".to_owned()),
        lag_bytes: lag,
        upstream: (role == "replica").then(|| "n1".to_owned()),
        takes: Some(if role == "leader" { "write" } else { "read" }),
        weight: 1.0,
        ..MemberState::default()
    }
}

fn change() -> LeaderChange {
    let phase = |name: &str, begins_seconds, seconds| Phase {
        name: name.to_owned(),
        begins_seconds,
        seconds,
        by: "this proxy".to_owned(),
    };
    LeaderChange {
        at: "2026-01-02T03:04:05.678Z".to_owned(),
        age_seconds: 62.0,
        from: Some("n2".to_owned()),
        to: Some("n1".to_owned()),
        cause: None,
        phases: vec![phase("nobody leads", 0.0, 0.5), phase("promotion", 0.5, 0.25)],
        going_on: false,
    }
}

pub(crate) fn state() -> State {
    State {
        uptime_seconds: 4000.0,
        writable: true,
        verdict: Verdict {
            word: "WRITABLE",
            mood: Mood::Good,
            sentence: "n1, timeline 9".to_owned(),
        },
        safety: Safety {
            mode: "asynchronous",
            at_risk_bytes: Some(0),
            successors: 2,
        },
        view: ViewState {
            revision: 12,
            age_seconds: Some(0.2),
            warrant_left_seconds: 8.4,
            warrant_seconds: 9.0,
            store: "following",
            ttl_seconds: 10.0,
            ..ViewState::default()
        },
        leader: Some(LeaderState {
            name: "n1".to_owned(),
            epoch: 33,
            since: Some("2026-01-02T03:04:05.678Z".to_owned()),
            since_seconds: 62.0,
            timeline: Some(9),
        }),
        members: vec![
            member("n1", "leader", "running", None),
            member("n2", "replica", "streaming", Some(0)),
            member("n3", "replica", "streaming", Some(33_554_432)),
        ],
        listeners: vec![ListenerRow {
            name: "0.0.0.0:5432".to_owned(),
            role: "write",
            connections: 3,
            sessions: 3,
            ..ListenerRow::default()
        }],
        routes: vec![RouteRow {
            listener: "0.0.0.0:5432".to_owned(),
            member: "n1".to_owned(),
            open: 3,
            total: 70,
            bytes_to_server: 1000,
            bytes_to_client: 200_000,
        }],
        changes: vec![change()],
        events: vec![EventRow {
            at: "2026-01-02T03:04:05.678Z".to_owned(),
            age_seconds: 62.0,
            kind: "leader_changed",
            text: "leader changed n2 -> n1".to_owned(),
            count: 1,
            ..EventRow::default()
        }],
        ..State::unknown("c", Teller::Proxy)
    }
}

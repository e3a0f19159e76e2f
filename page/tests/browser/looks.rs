//! What the page looks like: pictures of a cluster that is made up, kept in `target/screenshots` to be looked at.

use std::collections::BTreeMap;
use std::f64::consts::TAU;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_page::headers::{Paths, file};
use pgherd_page::model::{
    EventRow, LeaderChange, LeaderState, ListenerRow, MemberState, Mood, Phase, RouteRow, Safety, State, Teller,
    Timeline, Verdict, ViewState,
};
use pgherd_page::render::{Acting, Page};
use pgherd_page::ring::Ring;

use crate::chromium::Browser;
use crate::told::{Told, answer};

const PATHS: Paths = Paths { root: "/stats" };
const POINTS: u32 = 360;

fn member(name: &str, number: u8, role: &'static str, lag: u64) -> MemberState {
    let leads = role == "leader";
    MemberState {
        name: name.to_owned(),
        role,
        state: if leads { "running" } else { "streaming" }.to_owned(),
        timeline: Some(9),
        lsn: Some(format!("2C/{:X}", 0x8A00_0000_u64 - lag)),
        received_lsn: (!leads).then(|| "2C/8A000000".to_owned()),
        lag_bytes: Some(lag),
        lag_seconds: Some(if lag > 0 { 3.2 } else { 0.0 }),
        address: Some(format!("10.0.0.{number}:5434")),
        upstream: (!leads).then(|| "n1".to_owned()),
        tags: vec![format!("zone: {}", if number == 2 { "b" } else { "a" })],
        agent: Some("pgherd 0.1.0".to_owned()),
        connect_seconds: Some(0.0011),
        weight: 1.0,
        takes: Some(if leads { "write" } else { "read" }),
        ..MemberState::default()
    }
}

fn listener(port: u16, role: &'static str, sessions: usize) -> ListenerRow {
    ListenerRow {
        name: format!("0.0.0.0:{port}"),
        role,
        connections: sessions,
        sessions,
        sessions_total: 48_211,
        accepted_total: 48_230,
        refused_total: 19,
        ended_total: 204,
        ..ListenerRow::default()
    }
}

fn route(port: u16, member: &str, open: usize, bytes: u64) -> RouteRow {
    RouteRow {
        listener: format!("0.0.0.0:{port}"),
        member: member.to_owned(),
        open,
        total: 24_000,
        bytes_to_server: bytes / 20,
        bytes_to_client: bytes,
    }
}

fn event(ago: f64, at: &str, text: &str) -> EventRow {
    EventRow {
        at: format!("2026-01-02T{at}Z"),
        age_seconds: ago,
        kind: "leader_changed",
        text: text.to_owned(),
        count: 1,
        ..EventRow::default()
    }
}

fn phases(all: &[(&str, f64, f64)]) -> Vec<Phase> {
    let phase = |(name, begins_seconds, seconds): &(&str, f64, f64)| Phase {
        name: (*name).to_owned(),
        begins_seconds: *begins_seconds,
        seconds: *seconds,
        by: "this proxy".to_owned(),
    };
    all.iter().map(phase).collect()
}

fn news() -> Vec<EventRow> {
    vec![
        event(12.0, "03:03:53.100", "n3 cannot be connected to"),
        event(
            1863.6,
            "02:33:01.575",
            "n1 is writable, 0.212 s after it took the lease",
        ),
        event(1863.8, "02:33:01.363", "n1 leads"),
        event(1864.0, "02:33:01.204", "leader n2 is gone, nobody leads"),
        event(9300.0, "00:28:59.002", "the configuration was read again"),
    ]
}

/// On a quiet evening, after a failover half an hour ago.
fn quiet() -> State {
    let mut state = State::unknown("main", Teller::Proxy);
    state.uptime_seconds = 273_600.0;
    state.writable = true;
    state.verdict = Verdict {
        word: "WRITABLE",
        mood: Mood::Good,
        sentence: "n1, timeline 9, leader for 31 min 4 s (since 2026-01-02T02:33:01.204Z)".to_owned(),
    };
    state.safety = Safety {
        mode: "asynchronous",
        at_risk_bytes: Some(0),
        successors: 2,
    };
    state.view = ViewState {
        revision: 88_213,
        age_seconds: Some(0.3),
        warrant_left_seconds: 3.9,
        warrant_seconds: 4.5,
        store: "following",
        ttl_seconds: 5.0,
        ..ViewState::default()
    };
    state.leader = Some(LeaderState {
        name: "n1".to_owned(),
        epoch: 71_002,
        since: Some("2026-01-02T02:33:01.204Z".to_owned()),
        since_seconds: 1864.0,
        timeline: Some(9),
    });
    state.members = vec![
        member("n1", 1, "leader", 0),
        member("n2", 2, "replica", 0),
        member("n3", 3, "replica", 24_117_248),
    ];
    state.listeners = vec![listener(5432, "write", 41), listener(5433, "read", 120)];
    state.routes = vec![
        route(5432, "n1", 41, 4_100_000_000),
        route(5433, "n2", 64, 18_200_000_000),
        route(5433, "n3", 56, 17_900_000_000),
    ];
    state.changes = vec![LeaderChange {
        at: "2026-01-02T02:33:01.204Z".to_owned(),
        age_seconds: 1864.0,
        from: Some("n2".to_owned()),
        to: Some("n1".to_owned()),
        cause: Some("the postmaster of n2 ended".to_owned()),
        phases: phases(&[
            ("PostgreSQL ended, lease given up", 0.0, 0.041),
            ("nobody leads: candidates compare their logs", 0.041, 0.118),
            ("promotion, until the first write", 0.159, 0.212),
        ]),
        going_on: false,
    }];
    state.events = news();
    state.history = vec![Timeline {
        timeline: 8,
        lsn: "2C/4100C2A8".to_owned(),
        reason: "no recovery target specified".to_owned(),
        at: Some("2026-01-02T02:33:01.401+00:00".to_owned()),
        new_leader: Some("n1".to_owned()),
    }];
    state
}

/// In the middle of it.
fn failing_over() -> State {
    let mut state = quiet();
    state.writable = false;
    state.verdict = Verdict {
        word: "HOLDING",
        mood: Mood::Wait,
        sentence: "nobody leads the cluster since 2.3 s, 37 clients are held".to_owned(),
    };
    state.held_clients = 37;
    state.leader = None;
    state.view.warrant_left_seconds = 0.0;
    state.safety.successors = 2;
    state.members.remove(0);
    for member in &mut state.members {
        member.upstream = Some("n1".to_owned());
        member.state = "running".to_owned();
    }
    state.listeners[0].held = 37;
    state.listeners[0].sessions = 0;
    state.listeners[0].connections = 37;
    state.routes.remove(0);
    state.changes.insert(
        0,
        LeaderChange {
            at: "2026-01-02T03:04:05.101Z".to_owned(),
            age_seconds: 2.3,
            from: Some("n1".to_owned()),
            to: None,
            cause: None,
            phases: phases(&[("nobody leads", 0.0, 2.3)]),
            going_on: true,
        },
    );
    state
        .events
        .insert(0, event(2.3, "03:04:05.101", "leader n1 is gone, nobody leads"));
    state
}

/// An hour of it, with a change of leader in between.
fn hour(state: &State, now: Boottime) -> Ring {
    let (mut ring, mut then) = (Ring::default(), state.clone());
    for step in 0..POINTS {
        let at = now - Duration::from_secs(10) * (POINTS - step);
        let part = f64::from(step) / f64::from(POINTS);
        let wave = 1.0 + 0.4 * (TAU * part * 3.0).sin() + 0.1 * (TAU * part * 41.0).sin();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a made up number of bytes"
        )]
        let moved = (wave * 4.0e7) as u64;
        if let Some(leader) = &mut then.leader {
            leader.name = if step < 174 { "n2" } else { "n1" }.to_owned();
        }
        for (number, member) in then.members.iter_mut().enumerate() {
            let share = u64::try_from(number + 1).expect("few");
            member.bytes_total += moved * share;
            member.lag_bytes = Some(match number {
                2 if step > 200 => u64::from(step - 200) * 150_000,
                _ => u64::from(step * 7919 % 13) * 700 * share,
            });
        }
        ring.sample(&then, at);
    }
    ring
}

async fn serve(state: &State) -> Told {
    let now = Boottime::now();
    let ring = hour(&quiet(), now);
    let page = Page {
        state,
        ring: &ring,
        now,
        acting: &Acting::Allowed,
        paths: PATHS,
    };
    let mut answers: BTreeMap<String, String> =
        [("/stats".to_owned(), answer("text/html; charset=utf-8", &page.whole()))].into();
    for name in ["page.css", "page.js", "icon.svg"] {
        let (content_type, body) = file(name).expect("a file of the page");
        answers.insert(PATHS.of(name), answer(content_type, body));
    }
    // It stays as it is: there is nothing to follow.
    let live =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\nevent: page\ndata: {\"title\":\"as it is\"}\n\n";
    answers.insert(PATHS.of("live"), live.to_owned());
    Told::serve(answers).await
}

#[tokio::test]
async fn it_is_readable_by_day_by_night_and_on_a_phone() {
    let (quiet, failing) = (serve(&quiet()).await, serve(&failing_over()).await);
    let mut browser = Browser::start().await;
    for (name, told, scheme, width, phone) in [
        ("light", &quiet, "light", 1280, false),
        ("dark", &quiet, "dark", 1280, false),
        ("phone", &quiet, "light", 390, true),
        ("failover", &failing, "light", 1280, false),
        ("failover-phone-dark", &failing, "dark", 390, true),
    ] {
        browser.window(width, 844, phone).await;
        browser.prefers(scheme).await;
        let host = format!("http://{}", told.address);
        browser.open(&format!("{host}/stats")).await;
        browser.shows("#live", "live").await;
        browser.screenshot(name).await;
        let beyond = browser
            .evaluate("document.documentElement.scrollWidth - window.innerWidth")
            .await;
        assert!(
            beyond.as_i64().is_some_and(|beyond| beyond <= 0),
            "{name} is {beyond} pixels too wide"
        );
        let paper = browser
            .evaluate("getComputedStyle(document.body).backgroundColor")
            .await;
        let expected = if scheme == "dark" {
            "rgb(18, 22, 26)"
        } else {
            "rgb(247, 246, 242)"
        };
        assert_eq!(paper, expected, "{name}");
        let complaints = browser.complaints(&host).await;
        assert_eq!(complaints, Vec::<String>::new(), "{name}");
    }
}

//! What PgBouncer has nothing of: members, routes, who is held, what happened.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;

use super::columns::column;
use super::show::{Row, moment, number, text};
use crate::refusal;
use crate::shared::Shared;
use crate::stats::state::State;
use crate::wire::console::Kind::{Int4, Int8, Text};
use crate::wire::console::{Cell, Column};

pub(super) const NODES: &[Column] = &[
    column("node", Text),
    column("role", Text),
    column("state", Text),
    column("timeline", Int8),
    column("lsn", Text),
    column("lag_bytes", Int8),
    column("lag_ms", Int8),
    column("zone", Text),
    column("takes", Text),
    column("left_out", Text),
    column("sessions_write", Int8),
    column("sessions_read", Int8),
    column("connect_us", Int8),
    column("weight_percent", Int4),
];

pub(super) const ROUTES: &[Column] = &[
    column("listener", Text),
    column("role", Text),
    column("node", Text),
    column("sessions", Int8),
    column("sessions_total", Int8),
    column("bytes_to_server", Int8),
    column("bytes_to_client", Int8),
    column("node_places", Int8),
    column("node_queue", Int8),
];

pub(super) const EVENTS: &[Column] = &[
    column("at", Text),
    column("age_ms", Int8),
    column("kind", Text),
    column("count", Int8),
    column("text", Text),
    column("id", Text),
];

pub(super) const HELD: &[Column] = &[
    column("client", Text),
    column("user", Text),
    column("database", Text),
    column("application_name", Text),
    column("listener", Text),
    column("since", Text),
    column("waited_ms", Int8),
    column("left_ms", Int8),
    column("why", Text),
];

fn maybe(found: Option<impl Into<String>>) -> Cell {
    found.map_or(Cell::Null, text)
}

fn milliseconds(duration: Duration) -> Cell {
    number(duration.as_millis())
}

fn scaled(seconds: Option<f64>, scale: f64) -> Cell {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "no lag is as long, and the cast saturates"
    )]
    seconds.map_or(Cell::Null, |seconds| Cell::Number((seconds * scale) as i64))
}

pub(super) fn nodes(shared: &Shared) -> Vec<Row> {
    let row = |member: crate::stats::state::MemberState| {
        vec![
            text(member.name),
            text(member.role),
            text(member.state),
            member.timeline.map_or(Cell::Null, number),
            maybe(member.lsn),
            member.lag_bytes.map_or(Cell::Null, number),
            scaled(member.lag_seconds, 1e3),
            maybe(member.zone),
            maybe(member.takes),
            maybe(member.left_out),
            number(member.sessions_write),
            number(member.sessions_read),
            scaled(member.connect_seconds, 1e6),
            scaled(Some(member.weight), 1e2),
        ]
    };
    State::of(shared).members.into_iter().map(row).collect()
}

pub(super) fn routes(shared: &Shared) -> Vec<Row> {
    let listeners = shared.listeners();
    let crowds = shared.places.crowds();
    let row = |route: crate::counters::RouteCounts| {
        let listener = listeners.get(route.listener)?;
        let crowd = crowds.get(&route.member);
        let places = |count: fn(&crate::gate::Crowd) -> usize| crowd.map_or(Cell::Null, |crowd| number(count(crowd)));
        Some(vec![
            text(listener.name.clone()),
            text(listener.config.load().role.as_str()),
            text(route.member.as_str()),
            number(route.open),
            number(route.total),
            number(route.bytes_to_server),
            number(route.bytes_to_client),
            places(|crowd| crowd.inside),
            places(|crowd| crowd.waiting),
        ])
    };
    shared.routes.counts().into_iter().filter_map(row).collect()
}

pub(super) fn events(shared: &Shared) -> Vec<Row> {
    let now = Boottime::now();
    let row = |event: crate::events::Event| {
        vec![
            moment(event.at_boottime, now),
            milliseconds(now.since(event.at_boottime)),
            text(event.kind.label()),
            number(event.count),
            text(event.kind.to_string()),
            text(event.id.to_string()),
        ]
    };
    shared.events.latest().into_iter().map(row).collect()
}

/// Only who is held: whoever is being connected at this moment is with `SHOW CLIENTS`.
pub(super) fn held(shared: &Shared) -> Vec<Row> {
    let now = Boottime::now();
    let listeners = shared.listeners();
    let knowledge = shared.knowledge();
    let row = |waiter: crate::waiting::Waiter| {
        let held = waiter.held?;
        let about = &waiter.about;
        let listener = listeners.get(about.listener).map(|listener| listener.name.clone());
        let waited = now.since(waiter.since);
        Some(vec![
            text(about.peer.to_string()),
            maybe(about.who.user.clone()),
            maybe(about.who.database.clone()),
            maybe(about.application_name.as_deref()),
            maybe(listener),
            moment(waiter.since, now),
            milliseconds(waited),
            milliseconds(held.until.since(now)),
            text(refusal::cannot_route(&held.why, waited, knowledge).message()),
        ])
    };
    shared.waiting.list().into_iter().filter_map(row).collect()
}

//! The cluster as it is: picture, members, listeners.

use maud::{Markup, html};

use super::mood;
use crate::model::{ListenerRow, MemberState, Mood, RouteRow, State};
use crate::picture::topology;
use crate::words::{size as in_words, span};

pub(super) fn picture(state: &State) -> Markup {
    html! {
        h2 { "The cluster" }
        figure { (topology(state)) }
    }
}

/// What is not known is a dash.
fn known(value: Option<impl std::fmt::Display>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn size(value: Option<u64>) -> Markup {
    html! {
        @match value {
            Some(exactly) => { span title={ (exactly) " bytes" } { (in_words(exactly)) } }
            None => { "-" }
        }
    }
}

pub(super) fn members(state: &State) -> Markup {
    let serves_clients = !state.listeners.is_empty();
    html! {
        h2 { "Members" }
        div.scroll { table {
            thead { tr {
                th scope="col" { "member" }
                th scope="col" { "role" }
                th scope="col" { "state" }
                th.n scope="col" title="timeline" { "TL" }
                th.n scope="col" { "received" }
                th.n scope="col" { "replayed" }
                th.n scope="col" title="pgherd_replication_lag_bytes" { "behind" }
                th.n scope="col" title="pgherd_replication_lag_seconds" { "for" }
                @if serves_clients {
                    th.n scope="col" { "writers" }
                    th.n scope="col" { "readers" }
                    th.n scope="col" title="its share of readers" { "share" }
                }
                th scope="col" { "takes" }
            } }
            tbody { @for member in &state.members { (member_row(state, member, serves_clients)) } }
        } }
    }
}

fn member_row(state: &State, member: &MemberState, serves_clients: bool) -> Markup {
    let (of, takes) = match (member.takes, &member.left_out) {
        (Some("write"), _) => (Mood::Good, "writes".to_owned()),
        (Some(_), _) => (Mood::Good, "reads".to_owned()),
        (None, Some(why)) => (Mood::Bad, format!("nothing: {why}")),
        (None, None) => (Mood::Wait, "-".to_owned()),
    };
    let leads = state.leads(&member.name);
    html! {
        tr id={ "member-" (member.name) } {
            th scope="row" { (member.name) @for note in notes(member) { br; small { (note) } } }
            td { (member.role) }
            td { (member.state) @if !member.pending_restart.is_empty() { br; small.wait { "restart pending" } } }
            td.n { (known(member.timeline)) }
            td.n.mono { (known(member.received_lsn.as_deref())) }
            td.n.mono { (known(member.lsn.as_deref())) }
            td.n { @if leads { "-" } @else { (size(member.lag_bytes)) } }
            td.n { @if leads { "-" } @else { (known(member.lag_seconds.map(span))) } }
            @if serves_clients {
                td.n { (member.sessions_write) }
                td.n { (member.sessions_read) }
                td.n { (format!("{:.0} %", member.weight * 100.0)) }
            }
            td.(mood(of)) { (takes) }
        }
    }
}

/// Where it is, and what it is.
fn notes(member: &MemberState) -> Vec<String> {
    let what: Vec<String> = member.agent.iter().chain(&member.tags).cloned().collect();
    let lines = member.address.iter().cloned().chain([what.join(", ")]);
    lines.filter(|line| !line.is_empty()).collect()
}

pub(super) fn clients(state: &State) -> Markup {
    html! {
        @if !state.listeners.is_empty() {
            h2 { "Clients" }
            div.scroll { table {
                thead { tr {
                    th scope="col" { "listener" }
                    th scope="col" { "for" }
                    th.n scope="col" title="pgherd_listener_connections" { "connected" }
                    th.n scope="col" title="pgherd_hold_clients" { "held" }
                    th.n scope="col" title="pgherd_route_sessions" { "sessions" }
                    th.n scope="col" { "so far" }
                    th.n scope="col" { "refused" }
                    th.n scope="col" { "ended" }
                } }
                tbody { @for listener in &state.listeners { (listener_row(state, listener)) } }
            } }
            (outcomes(state))
        }
    }
}

fn listener_row(state: &State, listener: &ListenerRow) -> Markup {
    let routes = state.routes.iter().filter(|route| route.listener == listener.name);
    html! {
        tr.listener id={ "listener-" (listener.name) } {
            th scope="row" { (listener.name) }
            td { (listener.role) }
            td.n { (listener.connections) }
            td.n { @if listener.held > 0 { b.bad { (listener.held) } } @else { "0" } }
            td.n { (listener.sessions) }
            td.n { (listener.sessions_total) }
            td.n { (listener.refused_total) }
            td.n { (listener.ended_total) }
        }
        @for route in routes { (route_row(route)) }
    }
}

fn route_row(route: &RouteRow) -> Markup {
    html! {
        tr.route {
            th scope="row" { "to " (route.member) }
            td colspan="3" { (in_words(route.bytes_to_server)) " to it, " (in_words(route.bytes_to_client)) " from it" }
            td.n { (route.open) }
            td.n { (route.total) }
            td {}
            td {}
        }
    }
}

fn outcomes(state: &State) -> Markup {
    html! {
        @if !state.outcomes.is_empty() {
            p { small {
                "Since the start: "
                @for (index, outcome) in state.outcomes.iter().enumerate() {
                    @if index > 0 { ", " }
                    (outcome.count) " " (outcome.what) " (" (outcome.reason.replace('_', " "))
                    @if let Some(sqlstate) = outcome.sqlstate { ", " (sqlstate) }
                    ")"
                }
                "."
            } }
        }
    }
}

//! What happened: the last change of leader with its phases, the last hour, the last events, ended timelines.

use maud::{Markup, html};

use super::{Page, moment};
use crate::model::{EventRow, LeaderChange, State};
use crate::picture::{bar, lag, swatch, throughput};
use crate::words::{size, span};

/// Events above the fold; all are further below.
const NEWS: usize = 5;
/// Changes of leader that are drawn.
const CHANGES: usize = 3;

pub(super) fn happened(state: &State) -> Markup {
    html! {
        h2 { "What happened?" }
        @for change in state.changes.iter().take(CHANGES) { (waterfall(change)) }
        @if state.events.is_empty() { p { "Nothing since this process started." } }
        @else { ol.news { @for event in state.events.iter().take(NEWS) { li { (moment(&event.at, event.age_seconds)) " " span { (what(event)) } } } } }
    }
}

fn what(event: &EventRow) -> Markup {
    html! {
        (event.text) @if event.count > 1 { " (" (event.count) " times)" }
        @if let Some(id) = &event.id { " " code { (id) } }
    }
}

/// A change of leader: what took how long, one row below the other.
fn waterfall(change: &LeaderChange) -> Markup {
    let whole = change.seconds();
    let part = |seconds: f64| if whole > 0.0 { seconds / whole } else { 0.0 };
    html! {
        div.change.going-on[change.going_on] {
            h3 {
                (change.from.as_deref().unwrap_or("nobody")) " " span.arrow { "to" } " " (change.to.as_deref().unwrap_or("nobody yet"))
                ": " (seconds(whole)) @if change.going_on { " so far" }
            }
            p {
                (moment(&change.at, change.age_seconds))
                @if let Some(cause) = &change.cause { ", " (cause) }
                "."
            }
            @if !change.phases.is_empty() {
                table.waterfall {
                    thead { tr {
                        th scope="col" { "phase" } th.n scope="col" { "took" } th scope="col" { "measured by" } td {}
                    } }
                    tbody { @for (index, phase) in change.phases.iter().enumerate() {
                        tr {
                            th scope="row" { (phase.name) }
                            td.n { (seconds(phase.seconds)) }
                            td { (phase.by) }
                            td.bars { (bar(part(phase.begins_seconds), part(phase.seconds), step(index))) }
                        }
                    } }
                }
            }
        }
    }
}

/// To the millisecond, which is what decides here.
fn seconds(seconds: f64) -> String {
    if seconds < 100.0 {
        format!("{seconds:.3} s")
    } else {
        span(seconds)
    }
}

/// Phases that follow each other can be told apart.
const fn step(index: usize) -> &'static str {
    match index % 3 {
        0 => "step0",
        1 => "step1",
        _ => "step2",
    }
}

pub(super) fn hour(page: &Page<'_>) -> Markup {
    let state = page.state;
    html! {
        h2 { "The last hour" }
        div.plots {
            figure {
                figcaption { "Behind the leader" }
                (lag(state, page.ring, page.now))
            }
            @if !state.listeners.is_empty() {
                figure {
                    figcaption { "Between clients and members" }
                    (throughput(state, page.ring, page.now))
                }
            }
        }
        ul.legend {
            @for (index, name) in page.ring.names(state).iter().enumerate() {
                li { (swatch(index)) " " (name) " " (position(state, name)) }
            }
        }
    }
}

fn position(state: &State, name: &str) -> String {
    let member = state.members.iter().find(|member| member.name == name);
    match member.map(|member| member.lag_bytes) {
        None => "is gone".to_owned(),
        Some(_) if state.leads(name) => "leads".to_owned(),
        Some(Some(lag)) => format!("{} behind", size(lag)),
        Some(None) => "position not known".to_owned(),
    }
}

pub(super) fn events(state: &State) -> Markup {
    html! {
        h2 { "Events" }
        div.scroll { table.log {
            thead { tr { th scope="col" { "UTC" } th.n scope="col" { "ago" } th scope="col" { "what" } } }
            tbody { @for event in &state.events {
                tr id=[event.id.as_ref().map(|id| format!("event-{id}"))] {
                    td.mono { (event.at) }
                    td.n { (moment(&event.at, event.age_seconds)) }
                    td { (what(event)) }
                }
            } }
        } }
        @if !state.history.is_empty() {
            h3 { "Ended timelines" }
            div.scroll { table {
                thead { tr {
                    th.n scope="col" { "TL" } th scope="col" { "ended" } th.n scope="col" { "at" }
                    th scope="col" { "next leader" } th scope="col" { "why" }
                } }
                tbody { @for ended in &state.history {
                    tr {
                        td.n { (ended.timeline) }
                        td.mono { (ended.at.as_deref().unwrap_or("-")) }
                        td.n.mono { (ended.lsn) }
                        td { (ended.new_leader.as_deref().unwrap_or("-")) }
                        td { (ended.reason) }
                    }
                } }
            } }
        }
    }
}

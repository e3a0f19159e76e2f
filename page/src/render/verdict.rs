//! Is it writable and for how long is that certain; who is suffering; where the page knows it from.

use std::time::Duration;

use maud::{Markup, html};

use super::{Page, mood};
use crate::model::{Mood, State, Teller};
use crate::picture::bar;
use crate::words::{counted, size, span};

/// What counts as lately.
const LATELY: Duration = Duration::from_secs(300);

pub(super) fn verdict(state: &State) -> Markup {
    html! {
        div.verdict.(mood(state.verdict.mood)) role="status" {
            p.word { (state.verdict.word) }
            p.sentence { (state.verdict.sentence) }
            @if state.view.warrant_left_seconds > 0.0 { (certain(state)) }
        }
        (safety(state))
        @if state.paused {
            p.note.wait { b { "PAUSED" } " The cluster is in maintenance: nothing fails over by itself until it is resumed." }
        }
        @if let Some(asked) = &state.asked {
            p.note.wait {
                b { "ASKED FOR" } " The lead goes from " (asked.from.as_deref().unwrap_or("whoever has it")) " to "
                (asked.to.as_deref().unwrap_or("whoever is fit")) @if let Some(at) = &asked.at { " at " (at) } "."
            }
        }
        @if state.panics > 0 {
            p.note.bad { b { "DEFECT" } " This process has failed " (counted(state.panics, "time")) " within itself: its log says where." }
        }
    }
}

fn certain(state: &State) -> Markup {
    let (left, of) = (state.view.warrant_left_seconds, state.view.warrant_seconds);
    html! {
        p.certain {
            "Certain for another " b title="pgherd_warrant_remaining_seconds" { (span(left)) }
            @if of > 0.0 { " of " (span(of)) " unless it is proven anew, as it is all the time. " (bar(0.0, left / of, "fill")) }
        }
    }
}

fn safety(state: &State) -> Markup {
    let safety = &state.safety;
    let loss = match (safety.mode, safety.at_risk_bytes) {
        ("asynchronous", Some(0)) => "A replica has all that was acknowledged.".to_owned(),
        ("asynchronous", Some(lag)) => format!(
            "If the leader's disk were lost now, the last {} would be too.",
            size(lag)
        ),
        ("asynchronous", None) if safety.successors > 0 => "How far the replicas are is not known.".to_owned(),
        ("asynchronous", None) => "No replica streams: what is written is in one place.".to_owned(),
        (mode, _) => format!("Commits wait for a replica ({mode}): no single failure loses one."),
    };
    let successors = match safety.successors {
        0 => "Nobody could take the lead".to_owned(),
        1 => "1 member could take the lead".to_owned(),
        several => format!("{several} members could take the lead"),
    };
    let class = if safety.successors == 0 { "wait" } else { "plain" };
    html! { p.safety.(class) { (loss) " " (successors) "." } }
}

pub(super) fn suffering(page: &Page<'_>) -> Markup {
    let sufferers = sufferers(page);
    html! {
        h2 { "Who is suffering?" }
        @if sufferers.is_empty() { p.good { "Nobody, as far as this page can see." } }
        @else { ul.sufferers { @for (of, text) in &sufferers { li.(mood(*of)) { (text) } } } }
    }
}

/// Everybody for whom something is not as it should be, the worst first.
fn sufferers(page: &Page<'_>) -> Vec<(Mood, String)> {
    let state = page.state;
    let mut found = Vec::new();
    if state.held_clients > 0 {
        let held = counted(u64::try_from(state.held_clients).unwrap_or(u64::MAX), "client");
        found.push((Mood::Bad, format!("{held} held until somebody can serve them.")));
    }
    for listener in &state.listeners {
        if listener.held == 0 && listener.connections > 0 && listener.sessions == 0 && !state.writable {
            found.push((Mood::Wait, format!("{} has clients and no session.", listener.name)));
        }
    }
    let (refused, ended) = page.ring.lately(state, LATELY, page.now);
    if refused > 0 {
        found.push((
            Mood::Bad,
            format!("{} refused within five minutes.", counted(refused, "client")),
        ));
    }
    if ended > 0 {
        found.push((
            Mood::Wait,
            format!("{} ended by this proxy within five minutes.", counted(ended, "session")),
        ));
    }
    for member in &state.members {
        if let Some(why) = &member.left_out {
            let whom = if state.leads(&member.name) {
                "no writer"
            } else {
                "no reader"
            };
            found.push((Mood::Wait, format!("{} gets {whom}: {why}.", member.name)));
        }
        if !member.pending_restart.is_empty() {
            let what = member.pending_restart.join(", ");
            found.push((
                Mood::Wait,
                format!("{} waits for a restart to take over {what}.", member.name),
            ));
        }
    }
    found.sort_by_key(|(of, _)| *of != Mood::Bad);
    found
}

pub(super) fn source(state: &State) -> Markup {
    let view = &state.view;
    let (of, store) = match view.store {
        "following" => (Mood::Good, "the store answers".to_owned()),
        "starting" => (Mood::Wait, "the store has not answered yet".to_owned()),
        _ => {
            let error = view.store_error.as_deref().unwrap_or("no reason known");
            (Mood::Bad, format!("the store does not answer: {error}"))
        }
    };
    html! {
        h2 { "How this page knows" }
        p {
            span.(mood(of)) { (store) } ". "
            @match view.age_seconds {
                Some(age) => { "The leader was last confirmed " (span(age)) " ago. " }
                None => { "The leader was never confirmed. " }
            }
            "A lease is for " (span(view.ttl_seconds)) ". pgherd " (state.version) ", up for " (up(state.uptime_seconds)) "."
        }
        @if let Teller::Agent { name, reason } = &state.teller { p { "The agent of " (name) " says: " (reason) "." } }
    }
}

/// In whole minutes, so that the section changes seldom.
fn up(seconds: f64) -> String {
    if seconds < 60.0 {
        "less than a minute".to_owned()
    } else {
        span((seconds / 60.0).floor() * 60.0).replace(" 0 s", "")
    }
}

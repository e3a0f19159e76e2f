//! Who is connected to whom: listeners, members, and who streams from whom.

use maud::{Markup, html};

use super::{at, n};
use crate::model::{MemberState, RouteRow, State};
use crate::words::{counted, size};

/// Boxes beyond these would not be read.
const BOXES_MAX: usize = 8;
const LISTENER: (f64, f64) = (148.0, 46.0);
const MEMBER: (f64, f64) = (190.0, 52.0);
const BETWEEN: f64 = 78.0;
const GAP: f64 = 22.0;
/// Where the arrows of replication bend.
const BEND: f64 = 64.0;
const TOP: f64 = 4.0;

/// Where a box is.
#[derive(Clone, Copy)]
struct Place {
    x: f64,
    y: f64,
    size: (f64, f64),
}

impl Place {
    fn left(self) -> (f64, f64) {
        (self.x, self.y + self.size.1 / 2.0)
    }

    fn right(self) -> (f64, f64) {
        (self.x + self.size.0, self.y + self.size.1 / 2.0)
    }
}

/// The picture, with the leader on top.
pub(crate) fn topology(state: &State) -> Markup {
    let mut members: Vec<&MemberState> = state.members.iter().collect();
    members.sort_by_key(|member| !state.leads(&member.name));
    members.truncate(BOXES_MAX);
    let listeners: Vec<_> = state.listeners.iter().take(BOXES_MAX).collect();
    let left = if listeners.is_empty() {
        4.0
    } else {
        LISTENER.0 + BETWEEN + 2.0
    };
    let place = |index: usize| Place {
        x: left,
        y: TOP + at(index) * (MEMBER.1 + GAP),
        size: MEMBER,
    };
    let rows = members.len().max(listeners.len()).max(1);
    let height = TOP * 2.0 + at(rows) * (MEMBER.1 + GAP) - GAP;
    // The listeners stand in the middle of their side.
    let spare = (at(rows) - at(listeners.len())) * (MEMBER.1 + GAP) / 2.0;
    let listener_place = |index: usize| Place {
        x: 2.0,
        y: TOP + spare + at(index) * (MEMBER.1 + GAP) + (MEMBER.1 - LISTENER.1) / 2.0,
        size: LISTENER,
    };
    let width = left + MEMBER.0 + BEND + 6.0;
    let index_of = |name: &str| members.iter().position(|member| member.name == name);
    html! {
        svg.topology viewBox={ "0 0 " (n(width)) " " (n(height)) } role="img" aria-label=(told(state)) {
            defs {
                @for mood in ["good", "wait", "bad", "flow"] {
                    marker.(mood) id={ "tip-" (mood) } viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8"
                        markerUnits="userSpaceOnUse" orient="auto" { path.tip d="M0,0.5 L8,4 L0,7.5 z" {} }
                }
            }
            @for route in state.routes.iter().filter(|route| route.open > 0) {
                @let from = listeners.iter().position(|listener| listener.name == route.listener);
                @if let (Some(from), Some(to)) = (from, index_of(&route.member)) {
                    (sessions(listener_place(from).right(), place(to).left(), route))
                }
            }
            @for (index, member) in members.iter().enumerate() {
                @if let Some(from) = member.upstream.as_deref().and_then(index_of) {
                    (replication(place(from).right(), place(index).right(), member))
                }
            }
            @for (index, listener) in listeners.iter().enumerate() {
                @let place = listener_place(index);
                g.listener {
                    (frame(place))
                    (line(place, 19.0, "name", listener.role, ": "))
                    (line(place, 36.0, "small", &beside(&listener.name, listener.held), "; "))
                }
            }
            @for (index, member) in members.iter().enumerate() {
                @let place = place(index);
                g.(class(state, member)) {
                    (frame(place))
                    (line(place, 22.0, "name", &member.name, ", "))
                    (role(place, member))
                    (line(place, 40.0, "small", &below(state, member), "; "))
                }
            }
        }
    }
}

/// The picture in words, for who cannot see it.
fn told(state: &State) -> String {
    let leads = state.leader.as_ref().map_or("nobody", |leader| &leader.name);
    let replicas = state.members.iter().filter(|member| !state.leads(&member.name));
    let replicas: Vec<String> = replicas
        .map(|member| format!("{} {}", member.name, below(state, member)))
        .collect();
    format!("{leads} leads; {}", replicas.join("; "))
}

fn beside(address: &str, held: usize) -> String {
    let port = address.rsplit_once(':').map_or(address, |(_, port)| port);
    match held {
        0 => format!("port {port}"),
        held => format!("port {port}, {held} held"),
    }
}

fn below(state: &State, member: &MemberState) -> String {
    if state.leads(&member.name) {
        return match member.takes {
            Some(_) => counted(u64::try_from(member.sessions_write).unwrap_or(u64::MAX), "session"),
            None => member.state.clone(),
        };
    }
    match (member.state.as_str(), member.lag_bytes) {
        ("streaming", Some(0)) => "streams, has it all".to_owned(),
        ("streaming", Some(lag)) => format!("streams, {} behind", size(lag)),
        (other, _) => other.to_owned(),
    }
}

fn class(state: &State, member: &MemberState) -> &'static str {
    match (state.leads(&member.name), member.takes, member.state.as_str()) {
        (true, Some(_), _) => "member leader good",
        (true, None, _) => "member leader wait",
        (false, Some(_), _) | (false, None, "streaming") => "member good",
        (false, None, "running" | "starting" | "creating replica") => "member wait",
        (false, None, _) => "member bad",
    }
}

fn frame(place: Place) -> Markup {
    let (width, height) = place.size;
    html! { rect x=(n(place.x)) y=(n(place.y)) width=(n(width)) height=(n(height)) rx="7" {} }
}

fn line(place: Place, below: f64, class: &str, text: &str, then: &str) -> Markup {
    html! { text.(class) x=(n(place.x + 12.0)) y=(n(place.y + below)) { (text) (spoken(then)) } }
}

/// What a text browser, which shows the texts of a picture and nothing else of it, puts between them.
fn spoken(text: &str) -> Markup {
    html! { tspan.spoken { (text) } }
}

fn role(place: Place, member: &MemberState) -> Markup {
    let right = place.x + place.size.0 - 12.0;
    html! { text.role x=(n(right)) y=(n(place.y + 22.0)) text-anchor="end" { (member.role) (spoken(", ")) } }
}

fn sessions(from: (f64, f64), to: (f64, f64), route: &RouteRow) -> Markup {
    let open = route.open;
    let width = 1.2 + at(open + 1).log2() * 0.5;
    let middle = f64::midpoint(from.0, to.0);
    let path = format!(
        "M{},{} C{},{} {},{} {},{}",
        n(from.0),
        n(from.1),
        n(middle),
        n(from.1),
        n(middle),
        n(to.1),
        n(to.0 - 2.0),
        n(to.1)
    );
    html! {
        path.flow d=(path) stroke-width=(n(width.min(5.0))) marker-end="url(#tip-flow)" {
            title { (counted(u64::try_from(open).unwrap_or(u64::MAX), "session")) }
        }
        text.count x=(n(middle)) y=(n(f64::midpoint(from.1, to.1) - 6.0)) text-anchor="middle" {
            (open) (spoken(&format!(" from {} to {}; ", route.listener, route.member)))
        }
    }
}

fn replication(from: (f64, f64), to: (f64, f64), member: &MemberState) -> Markup {
    let mood = match (member.state.as_str(), member.lag_bytes) {
        ("streaming", Some(0..16_777_216)) => "good",
        ("streaming", _) => "wait",
        _ => "bad",
    };
    // What ends further below bends further out.
    let bend = (16.0 + (to.1 - from.1).abs() * 0.2).min(BEND * 1.3);
    let path = format!(
        "M{},{} C{},{} {},{} {},{}",
        n(from.0),
        n(from.1),
        n(from.0 + bend),
        n(from.1),
        n(to.0 + bend),
        n(to.1),
        n(to.0 + 2.0),
        n(to.1)
    );
    html! {
        path class={ "replication " (mood) } d=(path) marker-end={ "url(#tip-" (mood) ")" } {
            title { (member.name) " " (member.state) @if let Some(lag) = member.lag_bytes { ", " (lag) " B behind" } }
        }
    }
}

//! Lag and throughput over the last hour.

use std::time::Duration;

use maud::{Markup, html};
use pgherd_cluster::clock::Boottime;

use super::{at, n};
use crate::model::State;
use crate::ring::{Point, Ring};
use crate::words::{as_f64, bytes};

const HOUR: Duration = Duration::from_secs(3600);
const WIDTH: f64 = 470.0;
const HEIGHT: f64 = 150.0;
/// Room for what is written beside and below.
const LEFT: f64 = 74.0;
const BOTTOM: f64 = 20.0;
const TOP: f64 = 14.0;
/// Two points that are further from each other belong to two lines: nobody looked in between.
const GAP_MAX: Duration = Duration::from_secs(35);

/// A point of a line: when, in seconds ago, and how much.
type Sample = (f64, f64);

/// One member's lines; it has several when it was away in between.
struct Line {
    member: usize,
    name: String,
    pieces: Vec<Vec<Sample>>,
}

/// How far each replica was behind.
pub(crate) fn lag(state: &State, ring: &Ring, now: Boottime) -> Markup {
    let lines = lines(state, ring, now, |_, point, name| {
        point.members.get(name)?.lag_bytes.map(as_f64)
    });
    let most = most(&lines).max(1e6);
    let decades = most.log10().ceil();
    // Nothing is on the axis; the first byte is a step above it.
    let scale = |value: f64| (value + 1.0).log10() / decades;
    let ticks: Vec<f64> = [0.0, 1e3, 1e6, 1e9, 1e12]
        .into_iter()
        .filter(|tick| *tick <= 10_f64.powf(decades))
        .collect();
    plot(
        "lag",
        "how far replicas were behind the leader, in bytes",
        &lines,
        &scale,
        &ticks,
        "",
        &marks(ring, now),
    )
}

/// How much went between clients and each member.
pub(crate) fn throughput(state: &State, ring: &Ring, now: Boottime) -> Markup {
    let lines = lines(state, ring, now, |before, point, name| {
        let (before, reading) = (before?, point.members.get(name)?);
        let seconds = point.at.since(before.at).as_secs_f64();
        let moved = reading.bytes_total.checked_sub(before.members.get(name)?.bytes_total)?;
        (seconds > 0.0).then(|| as_f64(moved) / seconds)
    });
    let top = round_up(most(&lines).max(1000.0));
    let scale = |value: f64| value / top;
    plot(
        "throughput",
        "bytes per second between clients and members",
        &lines,
        &scale,
        &[0.0, top / 2.0, top],
        "/s",
        &marks(ring, now),
    )
}

/// A piece of a member's line, for a legend.
pub(crate) fn swatch(member: usize) -> Markup {
    html! {
        svg.swatch viewBox="0 0 26 8" aria-hidden="true" { path.line.{ "line" (member) } d="M0,4 H26" {} }
    }
}

fn lines(
    state: &State,
    ring: &Ring,
    now: Boottime,
    of: impl Fn(Option<&Point>, &Point, &str) -> Option<f64>,
) -> Vec<Line> {
    let line = |(member, name): (usize, &String)| {
        let mut pieces: Vec<Vec<Sample>> = vec![Vec::new()];
        let mut before: Option<&Point> = None;
        for point in ring.points().iter().filter(|point| now.since(point.at) <= HOUR) {
            let follows = before.filter(|before| point.at.since(before.at) <= GAP_MAX);
            let value = of(follows, point, name);
            if follows.is_none() || value.is_none() {
                pieces.push(Vec::new());
            }
            if let (Some(value), Some(piece)) = (value, pieces.last_mut()) {
                piece.push((now.since(point.at).as_secs_f64(), value));
            }
            before = Some(point);
        }
        pieces.retain(|piece| !piece.is_empty());
        Line {
            member,
            name: name.clone(),
            pieces,
        }
    };
    ring.names(state).iter().enumerate().map(line).collect()
}

fn most(lines: &[Line]) -> f64 {
    let samples = lines.iter().flat_map(|line| line.pieces.iter().flatten());
    samples.map(|(_, value)| *value).fold(0.0, f64::max)
}

/// To the next of 1, 2, 5, 10 and so on.
fn round_up(value: f64) -> f64 {
    let power = 10_f64.powf(value.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0];
    steps
        .into_iter()
        .map(|step| step * power)
        .find(|step| *step >= value)
        .unwrap_or(value)
}

/// When the leader changed, in seconds ago, and who came.
fn marks(ring: &Ring, now: Boottime) -> Vec<(f64, String)> {
    let points = ring.points();
    let changes = points.iter().zip(points.iter().skip(1)).filter_map(|(before, after)| {
        let leads = after.leader.as_ref()?;
        let changed = before.leader.as_ref() != Some(leads);
        changed.then(|| (now.since(after.at).as_secs_f64(), leads.clone()))
    });
    changes.filter(|(ago, _)| *ago <= HOUR.as_secs_f64()).collect()
}

fn x(seconds_ago: f64) -> f64 {
    LEFT + (WIDTH - LEFT - 2.0) * (1.0 - seconds_ago / HOUR.as_secs_f64()).clamp(0.0, 1.0)
}

fn y(part: f64) -> f64 {
    TOP + (HEIGHT - BOTTOM - TOP) * (1.0 - part.clamp(0.0, 1.0))
}

fn plot(
    class: &str,
    label: &str,
    lines: &[Line],
    scale: &dyn Fn(f64) -> f64,
    ticks: &[f64],
    per: &str,
    marks: &[(f64, String)],
) -> Markup {
    html! {
        svg class={ "plot " (class) } viewBox={ "0 0 " (n(WIDTH)) " " (n(HEIGHT)) } role="img" aria-label=(label) {
            @for tick in ticks {
                @let height = y(scale(*tick));
                path.grid d={ "M" (n(LEFT)) "," (n(height)) " H" (n(WIDTH)) } {}
                text.tick x=(n(LEFT - 8.0)) y=(n(height + 4.0)) text-anchor="end" { (bytes(*tick)) (per) " " }
            }
            @for minutes in [60_u32, 45, 30, 15, 0] {
                @let anchor = match minutes { 60 => "start", 0 => "end", _ => "middle" };
                text.tick x=(n(x(f64::from(minutes) * 60.0))) y=(n(HEIGHT - 4.0)) text-anchor=(anchor) {
                    @if minutes == 0 { "now " } @else { "-" (minutes) " min " }
                }
            }
            @for (ago, leader) in marks {
                path.mark d={ "M" (n(x(*ago))) "," (n(TOP)) " V" (n(HEIGHT - BOTTOM)) } { title { (leader) " leads" } }
                text.tick x=(n(x(*ago))) y="10" text-anchor="middle" { (leader) " leads " }
            }
            @for line in lines {
                @for piece in &line.pieces {
                    path.line.{ "line" (line.member) } d=(path(piece, scale)) { title { (line.name) } }
                }
            }
        }
    }
}

fn path(piece: &[Sample], scale: &dyn Fn(f64) -> f64) -> String {
    let mut path = String::new();
    for (index, (ago, value)) in piece.iter().enumerate() {
        let command = if index == 0 { 'M' } else { 'L' };
        path.push_str(&format!("{command}{},{}", n(x(*ago)), n(y(scale(*value)))));
    }
    if let [(ago, _)] = piece {
        // A single point is drawn as long as it counts for.
        path.push_str(&format!("h{}", n(x(0.0).min(x(*ago) + at(2)) - x(*ago))));
    }
    path
}

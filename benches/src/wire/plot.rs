//! The figures that have a goal, and those with TLS, as a picture: one bar for each way, its length the ratio to HAProxy.

use std::fmt::Write as _;

use super::measure::{Compare, Figure, Goal};
use super::tally::{Spread, Tally};
use super::way::Kind;

const WIDTH: f64 = 860.0;
const LEFT: f64 = 350.0;
const RIGHT: f64 = 110.0;
const TOP: f64 = 70.0;
const BAR: f64 = 11.0;
const GAP: f64 = 14.0;
/// What is longer is cut, and its number says so.
const RATIO_MAX: f64 = 2.5;

/// Left out where there is nothing to compare.
struct Group {
    title: String,
    goal: Option<f64>,
    bars: Vec<(Kind, Spread)>,
}

/// An SVG document.
pub(crate) fn plot(tallies: &[Tally]) -> String {
    let groups: Vec<Group> = tallies.iter().flat_map(groups).collect();
    let mut y = TOP;
    let mut body = String::new();
    for group in &groups {
        y = draw(group, y, &mut body);
    }
    let height = y + 30.0;
    let one = x(1.0);
    let loads = tallies.iter().map(Tally::load);
    let (least, most) = loads.fold((f64::MAX, 0.0), |(least, most): (f64, f64), (low, high)| {
        (least.min(low), most.max(high))
    });
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"16\" y=\"24\" font-size=\"16\" fill=\"#222\">Ratio to HAProxy, medians of rounds in turn, with quartiles</text>\n\
         <text x=\"16\" y=\"42\" fill=\"#555\">load {least:.1} to {most:.1}; one thread each; the dashed mark is the goal; shorter is better, \
         but for GB/s</text>\n\
         <line x1=\"{one}\" y1=\"{}\" x2=\"{one}\" y2=\"{}\" stroke=\"#444\"/>\n\
         <text x=\"{one}\" y=\"{}\" text-anchor=\"middle\" fill=\"#444\">HAProxy = 1</text>\n{body}</svg>\n",
        TOP - 6.0,
        y,
        TOP - 12.0
    )
}

fn groups(tally: &Tally) -> Vec<Group> {
    let figures = tally.figures().filter_map(|(index, figure)| {
        let goal = match figure.goal {
            Goal::RatioMax(goal) | Goal::RatioMin(goal) => Some(goal),
            Goal::None if tally.measure.tls && has_a_place(figure) => None,
            Goal::None | Goal::Max(_) => return None,
        };
        let shown = |kind: &Kind| !matches!(kind, Kind::Direct | Kind::HaProxy);
        let bars = tally.kinds().filter(shown);
        let bars: Vec<_> = bars
            .filter_map(|kind| Some((kind, tally.ratio(kind, index)?)))
            .collect();
        let added = if tally.added(Kind::Pgherd, index).is_some() {
            "added "
        } else {
            ""
        };
        let title = format!("{}: {added}{}", tally.measure.title, figure.name);
        (!bars.is_empty()).then_some(Group { title, goal, bars })
    });
    figures.collect()
}

/// With TLS no goals are set.
fn has_a_place(figure: &Figure) -> bool {
    figure.compare == Compare::Whole && ["p50", "CPU", "own"].iter().any(|start| figure.name.starts_with(start))
}

fn x(ratio: f64) -> f64 {
    LEFT + ratio.clamp(0.0, RATIO_MAX) / RATIO_MAX * (WIDTH - LEFT - RIGHT)
}

const fn color(kind: Kind) -> &'static str {
    match kind {
        Kind::Pgherd => "#1f6fb4",
        Kind::HaProxySplice => "#b9b9b9",
        Kind::PgBouncer => "#d9a15b",
        Kind::Before => "#9fc3e0",
        Kind::Direct | Kind::HaProxy => "#444444",
    }
}

/// Draws a group at `y`; where the next one begins.
fn draw(group: &Group, y: f64, body: &mut String) -> f64 {
    let mut at = y;
    for (index, (kind, ratio)) in group.bars.iter().enumerate() {
        let label = if index == 0 {
            escaped(&group.title)
        } else {
            String::new()
        };
        let middle = at + BAR - 2.0;
        let (end, low, high) = (x(ratio.median), x(ratio.low), x(ratio.high));
        let _ = writeln!(
            body,
            "<text x=\"{}\" y=\"{middle}\" text-anchor=\"end\" fill=\"#222\">{label}</text>\
             <rect x=\"{LEFT}\" y=\"{at}\" width=\"{:.1}\" height=\"{}\" fill=\"{}\"/>\
             <line x1=\"{low:.1}\" y1=\"{m:.1}\" x2=\"{high:.1}\" y2=\"{m:.1}\" stroke=\"#000\"/>\
             <text x=\"{:.1}\" y=\"{middle}\" fill=\"#222\" stroke=\"#fff\" stroke-width=\"3\" paint-order=\"stroke\">{:.2} {}</text>",
            LEFT - 8.0,
            end - LEFT,
            BAR - 1.0,
            color(*kind),
            end.max(high) + 5.0,
            ratio.median,
            kind.name(),
            m = at + BAR / 2.0 - 0.5,
        );
        at += BAR + 1.0;
    }
    if let Some(goal) = group.goal.map(x) {
        let _ = writeln!(
            body,
            "<line x1=\"{goal:.1}\" y1=\"{}\" x2=\"{goal:.1}\" y2=\"{}\" stroke=\"#c22\" stroke-dasharray=\"3 2\"/>",
            y - 3.0,
            at + 2.0
        );
    }
    at + GAP
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

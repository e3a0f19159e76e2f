//! A measure as text.

use std::fmt::Write as _;

use super::measure::{Figure, Goal};
use super::tally::{Spread, Tally};
use super::way::Kind;

/// Title, a line per figure and way, and what else was seen.
pub(crate) fn table(tally: &Tally) -> String {
    let (least, most) = tally.load();
    let mut text = format!(
        "{} ({}): rounds {}, load {least:.1} to {most:.1}\n",
        tally.measure.title,
        tally.measure.name,
        tally.rounds()
    );
    let _ = writeln!(
        text,
        "  {:<31} {:<14} {:>9} {:>9} {:>10}  {:<16} goal",
        "figure", "way", "median", "added", "x HAProxy", "quartiles"
    );
    for (index, figure) in tally.figures() {
        let mut name = figure.name;
        for kind in tally.kinds() {
            let Some(value) = tally.value(kind, index) else {
                continue;
            };
            let cells = [
                number(Some(value.median)),
                number(tally.added(kind, index)),
                number(tally.ratio(kind, index).map(|ratio| ratio.median)),
            ];
            let [median, added, ratio_median] = cells;
            let ratio = tally.ratio(kind, index);
            let quartiles = ratio.map_or(String::new(), |ratio| {
                format!("[{:.2} .. {:.2}]", ratio.low, ratio.high)
            });
            let goal = if kind == Kind::Pgherd {
                goal(figure, value, ratio)
            } else {
                String::new()
            };
            let line = format!(
                "  {name:<31} {:<14} {median:>9} {added:>9} {ratio_median:>10}  {quartiles:<16} {goal}",
                kind.name()
            );
            let _ = writeln!(text, "{}", line.trim_end());
            name = "";
        }
    }
    for remark in &tally.remarks {
        let _ = writeln!(text, "  {remark}");
    }
    text
}

/// Three digits that count.
pub(crate) fn number(value: Option<f64>) -> String {
    match value {
        None => String::new(),
        Some(value) if value.abs() >= 100.0 => format!("{value:.0}"),
        Some(value) if value.abs() >= 10.0 => format!("{value:.1}"),
        Some(value) if value.abs() >= 0.995 => format!("{value:.2}"),
        Some(value) => format!("{value:.3}"),
    }
}

/// What is wanted, and whether it is so.
fn goal(figure: &Figure, value: Spread, ratio: Option<Spread>) -> String {
    let (wanted, reached) = match figure.goal {
        Goal::None => return String::new(),
        Goal::RatioMax(most) => (format!("x <= {most:.2}"), ratio.map(|ratio| ratio.median <= most)),
        Goal::RatioMin(least) => (format!("x >= {least:.2}"), ratio.map(|ratio| ratio.median >= least)),
        Goal::Max(most) => (format!("<= {most:.1}"), Some(value.median <= most)),
    };
    let verdict = match reached {
        Some(true) => "reached",
        Some(false) => "MISSED",
        None => "not compared",
    };
    format!("{wanted}  {verdict}")
}

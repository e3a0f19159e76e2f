//! Pictures as SVG within the page. Colours and strokes are in its style sheet; what they show is said in words beside them.

mod plot;
mod topology;

pub(crate) use plot::{lag, swatch, throughput};
pub(crate) use topology::topology;

use maud::{Markup, html};

/// A number of an SVG, in tenths.
pub(crate) fn n(value: f64) -> String {
    let rounded = (value * 10.0).round() / 10.0;
    // Neither a minus before a zero nor a number that is none.
    if rounded == 0.0 || !rounded.is_finite() {
        return "0".to_owned();
    }
    rounded.to_string()
}

/// A bar that is full to `part` of 1, beginning at `begin` of 1.
pub(crate) fn bar(begin: f64, part: f64, class: &str) -> Markup {
    let begin = begin.clamp(0.0, 1.0);
    // Too short a part would not be seen.
    let part = part.clamp(0.004, 1.0 - begin.min(0.996));
    html! {
        svg.bar viewBox="0 0 1000 10" preserveAspectRatio="none" aria-hidden="true" {
            rect.track x="0" y="0" width="1000" height="10" {}
            rect.(class) x=(n(begin * 1000.0)) y="0" width=(n(part * 1000.0)) height="10" {}
        }
    }
}

/// An index as a number of a picture.
pub(crate) fn at(index: usize) -> f64 {
    u32::try_from(index).map_or(0.0, f64::from)
}

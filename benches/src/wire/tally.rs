//! What the rounds have given.

use super::measure::{Compare, Figure, Measure};
use super::way::Kind;

/// One work's numbers, one for each figure of its measure; none where there is nothing to count.
pub(crate) type Sample = Vec<Option<f64>>;

/// A median and its quartiles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Spread {
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.retain(|value| value.is_finite());
        values.sort_unstable_by(f64::total_cmp);
        Some(Self {
            median: quantile(&values, 2)?,
            low: quantile(&values, 1)?,
            high: quantile(&values, 3)?,
        })
    }
}

/// The value at so many quarters of a sorted list, between two neighbours if need be.
fn quantile(sorted: &[f64], quarters: usize) -> Option<f64> {
    let position = sorted.len().checked_sub(1)? * quarters;
    let (below, part) = (sorted.get(position / 4)?, position % 4);
    let above = sorted.get(position / 4 + 1).unwrap_or(below);
    let part = [0.0, 0.25, 0.5, 0.75].get(part)?;
    Some(below + (above - below) * part)
}

/// The value that a share of them, in thousandths, do not exceed.
pub(crate) fn percentile(sorted: &[u64], thousandths: usize) -> Option<u64> {
    let last = sorted.len().checked_sub(1)?;
    sorted.get((sorted.len() * thousandths / 1000).min(last)).copied()
}

/// What one way has given, and what is said of it beside its numbers.
struct Row {
    kind: Kind,
    samples: Vec<Sample>,
}

/// A measure and all its rounds.
pub(crate) struct Tally {
    pub(crate) measure: &'static Measure,
    rows: Vec<Row>,
    loads: Vec<f64>,
    /// What is said beside the numbers.
    pub(crate) remarks: Vec<String>,
}

impl Tally {
    pub(crate) fn new(measure: &'static Measure, kinds: impl Iterator<Item = Kind>) -> Self {
        let row = |kind| Row {
            kind,
            samples: Vec::new(),
        };
        Self {
            measure,
            rows: kinds.map(row).collect(),
            loads: Vec::new(),
            remarks: Vec::new(),
        }
    }

    pub(crate) fn begin_round(&mut self, load: f64) {
        self.loads.push(load);
    }

    pub(crate) fn add(&mut self, kind: Kind, sample: Sample) {
        if let Some(row) = self.rows.iter_mut().find(|row| row.kind == kind) {
            row.samples.push(sample);
        }
    }

    pub(crate) fn kinds(&self) -> impl Iterator<Item = Kind> {
        self.rows.iter().map(|row| row.kind)
    }

    pub(crate) fn figures(&self) -> impl Iterator<Item = (usize, &'static Figure)> + use<> {
        self.measure.figures.iter().enumerate()
    }

    pub(crate) fn rounds(&self) -> usize {
        self.loads.len()
    }

    /// The least and the greatest load at a round's beginning.
    pub(crate) fn load(&self) -> (f64, f64) {
        let fold = |with: fn(f64, f64) -> f64| self.loads.iter().copied().reduce(with).unwrap_or(0.0);
        (fold(f64::min), fold(f64::max))
    }

    fn values(&self, kind: Kind, figure: usize) -> Vec<Option<f64>> {
        let row = self.rows.iter().find(|row| row.kind == kind);
        let samples = row.map(|row| row.samples.as_slice()).unwrap_or_default();
        samples
            .iter()
            .map(|sample| sample.get(figure).copied().flatten())
            .collect()
    }

    /// A figure of a way.
    pub(crate) fn value(&self, kind: Kind, figure: usize) -> Option<Spread> {
        Spread::of(self.values(kind, figure).into_iter().flatten().collect())
    }

    /// What of it is compared, per round: all of it, or what it is more than without a proxy.
    fn compared(&self, kind: Kind, figure: usize) -> Vec<Option<f64>> {
        let values = self.values(kind, figure);
        match self.measure.figures.get(figure).map(|figure| figure.compare) {
            Some(Compare::Whole) => values,
            Some(Compare::Added) => {
                let direct = self.values(Kind::Direct, figure);
                let less = |(value, direct): (Option<f64>, Option<f64>)| Some(value? - direct?);
                values.into_iter().zip(direct).map(less).collect()
            }
            Some(Compare::Alone) | None => Vec::new(),
        }
    }

    /// What of a figure of a way is more than without a proxy.
    pub(crate) fn added(&self, kind: Kind, figure: usize) -> Option<f64> {
        let wanted = self.measure.figures.get(figure)?.compare == Compare::Added && kind != Kind::Direct;
        let added = wanted.then(|| self.compared(kind, figure))?;
        Some(Spread::of(added.into_iter().flatten().collect())?.median)
    }

    /// The ratio to HAProxy, of the rounds' own ratios.
    pub(crate) fn ratio(&self, kind: Kind, figure: usize) -> Option<Spread> {
        let (ours, theirs) = (self.compared(kind, figure), self.compared(Kind::HaProxy, figure));
        let ratio = |(ours, theirs): (Option<f64>, Option<f64>)| {
            let theirs = theirs.filter(|theirs| *theirs > 0.0)?;
            Some(ours? / theirs)
        };
        let direct_is_the_base = self.measure.figures.get(figure)?.compare == Compare::Added && kind == Kind::Direct;
        let ratios = ours.into_iter().zip(theirs).filter_map(ratio);
        (!direct_is_the_base).then(|| Spread::of(ratios.collect()))?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::measure::MEASURES;

    #[test]
    fn quartiles_lie_between_the_values() {
        let spread = Spread::of(vec![4.0, 1.0, 2.0, 3.0]).unwrap();
        assert_eq!((spread.low, spread.median, spread.high), (1.75, 2.5, 3.25));
        let one = Spread::of(vec![7.0]).unwrap();
        assert_eq!((one.low, one.median, one.high), (7.0, 7.0, 7.0));
        assert_eq!(Spread::of(vec![f64::NAN]), None);
    }

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<u64> = (1..=1000).collect();
        assert_eq!(
            [500, 990, 999, 1000].map(|at| percentile(&values, at)),
            [501, 991, 1000, 1000].map(Some)
        );
        assert_eq!(percentile(&[], 500), None);
    }

    #[test]
    fn what_is_added_is_compared_round_by_round() {
        let measure = MEASURES.iter().find(|measure| measure.name == "prepared").unwrap();
        let mut tally = Tally::new(measure, [Kind::Direct, Kind::Pgherd, Kind::HaProxy].into_iter());
        for (direct, ours, theirs) in [(10.0, 18.0, 20.0), (20.0, 28.0, 30.0), (10.0, 15.0, 20.0)] {
            tally.begin_round(1.0);
            for (kind, p50) in [(Kind::Direct, direct), (Kind::Pgherd, ours), (Kind::HaProxy, theirs)] {
                tally.add(kind, vec![Some(p50), None, None, None, None]);
            }
        }
        assert_eq!(tally.ratio(Kind::Pgherd, 0).unwrap().median, 0.8);
        assert_eq!(tally.added(Kind::HaProxy, 0), Some(10.0));
        assert_eq!(tally.ratio(Kind::Direct, 0), None);
        assert_eq!(tally.ratio(Kind::Pgherd, 3), None);
    }
}

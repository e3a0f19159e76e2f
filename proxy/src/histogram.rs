//! Durations, counted by how long they were. What is counted happens at most a few times per connection: never per message.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pgherd_cluster::name::MemberName;

/// The upper ends of the buckets, in microseconds: from a connection on the same host to the longest hold.
const BOUNDS_MICROS: [u64; 16] = [
    250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000,
    10_000_000, 30_000_000,
];

/// How long something took, over all times.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    buckets: [AtomicU64; BOUNDS_MICROS.len()],
    /// Longer than the last bound.
    beyond: AtomicU64,
    sum_micros: AtomicU64,
}

/// What a histogram has counted, as Prometheus wants it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Buckets {
    /// The upper end in seconds, and how many were no longer.
    pub(crate) cumulative: Vec<(f64, u64)>,
    /// In seconds.
    pub(crate) sum: f64,
    pub(crate) count: u64,
}

impl Histogram {
    pub(crate) fn observe(&self, duration: Duration) {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let index = BOUNDS_MICROS.partition_point(|bound| *bound < micros);
        let bucket = self.buckets.get(index).unwrap_or(&self.beyond);
        bucket.fetch_add(1, Ordering::Relaxed);
        self.sum_micros.fetch_add(micros, Ordering::Relaxed);
    }

    pub(crate) fn sum(&self) -> Duration {
        Duration::from_micros(self.sum_micros.load(Ordering::Relaxed))
    }

    pub(crate) fn buckets(&self) -> Buckets {
        let mut count = 0;
        let cumulative = BOUNDS_MICROS.iter().zip(&self.buckets).map(|(bound, bucket)| {
            count += bucket.load(Ordering::Relaxed);
            (Duration::from_micros(*bound).as_secs_f64(), count)
        });
        let cumulative = cumulative.collect();
        Buckets {
            cumulative,
            sum: self.sum().as_secs_f64(),
            count: count + self.beyond.load(Ordering::Relaxed),
        }
    }
}

/// One for each member that there has been: as many as there are routes.
#[derive(Debug, Default)]
pub(crate) struct ByMember(Mutex<BTreeMap<MemberName, Histogram>>);

impl ByMember {
    pub(crate) fn observe(&self, member: &MemberName, duration: Duration) {
        let mut histograms = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(histogram) = histograms.get(member) {
            return histogram.observe(duration);
        }
        histograms.entry(member.clone()).or_default().observe(duration);
    }

    pub(crate) fn buckets(&self) -> Vec<(MemberName, Buckets)> {
        let histograms = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let each = histograms.iter();
        each.map(|(member, histogram)| (member.clone(), histogram.buckets()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_duration_is_in_its_bucket_and_in_all_behind() {
        let histogram = Histogram::default();
        for micros in [0, 250, 251, 30_000_000, 30_000_001] {
            histogram.observe(Duration::from_micros(micros));
        }
        let buckets = histogram.buckets();
        assert_eq!(buckets.cumulative[0], (0.000_25, 2));
        assert_eq!(buckets.cumulative[1], (0.0005, 3));
        assert_eq!(buckets.cumulative.last(), Some(&(30.0, 4)));
        assert_eq!((buckets.count, histogram.sum()), (5, Duration::from_micros(60_000_502)));
    }
}

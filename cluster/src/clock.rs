//! The one clock that deadlines live on, and wall time for people.

use std::fmt;
use std::ops::{Add, Sub};
use std::time::{Duration, SystemTime};

use rustix::time::{ClockId, clock_gettime};

/// A point on CLOCK_BOOTTIME, in nanoseconds since boot.
///
/// The clock counts through suspend and is never stepped, so a deadline on it means the same to every process of the
/// machine; `std::time::Instant` stands still in suspend, and wall time jumps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Boottime(u64);

impl Boottime {
    /// The current time.
    #[must_use]
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        // The kernel never reports a negative time on this clock.
        let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
        let nanos = u64::try_from(now.tv_nsec).unwrap_or_default();
        Self(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
    }

    /// From nanoseconds since boot.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since boot.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// How long after `earlier` this is; zero when it is not after it.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Boottime {
    type Output = Self;

    fn add(self, by: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl Sub<Duration> for Boottime {
    type Output = Self;

    fn sub(self, by: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl fmt::Display for Boottime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3}s", Duration::from_nanos(self.0).as_secs_f64())
    }
}

/// Wall time, for logs, pages and records that people read; never for a decision.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the one place that reads wall time")]
pub fn wall_now() -> SystemTime {
    SystemTime::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_saturates_instead_of_wrapping() {
        let start = Boottime::from_nanos(5);
        assert_eq!(start - Duration::from_secs(1), Boottime::from_nanos(0));
        assert_eq!(
            Boottime::from_nanos(u64::MAX) + Duration::from_secs(1),
            Boottime::from_nanos(u64::MAX)
        );
        assert_eq!(start.since(Boottime::from_nanos(9)), Duration::ZERO);
    }

    #[test]
    fn the_clock_does_not_go_backwards() {
        let first = Boottime::now();
        assert!(Boottime::now() >= first);
        assert!(first.as_nanos() > 0);
    }
}

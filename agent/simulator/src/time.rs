//! The run's own time, and what each machine's clocks make of it.

use std::fmt;
use std::ops::{Add, Sub};
use std::time::Duration;

use pgherd_cluster::clock::Boottime;

/// Nanoseconds since the run began: the time that only the run itself and its oracle know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Time(pub(crate) u64);

impl Time {
    #[cfg(test)]
    pub(crate) const fn millis(millis: u64) -> Self {
        Self(millis * 1_000_000)
    }

    /// How long after `earlier` this is; zero when it is not after it.
    pub(crate) const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Time {
    type Output = Self;

    fn add(self, by: Duration) -> Self {
        Self(self.0.saturating_add(nanos(by)))
    }
}

impl Sub<Duration> for Time {
    type Output = Self;

    fn sub(self, by: Duration) -> Self {
        Self(self.0.saturating_sub(nanos(by)))
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = self.0 / 1000;
        write!(f, "{:3}.{:06}", micros / 1_000_000, micros % 1_000_000)
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The clocks of one machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clocks {
    booted: Time,
    /// How long it had been up by `booted`, for a machine that was started before the run.
    age: Duration,
    /// Wall time at the run's beginning, in milliseconds since 1970. An operator may set it, and it may jump.
    pub(crate) wall_millis: i64,
}

impl Clocks {
    pub(crate) const fn new(age: Duration) -> Self {
        Self {
            booted: Time(0),
            age,
            wall_millis: 1_800_000_000_000,
        }
    }

    /// What CLOCK_BOOTTIME says.
    pub(crate) fn boottime(self, now: Time) -> Boottime {
        Boottime::from_nanos(0) + self.age + now.since(self.booted)
    }

    /// When the machine's clock will say `at`, at the earliest now.
    pub(crate) fn when(self, at: Boottime, now: Time) -> Time {
        now + at.since(self.boottime(now))
    }

    /// The machine starts anew.
    pub(crate) fn reboot(&mut self, now: Time) {
        self.booted = now;
        self.age = Duration::from_secs(1);
    }

    /// Wall time in milliseconds since 1970.
    #[cfg(test)]
    pub(crate) fn wall(self, now: Time) -> i64 {
        self.wall_millis + i64::try_from(now.0 / 1_000_000).unwrap_or(i64::MAX / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_machine_counts_from_its_own_start() {
        let mut clocks = Clocks::new(Duration::from_secs(100));
        let now = Time::millis(5000);
        assert_eq!(clocks.boottime(now), Boottime::from_nanos(105_000_000_000));
        assert_eq!(
            clocks.when(Boottime::from_nanos(107_000_000_000), now),
            Time::millis(7000)
        );
        assert_eq!(clocks.when(Boottime::from_nanos(1), now), now);
        clocks.reboot(now);
        assert_eq!(clocks.boottime(Time::millis(6000)), Boottime::from_nanos(2_000_000_000));
    }

    #[test]
    fn wall_time_jumps_and_the_other_clock_does_not() {
        let mut clocks = Clocks::new(Duration::ZERO);
        let now = Time::millis(10);
        let before = (clocks.wall(now), clocks.boottime(now));
        clocks.wall_millis -= 3_600_000;
        assert_eq!(
            (clocks.wall(now), clocks.boottime(now)),
            (before.0 - 3_600_000, before.1)
        );
    }
}

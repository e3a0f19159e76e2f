//! Time as the fence counts it: CLOCK_BOOTTIME, which no operator sets and which goes on while the machine is suspended.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io;
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime, timerfd_create,
    timerfd_settime,
};

const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// A moment on CLOCK_BOOTTIME, in nanoseconds since the machine started. Processes of one machine agree on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Boottime(u64);

impl Boottime {
    /// The present moment.
    #[must_use]
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
        Self(seconds.saturating_mul(NANOS_PER_SECOND).saturating_add(nanos))
    }

    /// The moment `nanos` nanoseconds after the machine started.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the machine started.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// The moment `duration` later, or the last one that can be written down.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(nanos(duration)))
    }

    /// The moment `duration` earlier, or the machine's start.
    #[must_use]
    pub fn minus(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(nanos(duration)))
    }

    /// How long it is from `now` to this moment; zero when it has passed.
    #[must_use]
    pub const fn remaining(self, now: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(now.0))
    }
}

impl fmt::Display for Boottime {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "{}.{:03}s",
            self.0 / NANOS_PER_SECOND,
            self.0 % NANOS_PER_SECOND / 1_000_000
        )
    }
}

/// Whole nanoseconds, at most 584 years of them.
pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Wakes `poll` at a moment on CLOCK_BOOTTIME. A timeout of `poll` itself would stand still during a suspend, and a
/// deadline that passed meanwhile would be noticed late.
#[derive(Debug)]
pub(crate) struct Alarm(OwnedFd);

impl Alarm {
    pub(crate) fn new() -> io::Result<Self> {
        timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK).map(Self)
    }

    /// Readable from `at` on. Replaces what was set before; a moment that has passed rings at once.
    pub(crate) fn set(&self, at: Boottime) -> io::Result<()> {
        // A value of zero would switch the timer off.
        let nanos = at.0.max(1);
        let value = Timespec {
            tv_sec: i64::try_from(nanos / NANOS_PER_SECOND).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(nanos % NANOS_PER_SECOND).unwrap_or(0),
        };
        let interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        timerfd_settime(
            &self.0,
            TimerfdTimerFlags::ABSTIME,
            &Itimerspec {
                it_interval: interval,
                it_value: value,
            },
        )?;
        Ok(())
    }
}

impl AsFd for Alarm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_saturates_at_both_ends() {
        let start = Boottime::from_nanos(5);
        assert_eq!(start.minus(Duration::from_secs(1)), Boottime::from_nanos(0));
        assert_eq!(
            Boottime::from_nanos(u64::MAX).plus(Duration::MAX),
            Boottime::from_nanos(u64::MAX)
        );
        assert_eq!(start.remaining(Boottime::from_nanos(9)), Duration::ZERO);
        assert_eq!(Boottime::from_nanos(9).remaining(start), Duration::from_nanos(4));
    }

    #[test]
    fn the_clock_goes_forward() {
        let first = Boottime::now();
        assert!(first.as_nanos() > 0);
        assert!(Boottime::now() >= first);
    }
}

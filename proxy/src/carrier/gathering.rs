//! Who is looked at by time, and not whenever something comes.
//!
//! PostgreSQL sends what it has much of in pieces of 8 KiB, and each would wake the carrier: most of what a COPY out or a dump
//! costs. While one flows, the kernel does not tell of its pieces. A timer does, after [`BEAT`], and several have come by then. A
//! session at which a beat finds little is told of each piece again, so that no byte ever waits longer than one beat.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// How long what has come may wait for what follows.
pub(super) const BEAT: Duration = Duration::from_micros(200);
/// What a beat has to find for the next one: two of PostgreSQL's pieces.
pub(super) const FOUND_MIN: u32 = 16 * 1024;

/// The places of such sessions, and the timer that beats while there are any.
pub(super) struct Gathering {
    timer: OwnedFd,
    places: Vec<usize>,
}

impl Gathering {
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self {
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            places: Vec::new(),
        })
    }

    /// Becomes readable at a beat, which is an edge, so that it never has to be read.
    pub(super) const fn timer(&self) -> &OwnedFd {
        &self.timer
    }

    /// Whether the timer beats for one more.
    pub(super) fn begin(&mut self, place: usize) -> bool {
        let beats = !self.places.is_empty() || self.set().is_ok();
        if beats {
            self.places.push(place);
        }
        beats
    }

    pub(super) fn end(&mut self, place: usize) {
        self.places.retain(|other| *other != place);
    }

    /// The one at an index.
    pub(super) fn get(&self, index: usize) -> Option<usize> {
        self.places.get(index).copied()
    }

    /// Once all have been looked at: whether they will be again. A beat is timed from here, so that a carrier that is busy is
    /// not kept busier.
    pub(super) fn beats_again(&self) -> bool {
        self.places.is_empty() || self.set().is_ok()
    }

    /// One beat from now. The kernel would time the next one only when this one has been read.
    fn set(&self) -> io::Result<()> {
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        let setting = Itimerspec {
            it_interval: never,
            it_value: Timespec {
                tv_nsec: BEAT.subsec_nanos().into(),
                ..never
            },
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &setting)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::io::read;

    use super::*;

    /// Whether a beat comes; it is one that was not seen before.
    fn beats(gathering: &Gathering, within: Duration) -> bool {
        let mut timer = [PollFd::new(&gathering.timer, PollFlags::IN)];
        let within = Timespec::try_from(within).expect("a short time");
        poll(&mut timer, Some(&within)).expect("a timer");
        read(&gathering.timer, &mut [0_u8; 8]).is_ok()
    }

    #[test]
    fn it_beats_as_long_as_somebody_is_listened_to_by_time() {
        let (soon, at_once) = (Duration::from_secs(10), Duration::ZERO);
        let mut gathering = Gathering::new().expect("a timer");
        assert!(gathering.beats_again() && !beats(&gathering, at_once), "for nobody");
        assert!(gathering.begin(3) && gathering.begin(5) && beats(&gathering, soon));
        gathering.end(3);
        gathering.end(4);
        assert_eq!((gathering.get(0), gathering.get(1)), (Some(5), None));
        assert!(gathering.beats_again() && beats(&gathering, soon));
        gathering.end(5);
        assert!(gathering.beats_again() && !beats(&gathering, at_once));
        assert!(gathering.begin(6) && beats(&gathering, soon));
    }
}

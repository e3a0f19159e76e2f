//! The steps by which PostgreSQL is ended whole. Pure: says when to look, when to kill and when to look again.

use std::time::Duration;

use crate::clock::Boottime;

/// How long PostgreSQL may take to leave by itself: after SIGQUIT, or after its postmaster has exited.
pub(crate) const GRACE_MAX: Duration = Duration::from_millis(200);
/// The first wait between two looks at what is left. It doubles, for each look walks through /proc.
const PAUSE_MIN: Duration = Duration::from_millis(5);
/// The longest wait between two looks: processes that even SIGKILL does not end hang in the kernel.
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// How a postmaster left, as far as it matters to those it left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Departure {
    /// By `exit`: it has waited for its backends, and only the log collector may still be writing the last lines.
    Orderly,
    /// By a signal: its backends run on, and they commit for their clients until they notice.
    Killed,
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing before `wake_at`.
    Wait,
    /// Find out whether a process of the instance is left.
    Look,
    /// SIGKILL to every process of the instance that is found.
    Kill,
}

/// An end under way. It is over when a look finds nothing.
#[derive(Debug)]
pub(crate) struct Ending {
    kill_at: Boottime,
    look_at: Boottime,
    pause: Duration,
    /// Nobody asked for it: the postmaster has exited in order.
    is_only_seen: bool,
}

impl Ending {
    /// The postmaster has just been sent SIGQUIT. It is given `grace`, at most 200 ms.
    pub(crate) fn after_quit(now: Boottime, grace: Duration) -> Self {
        let kill_at = now.plus(grace.min(GRACE_MAX));
        Self {
            kill_at,
            look_at: kill_at,
            pause: PAUSE_MIN,
            is_only_seen: false,
        }
    }

    /// There is no postmaster that could be asked.
    pub(crate) fn without_postmaster(now: Boottime) -> Self {
        Self {
            kill_at: now,
            look_at: now,
            pause: PAUSE_MIN,
            is_only_seen: false,
        }
    }

    /// The postmaster has exited although nobody was ending the instance.
    pub(crate) fn after_exit(now: Boottime, departure: Departure) -> Self {
        let mut ending = Self::after_quit(now, GRACE_MAX);
        ending.postmaster_died(now, departure);
        ending.is_only_seen = departure == Departure::Orderly;
        ending
    }

    /// The postmaster died while the end was under way.
    pub(crate) fn postmaster_died(&mut self, now: Boottime, departure: Departure) {
        self.look_at = now;
        if departure == Departure::Killed {
            self.kill_at = self.kill_at.min(now);
        }
    }

    /// Asked again, perhaps with less time than before.
    pub(crate) fn hurry(&mut self, now: Boottime, grace: Duration) {
        self.is_only_seen = false;
        self.kill_at = self.kill_at.min(now.plus(grace.min(GRACE_MAX)));
        self.look_at = self.look_at.min(self.kill_at);
    }

    /// Whether it is over as soon as others have started the next postmaster. Who asked for an end means that one too.
    pub(crate) fn is_only_seen(&self) -> bool {
        self.is_only_seen
    }

    /// The step that is due.
    pub(crate) fn step(&mut self, now: Boottime) -> Step {
        if now < self.look_at && now < self.kill_at {
            return Step::Wait;
        }
        self.look_at = now.plus(self.pause);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        if now < self.kill_at {
            // The kill is never put off by looking.
            self.look_at = self.look_at.min(self.kill_at);
            return Step::Look;
        }
        self.kill_at = self.look_at;
        Step::Kill
    }

    /// When the next step is due.
    pub(crate) fn wake_at(&self) -> Boottime {
        self.look_at.min(self.kill_at)
    }
}

/// The grace that a fence can afford: the kill has to begin before half of the margin is gone, for then the sentinel acts.
pub(crate) fn grace_within(margin: Duration) -> Duration {
    GRACE_MAX.min(margin * 2 / 5)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Boottime {
        Boottime::from_nanos(millis * 1_000_000)
    }

    /// The steps from `from` until `until`, with their times in milliseconds.
    fn steps(ending: &mut Ending, from: u64, until: u64) -> Vec<(u64, Step)> {
        let mut steps = Vec::new();
        let mut now = at(from);
        while now <= at(until) {
            let step = ending.step(now);
            if step != Step::Wait {
                steps.push((now.as_nanos() / 1_000_000, step));
            }
            assert!(ending.wake_at() > now, "the loop would spin");
            now = ending.wake_at();
        }
        steps
    }

    #[test]
    fn after_a_quit_the_kill_comes_200_ms_later_and_again_until_nothing_is_left() {
        let mut ending = Ending::after_quit(at(1000), Duration::from_secs(9));
        assert_eq!(ending.step(at(1000)), Step::Wait);
        let kill = Step::Kill;
        assert_eq!(
            steps(&mut ending, 1199, 1300),
            [(1200, kill), (1205, kill), (1215, kill), (1235, kill), (1275, kill)]
        );
    }

    #[test]
    fn a_killed_postmaster_means_killing_at_once() {
        assert_eq!(
            Ending::after_exit(at(1000), Departure::Killed).step(at(1000)),
            Step::Kill
        );
        let mut ending = Ending::after_quit(at(1000), Duration::from_secs(1));
        ending.postmaster_died(at(1050), Departure::Killed);
        assert_eq!(ending.step(at(1050)), Step::Kill);
        assert_eq!(Ending::without_postmaster(at(1000)).step(at(1000)), Step::Kill);
    }

    #[test]
    fn after_an_orderly_exit_the_log_collector_gets_time_to_finish() {
        let mut ending = Ending::after_exit(at(1000), Departure::Orderly);
        let steps = steps(&mut ending, 1000, 1200);
        assert_eq!(steps.first(), Some(&(1000, Step::Look)));
        assert_eq!(steps.last(), Some(&(1200, Step::Kill)));
        assert!(steps.iter().rev().skip(1).all(|(_, step)| *step == Step::Look));
    }

    #[test]
    fn an_end_is_only_seen_until_somebody_asks_for_it() {
        let mut ending = Ending::after_exit(at(1000), Departure::Orderly);
        assert!(ending.is_only_seen());
        ending.hurry(at(1000), GRACE_MAX);
        assert!(!ending.is_only_seen());
        assert!(!Ending::after_exit(at(1000), Departure::Killed).is_only_seen());
        assert!(!Ending::after_quit(at(1000), GRACE_MAX).is_only_seen());
        assert!(!Ending::without_postmaster(at(1000)).is_only_seen());
    }

    #[test]
    fn hurrying_only_ever_shortens() {
        let mut ending = Ending::after_quit(at(1000), Duration::from_millis(100));
        ending.hurry(at(1010), Duration::from_millis(200));
        assert_eq!(ending.wake_at(), at(1100));
        ending.hurry(at(1010), Duration::from_millis(20));
        assert_eq!(ending.wake_at(), at(1030));
        assert_eq!(ending.step(at(1030)), Step::Kill);
    }

    #[test]
    fn the_grace_leaves_half_of_the_margin_to_the_sentinel() {
        assert_eq!(grace_within(Duration::from_millis(500)), Duration::from_millis(200));
        assert_eq!(grace_within(Duration::from_millis(100)), Duration::from_millis(40));
        assert_eq!(grace_within(Duration::from_secs(3)), GRACE_MAX);
    }
}

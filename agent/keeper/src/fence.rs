//! Until when PostgreSQL may be writable. Pure: requests and the time in, verdicts out; ending processes is done elsewhere.
//!
//! It is public for simulations, which drive the very code that the keeper runs: whoever does has to call
//! [`Fence::begin`] no later than [`Fence::wake_at`], to end the instance when it returns a term, and to call
//! [`Fence::instance_ended`] once nothing of it is left.

use std::collections::VecDeque;
use std::time::Duration;

use crate::clock::{Boottime, nanos};
use crate::protocol::{Malformed, Refusal};
use crate::wire::{Reader, Writer};

/// How many terms are remembered as final. A message about an older one cannot still be under way: the agent that sent
/// it has been replaced, or has had every one of these refused.
const FINAL_TERMS_MAX: usize = 64;

/// One holding of the lease, and how long it may last as far as is proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Armed {
    /// The create revision of the leader key. Compared for equality only: a restored etcd counts backwards.
    pub term: u64,
    /// When PostgreSQL must have ended.
    pub deadline: Boottime,
    /// How long before the deadline the end begins.
    pub margin: Duration,
}

impl Armed {
    /// When the end begins.
    #[must_use]
    pub fn fence_at(self) -> Boottime {
        self.deadline.minus(self.margin)
    }

    /// The same deadline with an end that begins so much earlier that it is over when something fires, which may be
    /// before the deadline.
    #[must_use]
    pub fn over_by(self, fires_at: Option<Boottime>) -> Self {
        let earlier = fires_at.map_or(Duration::ZERO, |fires_at| self.deadline.remaining(fires_at));
        Self {
            margin: self.margin.saturating_add(earlier),
            ..self
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Disarmed,
    Armed(Armed),
    /// The term is over, and PostgreSQL is not known to have ended.
    Fencing(Armed),
    /// Maintenance: whatever runs stays, and nobody watches it.
    Paused {
        /// Whether a term was armed, so that what runs may be writable.
        was_armed: bool,
    },
}

/// The fence of one instance. Input is [`arm`](Self::arm), [`disarm`](Self::disarm), [`pause`](Self::pause),
/// [`begin`](Self::begin), [`instance_adopted`](Self::instance_adopted) and [`instance_ended`](Self::instance_ended); the
/// rest only looks.
///
/// Whether a process of the instance is left is asked through a closure, for it costs a walk through /proc that a
/// renewal does not need.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fence {
    state: State,
    final_terms: VecDeque<u64>,
    /// Whether something runs that was writable when it was adopted, which no deadline had allowed.
    adopted_writable: bool,
}

impl Fence {
    /// Nothing is armed, and no term is final.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            state: State::Disarmed,
            final_terms: VecDeque::new(),
            adopted_writable: false,
        }
    }

    /// Sets the deadline of a new term, or moves that of the present one further away. Returns what is in force then.
    ///
    /// # Errors
    /// When the term is final, comes too late, or another one's instance is left. Nothing has changed then.
    pub fn arm(&mut self, asked: Armed, now: Boottime, left: impl FnOnce() -> bool) -> Result<Armed, Refusal> {
        if self.final_terms.contains(&asked.term) {
            return Err(Refusal::TermIsFinal);
        }
        if let State::Armed(held) = self.state
            && held.fence_at() <= now
        {
            // The loop has not come to the fence yet. The term is final all the same, and nothing may take its place
            // before the fence has begun.
            return Err(if held.term == asked.term {
                Refusal::TermIsFinal
            } else {
                Refusal::OtherTermRuns
            });
        }
        if asked.fence_at() <= now {
            return Err(Refusal::DeadlinePassed);
        }
        let armed = match self.state {
            // In pause nobody has watched what runs, so that no term can be said to have it.
            State::Disarmed | State::Paused { .. } => asked,
            State::Armed(held) if held.term == asked.term && held.deadline >= asked.deadline => held,
            State::Armed(held) if held.term == asked.term => asked,
            State::Armed(_) | State::Fencing(_) => {
                if left() {
                    return Err(Refusal::OtherTermRuns);
                }
                asked
            }
        };
        self.state = State::Armed(armed);
        Ok(armed)
    }

    /// Writes down what the keeper after an upgrade has to know. A fence that has begun is not handed on.
    pub(crate) fn encode(&self, writer: &mut Writer<'_>) {
        match self.state {
            State::Disarmed | State::Fencing(_) => writer.u8(0),
            State::Armed(armed) => {
                writer.u8(1);
                writer.u64(armed.term);
                writer.u64(armed.deadline.as_nanos());
                writer.u64(nanos(armed.margin));
            }
            State::Paused { was_armed } => {
                writer.u8(2);
                writer.u8(u8::from(was_armed));
            }
        }
        writer.u8(u8::from(self.adopted_writable));
        writer.count(self.final_terms.len());
        for term in &self.final_terms {
            writer.u64(*term);
        }
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let state = match reader.u8()? {
            0 => State::Disarmed,
            1 => State::Armed(Armed {
                term: reader.u64()?,
                deadline: Boottime::from_nanos(reader.u64()?),
                margin: Duration::from_nanos(reader.u64()?),
            }),
            2 => State::Paused {
                was_armed: reader.flag()?,
            },
            state => {
                return Err(Malformed::Value {
                    value: i64::from(state),
                });
            }
        };
        let adopted_writable = reader.flag()?;
        let final_terms = (0..reader.count_within(8, FINAL_TERMS_MAX)?)
            .map(|_| reader.u64())
            .collect::<Result<_, _>>()?;
        Ok(Self {
            state,
            final_terms,
            adopted_writable,
        })
    }

    /// Takes the deadline away, which only an instance that has ended may ask for. Ends a pause that began without one.
    ///
    /// # Errors
    /// When something is left that may be writable.
    pub fn disarm(&mut self, left: impl FnOnce() -> bool) -> Result<(), Refusal> {
        let guards = !matches!(self.state, State::Disarmed | State::Paused { was_armed: false });
        if (guards || self.adopted_writable) && left() {
            return Err(Refusal::InstanceLeft);
        }
        self.state = State::Disarmed;
        self.adopted_writable = false;
        Ok(())
    }

    /// Suspends the fence until `arm` or `disarm`. One that has begun, or is due, is not stopped by that.
    ///
    /// # Errors
    /// When the fence has begun, or is due.
    pub fn pause(&mut self, now: Boottime) -> Result<(), Refusal> {
        let was_armed = match self.state {
            State::Disarmed => false,
            State::Armed(armed) if now < armed.fence_at() => true,
            State::Armed(_) | State::Fencing(_) => return Err(Refusal::TermIsFinal),
            State::Paused { was_armed } => was_armed,
        };
        self.state = State::Paused { was_armed };
        Ok(())
    }

    /// Makes the term final when its time has come. Returns it once; the caller then ends the instance.
    pub fn begin(&mut self, now: Boottime) -> Option<Armed> {
        let State::Armed(armed) = self.state else { return None };
        if now < armed.fence_at() {
            return None;
        }
        self.state = State::Fencing(armed);
        if self.final_terms.len() == FINAL_TERMS_MAX {
            self.final_terms.pop_front();
        }
        self.final_terms.push_back(armed.term);
        Some(armed)
    }

    /// A server that somebody else has started counts as the instance from here on. One that is writable may be armed or
    /// ended, but a pause cannot end with it and without a deadline.
    pub fn instance_adopted(&mut self, writable: bool) {
        self.adopted_writable |= writable;
    }

    /// No process of the instance is left. A fence that has begun is over by that; one that has not stays armed, for
    /// the agent may restart PostgreSQL in place under the same term. A pause goes on, and nothing writable runs in it.
    pub fn instance_ended(&mut self) {
        self.adopted_writable = false;
        match &mut self.state {
            State::Fencing(_) => self.state = State::Disarmed,
            State::Paused { was_armed } => *was_armed = false,
            State::Disarmed | State::Armed(_) => {}
        }
    }

    /// Whether PostgreSQL may be writable at `now`.
    #[must_use]
    pub fn may_write(&self, now: Boottime) -> bool {
        matches!(self.state, State::Armed(armed) if now < armed.fence_at())
    }

    /// Whether PostgreSQL may be made writable at `now`: under a deadline, or in maintenance, where an operator answers
    /// for it.
    #[must_use]
    pub fn may_become_writable(&self, now: Boottime) -> bool {
        self.may_write(now) || self.is_paused()
    }

    /// PostgreSQL is being made writable. In maintenance no term has it, and its end then needs one.
    pub fn becomes_writable(&mut self) {
        if let State::Paused { was_armed } = &mut self.state {
            *was_armed = true;
        }
    }

    /// The deadline that another process should enforce too: of a term that is armed or being fenced.
    #[must_use]
    pub fn deadline(&self) -> Option<Armed> {
        match self.state {
            State::Disarmed | State::Paused { .. } => None,
            State::Armed(armed) | State::Fencing(armed) => Some(armed),
        }
    }

    /// The term in force, if its fence has not begun.
    #[must_use]
    pub fn armed(&self) -> Option<Armed> {
        match self.state {
            State::Armed(armed) => Some(armed),
            State::Disarmed | State::Fencing(_) | State::Paused { .. } => None,
        }
    }

    /// Whether PostgreSQL is left alone, whatever happens to keeper and agent.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        matches!(self.state, State::Paused { .. })
    }

    /// Whether the fence has begun and is not over.
    #[must_use]
    pub fn is_fencing(&self) -> bool {
        matches!(self.state, State::Fencing(_))
    }

    /// The last term whose fence has begun.
    #[must_use]
    pub fn last_final_term(&self) -> Option<u64> {
        self.final_terms.back().copied()
    }

    /// When `begin` has something to do.
    #[must_use]
    pub fn wake_at(&self) -> Option<Boottime> {
        self.armed().map(Armed::fence_at)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEFT: fn() -> bool = || true;
    const GONE: fn() -> bool = || false;

    fn at(seconds: u64) -> Boottime {
        Boottime::from_nanos(seconds * 1_000_000_000)
    }

    /// A term whose fence begins one second before its deadline.
    fn term(term: u64, deadline: u64) -> Armed {
        Armed {
            term,
            deadline: at(deadline),
            margin: Duration::from_secs(1),
        }
    }

    fn armed(armed: Armed) -> Fence {
        Fence {
            state: State::Armed(armed),
            ..Fence::new()
        }
    }

    fn fencing(armed: Armed) -> Fence {
        Fence {
            state: State::Fencing(armed),
            final_terms: VecDeque::from([armed.term]),
            ..Fence::new()
        }
    }

    fn verdict(mut fence: Fence, asked: Armed, now: u64, left: fn() -> bool) -> Result<Armed, Refusal> {
        fence.arm(asked, at(now), left)
    }

    #[test]
    fn a_first_term_is_accepted_whatever_runs_if_it_comes_in_time() {
        let seven = term(7, 10);
        assert_eq!(verdict(Fence::new(), seven, 5, GONE), Ok(seven));
        assert_eq!(
            verdict(Fence::new(), seven, 5, LEFT),
            Ok(seven),
            "a standby about to be promoted"
        );
        assert_eq!(verdict(Fence::new(), seven, 9, GONE), Err(Refusal::DeadlinePassed));
    }

    #[test]
    fn a_renewal_moves_the_deadline_forward_only_and_not_once_the_fence_is_due() {
        let seven = term(7, 10);
        assert_eq!(verdict(armed(seven), term(7, 12), 5, LEFT), Ok(term(7, 12)));
        assert_eq!(verdict(armed(seven), term(7, 8), 5, LEFT), Ok(seven));
        assert_eq!(verdict(armed(seven), term(7, 12), 8, LEFT), Ok(term(7, 12)));
        assert_eq!(verdict(armed(seven), term(7, 12), 9, LEFT), Err(Refusal::TermIsFinal));
        assert_eq!(verdict(armed(seven), term(7, 12), 9, GONE), Err(Refusal::TermIsFinal));
    }

    #[test]
    fn another_term_takes_an_instance_that_has_ended() {
        let seven = term(7, 10);
        assert_eq!(verdict(armed(seven), term(8, 12), 5, LEFT), Err(Refusal::OtherTermRuns));
        assert_eq!(verdict(armed(seven), term(8, 12), 5, GONE), Ok(term(8, 12)));
        assert_eq!(
            verdict(armed(seven), term(8, 12), 9, GONE),
            Err(Refusal::OtherTermRuns),
            "not before the fence"
        );
        assert_eq!(
            verdict(fencing(seven), term(8, 20), 11, LEFT),
            Err(Refusal::OtherTermRuns)
        );
        assert_eq!(verdict(fencing(seven), term(8, 20), 11, GONE), Ok(term(8, 20)));
        assert_eq!(
            verdict(fencing(seven), term(7, 20), 11, GONE),
            Err(Refusal::TermIsFinal)
        );
    }

    #[test]
    fn a_fence_begins_once_and_its_term_stays_final() {
        let mut fence = armed(term(7, 10));
        assert_eq!(fence.wake_at(), Some(at(9)));
        assert_eq!(fence.begin(at(8)), None);
        assert!(fence.may_write(at(8)));
        assert_eq!(fence.begin(at(9)), Some(term(7, 10)));
        assert_eq!(fence.begin(at(9)), None);
        assert!(!fence.may_write(at(9)));
        assert_eq!(fence.deadline(), Some(term(7, 10)));
        fence.instance_ended();
        assert_eq!(fence.deadline(), None);
        assert_eq!(fence.last_final_term(), Some(7));
        assert_eq!(fence.arm(term(7, 30), at(12), GONE), Err(Refusal::TermIsFinal));
        assert_eq!(fence.arm(term(8, 30), at(12), GONE), Ok(term(8, 30)));
        assert_eq!(fence.arm(term(7, 40), at(12), GONE), Err(Refusal::TermIsFinal));
    }

    #[test]
    fn disarming_takes_an_instance_that_has_ended() {
        let mut fence = armed(term(7, 10));
        assert_eq!(fence.disarm(LEFT), Err(Refusal::InstanceLeft));
        assert!(fence.may_write(at(1)));
        assert_eq!(fence.disarm(GONE), Ok(()));
        assert!(!fence.may_write(at(1)));
        assert_eq!(fence.disarm(LEFT), Ok(()), "there is nothing to take away");
    }

    #[test]
    fn an_end_that_was_asked_for_leaves_the_term_armed() {
        let mut fence = armed(term(7, 10));
        fence.instance_ended();
        assert_eq!(fence.armed(), Some(term(7, 10)));
    }

    #[test]
    fn a_pause_suspends_the_fence_until_it_is_armed_again() {
        let mut fence = armed(term(7, 10));
        assert_eq!(fence.pause(at(5)), Ok(()));
        assert!(fence.is_paused() && !fence.may_write(at(5)));
        assert_eq!((fence.deadline(), fence.wake_at()), (None, None));
        assert_eq!(fence.begin(at(20)), None);
        assert_eq!(fence.pause(at(20)), Ok(()), "asked twice");
        assert_eq!(fence.arm(term(7, 21), at(20), LEFT), Err(Refusal::DeadlinePassed));
        assert!(fence.is_paused());
        assert_eq!(fence.arm(term(7, 30), at(20), LEFT), Ok(term(7, 30)));
        assert!(!fence.is_paused());
        assert_eq!(fence.begin(at(29)), Some(term(7, 30)));
    }

    #[test]
    fn what_ran_under_a_term_may_be_taken_over_by_another_after_a_pause() {
        let mut fence = armed(term(7, 10));
        assert_eq!(fence.pause(at(5)), Ok(()));
        assert_eq!(fence.arm(term(8, 30), at(20), LEFT), Ok(term(8, 30)));
    }

    #[test]
    fn what_becomes_writable_in_a_pause_does_not_lose_its_fence_by_its_end() {
        let mut fence = Fence::new();
        assert!(!fence.may_become_writable(at(1)));
        assert_eq!(fence.pause(at(1)), Ok(()));
        assert!(fence.may_become_writable(at(1)) && !fence.may_write(at(1)));
        fence.becomes_writable();
        assert_eq!(fence.disarm(LEFT), Err(Refusal::InstanceLeft));
        fence.instance_ended();
        assert_eq!(fence.disarm(LEFT), Ok(()));
    }

    #[test]
    fn a_pause_comes_too_late_for_a_fence_that_is_due() {
        assert_eq!(armed(term(7, 10)).pause(at(9)), Err(Refusal::TermIsFinal));
        assert_eq!(fencing(term(7, 10)).pause(at(9)), Err(Refusal::TermIsFinal));
    }

    #[test]
    fn a_pause_is_ended_without_a_term_only_if_nothing_writable_can_run() {
        let mut standby = Fence::new();
        assert_eq!(standby.pause(at(1)), Ok(()));
        assert_eq!(standby.disarm(LEFT), Ok(()));
        assert!(!standby.is_paused());
        let mut primary = armed(term(7, 10));
        assert_eq!(primary.pause(at(1)), Ok(()));
        assert_eq!(primary.disarm(LEFT), Err(Refusal::InstanceLeft));
        primary.instance_ended();
        assert!(primary.is_paused());
        assert_eq!(
            primary.disarm(LEFT),
            Ok(()),
            "what runs now was started without a deadline"
        );
    }

    #[test]
    fn what_was_adopted_writable_is_not_let_go_without_a_deadline() {
        let mut standby = Fence::new();
        standby.instance_adopted(false);
        assert_eq!((standby.pause(at(1)), standby.disarm(LEFT)), (Ok(()), Ok(())));
        let mut primary = Fence::new();
        assert_eq!(primary.pause(at(1)), Ok(()));
        primary.instance_adopted(true);
        assert_eq!(primary.disarm(LEFT), Err(Refusal::InstanceLeft));
        assert_eq!(primary.clone().arm(term(7, 10), at(1), LEFT), Ok(term(7, 10)));
        primary.instance_ended();
        assert_eq!(
            primary.disarm(LEFT),
            Ok(()),
            "what runs now was started without a deadline"
        );
    }

    #[test]
    fn an_end_that_must_be_over_earlier_begins_earlier() {
        let seven = term(7, 30);
        assert_eq!(seven.over_by(None), seven);
        assert_eq!(seven.over_by(Some(at(31))), seven);
        let early = seven.over_by(Some(at(25)));
        assert_eq!((early.deadline, early.fence_at()), (at(30), at(24)));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Arm { term: u64, ahead: u64 },
        Disarm,
        Pause,
        Pass { seconds: u64 },
        Ended,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..4_u64, 0..8_u64).prop_map(|(term, ahead)| Step::Arm { term, ahead }),
            Just(Step::Disarm),
            Just(Step::Pause),
            (0..5_u64).prop_map(|seconds| Step::Pass { seconds }),
            Just(Step::Ended),
        ]
    }

    proptest! {
        /// Whatever is asked, writing is allowed only before the fence of the newest accepted deadline, and never
        /// again under a term that has had its fence begun. A pause ends nothing and allows nothing, and after it the
        /// fence is what it is without one.
        #[test]
        fn no_order_of_requests_revives_a_term(steps in prop::collection::vec(step(), 1..60), left in any::<bool>()) {
            let mut fence = Fence::new();
            let mut now = 10;
            let mut dead = Vec::new();
            let mut paused = false;
            for step in steps {
                match step {
                    Step::Arm { term: number, ahead } => {
                        let asked = term(number, now + ahead);
                        if let Ok(held) = fence.arm(asked, at(now), || left) {
                            prop_assert!(!dead.contains(&number));
                            prop_assert!(held.fence_at() > at(now) && held.deadline >= asked.deadline);
                            prop_assert_eq!(fence.wake_at(), Some(held.fence_at()));
                            prop_assert_eq!(fence.clone().begin(held.fence_at()), Some(held));
                            paused = false;
                        }
                    }
                    Step::Disarm => paused &= fence.disarm(|| left).is_err(),
                    Step::Pause => paused |= fence.pause(at(now)).is_ok(),
                    Step::Pass { seconds } => now += seconds,
                    Step::Ended => fence.instance_ended(),
                }
                let begun = fence.begin(at(now)).map(|armed| armed.term);
                prop_assert_eq!(fence.is_paused(), paused);
                if paused {
                    prop_assert_eq!((begun, fence.deadline(), fence.wake_at()), (None, None, None));
                    prop_assert!(!fence.may_write(at(now)));
                }
                dead.extend(begun);
                if fence.may_write(at(now)) {
                    let held = fence.armed().expect("only an armed fence allows writing");
                    prop_assert!(!dead.contains(&held.term) && at(now) < held.fence_at());
                }
            }
        }
    }
}

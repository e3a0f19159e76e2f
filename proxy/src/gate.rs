//! Places of which only so many are taken at a time, handed to whoever has waited longest.
//!
//! Nothing here waits or looks at a clock but the client that holds a [`Turn`].

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use tokio::sync::oneshot;

/// Since when a client waits for anything, and a number that no other has.
type Ticket = (Boottime, u64);

#[derive(Debug)]
struct Inner {
    inside: usize,
    limit: usize,
    tickets: u64,
    waiting: BTreeMap<Ticket, oneshot::Sender<()>>,
}

impl Inner {
    /// Gives free places to those who wait. A turn that was given up meanwhile gives its place back when it is dropped.
    fn hand_out(&mut self) {
        while self.inside < self.limit
            && let Some((_, turn)) = self.waiting.pop_first()
        {
            self.inside += 1;
            let _ = turn.send(());
        }
    }

    fn leave(&mut self) {
        self.inside = self.inside.saturating_sub(1);
        self.hand_out();
    }
}

/// Places under one limit.
#[derive(Clone, Debug)]
pub(crate) struct Gate(Arc<Mutex<Inner>>);

/// What a gate has for a client.
#[derive(Debug)]
pub(crate) enum Entry {
    /// A place.
    In(Pass),
    /// A place in the queue.
    Wait(Turn),
    /// Neither.
    Full,
}

/// How full a gate is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Crowd {
    pub(crate) inside: usize,
    pub(crate) waiting: usize,
}

/// A place, given back when dropped.
#[derive(Debug)]
pub(crate) struct Pass(Gate);

/// A place in the queue, given back when dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    gate: Gate,
    ticket: Ticket,
    call: oneshot::Receiver<()>,
    called: bool,
    /// Its place has become a pass.
    taken: bool,
}

impl Gate {
    /// With `limit` places; nothing for as many as are asked for.
    pub(crate) fn new(limit: Option<usize>) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            inside: 0,
            limit: limit.unwrap_or(usize::MAX),
            tickets: 0,
            waiting: BTreeMap::new(),
        })))
    }

    /// No code that could panic runs while the lock is held.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a client that waits since `since`, or a turn among `waiting_max` that wait.
    pub(crate) fn enter(&self, since: Boottime, waiting_max: usize) -> Entry {
        let mut inner = self.lock();
        if inner.inside < inner.limit {
            inner.inside += 1;
            return Entry::In(Pass(self.clone()));
        }
        if inner.waiting.len() >= waiting_max {
            return Entry::Full;
        }
        Entry::Wait(self.queue(&mut inner, since))
    }

    /// A place beyond the limit, for whoever has a right to one.
    pub(crate) fn enter_over(&self) -> Pass {
        let mut inner = self.lock();
        inner.inside += 1;
        Pass(self.clone())
    }

    /// A place, waited for as long as it takes. For few.
    pub(crate) async fn wait(&self, since: Boottime) -> Pass {
        let turn = {
            let mut inner = self.lock();
            if inner.inside < inner.limit {
                inner.inside += 1;
                return Pass(self.clone());
            }
            self.queue(&mut inner, since)
        };
        turn.granted().await
    }

    fn queue(&self, inner: &mut Inner, since: Boottime) -> Turn {
        let ticket = (since, inner.tickets);
        inner.tickets += 1;
        let (caller, call) = oneshot::channel();
        inner.waiting.insert(ticket, caller);
        Turn {
            gate: self.clone(),
            ticket,
            call,
            called: false,
            taken: false,
        }
    }

    pub(crate) fn crowd(&self) -> Crowd {
        let inner = self.lock();
        Crowd {
            inside: inner.inside,
            waiting: inner.waiting.len(),
        }
    }

    /// Those that are inside stay, also above the new limit.
    pub(crate) fn set_limit(&self, limit: Option<usize>) {
        let mut inner = self.lock();
        inner.limit = limit.unwrap_or(usize::MAX);
        inner.hand_out();
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.0.lock().leave();
    }
}

impl Turn {
    /// Resolves when it is this client's turn, and at once from then on. May be dropped at any time.
    pub(crate) async fn called(&mut self) {
        if !self.called {
            // The other end goes only after it has called: the gate is kept by this turn.
            let _ = (&mut self.call).await;
            self.called = true;
        }
    }

    /// Whether it is this client's turn.
    pub(crate) fn is_called(&mut self) -> bool {
        self.called = self.called || self.call.try_recv().is_ok();
        self.called
    }

    /// The place, if it is this client's turn; otherwise the turn, for later.
    pub(crate) fn pass(mut self) -> Result<Pass, Self> {
        if !self.is_called() {
            return Err(self);
        }
        self.taken = true;
        Ok(Pass(self.gate.clone()))
    }

    /// The place, when it is this client's turn. May be dropped at any time.
    pub(crate) async fn granted(mut self) -> Pass {
        self.called().await;
        self.taken = true;
        Pass(self.gate.clone())
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        let mut inner = self.gate.lock();
        if inner.waiting.remove(&self.ticket).is_none() {
            inner.leave(); // It had been called.
        }
    }
}

/// A gate for each member, made when it is first asked for.
#[derive(Debug)]
pub(crate) struct Gates(Mutex<Members>);

#[derive(Debug)]
struct Members {
    limit: Option<usize>,
    gates: HashMap<MemberName, Gate>,
}

impl Gates {
    /// Of `limit` places each.
    pub(crate) fn new(limit: Option<usize>) -> Self {
        let gates = HashMap::new();
        Self(Mutex::new(Members { limit, gates }))
    }

    fn lock(&self) -> MutexGuard<'_, Members> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn of(&self, member: &MemberName) -> Gate {
        let mut members = self.lock();
        if let Some(gate) = members.gates.get(member) {
            return gate.clone();
        }
        let gate = Gate::new(members.limit);
        members.gates.insert(member.clone(), gate.clone());
        gate
    }

    pub(crate) fn set_limit(&self, limit: Option<usize>) {
        let mut members = self.lock();
        members.limit = limit;
        members.gates.values().for_each(|gate| gate.set_limit(limit));
    }

    /// In the order of names.
    pub(crate) fn crowds(&self) -> BTreeMap<MemberName, Crowd> {
        let members = self.lock();
        let crowds = members
            .gates
            .iter()
            .map(|(member, gate)| (member.clone(), gate.crowd()));
        crowds.collect()
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::{Pin, pin};
    use std::task::{Context, Poll, Waker};

    use proptest::prelude::*;

    use super::*;
    use crate::testing::name;

    fn at(seconds: u64) -> Boottime {
        Boottime::from_nanos(seconds * 1_000_000_000)
    }

    fn poll<F: Future + ?Sized>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    fn pass(entry: Entry) -> Pass {
        match entry {
            Entry::In(pass) => pass,
            other => panic!("{other:?}"),
        }
    }

    fn turn(entry: Entry) -> Turn {
        match entry {
            Entry::Wait(turn) => turn,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn whoever_has_waited_longest_is_next() {
        let gate = Gate::new(Some(1));
        let inside = pass(gate.enter(at(1), 2));
        let mut late = pin!(turn(gate.enter(at(3), 2)).granted());
        let mut early = pin!(turn(gate.enter(at(2), 2)).granted());
        assert!(matches!(gate.enter(at(4), 2), Entry::Full));
        drop(inside);
        assert!(poll(late.as_mut()).is_pending());
        let Poll::Ready(pass) = poll(early.as_mut()) else {
            panic!("it is its turn")
        };
        assert_eq!(gate.crowd(), Crowd { inside: 1, waiting: 1 });
        drop(pass);
        assert!(poll(late.as_mut()).is_ready());
        assert_eq!(gate.crowd(), Crowd { inside: 0, waiting: 0 });
    }

    #[test]
    fn a_turn_that_has_not_come_keeps_its_place_in_the_queue() {
        let gate = Gate::new(Some(1));
        let inside = pass(gate.enter(at(1), 2));
        let early = turn(gate.enter(at(2), 2)).pass().expect_err("somebody is inside");
        let late = turn(gate.enter(at(3), 2));
        assert_eq!(gate.crowd(), Crowd { inside: 1, waiting: 2 });
        drop(inside);
        let mut late = late.pass().expect_err("another is next");
        assert!(poll(pin!(late.called())).is_pending());
        let mut early = early;
        assert!(early.is_called() && poll(pin!(early.called())).is_ready());
        drop(early.pass().expect("it is its turn"));
        drop(late.pass().expect("it is its turn"));
        assert_eq!(gate.crowd(), Crowd { inside: 0, waiting: 0 });
    }

    #[test]
    fn a_raised_limit_lets_those_in_who_wait_and_a_lowered_one_throws_nobody_out() {
        let gates = Gates::new(Some(1));
        let gate = gates.of(&name("n1"));
        let _inside = pass(gate.enter(at(1), 9));
        let mut waiting = pin!(turn(gate.enter(at(2), 9)).granted());
        gates.set_limit(None);
        let Poll::Ready(_second) = poll(waiting.as_mut()) else {
            panic!("there is room")
        };
        gates.set_limit(Some(1));
        assert_eq!(gates.crowds()[&name("n1")], Crowd { inside: 2, waiting: 0 });
        assert!(matches!(gate.enter(at(3), 0), Entry::Full));
        assert!(matches!(gates.of(&name("n2")).enter(at(3), 0), Entry::In(_)));
    }

    proptest! {
        #[test]
        fn no_place_is_lost_or_given_twice(limit in 1_usize..4, steps in proptest::collection::vec((0_u8..4, 0_usize..8), 1..200)) {
            let gate = Gate::new(Some(limit));
            let (mut inside, mut waiting) = (Vec::new(), Vec::new());
            for (number, (step, which)) in steps.into_iter().enumerate() {
                match step {
                    0 | 1 => match gate.enter(at(number as u64), 5) {
                        Entry::In(pass) => inside.push(pass),
                        Entry::Wait(turn) => waiting.push(Box::pin(turn.granted())),
                        Entry::Full => {}
                    },
                    2 if which < inside.len() => drop(inside.remove(which)),
                    // Called or not, looked at or not.
                    _ if which < waiting.len() => drop(waiting.remove(which)),
                    _ => {}
                }
                let mut rest = Vec::new();
                for (index, mut turn) in waiting.into_iter().enumerate() {
                    match if (index + number) % 3 == 0 { Poll::Pending } else { poll(turn.as_mut()) } {
                        Poll::Ready(pass) => inside.push(pass),
                        Poll::Pending => rest.push(turn),
                    }
                }
                waiting = rest;
                let crowd = gate.crowd();
                prop_assert!(inside.len() <= crowd.inside && crowd.inside <= limit);
                prop_assert!(crowd.waiting == 0 || crowd.inside == limit);
                prop_assert_eq!(crowd.inside + crowd.waiting, inside.len() + waiting.len());
            }
            drop((inside, waiting));
            prop_assert_eq!(gate.crowd(), Crowd { inside: 0, waiting: 0 });
        }
    }
}

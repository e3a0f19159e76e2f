//! Runs futures in virtual time, one at a time, in an order that the seed alone decides.
//!
//! A process of the cluster is a set of tasks with one owner. Killing it drops them where they stand, as the kernel
//! would; freezing it keeps their wake-ups until it is thawed.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::queue::Queue;
use crate::time::Time;

/// Whose a task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Owner {
    /// The world's: physics, faults, clients.
    World,
    /// A member's keeper.
    Keeper(usize),
    /// A member's sentinel.
    Sentinel(usize),
    /// A member's agent.
    Agent(usize),
    /// A member's PostgreSQL.
    Postgres(usize),
}

/// What may change and be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Topic {
    /// What a member's agent looks at.
    Agent(usize),
    /// What a member's keeper looks at.
    Keeper(usize),
    /// A member's PostgreSQL.
    Postgres(usize),
    /// What a member's lease looks at.
    Lease(usize),
    /// What a member's keeper told its agent.
    Reports(usize),
    /// Whether a member's loop has time for others.
    Refresh(usize),
    /// etcd's revisions.
    Store,
}

pub(crate) type TaskId = usize;
type Work = Pin<Box<dyn Future<Output = ()>>>;

struct Task {
    owner: Owner,
    /// Out while it is being polled.
    work: Option<Work>,
    killed: bool,
    /// A wake-up came while its owner was frozen.
    missed: bool,
}

#[derive(Default)]
struct Subject {
    version: u64,
    waiting: Vec<TaskId>,
}

/// A value that one task leaves for another.
pub(crate) struct Slot<T> {
    value: RefCell<Option<T>>,
    waiting: Cell<Option<TaskId>>,
}

impl<T> Slot<T> {
    pub(crate) fn new() -> Rc<Self> {
        Rc::new(Self {
            value: RefCell::new(None),
            waiting: Cell::new(None),
        })
    }
}

/// The tasks and their clock.
pub(crate) struct Executor {
    now: Cell<Time>,
    current: Cell<TaskId>,
    next_id: Cell<TaskId>,
    queue: RefCell<Queue<TaskId>>,
    tasks: RefCell<BTreeMap<TaskId, Task>>,
    subjects: RefCell<BTreeMap<Topic, Subject>>,
    frozen: RefCell<BTreeMap<Owner, u32>>,
    /// How many times a task was polled.
    pub(crate) polls: Cell<u64>,
    /// How many of them since time last went on.
    standing: Cell<u64>,
}

/// More polls than this at one moment are a loop that never waits.
const STANDING_MAX: u64 = 100_000;

impl Executor {
    pub(crate) fn new() -> Self {
        Self {
            now: Cell::new(Time(0)),
            current: Cell::new(0),
            next_id: Cell::new(1),
            queue: RefCell::new(Queue::new()),
            tasks: RefCell::new(BTreeMap::new()),
            subjects: RefCell::new(BTreeMap::new()),
            frozen: RefCell::new(BTreeMap::new()),
            polls: Cell::new(0),
            standing: Cell::new(0),
        }
    }

    pub(crate) fn now(&self) -> Time {
        self.now.get()
    }

    /// Starts a task now.
    pub(crate) fn spawn(&self, owner: Owner, work: impl Future<Output = ()> + 'static) -> TaskId {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        let task = Task {
            owner,
            work: Some(Box::pin(work)),
            killed: false,
            missed: false,
        };
        self.tasks.borrow_mut().insert(id, task);
        self.queue.borrow_mut().push(self.now(), id);
        id
    }

    /// Drops a task where it stands.
    pub(crate) fn kill(&self, id: TaskId) {
        self.end(|task, _| task == id);
    }

    /// Drops all tasks of an owner. The one that runs now is dropped when it next waits.
    pub(crate) fn kill_owner(&self, owner: Owner) {
        self.end(|_, task| task.owner == owner);
    }

    /// Drops everything, so that nothing keeps the run alive.
    pub(crate) fn clear(&self) {
        self.end(|_, _| true);
    }

    fn end(&self, which: impl Fn(TaskId, &Task) -> bool) {
        let mut tasks = self.tasks.borrow_mut();
        let ended: Vec<TaskId> = tasks
            .iter()
            .filter(|(id, task)| which(**id, task))
            .map(|(id, _)| *id)
            .collect();
        let mut dropped = Vec::new();
        for id in ended {
            match tasks.get_mut(&id) {
                Some(task) if task.work.is_none() => task.killed = true,
                _ => dropped.extend(tasks.remove(&id)),
            }
        }
        drop(tasks);
        drop(dropped); // What they drop may look at the executor.
    }

    /// Freezes an owner. Faults may overlap, so freezes add up.
    pub(crate) fn freeze(&self, owner: Owner) {
        *self.frozen.borrow_mut().entry(owner).or_default() += 1;
    }

    /// Takes one freeze back; what was missed is made up for at once.
    pub(crate) fn thaw(&self, owner: Owner) {
        let left = {
            let mut frozen = self.frozen.borrow_mut();
            let count = frozen.entry(owner).or_default();
            *count = count.saturating_sub(1);
            *count
        };
        if left > 0 {
            return;
        }
        for (id, task) in self.tasks.borrow_mut().iter_mut() {
            if task.owner == owner && std::mem::take(&mut task.missed) {
                self.queue.borrow_mut().push(self.now(), *id);
            }
        }
    }

    pub(crate) fn is_frozen(&self, owner: Owner) -> bool {
        self.frozen.borrow().get(&owner).is_some_and(|count| *count > 0)
    }

    /// Forgets all freezes of an owner: a killed process is not a frozen one.
    pub(crate) fn unfreeze(&self, owner: Owner) {
        while self.is_frozen(owner) {
            self.thaw(owner);
        }
    }

    /// Whether something runs for ever without waiting.
    pub(crate) fn spins(&self) -> bool {
        self.standing.get() > STANDING_MAX
    }

    /// Runs what is due until `until`, or until nothing is left, or `stop` says so.
    pub(crate) fn run_until(&self, until: Time, mut stop: impl FnMut() -> bool) {
        loop {
            let due = self.queue.borrow().next_at().filter(|at| *at <= until);
            if due.is_none() {
                self.now.set(until.max(self.now()));
                return;
            }
            let Some((at, id)) = self.queue.borrow_mut().pop() else {
                return;
            };
            self.standing
                .set(if at > self.now() { 0 } else { self.standing.get() + 1 });
            self.now.set(at.max(self.now()));
            self.poll(id);
            if stop() {
                return;
            }
        }
    }

    fn poll(&self, id: TaskId) {
        let work = {
            let mut tasks = self.tasks.borrow_mut();
            let Some(task) = tasks.get_mut(&id) else { return };
            if self.is_frozen(task.owner) {
                task.missed = true;
                return;
            }
            task.work.take()
        };
        let Some(mut work) = work else { return };
        let before = self.current.replace(id);
        self.polls.set(self.polls.get() + 1);
        let polled = work.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        self.current.set(before);
        let mut tasks = self.tasks.borrow_mut();
        let over = polled.is_ready() || tasks.get(&id).is_none_or(|task| task.killed);
        let removed = if over {
            tasks.remove(&id)
        } else {
            if let Some(task) = tasks.get_mut(&id) {
                task.work = Some(work);
            }
            return;
        };
        drop(tasks);
        drop(removed);
        drop(work);
    }

    /// Says that something has changed.
    pub(crate) fn notify(&self, topic: Topic) {
        let waiting = {
            let mut subjects = self.subjects.borrow_mut();
            let subject = subjects.entry(topic).or_default();
            subject.version += 1;
            std::mem::take(&mut subject.waiting)
        };
        let mut queue = self.queue.borrow_mut();
        for id in waiting {
            queue.push(self.now(), id);
        }
    }

    fn version(&self, topic: Topic) -> u64 {
        self.subjects.borrow().get(&topic).map_or(0, |subject| subject.version)
    }

    fn wait_on(&self, topic: Topic) {
        let mut subjects = self.subjects.borrow_mut();
        let subject = subjects.entry(topic).or_default();
        let id = self.current.get();
        if !subject.waiting.contains(&id) {
            subject.waiting.push(id);
        }
    }

    fn wake_current_at(&self, at: Time) {
        self.queue.borrow_mut().push(at, self.current.get());
    }

    /// Resolves at a time.
    pub(crate) fn sleep_until(&self, at: Time) -> impl Future<Output = ()> + '_ {
        let mut asked = false;
        std::future::poll_fn(move |_| {
            if at <= self.now() {
                return Poll::Ready(());
            }
            if !std::mem::replace(&mut asked, true) {
                self.wake_current_at(at);
            }
            Poll::Pending
        })
    }

    pub(crate) fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + '_ {
        self.sleep_until(self.now() + duration)
    }

    /// Resolves when something on the topic has changed since this was called, or at `until`. Says whether in time.
    pub(crate) fn changed(&self, topic: Topic, until: Time) -> impl Future<Output = bool> + '_ {
        let version = self.version(topic);
        let mut asked = false;
        std::future::poll_fn(move |_| {
            if self.version(topic) != version {
                return Poll::Ready(true);
            }
            if until <= self.now() {
                return Poll::Ready(false);
            }
            self.wait_on(topic);
            if !std::mem::replace(&mut asked, true) {
                self.wake_current_at(until);
            }
            Poll::Pending
        })
    }

    /// Resolves with what `look` finds, looking whenever something on the topic changes; with nothing at `until`.
    pub(crate) async fn wait_for<T>(
        &self,
        topic: Topic,
        until: Time,
        mut look: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        loop {
            if let Some(found) = look() {
                return Some(found);
            }
            if self.now() >= until {
                return None;
            }
            self.changed(topic, until).await;
        }
    }

    /// Leaves a value for who waits.
    pub(crate) fn send<T>(&self, slot: &Slot<T>, value: T) {
        *slot.value.borrow_mut() = Some(value);
        if let Some(id) = slot.waiting.take() {
            self.queue.borrow_mut().push(self.now(), id);
        }
    }

    /// Resolves with the value.
    pub(crate) fn receive<'a, T>(&'a self, slot: &'a Slot<T>) -> impl Future<Output = T> + 'a {
        std::future::poll_fn(move |_| match slot.value.borrow_mut().take() {
            Some(value) => Poll::Ready(value),
            None => {
                slot.waiting.set(Some(self.current.get()));
                Poll::Pending
            }
        })
    }

    /// Resolves with what `work` gives, or with nothing at `until`.
    pub(crate) async fn until<T>(&self, until: Time, work: impl Future<Output = T>) -> Option<T> {
        let mut work = std::pin::pin!(work);
        let mut timer = std::pin::pin!(self.sleep_until(until));
        std::future::poll_fn(move |context| {
            if let Poll::Ready(done) = work.as_mut().poll(context) {
                return Poll::Ready(Some(done));
            }
            timer.as_mut().poll(context).map(|()| None)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Log = Rc<RefCell<Vec<(u64, &'static str)>>>;

    fn log() -> (Rc<Executor>, Log) {
        (Rc::new(Executor::new()), Rc::default())
    }

    fn tick(
        executor: &Rc<Executor>,
        log: &Rc<RefCell<Vec<(u64, &'static str)>>>,
        owner: Owner,
        name: &'static str,
        every: u64,
    ) -> TaskId {
        let (inner, log) = (Rc::clone(executor), Rc::clone(log));
        executor.spawn(owner, async move {
            loop {
                inner.sleep(Duration::from_millis(every)).await;
                log.borrow_mut().push((inner.now().0 / 1_000_000, name));
            }
        })
    }

    #[test]
    fn tasks_take_turns_in_virtual_time() {
        let (executor, log) = log();
        tick(&executor, &log, Owner::World, "a", 10);
        tick(&executor, &log, Owner::World, "b", 15);
        executor.run_until(Time::millis(30), || false);
        assert_eq!(*log.borrow(), [(10, "a"), (15, "b"), (20, "a"), (30, "b"), (30, "a")]);
    }

    #[test]
    fn a_frozen_process_makes_up_for_it_and_a_killed_one_does_not() {
        let (executor, log) = log();
        tick(&executor, &log, Owner::Agent(0), "frozen", 10);
        tick(&executor, &log, Owner::Agent(1), "killed", 10);
        executor.run_until(Time::millis(5), || false);
        executor.freeze(Owner::Agent(0));
        executor.kill_owner(Owner::Agent(1));
        executor.run_until(Time::millis(35), || false);
        assert!(log.borrow().is_empty());
        executor.thaw(Owner::Agent(0));
        executor.run_until(Time::millis(46), || false);
        assert_eq!(*log.borrow(), [(35, "frozen"), (45, "frozen")]);
    }

    #[test]
    fn waiting_ends_with_the_change_or_with_the_time() {
        let (executor, log) = log();
        let (inner, notes) = (Rc::clone(&executor), Rc::clone(&log));
        executor.spawn(Owner::World, async move {
            let in_time = inner.changed(Topic::Agent(0), Time::millis(100)).await;
            assert!(in_time);
            notes.borrow_mut().push((inner.now().0 / 1_000_000, "changed"));
            let given_up = inner.wait_for(Topic::Agent(0), Time::millis(50), || None::<()>).await;
            assert_eq!(given_up, None);
            notes.borrow_mut().push((inner.now().0 / 1_000_000, "gave up"));
            let late = inner
                .until(Time::millis(60), inner.sleep(Duration::from_millis(30)))
                .await;
            assert_eq!(late, None);
            notes.borrow_mut().push((inner.now().0 / 1_000_000, "too late"));
        });
        let inner = Rc::clone(&executor);
        executor.spawn(Owner::World, async move {
            inner.sleep(Duration::from_millis(20)).await;
            inner.notify(Topic::Agent(0));
        });
        executor.run_until(Time::millis(200), || false);
        assert_eq!(*log.borrow(), [(20, "changed"), (50, "gave up"), (60, "too late")]);
    }

    #[test]
    fn a_task_may_end_itself_and_its_own_kind() {
        let (executor, log) = log();
        let (inner, notes) = (Rc::clone(&executor), Rc::clone(&log));
        executor.spawn(Owner::Agent(0), async move {
            inner.kill_owner(Owner::Agent(0));
            notes.borrow_mut().push((0, "until it waits"));
            inner.sleep(Duration::from_millis(1)).await;
            notes.borrow_mut().push((0, "never"));
        });
        executor.run_until(Time::millis(10), || false);
        assert_eq!(*log.borrow(), [(0, "until it waits")]);
        assert!(executor.tasks.borrow().is_empty());
    }
}

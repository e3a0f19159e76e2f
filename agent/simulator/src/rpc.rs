//! Questions over the network, as the agent's own clients ask them: to one pinned endpoint of etcd, leaving it for the next
//! when it fails, and to other members' REST interfaces.

use std::rc::Rc;
use std::time::Duration;

use pgherd_cluster::etcd::{Op, Snapshot, StoreError, Txn, TxnOutcome};

use crate::executor::{Owner, Slot, Topic};
use crate::network::Site;
use crate::store::NODES;
use crate::time::Time;
use crate::world::Shared;

/// How long etcd itself keeps a request that it cannot serve.
const SERVED_WITHIN: Duration = Duration::from_secs(5);

/// A request to etcd.
#[derive(Clone, Debug)]
pub(crate) enum Question {
    Grant(Duration),
    KeepAlive(i64),
    Read(String),
    List,
    Txn(Txn),
}

/// What it answers.
#[derive(Clone, Debug)]
pub(crate) enum Reply {
    Granted(i64),
    KeptAlive,
    Entries(Snapshot),
    Done(TxnOutcome),
}

/// How long a call may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    pub(crate) total: Duration,
    pub(crate) attempt: Duration,
}

impl Budget {
    /// Shared out so that each endpoint can be tried once.
    pub(crate) fn new(total: Duration) -> Self {
        Self {
            total,
            attempt: (total / 3).max(Duration::from_millis(300)),
        }
    }
}

/// A client of etcd with its own pinned endpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Client {
    member: usize,
    pub(crate) node: usize,
}

fn unreachable(what: &str) -> StoreError {
    StoreError::Unreachable { what: what.to_owned() }
}

impl Client {
    pub(crate) const fn new(member: usize, node: usize) -> Self {
        Self { member, node }
    }

    pub(crate) const fn rotate(&mut self) {
        self.node = (self.node + 1) % NODES;
    }

    /// Asks until an answer comes or the budget is spent. After an error a write may have happened, and may yet happen.
    pub(crate) async fn ask(&mut self, sim: &Shared, question: Question, budget: Budget) -> Result<Reply, StoreError> {
        let deadline = sim.now() + budget.total;
        let mut backoff = Duration::from_millis(20);
        loop {
            let attempt_end = (sim.now() + budget.attempt).min(deadline);
            let slot = Slot::new();
            sim.spawn(
                Owner::World,
                serve(
                    Rc::clone(sim),
                    self.member,
                    self.node,
                    question.clone(),
                    Rc::clone(&slot),
                ),
            );
            let error = match sim.exec.until(attempt_end, sim.exec.receive(&slot)).await {
                Some(Ok(reply)) => return Ok(reply),
                Some(Err(error)) if !error.is_transient() => return Err(error),
                Some(Err(error)) => error,
                None => unreachable("no answer"),
            };
            self.rotate();
            if sim.now() + backoff >= deadline {
                return Err(error);
            }
            sim.exec.sleep(backoff).await;
            backoff = (backoff * 2).min(Duration::from_millis(250));
        }
    }

    pub(crate) async fn txn(&mut self, sim: &Shared, txn: Txn, budget: Budget) -> Result<TxnOutcome, StoreError> {
        match self.ask(sim, Question::Txn(txn), budget).await? {
            Reply::Done(outcome) => Ok(outcome),
            Reply::Granted(_) | Reply::KeptAlive | Reply::Entries(_) => Err(unreachable("another kind of answer")),
        }
    }
}

type Answer = Rc<Slot<Result<Reply, StoreError>>>;

/// The way of one request: there, its turn, and back. It goes on when nobody waits any more.
async fn serve(sim: Shared, member: usize, node: usize, question: Question, answer: Answer) {
    let (client, server) = (Site::Member(member), Site::Etcd(node));
    let transit = |from, to| sim.with(|world| world.network.transit(from, to, &mut world.random));
    let Some(there) = transit(client, server) else { return };
    sim.exec.sleep(there).await;
    sim.point();
    let until = sim.now() + SERVED_WITHIN;
    loop {
        let (serves, refuses) =
            sim.with(|world| (world.store.serves(node, &world.network), world.store.is_refusing(node)));
        if refuses {
            let Some(back) = transit(server, client) else { return };
            sim.exec.sleep(back).await;
            return sim.exec.send(&answer, Err(unreachable("refused")));
        }
        if serves {
            break;
        }
        if sim.now() >= until {
            return;
        }
        sim.exec.sleep(Duration::from_millis(20)).await;
    }
    let work = sim.with(|world| world.random.millis(0, 3));
    sim.exec.sleep(work).await;
    if !sim.with(|world| world.store.serves(node, &world.network)) {
        return;
    }
    let reply = carry_out(&sim, member, question);
    sim.point();
    let Some(back) = transit(server, client) else { return };
    sim.exec.sleep(back).await;
    sim.exec.send(&answer, reply);
}

/// What a transaction has done to the keys that decisions rest on.
fn tell(sim: &Shared, member: usize, txn: &Txn, outcome: &TxnOutcome) {
    let ops = if outcome.succeeded {
        txn.then_ops()
    } else {
        txn.otherwise_ops()
    };
    let guarded = |key: &str| !key.contains("/members/") && !key.ends_with("/status");
    for op in ops {
        match op {
            Op::Put { key, value, lease } if guarded(key) => sim.say(member, || {
                format!("etcd: {key} = {value} (lease {lease}, revision {})", outcome.revision)
            }),
            Op::Delete(key) => sim.say(member, || format!("etcd: {key} is deleted, if it is there")),
            Op::Put { .. } | Op::Get(_) => {}
        }
    }
}

fn carry_out(sim: &Shared, member: usize, question: Question) -> Result<Reply, StoreError> {
    let now = sim.now();
    let written = match &question {
        Question::Txn(txn) => Some(txn.clone()),
        Question::Grant(_) | Question::KeepAlive(_) | Question::Read(_) | Question::List => None,
    };
    let reply = sim.with(|world| {
        let snapshot = |entries, revision| Reply::Entries(Snapshot { entries, revision });
        match question {
            Question::Grant(ttl) => Ok(Reply::Granted(world.store.grant(ttl, now, &mut world.random))),
            Question::KeepAlive(lease) => world.store.keep_alive(lease, now).map(|()| Reply::KeptAlive),
            Question::Read(key) => {
                let entries = world.store.get(&key).cloned().into_iter().collect();
                Ok(snapshot(entries, world.store.state().revision))
            }
            Question::List => Ok(snapshot(world.store.state().entries(), world.store.state().revision)),
            Question::Txn(txn) => {
                world
                    .oracle
                    .before_commit(&world.keys, &world.store, &txn, &world.names, member, now);
                let outcome = world.store.commit(&txn, now);
                world.note_leader(now, |member| sim.exec.is_frozen(Owner::Agent(member)));
                outcome.map(Reply::Done)
            }
        }
    });
    if let (Some(txn), Ok(Reply::Done(outcome))) = (&written, &reply) {
        tell(sim, member, txn, outcome);
    }
    sim.notify(Topic::Store);
    reply
}

/// Asks another member something that its agent answers by `work`; nothing when no answer comes within `limit`.
pub(crate) async fn ask_member<T: 'static>(
    sim: &Shared,
    from: usize,
    to: usize,
    limit: Duration,
    work: impl AsyncFnOnce(Shared) -> T + 'static,
) -> Option<T> {
    let until: Time = sim.now() + limit;
    let slot: Rc<Slot<Option<T>>> = Slot::new();
    let (inner, answer) = (Rc::clone(sim), Rc::clone(&slot));
    let way = async move {
        let transit = |from, to| {
            inner.with(|world| {
                world
                    .network
                    .transit(Site::Member(from), Site::Member(to), &mut world.random)
            })
        };
        let Some(there) = transit(from, to) else { return };
        inner.exec.sleep(there).await;
        let (answers, powered) = inner.with(|world| (world.agent(to).is_some(), world.host(to).powered));
        if !powered {
            return;
        }
        if !answers {
            return inner.exec.send(&answer, None); // Refused: nobody listens.
        }
        inner.point();
        let serving = Rc::clone(&inner);
        inner.spawn(Owner::Agent(to), async move {
            let nap = serving.with(|world| world.random.millis(0, 3));
            serving.exec.sleep(nap).await;
            let done = work(Rc::clone(&serving)).await;
            let back = serving.with(|world| {
                world
                    .network
                    .transit(Site::Member(to), Site::Member(from), &mut world.random)
            });
            if let Some(back) = back {
                let returning = Rc::clone(&serving);
                serving.spawn(Owner::World, async move {
                    returning.exec.sleep(back).await;
                    returning.exec.send(&answer, Some(done));
                });
            }
        });
    };
    sim.spawn(Owner::World, way);
    sim.exec.until(until, sim.exec.receive(&slot)).await.flatten()
}

//! What the lease's thread does around the real core: it asks etcd and members, and speaks to the keeper.

use std::rc::Rc;
use std::time::Duration;

use pgherd_agent::lease::AskedBy;
use pgherd_agent::lease::core::{Answer, Ask, Input, KeySeen, Output, Voucher};
use pgherd_cluster::clock::Boottime;
use pgherd_cluster::etcd::{Compare, StoreError, Txn, TxnOutcome};
use pgherd_cluster::key::Key;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::MemberRecord;
use pgherd_cluster::view::{Entry, Epoch};
use pgherd_keeper::fence::Armed;

use crate::executor::{Owner, Slot, Topic};
use crate::host::Request;
use crate::rpc::{Budget, Client, Question, Reply, ask_member};
use crate::run::Planted;
use crate::world::{Shared, World};

/// Runs for ever.
pub(crate) async fn run(sim: Shared, member: usize) {
    let mut ticked_at = None;
    loop {
        let (at, now) = (sim.now(), sim.clock(member));
        let outputs = sim.with(|world| {
            let agent = world.agent(member)?;
            let due = agent.core.wake_at() <= now && ticked_at != Some(at);
            let input = agent.inputs.pop_front().or_else(|| {
                due.then(|| {
                    ticked_at = Some(at);
                    Input::Tick
                })
            })?;
            let before = agent.core.state().clone();
            let outputs = agent.core.handle(now, input);
            let changed = *agent.core.state() != before;
            let let_go: Vec<_> = if agent.inputs.is_empty() {
                std::mem::take(&mut agent.let_go)
            } else {
                Vec::new()
            };
            Some((outputs, changed, let_go))
        });
        match outputs {
            Some((outputs, changed, let_go)) => {
                if changed {
                    sim.notify(Topic::Agent(member));
                }
                for output in outputs {
                    perform(&sim, member, output);
                }
                for slot in let_go {
                    sim.exec.send(&slot, ());
                }
            }
            None => {
                let Some(wake_at) = sim.with(|world| world.agent(member).map(|agent| agent.core.wake_at())) else {
                    return;
                };
                let until = sim.with(|world| world.host(member).clocks.when(wake_at, at));
                // A timer has its grain; without it a moment that has passed would be waited for for ever.
                sim.exec
                    .changed(Topic::Lease(member), until.max(at + Duration::from_millis(1)))
                    .await;
                sim.drowse(member).await;
            }
        }
    }
}

/// Gives the core an input.
pub(crate) fn put_in(sim: &Shared, member: usize, input: Input) {
    sim.with(|world| {
        if let Some(agent) = world.agent(member) {
            agent.inputs.push_back(input);
        }
    });
    sim.notify(Topic::Lease(member));
}

/// Stops proving the holding; when this is over no deadline will be given for it any more.
pub(crate) async fn let_go(sim: &Shared, member: usize) {
    let slot = Slot::new();
    sim.with(|world| {
        if let Some(agent) = world.agent(member) {
            agent.let_go.push(Rc::clone(&slot));
        }
    });
    put_in(sim, member, Input::LetGo);
    sim.exec.receive(&slot).await;
}

/// Sends the keeper a request.
pub(crate) fn order(sim: &Shared, member: usize, request: Request) {
    sim.point();
    sim.with(|world| {
        if let Some(keeper) = &mut world.host(member).keeper {
            keeper.inbox.push_back(request);
        }
    });
    sim.notify(Topic::Keeper(member));
}

fn perform(sim: &Shared, member: usize, output: Output) {
    match output {
        Output::Ask { token, ask } => {
            let inner = Rc::clone(sim);
            sim.spawn(Owner::Agent(member), async move {
                let answer = put(&inner, member, ask).await;
                put_in(&inner, member, Input::Answer { token, answer });
            });
        }
        Output::Arm { term, deadline, margin } => arm(sim, member, term, deadline, margin),
        Output::End { why } => {
            sim.say(member, || format!("lease: {why}: ends PostgreSQL"));
            order(sim, member, Request::End);
        }
        Output::AskVouches {
            round,
            epoch,
            lasts,
            members,
        } => {
            sim.say(member, || format!("lease: asks {} members to vouch", members.len()));
            let limit = sim.with(|world| world.agent(member).map(|agent| agent.core.timing().ttl() / 4));
            let limit = limit.unwrap_or_default().max(Duration::from_millis(500));
            let lease = sim.with(|world| world.agent(member).and_then(|agent| agent.core.state().lease));
            let holding = AskedBy {
                create_revision: Some(epoch.create_revision),
                lease,
            };
            for voucher in members {
                let (inner, leader) = (Rc::clone(sim), epoch.holder.clone());
                let question = VouchQuestion { leader, holding, lasts };
                sim.spawn(Owner::Agent(member), async move {
                    let says = ask_vouch(&inner, member, &voucher, question, limit).await;
                    let input = Input::Vouch {
                        round,
                        member: voucher.name,
                        lasts: says.map(|says| says.min(lasts)),
                    };
                    put_in(&inner, member, input);
                });
            }
        }
        Output::BidEnded(result) => {
            sim.say(member, || format!("lease: the bid ended: {result:?}"));
            if let Some(slot) = sim.with(|world| world.agent(member).and_then(|agent| agent.bid.take())) {
                sim.exec.send(&slot, result);
            }
        }
    }
}

fn arm(sim: &Shared, member: usize, term: u64, deadline: Boottime, margin: Duration) {
    let now = sim.clock(member);
    let deadline = sim.with(|world| match world.planted {
        // Counted as if the question had been sent when its answer came.
        Some(Planted::DeadlineFromReply) => {
            let lasts = world
                .agent(member)
                .map_or(Duration::ZERO, |agent| agent.core.state().lease_ttl);
            deadline.max(now + lasts)
        }
        _ => deadline,
    });
    sim.with(|world| {
        if let Some(agent) = world.agent(member) {
            agent.last_term = term;
        }
    });
    let armed = Armed {
        term,
        deadline: pgherd_keeper::clock::Boottime::from_nanos(deadline.as_nanos()),
        margin,
    };
    order(sim, member, Request::Arm(armed));
}

async fn put(sim: &Shared, member: usize, ask: Ask) -> Result<Answer, StoreError> {
    let Some((attempt, mut client)) = sim.with(|world| {
        let agent = world.agent(member)?;
        Some((agent.core.timing().renewal_attempt(), agent.lease_client))
    }) else {
        return Err(StoreError::LeaseGone);
    };
    let budget = Budget {
        total: attempt * 2,
        attempt,
    };
    let answer = translate(sim, member, &mut client, ask, budget).await;
    sim.with(|world| {
        if let Some(agent) = world.agent(member) {
            agent.lease_client = client;
        }
    });
    answer
}

async fn translate(
    sim: &Shared,
    member: usize,
    client: &mut Client,
    ask: Ask,
    budget: Budget,
) -> Result<Answer, StoreError> {
    match ask {
        Ask::Grant { ttl } => client
            .ask(sim, Question::Grant(ttl), budget)
            .await
            .map(|reply| match reply {
                Reply::Granted(lease) => Answer::Granted(lease),
                Reply::KeptAlive | Reply::Entries(_) | Reply::Done(_) => Answer::KeptAlive,
            }),
        Ask::KeepAlive { lease } => client
            .ask(sim, Question::KeepAlive(lease), budget)
            .await
            .map(|_| Answer::KeptAlive),
        Ask::ReadLeader => read_leader(sim, member, client, budget).await,
        Ask::Txn(txn) => {
            let txn = sim.with(|world| spoilt(world.planted, &world.keys, txn));
            let creates = txn
                .conditions()
                .iter()
                .any(|compare| matches!(compare, Compare::Absent(_)));
            // Later than all that a view will show.
            if creates && let Some(entry) = sim.with(|world| taken_for_granted(world, member, 1_000_000)) {
                return Ok(Answer::Txn(TxnOutcome {
                    succeeded: true,
                    revision: entry.mod_revision,
                    read: vec![entry],
                }));
            }
            client.txn(sim, txn, budget).await.map(Answer::Txn)
        }
    }
}

/// A planted bug: while the lease lives, the key that was held is taken for held, on whatever lease there is by now.
fn taken_for_granted(world: &mut World, member: usize, later: i64) -> Option<Entry> {
    if !world.is_planted(Planted::KeepaliveProves) {
        return None;
    }
    let key = world.key(&Key::Leader);
    let state = world.agent(member)?.core.state();
    let held = state.holding.as_ref()?;
    let revision = held.epoch.create_revision + later;
    Some(Entry {
        key,
        value: held.epoch.holder.to_string(),
        create_revision: revision,
        mod_revision: revision,
        lease: state.lease?,
    })
}

async fn read_leader(sim: &Shared, member: usize, client: &mut Client, budget: Budget) -> Result<Answer, StoreError> {
    if let Some(entry) = sim.with(|world| taken_for_granted(world, member, 0)) {
        return Ok(Answer::Leader(Some(entry)));
    }
    let key = sim.with(|world| world.key(&Key::Leader));
    match client.ask(sim, Question::Read(key), budget).await? {
        Reply::Entries(snapshot) => Ok(Answer::Leader(snapshot.entries.into_iter().next())),
        Reply::Granted(_) | Reply::KeptAlive | Reply::Done(_) => Err(StoreError::Compacted),
    }
}

/// A bid that does not look whether `/sync` still says what its decision rested on.
fn spoilt(planted: Option<Planted>, keys: &pgherd_cluster::key::Keys, txn: Txn) -> Txn {
    if planted != Some(Planted::StaleSync) {
        return txn;
    }
    let sync = keys.of(&Key::Sync);
    let about_sync = |compare: &&Compare| matches!(compare, Compare::ModRevision(key, _) if *key == sync);
    let kept = txn.conditions().iter().filter(|compare| !about_sync(compare)).cloned();
    let with_conditions = kept.fold(Txn::new(), Txn::when);
    let with_then = txn.then_ops().iter().cloned().fold(with_conditions, Txn::then);
    txn.otherwise_ops().iter().cloned().fold(with_then, Txn::otherwise)
}

struct VouchQuestion {
    leader: MemberName,
    holding: AskedBy,
    lasts: Duration,
}

async fn ask_vouch(
    sim: &Shared,
    from: usize,
    voucher: &Voucher,
    question: VouchQuestion,
    limit: Duration,
) -> Option<Duration> {
    let address = MemberRecord::new(String::new(), voucher.api_url.clone()).api_address()?;
    let to = sim.with(|world| world.number(&address.host))?;
    ask_member(sim, from, to, limit, async move |sim: Shared| {
        vouch(&sim, to, &question)
    })
    .await
    .flatten()
}

/// The REST interface's part: refused while the mode is off as far as this member knows.
fn vouch(sim: &Shared, member: usize, question: &VouchQuestion) -> Option<Duration> {
    let VouchQuestion { leader, holding, lasts } = question;
    let (at, now) = (sim.now(), sim.clock(member));
    let given = sim.with(|world| {
        let careless = world.is_planted(Planted::VouchWhileBidding);
        let number = world.number(leader.as_str())?;
        let agent = world.agent(member)?;
        if !agent
            .view
            .config
            .value
            .as_ref()
            .is_some_and(|config| config.is_failsafe())
        {
            return None;
        }
        let lasts = agent.view.timing().ttl().min(*lasts);
        let seen = match (agent.in_touch, agent.view.epoch()) {
            (false, _) => KeySeen::Unknown,
            (true, None) => KeySeen::Free,
            (true, Some(epoch)) => KeySeen::Held(epoch.clone()),
        };
        let given = if careless {
            lasts // And nobody remembers it.
        } else {
            agent.core.vouch_for(now, leader, *holding, lasts, &seen).ok()?
        };
        world.oracle.vouched(member, number, at + given);
        Some(given)
    });
    sim.notify(Topic::Agent(member));
    sim.say(member, || format!("vouches for {leader}: {given:?}"));
    given
}

/// The REST interface's part of a release: what was promised to a holding that has ended is owed to nobody.
pub(crate) fn withdraw(sim: &Shared, member: usize, holding: &Epoch, lease: Option<i64>) {
    let withdrawn = sim.with(|world| {
        let number = world.number(holding.holder.as_str())?;
        let core = &mut world.agent(member)?.core;
        let stood = core.state().vouched.is_some();
        core.withdraw(holding, lease);
        let withdrawn = stood && core.state().vouched.is_none();
        if withdrawn {
            world.oracle.withdrawn(member, number);
        }
        Some(withdrawn)
    });
    if withdrawn == Some(true) {
        sim.say(member, || format!("its vouch for {holding} is not needed any more"));
        sim.notify(Topic::Agent(member));
    }
}

//! Performs one step of a decision, in the order in which the agent does.

mod keys;

use std::rc::Rc;
use std::time::Duration;

use pgherd_agent::decide::{Step, gives_no_deadline, upstream_address};
use pgherd_agent::lease::BidGuards;
use pgherd_agent::lease::core::{BidLoss, Input};
use pgherd_agent::observation::{JobKind, LeaseSeen, Observation, Postgres};
use pgherd_agent::postgres::{DataDir, Upstream};
use pgherd_agent::status::WalStatus;
use pgherd_agent::sync::SyncStep;
use pgherd_cluster::etcd::{Compare, Op, Txn};
use pgherd_cluster::key::Key;
use pgherd_keeper::protocol::{PostmasterSignal, Refusal, RequestKind};

pub(crate) use self::keys::keep_initialize;
use self::keys::{
    ask_release, clear_request, discard, initialize, name_successor, release_key, say_stopped, undo_bootstrap,
    withdraw_initialize,
};
use crate::agent::{drop_work, start_work};
use crate::executor::{Slot, Topic};
use crate::host::Request;
use crate::jobs;
use crate::lease::{self, order, put_in};
use crate::rpc::Budget;
use crate::run::Planted;
use crate::upkeep::remember;
use crate::world::Shared;

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Acted {
    Done,
    Started,
    Settling,
    Failed,
    Leave,
}

/// A step was not carried out.
pub(crate) struct Undone;

const KEEPER_ANSWERS: Duration = Duration::from_secs(5);

pub(crate) async fn act(sim: &Shared, member: usize, seen: &Observation, step: Step) -> Acted {
    let now = sim.clock(member);
    sim.with(|world| {
        if let Some(agent) = world.agent(member) {
            agent.memory.stepped(&step, now);
        }
    });
    sim.say(member, || format!("step {step:?}"));
    match perform(sim, member, seen, step.clone()).await {
        Ok(acted) => {
            sim.with(|world| {
                if let Some(agent) = world.agent(member) {
                    agent.memory.performed(&step);
                }
            });
            acted
        }
        Err(Undone) => {
            sim.say(member, || "the step failed".to_owned());
            Acted::Failed
        }
    }
}

async fn perform(sim: &Shared, member: usize, seen: &Observation, step: Step) -> Result<Acted, Undone> {
    match step {
        Step::ClaimBootstrap => return claim_bootstrap(sim, member).await,
        Step::Initialize => return initialize(sim, member, seen).await.map(|()| Acted::Settling),
        Step::Withdraw => return withdraw_initialize(sim, member).await.map(|()| Acted::Settling),
        Step::UndoBootstrap => return undo_bootstrap(sim, member, seen).await.map(|()| Acted::Settling),
        Step::Discard => discard(sim, member),
        Step::Bid(guards) => return bid(sim, member, guards).await,
        Step::End => return end(sim, member).await,
        Step::Release { epoch } => {
            give_up(sim, member).await?;
            release_key(sim, member, &epoch, None, None).await?;
            return Ok(Acted::Settling);
        }
        Step::WinAnew { epoch, lease, guards } => {
            let_go(sim, member).await;
            release_key(sim, member, &epoch, Some(lease), None).await?;
            return bid(sim, member, guards).await;
        }
        Step::Forsake { lease } => return hand_in(sim, member, Input::Forsake { lease }),
        Step::Abandon { epoch, lease } => {
            let_go(sim, member).await;
            release_key(sim, member, &epoch, Some(lease), None).await?;
            return Ok(Acted::Settling);
        }
        Step::Follow { upstream } => {
            let address = upstream.and_then(|name| upstream_address(&seen.view, &name));
            return Ok(follow(sim, member, address.map(Upstream::Member)));
        }
        Step::FollowRemote => return Ok(follow(sim, member, seen.standby_cluster.clone().map(Upstream::Remote))),
        Step::Sync(step) => return synchronize(sim, member, seen, step).await,
        Step::BeginHandover { .. } | Step::FailHandover(_) => return Ok(Acted::Done),
        Step::HandTo { epoch, successor, last } => {
            give_up(sim, member).await?;
            if let Some(successor) = successor {
                name_successor(sim, member, &epoch, &successor).await?;
            }
            release_key(sim, member, &epoch, None, last).await?;
            return Ok(Acted::Settling);
        }
        Step::ClearRequest => {
            clear_request(sim, member, seen).await?;
            return Ok(Acted::Settling);
        }
        Step::AskRelease { epoch } => ask_release(sim, member, seen, &epoch).await,
        Step::Adopt => adopt(sim, member, seen).await?,
        Step::Rebind { epoch, lease } => return hand_in(sim, member, Input::Rebind { epoch, lease }),
        Step::PauseFence => {
            put_in(sim, member, Input::Pause(true));
            order(sim, member, Request::Pause);
            keeper_does(sim, member, RequestKind::Pause, |instance| instance.paused).await?;
            return Ok(Acted::Settling);
        }
        Step::ResumeFence => return resume_fence(sim, member, seen).await,
        Step::DropJob => {
            drop_work(sim, member);
            return Ok(Acted::Done);
        }
        Step::Leave { code, keep_postgres } => {
            if !keep_postgres {
                say_stopped(sim, member).await;
            }
            order(sim, member, Request::Leave { code, keep_postgres });
            return Ok(Acted::Leave);
        }
        long => return start(sim, member, seen, long),
    }
    Ok(Acted::Done)
}

/// What the lease's core is told shows in what is seen a moment later.
fn hand_in(sim: &Shared, member: usize, input: Input) -> Result<Acted, Undone> {
    put_in(sim, member, input);
    Ok(Acted::Settling)
}

/// No deadline any more, also by what the agent after this one will remember.
pub(crate) async fn let_go(sim: &Shared, member: usize) {
    lease::let_go(sim, member).await;
    remember(sim, member);
}

/// A primary ends the pause by its next deadline; what cannot take writes needs none.
async fn resume_fence(sim: &Shared, member: usize, seen: &Observation) -> Result<Acted, Undone> {
    put_in(sim, member, Input::Pause(gives_no_deadline(seen)));
    let writable = match &seen.postgres {
        Postgres::Running(server) => matches!(server.wal, WalStatus::Primary { .. }),
        Postgres::Silent { writable } => *writable,
        Postgres::Ending => true,
        Postgres::Down => false,
    };
    if !seen.fence_paused || writable {
        return Ok(Acted::Settling);
    }
    if disarm(sim, member).await.is_err() {
        let left = sim.with(|world| {
            let agent = world.agent(member)?;
            let left = agent.instance.refused == Some((RequestKind::Disarm, Refusal::InstanceLeft));
            agent.known.writable |= left;
            Some(left)
        });
        return left.filter(|left| *left).map(|_| Acted::Settling).ok_or(Undone);
    }
    Ok(Acted::Settling)
}

/// Starts the long work of a step.
fn start(sim: &Shared, member: usize, seen: &Observation, step: Step) -> Result<Acted, Undone> {
    let inner = Rc::clone(sim);
    let known = |writable: bool, upstream: Option<Upstream>| {
        sim.with(|world| {
            if let Some(agent) = world.agent(member) {
                agent.known.writable = writable;
                if !writable {
                    agent.known.upstream = upstream;
                }
            }
        });
    };
    match step {
        Step::Initdb => start_work(sim, member, JobKind::Initdb, jobs::initdb(inner, member)),
        Step::Clone { from } => start_work(sim, member, JobKind::Clone, jobs::clone(inner, member, from)),
        Step::StartPrimary => {
            let LeaseSeen::Mine(epoch) = seen.lease.clone() else {
                return Ok(Acted::Failed);
            };
            known(true, None);
            let work = jobs::start_primary(inner, member, epoch);
            start_work(sim, member, JobKind::StartPrimary, work);
        }
        Step::StartStandby { upstream } => {
            let address = upstream.as_ref().and_then(|name| upstream_address(&seen.view, name));
            known(false, address.map(Upstream::Member));
            let work = jobs::start_standby(inner, member, upstream);
            start_work(sim, member, JobKind::StartStandby, work);
        }
        // The other cluster is no part of this world: it never answers.
        Step::StartStandbyLeader => {
            known(false, seen.standby_cluster.clone().map(Upstream::Remote));
            let work = jobs::start_standby(inner, member, None);
            start_work(sim, member, JobKind::StartStandby, work);
        }
        Step::CheckRemote { .. } => start_work(sim, member, JobKind::CheckRejoin, jobs::check_remote(inner)),
        Step::CheckRejoin { leader } => {
            let work = jobs::check_rejoin(inner, member, leader);
            start_work(sim, member, JobKind::CheckRejoin, work);
        }
        Step::Promote(epoch) => {
            known(true, None);
            start_work(sim, member, JobKind::Promote, jobs::promote(inner, member, epoch));
        }
        Step::Poll => start_work(sim, member, JobKind::Poll, jobs::poll(inner, member)),
        Step::Checkpoint { .. } => start_work(sim, member, JobKind::Checkpoint, jobs::checkpoint(inner, member)),
        Step::Stop => start_work(sim, member, JobKind::Stop, jobs::stop(inner, member)),
        Step::Confirm {
            members,
            checkpoint,
            timeline,
        } => {
            let work = jobs::confirm(inner, member, members, checkpoint, timeline);
            start_work(sim, member, JobKind::Confirm, work);
        }
        _ => return Err(Undone),
    }
    Ok(Acted::Started)
}

/// The time that one operation on etcd may take.
pub(crate) fn budget(sim: &Shared, member: usize) -> Budget {
    let total = sim.with(|world| world.agent(member).map(|agent| agent.timing().retry_timeout()));
    Budget::new(total.unwrap_or(Duration::from_secs(2)))
}

/// Asks etcd, with the loop's own client.
pub(crate) async fn etcd(sim: &Shared, member: usize, txn: Txn) -> Result<pgherd_cluster::etcd::TxnOutcome, Undone> {
    let budget = budget(sim, member);
    let Some(mut client) = sim.with(|world| world.agent(member).map(|agent| agent.client)) else {
        return Err(Undone);
    };
    let outcome = client.txn(sim, txn, budget).await;
    sim.with(|world| {
        if let Some(agent) = world.agent(member) {
            agent.client = client;
        }
    });
    outcome.map_err(|_| Undone)
}

/// Waits until the keeper has done what it was asked for.
pub(crate) async fn keeper_does(
    sim: &Shared,
    member: usize,
    asked: RequestKind,
    done: impl Fn(&pgherd_agent::keeper::Instance) -> bool,
) -> Result<(), Undone> {
    let before = sim
        .with(|world| world.agent(member).map(|agent| agent.instance.refusals))
        .ok_or(Undone)?;
    let until = sim.now() + KEEPER_ANSWERS;
    let look = || {
        sim.with(|world| {
            let instance = &world.agent(member)?.instance;
            let refused = instance.refusals > before && instance.refused.is_some_and(|(what, _)| what == asked);
            if done(instance) {
                Some(true)
            } else {
                refused.then_some(false)
            }
        })
    };
    match sim.exec.wait_for(Topic::Agent(member), until, look).await {
        Some(true) => Ok(()),
        Some(false) | None => Err(Undone),
    }
}

pub(crate) async fn disarm(sim: &Shared, member: usize) -> Result<(), Undone> {
    if sim.with(|world| world.is_planted(Planted::ReleaseWhileBackendLives)) {
        return Ok(());
    }
    order(sim, member, Request::Disarm);
    keeper_does(sim, member, RequestKind::Disarm, |instance| !instance.armed).await
}

/// Ends PostgreSQL whole and waits until nothing of it is left.
pub(crate) async fn end_postgres(sim: &Shared, member: usize, within: Duration) -> Result<(), Undone> {
    order(sim, member, Request::End);
    wait_ended(sim, member, within).await
}

pub(crate) async fn wait_ended(sim: &Shared, member: usize, within: Duration) -> Result<(), Undone> {
    let until = sim.now() + within;
    let look = || {
        sim.with(|world| {
            let early = world.is_planted(Planted::ReleaseWhileBackendLives);
            let instance = &world.agent(member)?.instance;
            (!instance.left || (early && instance.postmaster.is_none())).then_some(())
        })
    };
    sim.exec.wait_for(Topic::Agent(member), until, look).await.ok_or(Undone)
}

async fn bid(sim: &Shared, member: usize, guards: BidGuards) -> Result<Acted, Undone> {
    let slot = Slot::new();
    sim.with(|world| {
        if let Some(agent) = world.agent(member) {
            agent.bid = Some(Rc::clone(&slot));
        }
    });
    put_in(sim, member, Input::Bid(guards));
    match sim.exec.receive(&slot).await {
        Ok(_) => {
            remember(sim, member);
            Ok(Acted::Done)
        }
        Err(BidLoss::Store(_)) => Err(Undone),
        Err(_) => {
            sim.with(|world| {
                if let Some(agent) = world.agent(member) {
                    agent.memory.poll = None;
                }
            });
            Ok(Acted::Failed)
        }
    }
}

async fn end(sim: &Shared, member: usize) -> Result<Acted, Undone> {
    drop_work(sim, member);
    let_go(sim, member).await;
    end_postgres(sim, member, KEEPER_ANSWERS).await?;
    disarm(sim, member).await?;
    sim.with(|world| {
        if let Some(agent) = world.agent(member) {
            agent.known.writable = false;
        }
    });
    Ok(Acted::Done)
}

/// No more deadlines, and none in force.
async fn give_up(sim: &Shared, member: usize) -> Result<(), Undone> {
    let_go(sim, member).await;
    disarm(sim, member).await
}

fn follow(sim: &Shared, member: usize, upstream: Option<Upstream>) -> Acted {
    sim.with(|world| {
        let setting = match &upstream {
            Some(Upstream::Member(address)) => world.number(&address.host),
            Some(Upstream::Remote(_)) | None => None,
        };
        world.server(member).upstream_setting = setting;
        if let Some(agent) = world.agent(member) {
            agent.known.upstream = upstream;
        }
    });
    order(sim, member, Request::Signal(PostmasterSignal::Reload));
    Acted::Done
}

async fn synchronize(sim: &Shared, member: usize, seen: &Observation, step: SyncStep) -> Result<Acted, Undone> {
    let (key, leader) = sim.with(|world| (world.key(&Key::Sync), world.key(&Key::Leader)));
    let (revision, op) = match step {
        SyncStep::SetNames(names) => {
            if sim.with(|world| world.is_planted(Planted::SyncOrderSwapped)) {
                list_first(sim, member, &names).await?;
            }
            sim.with(|world| world.server(member).sync_setting = names.to_string());
            order(sim, member, Request::Signal(PostmasterSignal::Reload));
            return Ok(Acted::Settling);
        }
        SyncStep::WriteSync { state, revision } => {
            let value = serde_json::to_string(&state).unwrap_or_default();
            let key = key.clone();
            (revision, Op::Put { key, value, lease: 0 })
        }
        SyncStep::DeleteSync { revision } => (revision, Op::Delete(key.clone())),
    };
    let LeaseSeen::Mine(epoch) = &seen.lease else {
        return Ok(Acted::Failed);
    };
    let txn = Txn::new()
        .when(Compare::CreateRevision(leader, epoch.create_revision))
        .when(Compare::ModRevision(key, revision))
        .then(op);
    let outcome = etcd(sim, member, txn).await?;
    Ok(if outcome.succeeded {
        Acted::Settling
    } else {
        Acted::Failed
    })
}

/// A planted bug: whoever is to be waited for is listed before he is.
async fn list_first(sim: &Shared, member: usize, names: &pgherd_agent::sync::SyncNames) -> Result<(), Undone> {
    let listed: Vec<String> = names.required().iter().map(ToString::to_string).collect();
    if listed.is_empty() {
        return Ok(());
    }
    let (key, me) = sim.with(|world| (world.key(&Key::Sync), world.names[member].clone()));
    let state = pgherd_cluster::record::SyncState {
        leader: Some(me),
        quorum: 0,
        sync_standby: Some(listed.join(",")),
    };
    let value = serde_json::to_string(&state).unwrap_or_default();
    etcd(sim, member, Txn::new().then(Op::Put { key, value, lease: 0 })).await?;
    sim.exec.sleep(Duration::from_millis(500)).await;
    Ok(())
}

async fn adopt(sim: &Shared, member: usize, seen: &Observation) -> Result<(), Undone> {
    let writable = !matches!(&seen.data, DataDir::Cluster { standby: true, .. });
    order(sim, member, Request::Adopt { writable });
    keeper_does(sim, member, RequestKind::Adopt, |instance| instance.adopted).await?;
    sim.with(|world| {
        if let Some(agent) = world.agent(member) {
            agent.known.writable = writable;
        }
    });
    Ok(())
}

async fn claim_bootstrap(sim: &Shared, member: usize) -> Result<Acted, Undone> {
    let (initialize, leader) = sim.with(|world| (world.key(&Key::Initialize), world.key(&Key::Leader)));
    let lease = sim.with(|world| world.agent(member).and_then(|agent| agent.core.state().lease));
    let Some(lease) = lease else { return Ok(Acted::Failed) };
    let txn = Txn::new()
        .when(Compare::Absent(initialize.clone()))
        .when(Compare::Absent(leader))
        .then(Op::Put {
            key: initialize.clone(),
            value: String::new(),
            lease,
        })
        .then(Op::Get(initialize.clone()))
        .otherwise(Op::Get(initialize));
    let outcome = etcd(sim, member, txn).await?;
    if !outcome
        .read
        .iter()
        .any(|entry| entry.value.is_empty() && entry.lease == lease)
    {
        return Ok(Acted::Failed);
    }
    start_work(sim, member, JobKind::Initdb, jobs::initdb(Rc::clone(sim), member));
    Ok(Acted::Started)
}

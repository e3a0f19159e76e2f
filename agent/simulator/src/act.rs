//! Performs one step of a decision, in the order in which the agent does.

use std::rc::Rc;
use std::time::Duration;

use pgherd_agent::decide::{Step, upstream_address};
use pgherd_agent::lease::BidGuards;
use pgherd_agent::lease::core::{BidLoss, Input};
use pgherd_agent::observation::{JobKind, LeaseSeen, Observation, Postgres};
use pgherd_agent::postgres::DataDir;
use pgherd_agent::status::WalStatus;
use pgherd_agent::sync::SyncStep;
use pgherd_cluster::etcd::{Compare, Op, Txn};
use pgherd_cluster::key::Key;
use pgherd_cluster::name::{Lsn, MemberName};
use pgherd_cluster::record::{Address, FailoverRequest, Status};
use pgherd_cluster::view::Epoch;
use pgherd_keeper::protocol::{PostmasterSignal, RequestKind};

use crate::agent::{drop_work, start_work};
use crate::executor::{Slot, Topic};
use crate::host::Request;
use crate::jobs;
use crate::lease::{let_go, order, put_in};
use crate::rpc::{Budget, ask_member};
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
        Step::Initialize => {
            initialize(sim, member, seen).await?;
        }
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
        Step::Abandon { epoch, lease } => {
            let_go(sim, member).await;
            release_key(sim, member, &epoch, Some(lease), None).await?;
            return Ok(Acted::Settling);
        }
        Step::Follow { upstream } => return Ok(follow(sim, member, seen, upstream.as_ref())),
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
        Step::Adopt => return Err(Undone),
        Step::Rebind { epoch, lease } => {
            put_in(sim, member, Input::Rebind { epoch, lease });
            return Ok(Acted::Settling);
        }
        Step::PauseFence => {
            put_in(sim, member, Input::Pause(true));
            order(sim, member, Request::Pause);
            keeper_does(sim, member, RequestKind::Pause, |instance| instance.paused).await?;
            return Ok(Acted::Settling);
        }
        Step::ResumeFence => {
            put_in(sim, member, Input::Pause(false));
            if !matches!(&seen.postgres, Postgres::Running(server) if matches!(server.wal, WalStatus::Primary { .. })) {
                disarm(sim, member).await?;
            }
            return Ok(Acted::Settling);
        }
        Step::DropJob => {
            drop_work(sim, member);
            return Ok(Acted::Done);
        }
        Step::Leave { code, keep_postgres } => {
            order(sim, member, Request::Leave { code, keep_postgres });
            return Ok(Acted::Leave);
        }
        long => return start(sim, member, seen, long),
    }
    Ok(Acted::Started)
}

/// Starts the long work of a step.
fn start(sim: &Shared, member: usize, seen: &Observation, step: Step) -> Result<Acted, Undone> {
    let inner = Rc::clone(sim);
    let known = |writable: bool, upstream: Option<Address>| {
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
            let LeaseSeen::Mine(epoch) = seen.lease.clone() else { return Ok(Acted::Failed) };
            known(true, None);
            start_work(sim, member, JobKind::StartPrimary, jobs::start_primary(inner, member, epoch));
        }
        Step::StartStandby { upstream } => {
            known(false, upstream.as_ref().and_then(|name| upstream_address(&seen.view, name)));
            start_work(sim, member, JobKind::StartStandby, jobs::start_standby(inner, member, upstream));
        }
        Step::CheckRejoin { leader } => {
            start_work(sim, member, JobKind::CheckRejoin, jobs::check_rejoin(inner, member, leader));
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
    let Some(mut client) = sim.with(|world| world.agent(member).map(|agent| agent.client)) else { return Err(Undone) };
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
    let before = sim.with(|world| world.agent(member).map(|agent| agent.instance.refusals)).ok_or(Undone)?;
    let until = sim.now() + KEEPER_ANSWERS;
    let look = || {
        sim.with(|world| {
            let instance = &world.agent(member)?.instance;
            let refused = instance.refusals > before && instance.refused.is_some_and(|(what, _)| what == asked);
            if done(instance) { Some(true) } else { refused.then_some(false) }
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

async fn release_key(
    sim: &Shared,
    member: usize,
    epoch: &Epoch,
    lease: Option<i64>,
    last: Option<Lsn>,
) -> Result<(), Undone> {
    let txn = sim.with(|world| {
        let (key, status_key) = (world.key(&Key::Leader), world.key(&Key::Status));
        let agent = world.agent(member)?;
        let lease = lease.or(agent.core.state().lease).unwrap_or_default();
        let mut txn = Txn::new()
            .when(Compare::Value(key.clone(), epoch.holder.to_string()))
            .when(Compare::CreateRevision(key.clone(), epoch.create_revision))
            .when(Compare::Lease(key.clone(), lease))
            .then(Op::Delete(key));
        if let Some(last) = last {
            let status = Status {
                optime: Some(last),
                ..agent.view.status.clone()
            };
            let value = serde_json::to_string(&status).unwrap_or_default();
            txn = txn.then(Op::Put {
                key: status_key,
                value,
                lease: 0,
            });
        }
        Some(txn)
    });
    etcd(sim, member, txn.ok_or(Undone)?).await.map(|_| ())
}

async fn name_successor(sim: &Shared, member: usize, epoch: &Epoch, successor: &MemberName) -> Result<(), Undone> {
    let txn = sim.with(|world| {
        let key = world.key(&Key::Failover);
        let failover = &world.agent(member)?.view.failover;
        if failover.value.as_ref().is_some_and(|request| request.member.is_some()) {
            return Some(None);
        }
        let request = FailoverRequest {
            leader: Some(epoch.holder.to_string()),
            member: Some(successor.to_string()),
            scheduled_at: None,
        };
        let value = serde_json::to_string(&request).unwrap_or_default();
        let same = Compare::ModRevision(key.clone(), failover.mod_revision);
        Some(Some(Txn::new().when(same).then(Op::Put { key, value, lease: 0 })))
    });
    match txn.ok_or(Undone)? {
        Some(txn) => etcd(sim, member, txn).await.map(|_| ()),
        None => Ok(()),
    }
}

async fn clear_request(sim: &Shared, member: usize, seen: &Observation) -> Result<(), Undone> {
    let key = sim.with(|world| world.key(&Key::Failover));
    let txn = Txn::new()
        .when(Compare::ModRevision(key.clone(), seen.view.failover.mod_revision))
        .then(Op::Put {
            key,
            value: "{}".to_owned(),
            lease: 0,
        });
    etcd(sim, member, txn).await.map(|_| ())
}

fn follow(sim: &Shared, member: usize, seen: &Observation, upstream: Option<&MemberName>) -> Acted {
    let address = upstream.and_then(|name| upstream_address(&seen.view, name));
    sim.with(|world| {
        let setting = address.as_ref().and_then(|address| world.number(&address.host));
        world.host(member).upstream_setting = setting;
        if let Some(agent) = world.agent(member) {
            agent.known.upstream = address;
        }
    });
    order(sim, member, Request::Signal(PostmasterSignal::Reload));
    Acted::Done
}

async fn synchronize(sim: &Shared, member: usize, seen: &Observation, step: SyncStep) -> Result<Acted, Undone> {
    let (key, leader) = sim.with(|world| (world.key(&Key::Sync), world.key(&Key::Leader)));
    let (revision, op) = match step {
        SyncStep::SetNames(names) => {
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
    let LeaseSeen::Mine(epoch) = &seen.lease else { return Ok(Acted::Failed) };
    let txn = Txn::new()
        .when(Compare::CreateRevision(leader, epoch.create_revision))
        .when(Compare::ModRevision(key, revision))
        .then(op);
    etcd(sim, member, txn).await?;
    Ok(Acted::Settling)
}

async fn ask_release(sim: &Shared, member: usize, seen: &Observation, epoch: &Epoch) {
    let lease = sim.with(|world| world.agent(member).and_then(|agent| agent.core.state().lease));
    let Some(lease) = lease else { return };
    let_go(sim, member).await;
    for other in seen.view.members.keys().filter(|name| **name != seen.me) {
        let Some(to) = sim.with(|world| world.number(other.as_str())) else { continue };
        let epoch = epoch.clone();
        let work = async move |sim: Shared| {
            let key = sim.with(|world| world.key(&Key::Leader));
            let txn = Txn::new()
                .when(Compare::Value(key.clone(), epoch.holder.to_string()))
                .when(Compare::CreateRevision(key.clone(), epoch.create_revision))
                .when(Compare::Lease(key.clone(), lease))
                .then(Op::Delete(key));
            etcd(&sim, to, txn).await.is_ok_and(|outcome| outcome.succeeded)
        };
        ask_member(sim, member, to, Duration::from_secs(1), work).await;
    }
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
    if !outcome.read.iter().any(|entry| entry.value.is_empty() && entry.lease == lease) {
        return Ok(Acted::Failed);
    }
    start_work(sim, member, JobKind::Initdb, jobs::initdb(Rc::clone(sim), member));
    Ok(Acted::Started)
}

async fn initialize(sim: &Shared, member: usize, seen: &Observation) -> Result<(), Undone> {
    let DataDir::Cluster { control, .. } = &seen.data else { return Ok(()) };
    let (key, config) = sim.with(|world| (world.key(&Key::Initialize), world.key(&Key::Config)));
    let put = Op::Put {
        key: key.clone(),
        value: control.system_id.to_string(),
        lease: 0,
    };
    let lease = sim.with(|world| world.agent(member).and_then(|agent| agent.core.state().lease)).unwrap_or_default();
    let fresh = Txn::new().when(Compare::Absent(key.clone())).then(put.clone());
    let ours = Txn::new()
        .when(Compare::Value(key.clone(), String::new()))
        .when(Compare::Lease(key, lease))
        .then(put);
    for txn in [fresh, ours] {
        if etcd(sim, member, txn).await?.succeeded {
            break;
        }
    }
    let value = sim.with(|world| serde_json::to_string(&world.bootstrap).unwrap_or_default());
    let txn = Txn::new()
        .when(Compare::Absent(config.clone()))
        .then(Op::Put {
            key: config,
            value,
            lease: 0,
        });
    etcd(sim, member, txn).await.map(|_| ())
}

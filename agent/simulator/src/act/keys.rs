//! What steps write into etcd, each guarded by what it rests on.

use std::rc::Rc;
use std::time::Duration;

use pgherd_agent::observation::{LeaseSeen, Observation};
use pgherd_agent::postgres::DataDir;
use pgherd_cluster::etcd::{Compare, Op, Txn};
use pgherd_cluster::key::Key;
use pgherd_cluster::name::{Lsn, MemberName};
use pgherd_cluster::record::{FailoverRequest, PgState, Role, Status};
use pgherd_cluster::view::Epoch;

use super::{Undone, etcd, let_go};
use crate::executor::Owner;
use crate::lease::withdraw;
use crate::rpc::ask_member;
use crate::world::Shared;

/// How long a member may take to delete our key for us.
const RELEASE_MAX: Duration = Duration::from_secs(1);

pub(super) async fn release_key(
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

pub(super) async fn name_successor(
    sim: &Shared,
    member: usize,
    epoch: &Epoch,
    successor: &MemberName,
) -> Result<(), Undone> {
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

pub(super) async fn clear_request(sim: &Shared, member: usize, seen: &Observation) -> Result<(), Undone> {
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

pub(super) async fn ask_release(sim: &Shared, member: usize, seen: &Observation, epoch: &Epoch) {
    let lease = sim.with(|world| world.agent(member).and_then(|agent| agent.core.state().lease));
    let Some(lease) = lease else { return };
    let_go(sim, member).await;
    let others = seen.view.members.keys().filter(|name| **name != seen.me);
    let others: Vec<usize> = sim.with(|world| others.filter_map(|name| world.number(name.as_str())).collect());
    let until = sim.now() + RELEASE_MAX;
    for to in others {
        let (epoch, asking) = (epoch.clone(), Rc::clone(sim));
        let work = async move |sim: Shared| {
            let key = sim.with(|world| world.key(&Key::Leader));
            let txn = Txn::new()
                .when(Compare::Value(key.clone(), epoch.holder.to_string()))
                .when(Compare::CreateRevision(key.clone(), epoch.create_revision))
                .when(Compare::Lease(key.clone(), lease))
                .then(Op::Delete(key));
            let deleted = etcd(&sim, to, txn).await.is_ok_and(|outcome| outcome.succeeded);
            withdraw(&sim, to, &epoch, (!deleted).then_some(lease));
        };
        sim.spawn(Owner::Agent(member), async move {
            ask_member(&asking, member, to, RELEASE_MAX, work).await;
        });
    }
    // Who is silent is waited for; whoever answers has answered by then.
    sim.exec.sleep_until(until).await;
}

/// Others see at once that this member went on purpose.
pub(super) async fn say_stopped(sim: &Shared, member: usize) {
    let put = sim.with(|world| {
        let name = world.name(member).clone();
        let key = world.key(&Key::Member(name.clone()));
        let agent = world.agent(member)?;
        let lease = agent.core.state().lease?;
        let mut record = agent.view.members.get(&name)?.record.clone();
        record.state = PgState::Stopped;
        if record.role != Role::Replica {
            record.role = Role::Demoted;
        }
        record.replication_state = None;
        (record.xlog_location, record.timeline) = (None, None);
        let value = serde_json::to_string(&record).ok()?;
        Some(Op::Put { key, value, lease })
    });
    if let Some(put) = put {
        // Nobody waits for it.
        let _ = etcd(sim, member, Txn::new().then(put)).await;
    }
}

/// Deletes the initialize key of a cluster that was not finished: one that is bound to this member's lease.
pub(super) async fn withdraw_initialize(sim: &Shared, member: usize) -> Result<(), Undone> {
    let key = sim.with(|world| world.key(&Key::Initialize));
    let lease = sim.with(|world| world.agent(member).and_then(|agent| agent.core.state().lease));
    let Some(lease) = lease else { return Ok(()) };
    let txn = Txn::new()
        .when(Compare::Lease(key.clone(), lease))
        .then(Op::Delete(key));
    etcd(sim, member, txn).await.map(|_| ())
}

/// Makes the initialize key of a cluster that is finished outlive this member's lease.
pub(crate) async fn keep_initialize(sim: &Shared, member: usize, system_id: String, epoch: &Epoch) -> bool {
    let (key, leader) = sim.with(|world| (world.key(&Key::Initialize), world.key(&Key::Leader)));
    for before in [
        Compare::Value(key.clone(), system_id.clone()),
        Compare::Absent(key.clone()),
    ] {
        let txn = Txn::new()
            .when(before)
            .when(Compare::CreateRevision(leader.clone(), epoch.create_revision))
            .then(Op::Put {
                key: key.clone(),
                value: system_id.clone(),
                lease: 0,
            });
        if etcd(sim, member, txn).await.is_ok_and(|outcome| outcome.succeeded) {
            return true;
        }
    }
    false
}

/// Takes back what a failed bootstrap has done.
pub(super) async fn undo_bootstrap(sim: &Shared, member: usize, seen: &Observation) -> Result<(), Undone> {
    withdraw_initialize(sim, member).await?;
    match &seen.lease {
        LeaseSeen::Mine(epoch) | LeaseSeen::MineUnproven(epoch) => {
            let_go(sim, member).await;
            release_key(sim, member, epoch, None, None).await?;
        }
        LeaseSeen::Stale { epoch, lease } => {
            let_go(sim, member).await;
            release_key(sim, member, epoch, Some(*lease), None).await?;
        }
        LeaseSeen::Theirs(_) | LeaseSeen::Free | LeaseSeen::Unknown => {}
    }
    discard(sim, member);
    Ok(())
}

/// Moves data aside that was to become a cluster.
pub(super) fn discard(sim: &Shared, member: usize) {
    sim.with(|world| {
        let server = world.server(member);
        if let Some(data) = server.data.take() {
            server.aside.push(data);
        }
    });
}

pub(super) async fn initialize(sim: &Shared, member: usize, seen: &Observation) -> Result<(), Undone> {
    let DataDir::Cluster { control, .. } = &seen.data else {
        return Ok(());
    };
    let (key, config) = sim.with(|world| (world.key(&Key::Initialize), world.key(&Key::Config)));
    let lease = sim
        .with(|world| world.agent(member).and_then(|agent| agent.core.state().lease))
        .unwrap_or_default();
    let put = Op::Put {
        key: key.clone(),
        value: control.system_id.to_string(),
        lease: if seen.bootstrap_unfinished { lease } else { 0 },
    };
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
    let txn = Txn::new().when(Compare::Absent(config.clone())).then(Op::Put {
        key: config,
        value,
        lease: 0,
    });
    etcd(sim, member, txn).await.map(|_| ())
}

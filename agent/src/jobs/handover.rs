//! Giving the lease up in order: stop, see that a candidate has everything, delete the key.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::etcd::{Compare, Op, Txn};
use pgherd_cluster::key::Key;
use pgherd_cluster::name::{Lsn, MemberName, Timeline};
use pgherd_cluster::record::{FailoverRequest, Status};
use pgherd_cluster::view::{Epoch, View};
use pgherd_keeper::protocol::PostmasterSignal;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::poll::{ask_all, ask_one};
use super::{JobError, Outcome};
use crate::context::{Context, local_target};
use crate::observation::Peer;
use crate::postgres::control::inspect;
use crate::postgres::sql::ask_once;
use crate::postgres::{ControlState, DataDir};

/// A checkpoint while still serving, so that the one of the shutdown has little left to write. It is no condition.
const CHECKPOINT_MAX: Duration = Duration::from_secs(300);
/// How long a fast stop may take before the rest is ended without a checkpoint.
const STOP_MAX: Duration = Duration::from_secs(60);
/// How long a candidate has to confirm the shutdown checkpoint. It was streaming; this is a matter of milliseconds.
const CONFIRM_MAX: Duration = Duration::from_secs(3);
const CONFIRM_EVERY: Duration = Duration::from_millis(5);

/// The leader's side of a planned switchover. When it fails before the stop, the leader goes on as if nothing had been
/// asked; after the stop, the loop restarts PostgreSQL in place, unless the lease was given up.
pub(super) async fn switchover(
    context: &Context,
    epoch: &Epoch,
    candidate: Option<MemberName>,
) -> Result<Outcome, JobError> {
    let view = context.view();
    let candidate = match choose(context, &view, candidate.as_ref()).await {
        Ok(candidate) => candidate,
        Err(error) => {
            clear_request(context, &view).await?;
            return Err(error);
        }
    };
    tracing::info!(candidate = %candidate.name, "switchover: checkpoint while still serving");
    // On a connection of its own: the loop's must stay free to observe.
    let target = local_target(&context.config);
    let what = "writing a checkpoint before the switchover";
    if let Err(error) = ask_once(&target, what, "CHECKPOINT", CHECKPOINT_MAX).await {
        clear_request(context, &view).await?;
        return Err(error.into());
    }
    tracing::info!("switchover: stopping PostgreSQL");
    let shutdown = stop_in_order(context).await?;
    let confirmed = match &shutdown {
        Some(end) => confirmed_by(context, &view, std::slice::from_ref(&candidate.name), end).await,
        None => None,
    };
    let Some(successor) = confirmed else {
        clear_request(context, &view).await?;
        return Err(JobError::NoCandidate(format!(
            "{} did not confirm the shutdown checkpoint",
            candidate.name
        )));
    };
    tracing::info!(candidate = %candidate.name, "switchover: the candidate has everything, giving the lease up");
    give_up(context, epoch, shutdown.map(|end| end.checkpoint), Some(successor)).await?;
    Ok(Outcome::Done)
}

/// A leader that is told to stop hands over to whoever has everything; with nobody there it stops all the same.
pub(super) async fn before_leaving(context: &Context, epoch: Option<&Epoch>) -> Result<Outcome, JobError> {
    let view = context.view();
    let shutdown = stop_in_order(context).await?;
    let mut successor = None;
    if let Some(end) = &shutdown {
        let others: Vec<MemberName> = view
            .members
            .values()
            .filter(|member| member.name != context.config.name && !member.record.nofailover())
            .map(|member| member.name.clone())
            .collect();
        successor = confirmed_by(context, &view, &others, end).await;
        match &successor {
            Some(name) => tracing::info!(member = %name, "the shutdown checkpoint has arrived"),
            None => {
                tracing::warn!("no other member confirmed the shutdown checkpoint; the lease is given up all the same");
            }
        }
    }
    if let Some(epoch) = epoch {
        give_up(context, epoch, shutdown.map(|end| end.checkpoint), successor).await?;
    }
    Ok(Outcome::Done)
}

/// Stops a standby in order.
pub(super) async fn stop(context: &Context) -> Result<Outcome, JobError> {
    stop_in_order(context).await?;
    Ok(Outcome::Done)
}

/// Who takes over: the named candidate if it is able, else the one that is furthest.
async fn choose(context: &Context, view: &View, candidate: Option<&MemberName>) -> Result<Peer, JobError> {
    let poll = ask_all(context, Boottime::now()).await?;
    let lag_max = view.config.value.clone().unwrap_or_default().maximum_lag_on_failover();
    let own = poll.own_position;
    let able = |peer: &Peer| {
        let same_timeline = peer.timeline == poll.own_timeline;
        let position = peer
            .position
            .filter(|_| !peer.primary && !peer.nofailover && same_timeline);
        position.is_some_and(|position| position.behind(own) <= lag_max)
    };
    let asked = poll.peers.len() + poll.silent;
    let mut peers: Vec<Peer> = poll
        .peers
        .into_iter()
        .filter(|peer| able(peer) && candidate.is_none_or(|candidate| *candidate == peer.name))
        .collect();
    peers.sort_by_key(|peer| (peer.position, peer.failover_priority));
    peers.pop().ok_or_else(|| {
        JobError::NoCandidate(match candidate {
            Some(name) => {
                format!("{name} does not answer, is not a standby on our timeline, or lags more than {lag_max} bytes")
            }
            None => format!("none of {asked} other members answers as a standby within {lag_max} bytes"),
        })
    })
}

/// Where a primary that was stopped in order ended.
#[derive(Clone, Copy, Debug)]
struct ShutdownEnd {
    /// Where its last record, the shutdown checkpoint, begins.
    checkpoint: Lsn,
    /// On which timeline.
    timeline: Timeline,
}

/// Stops PostgreSQL and waits until all of it has ended. Says where it ended, if that was in order.
async fn stop_in_order(context: &Context) -> Result<Option<ShutdownEnd>, JobError> {
    context.sql.disconnect().await;
    context.keeper.signal(PostmasterSignal::StopFast)?;
    if context.keeper.wait_ended(STOP_MAX).await.is_err() {
        tracing::warn!("PostgreSQL did not stop within {} s: ending it", STOP_MAX.as_secs());
        context.keeper.end().await?;
    }
    Ok(
        match inspect(&context.programs, &context.config.postgresql.data_dir).await? {
            DataDir::Cluster { control, .. } if control.state == ControlState::ShutDown => Some(ShutdownEnd {
                checkpoint: control.checkpoint,
                timeline: control.timeline,
            }),
            _ => None,
        },
    )
}

/// Asks the members until one has received past the beginning of the shutdown checkpoint, its last record.
async fn confirmed_by(context: &Context, view: &View, members: &[MemberName], end: &ShutdownEnd) -> Option<MemberName> {
    let deadline = Instant::now() + CONFIRM_MAX;
    let mut tick = interval(CONFIRM_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let asked: Vec<_> = members
        .iter()
        .filter_map(|name| Some((name.clone(), view.members.get(name)?.record.api_address()?)))
        .collect();
    while !asked.is_empty() && Instant::now() < deadline {
        tick.tick().await;
        if context.keeper.instance().borrow().armed {
            let mut asking = tokio::task::JoinSet::new();
            for (name, address) in &asked {
                asking.spawn(ask_one(name.clone(), address.clone()));
            }
            while let Some(answer) = asking.join_next().await {
                if let Ok(Some(peer)) = answer
                    && peer.timeline == Some(end.timeline)
                    && peer.position.is_some_and(|position| position > end.checkpoint)
                {
                    return Some(peer.name);
                }
            }
        } else {
            return None; // The deadline passed meanwhile: there is nothing left to give up.
        }
    }
    None
}

/// PostgreSQL has ended: no more deadlines, then the last position and who has it, then the key.
async fn give_up(
    context: &Context,
    epoch: &Epoch,
    last: Option<Lsn>,
    successor: Option<MemberName>,
) -> Result<(), JobError> {
    context.lease.let_go().await;
    // After that: until then the key may still move to a lease of another length.
    let lease = context.lease.state().borrow().lease.unwrap_or_default();
    context.keeper.disarm().await?;
    if let Some(successor) = successor {
        name_successor(context, epoch, &successor).await?;
    }
    release_key(context, epoch, lease, last).await
}

/// Names the member that has everything, unless a request stands that names one: another that bids first might lack the
/// last commits.
async fn name_successor(context: &Context, epoch: &Epoch, successor: &MemberName) -> Result<(), JobError> {
    let view = context.view();
    let named = view
        .failover
        .value
        .as_ref()
        .is_some_and(|request| request.member.is_some());
    if named {
        return Ok(());
    }
    let request = FailoverRequest {
        leader: Some(epoch.holder.to_string()),
        member: Some(successor.to_string()),
        scheduled_at: None,
    };
    let key = context.key(&Key::Failover);
    let value = serde_json::to_string(&request).unwrap_or_default();
    let txn = Txn::new()
        .when(Compare::ModRevision(key.clone(), view.failover.mod_revision))
        .then(Op::Put { key, value, lease: 0 });
    // A request that came in between names another, and stands.
    context.etcd.txn(&txn, context.budget()).await?;
    Ok(())
}

/// Deletes the leader key if it is still this holding of it, and writes the last position in the same transaction.
pub(crate) async fn release_key(
    context: &Context,
    epoch: &Epoch,
    lease: i64,
    last: Option<Lsn>,
) -> Result<(), JobError> {
    let key = context.key(&Key::Leader);
    let mut txn = Txn::new()
        .when(Compare::Value(key.clone(), epoch.holder.to_string()))
        .when(Compare::CreateRevision(key.clone(), epoch.create_revision))
        .when(Compare::Lease(key.clone(), lease))
        .then(Op::Delete(key));
    if let Some(last) = last {
        let status = Status {
            optime: Some(last),
            ..context.view().status.clone()
        };
        let value = serde_json::to_string(&status).unwrap_or_default();
        txn = txn.then(Op::Put {
            key: context.key(&Key::Status),
            value,
            lease: 0,
        });
    }
    // Whether it was there to be deleted or not: it is not ours any more.
    context.etcd.txn(&txn, context.budget()).await?;
    Ok(())
}

/// Overwrites the request as done, unless it has changed meanwhile.
pub(crate) async fn clear_request(context: &Context, view: &View) -> Result<(), JobError> {
    let key = context.key(&Key::Failover);
    let txn = Txn::new()
        .when(Compare::ModRevision(key.clone(), view.failover.mod_revision))
        .then(Op::Put {
            key,
            value: "{}".to_owned(),
            lease: 0,
        });
    context.etcd.txn(&txn, context.budget()).await?;
    Ok(())
}

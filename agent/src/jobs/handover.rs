//! The pieces of giving the lease up in order; the decisions put them together.

use std::time::Duration;

use pgherd_cluster::etcd::{Compare, Op, Txn};
use pgherd_cluster::event::phase;
use pgherd_cluster::key::Key;
use pgherd_cluster::name::{Lsn, MemberName, Timeline};
use pgherd_cluster::record::{DynamicConfig, FailoverRequest, Status};
use pgherd_cluster::view::{Epoch, View};
use pgherd_keeper::protocol::PostmasterSignal;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::poll::ask_one;
use super::{JobError, Outcome};
use crate::context::Context;
use crate::postgres::sql::ask_once;
use crate::scripts::Run;
use crate::sync::{SyncMode, SyncSettings};

/// A checkpoint while still serving may take its time.
const CHECKPOINT_MAX: Duration = Duration::from_secs(300);
/// How long a fast stop may take before the rest is ended without a checkpoint.
const STOP_MAX: Duration = Duration::from_secs(60);
/// Patroni sets no limit; a stop that never comes would keep a machine from being shut down.
const BEFORE_STOP_MAX: Duration = Duration::from_secs(300);
/// How long a candidate has to confirm the shutdown checkpoint. It was streaming; this is a matter of milliseconds.
const CONFIRM_MAX: Duration = Duration::from_secs(3);
const CONFIRM_EVERY: Duration = Duration::from_millis(5);

/// Writes a checkpoint, on a connection of its own: the loop's must stay free to observe.
pub(super) async fn checkpoint(context: &Context) -> Result<Outcome, JobError> {
    let target = context.sql.target();
    let what = "writing a checkpoint before the hand-over";
    ask_once(&target, what, "CHECKPOINT", CHECKPOINT_MAX).await?;
    Ok(Outcome::Done)
}

/// Runs the operator's `before_stop`, whose result does not matter. It is not waited for once PostgreSQL has ended by
/// another's hand, as at the end of a deadline.
pub(super) async fn before_stop(context: &Context) {
    let scripts = context.scripts();
    let Some(words) = &scripts.before_stop else { return };
    let run = Run::words(words);
    let mut instance = context.keeper.instance();
    tracing::info!("running {} before PostgreSQL is stopped", run.name());
    let ended = instance.wait_for(|instance| instance.postmaster.is_none());
    tokio::select! {
        ran = run.run(BEFORE_STOP_MAX) => if let Err(error) = ran {
            tracing::warn!("before_stop: {error}; PostgreSQL is stopped all the same");
        },
        _ = ended => tracing::warn!("before_stop: PostgreSQL has ended meanwhile; {} is killed", run.name()),
    }
}

/// `primary_stop_timeout` counts in synchronous mode only, as with Patroni: there a standby has all that was acknowledged.
fn stop_max(dynamic: &DynamicConfig) -> Duration {
    let synchronous = SyncSettings::of(dynamic).mode != SyncMode::Off;
    let configured = dynamic.primary_stop_timeout().filter(|_| synchronous);
    configured.unwrap_or(STOP_MAX)
}

/// Stops PostgreSQL in order and waits until all of it has ended.
pub(super) async fn stop(context: &Context) -> Result<Outcome, JobError> {
    before_stop(context).await;
    context.sql.disconnect().await;
    context.slot_sql.disconnect().await;
    context.journal.mark(phase::STOP);
    context.keeper.signal(PostmasterSignal::StopFast)?;
    let limit = stop_max(&context.dynamic());
    if context.keeper.wait_ended(limit).await.is_err() {
        tracing::warn!("PostgreSQL did not stop within {} s: ending it", limit.as_secs());
        context.keeper.end().await?;
    }
    Ok(Outcome::Done)
}

/// Asks the members until one has received past the beginning of the shutdown checkpoint, the last record.
pub(super) async fn confirmed_by(
    context: &Context,
    members: &[MemberName],
    checkpoint: Lsn,
    timeline: Timeline,
) -> Option<MemberName> {
    let view = context.view();
    let deadline = Instant::now() + CONFIRM_MAX;
    let mut tick = interval(CONFIRM_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let asked: Vec<_> = members
        .iter()
        .filter_map(|name| Some((name.clone(), view.members.get(name)?.record.api_endpoint()?)))
        .collect();
    while !asked.is_empty() && Instant::now() < deadline {
        tick.tick().await;
        let instance = context.keeper.instance().borrow().clone();
        if !instance.armed && !instance.paused {
            return None; // The deadline passed meanwhile: there is nothing left to give up.
        }
        let mut asking = tokio::task::JoinSet::new();
        for (name, endpoint) in &asked {
            let (peers, scope) = (context.peers.clone(), context.config.scope.clone());
            asking.spawn(ask_one(peers, scope, name.clone(), endpoint.clone()));
        }
        while let Some(answer) = asking.join_next().await {
            if let Ok(Some(peer)) = answer
                && peer.timeline == Some(timeline)
                && peer.position.is_some_and(|position| position > checkpoint)
            {
                return Some(peer.name);
            }
        }
    }
    None
}

/// PostgreSQL has ended: no more deadlines, then the last position and who has it, then the key.
pub(crate) async fn hand_to(
    context: &Context,
    epoch: &Epoch,
    successor: Option<&MemberName>,
    last: Option<Lsn>,
) -> Result<(), JobError> {
    context.lease.let_go().await;
    // After that: until then the key may still move to a lease of another length.
    let lease = context.lease.state().borrow().lease.unwrap_or_default();
    context.keeper.disarm().await?;
    match successor {
        Some(successor) => {
            tracing::info!(member = %successor, "the shutdown checkpoint has arrived: giving the lease up");
            name_successor(context, epoch, successor).await?;
        }
        None => tracing::warn!("no other member confirmed the shutdown checkpoint: giving the lease up all the same"),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configured_limit_of_a_stop_counts_in_synchronous_mode_only() {
        for (text, expected) in [
            (r#"{"primary_stop_timeout": 5}"#, STOP_MAX),
            (
                r#"{"primary_stop_timeout": 5, "synchronous_mode": "quorum"}"#,
                Duration::from_secs(5),
            ),
            (r#"{"primary_stop_timeout": 0, "synchronous_mode": true}"#, STOP_MAX),
        ] {
            assert_eq!(stop_max(&DynamicConfig::parse(text)), expected, "{text}");
        }
    }
}

//! One cycle's choice. Pure: the same inputs give the same answer; nothing here performs, logs, or reads a clock.
//!
//! A decision is a [`Reason`], from which log, REST and page speak, and at most one [`Step`]; after a step the loop
//! observes and decides again.

mod data;
mod election;
mod handover;
mod leader;
mod pause;
mod postgres_down;
mod reason;
mod reinitialize;
mod restart;
mod standby;
mod standby_leader;
pub(crate) mod synchronous;

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::{Lsn, MemberName, Timeline};
use pgherd_cluster::record::{Address, Role};
use pgherd_cluster::view::{Epoch, View};

pub(crate) use self::pause::is_writable;
pub use self::reason::Reason;
pub use self::standby_leader::gives_no_deadline;
use crate::lease::BidGuards;
use crate::memory::{Memory, Why};
use crate::observation::{JobKind, LeaseSeen, Observation, Postgres};
use crate::postgres::{Control, ControlState, DataDir};
use crate::status::WalStatus;
use crate::sync::SyncStep;

/// What to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Create the initialize key, empty, to bootstrap.
    ClaimBootstrap,
    /// Write the initialize key from the data that is here, and the configuration if there is none.
    Initialize,
    /// Run initdb.
    Initdb,
    /// Clone from a member.
    Clone {
        /// Which.
        from: MemberName,
    },
    /// Make a replica by a method that needs no member to copy from.
    Restore,
    /// Give up the initialize key of a cluster that an agent before this one, of the same lease, has begun to make.
    Withdraw,
    /// Take back what a failed bootstrap has done: keys that are ours alone, and the data directory, which is moved aside.
    UndoBootstrap,
    /// Move a data directory aside that was to become a cluster which another member has made meanwhile.
    Discard,
    /// Ask the operator's program whether this member may be promoted.
    PrePromote(Epoch),
    /// Copy the data of the cluster that this one follows.
    CloneRemote,
    /// Start as a primary, with the deadline that the keeper has.
    StartPrimary,
    /// Start as a standby.
    StartStandby {
        /// Whom to stream from.
        upstream: Option<MemberName>,
    },
    /// Start as the leader of a standby cluster.
    StartStandbyLeader,
    /// Stream from the cluster that this one follows.
    FollowRemote,
    /// Ask the cluster that this one follows whether our data can follow it.
    CheckRemote {
        /// Our own holding, which the answer is remembered with.
        epoch: Epoch,
    },
    /// Stream from another member, or from nobody.
    Follow {
        /// Whom.
        upstream: Option<MemberName>,
    },
    /// Ask the leader whether our data can follow it.
    CheckRejoin {
        /// Its holding.
        leader: Epoch,
    },
    /// Take back what the leader has not, by pg_rewind.
    Rewind {
        /// The leader's holding.
        leader: Epoch,
    },
    /// Bid for the leader key.
    Bid(BidGuards),
    /// Promote the standby.
    Promote(Epoch),
    /// End PostgreSQL at once.
    End,
    /// PostgreSQL has ended: give the leader key up.
    Release {
        /// The holding to give up.
        epoch: Epoch,
    },
    /// PostgreSQL has ended, and the key still names us: give it up and win it anew.
    WinAnew {
        /// The old holding.
        epoch: Epoch,
        /// The lease that its key is bound to.
        lease: i64,
        /// What the bid rests on.
        guards: BidGuards,
    },
    /// PostgreSQL does not end: leave the lease, and the leader key with it, to expire.
    Forsake {
        /// The lease that the key is bound to; that of our holding when nothing.
        lease: Option<i64>,
    },
    /// A stale key that we shall not use: delete it.
    Abandon {
        /// The holding.
        epoch: Epoch,
        /// The lease that its key is bound to.
        lease: i64,
    },
    /// Ask the other members for their positions.
    Poll,
    /// Change what commits wait for, or the record of it.
    Sync(SyncStep),
    /// Begin to give the lease up in order. Nothing is performed yet.
    BeginHandover {
        /// The holding to give up.
        epoch: Epoch,
        /// Why.
        why: Why,
    },
    /// Note that the hand-over cannot be carried out. Nothing is performed.
    FailHandover(String),
    /// Write a checkpoint while still serving, so that the one of the stop has little left to write.
    Checkpoint {
        /// Who takes over; this member itself before a restart.
        to: MemberName,
    },
    /// Stop PostgreSQL in order.
    Stop,
    /// Ask who has received the shutdown checkpoint.
    Confirm {
        /// Whom to ask.
        members: Vec<MemberName>,
        /// Where the shutdown checkpoint begins.
        checkpoint: Lsn,
        /// On which timeline.
        timeline: Timeline,
    },
    /// PostgreSQL has ended: name who has everything, and give the leader key up.
    HandTo {
        /// The holding to give up.
        epoch: Epoch,
        /// Who has everything.
        successor: Option<MemberName>,
        /// Where the log ends, when it was ended in order.
        last: Option<Lsn>,
    },
    /// Clear a request that is done or cannot be carried out.
    ClearRequest,
    /// etcd cannot be reached: ask the other members to delete the key of a holding that is over.
    AskRelease {
        /// The holding.
        epoch: Epoch,
    },
    /// Take a running PostgreSQL into the keeper's care.
    Adopt,
    /// The key names us from a holding of another process, and PostgreSQL runs by it: bind it to our lease.
    Rebind {
        /// The holding.
        epoch: Epoch,
        /// The lease that its key is bound to.
        lease: i64,
    },
    /// The maintenance has begun: leave PostgreSQL alone, whatever becomes of agent and lease.
    PauseFence,
    /// The maintenance has ended.
    ResumeFence,
    /// Drop the job that is under way.
    DropJob,
    /// End the process.
    Leave {
        /// With which exit code.
        code: u8,
        /// Whether PostgreSQL goes on without it, as in maintenance.
        keep_postgres: bool,
    },
}

/// A reason, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Why.
    pub reason: Reason,
    /// What to do; nothing but to wait.
    pub step: Option<Step>,
    /// Decide again after this, if nothing happens before.
    pub again_after: Option<Duration>,
}

impl Decision {
    fn wait(reason: Reason) -> Self {
        Self {
            reason,
            step: None,
            again_after: None,
        }
    }

    fn wait_for(reason: Reason, again_after: Duration) -> Self {
        Self {
            reason,
            step: None,
            again_after: Some(again_after),
        }
    }

    fn act(reason: Reason, step: Step) -> Self {
        Self {
            reason,
            step: Some(step),
            again_after: None,
        }
    }
}

/// A short wait where something is expected to happen any moment.
const SOON: Duration = Duration::from_millis(200);

/// Decides.
#[must_use]
pub fn decide(seen: &Observation, memory: &Memory, now: Boottime) -> Decision {
    if let Some(why) = &memory.fatal {
        return leave(seen, Reason::Fatal(why.clone()), 64);
    }
    if let Some(decision) = never_ends(seen, memory, now) {
        return decision;
    }
    if let (Some((why, _)), None) = (&memory.bootstrap_failed, seen.job) {
        return data::undo_bootstrap(seen, why);
    }
    if let Some(job) = seen.job {
        // Commits wait for a standby that is lost; the checkpoint before a hand-over is not worth that.
        if job == JobKind::Checkpoint && synchronous::leader(seen, memory, now).is_some() {
            return Decision::act(Reason::Busy(job), Step::DropJob);
        }
        return during(seen, memory, job);
    }
    // Before anything can be done to it, somebody must be able to end it.
    if seen.stranger {
        return Decision::act(Reason::Adopting, Step::Adopt);
    }
    if let Some(decision) = pause::switch(seen) {
        return decision;
    }
    if let Some(under_way) = &memory.handover {
        return handover::decide(seen, memory, under_way, now);
    }
    if seen.stopping {
        return handover::stopping(seen, memory, now);
    }
    if let Postgres::Ending = seen.postgres {
        return Decision::wait(Reason::PostgresEnding);
    }
    if let Some(decision) = reinitialize::decide(seen, memory) {
        return decision;
    }
    match &seen.data {
        DataDir::Foreign(files) => Decision::wait(Reason::ForeignFiles(files.clone())),
        // A server whose data was taken away keeps nothing: what it acknowledges is gone with it.
        DataDir::Empty if seen.postgres != Postgres::Down && !seen.is_paused() => {
            Decision::act(Reason::DataGone, Step::End)
        }
        DataDir::Empty if seen.postgres != Postgres::Down => Decision::wait(Reason::Paused),
        DataDir::Empty => data::none(seen, memory, now),
        DataDir::Cluster { control, standby } => {
            // What runs tells better than what was seen before it was promoted.
            let standby = comes_up_as_standby(seen, control, *standby);
            data::identity(seen, control, standby)
                .or_else(|| restart::decide(seen, memory, now, standby))
                .unwrap_or_else(|| with_data(seen, memory, now, standby))
        }
    }
}

/// Whether this data is a standby's. A crash in the middle of a promotion leaves a control file in recovery without a
/// standby.signal; started as primary it would go on on the former leader's timeline.
fn comes_up_as_standby(seen: &Observation, control: &Control, standby: bool) -> bool {
    if let Postgres::Running(server) = &seen.postgres {
        return matches!(server.wal, WalStatus::Standby { .. });
    }
    // A cluster that is being made is nobody's standby, be it made out of a standby's backup.
    if seen.bootstrap_unfinished {
        return false;
    }
    standby
        || matches!(
            control.state,
            ControlState::InArchiveRecovery | ControlState::ShutDownInRecovery
        )
}

/// Processes that are killed and still there hang in the kernel, on a disk that does not answer. They will not serve
/// anybody any more, and the key that they keep serves nobody either. It is not given up, since that must not be done before
/// the last of them is gone; it is left to end with its lease.
fn never_ends(seen: &Observation, memory: &Memory, now: Boottime) -> Option<Decision> {
    let ttl = seen.view.timing().ttl();
    let for_long = memory.ending_since.is_some_and(|since| now.since(since) >= ttl);
    let lease = match &seen.lease {
        LeaseSeen::Mine(_) | LeaseSeen::MineUnproven(_) => None,
        LeaseSeen::Stale { lease, .. } => Some(*lease),
        LeaseSeen::Theirs(_) | LeaseSeen::Free | LeaseSeen::Unknown => return None,
    };
    let answers = matches!(seen.postgres, Postgres::Running(_) | Postgres::Down);
    (for_long && !answers && !seen.is_paused()).then(|| Decision {
        again_after: Some(SOON),
        ..Decision::act(Reason::CannotEnd, Step::Forsake { lease })
    })
}

/// A job is under way: only the loss of the lease, an election, and the order to stop interrupt it.
fn during(seen: &Observation, memory: &Memory, job: JobKind) -> Decision {
    let needs_lease = matches!(job, JobKind::StartPrimary | JobKind::Promote);
    let lost = match &seen.lease {
        LeaseSeen::Mine(_) | LeaseSeen::MineUnproven(_) | LeaseSeen::Unknown => false,
        LeaseSeen::Stale { .. } | LeaseSeen::Theirs(_) | LeaseSeen::Free => true,
    };
    if needs_lease && lost {
        return Decision::act(Reason::LostLease, Step::End);
    }
    // Nothing has been promoted yet.
    if job == JobKind::PrePromote && lost {
        return Decision::act(Reason::LostLease, Step::DropJob);
    }
    // Before a restart it may take minutes, and an election does not wait for that.
    if job == JobKind::Checkpoint && seen.lease == LeaseSeen::Free && memory.handover.is_none() {
        return Decision::act(Reason::Restarting, Step::DropJob);
    }
    // A stop does not wait for a clone of hours; what a dropped job leaves is stopped or cleared next.
    let is_the_stop = matches!(job, JobKind::Stop | JobKind::Confirm);
    if seen.stopping && !is_the_stop {
        return Decision::act(Reason::Stopping, Step::DropJob);
    }
    Decision::wait(Reason::Busy(job))
}

/// A fatal finding ends the process, but never leaves PostgreSQL behind without its keeper's agent.
fn leave(seen: &Observation, reason: Reason, code: u8) -> Decision {
    match seen.postgres {
        Postgres::Down => {
            let keep_postgres = false;
            Decision::act(reason, Step::Leave { code, keep_postgres })
        }
        Postgres::Ending => Decision::wait(reason),
        Postgres::Silent { .. } | Postgres::Running(_) => Decision::act(reason, Step::End),
    }
}

fn with_data(seen: &Observation, memory: &Memory, now: Boottime, standby_data: bool) -> Decision {
    if seen.is_paused() {
        return pause::decide(seen, memory, now, standby_data);
    }
    match &seen.postgres {
        Postgres::Ending => Decision::wait(Reason::PostgresEnding),
        Postgres::Down => postgres_down::decide(seen, memory, now, standby_data),
        Postgres::Silent { writable: true } => leader::decide(seen, memory, Reason::PostgresSilent, now),
        Postgres::Silent { writable: false } => Decision::wait_for(Reason::PostgresSilent, SOON),
        Postgres::Running(server) => match server.wal {
            WalStatus::Primary { .. } => leader::decide(seen, memory, Reason::Leading, now),
            WalStatus::Standby { .. } => standby::decide(seen, memory, now),
        },
    }
}

fn abandon(epoch: &Epoch, lease: i64) -> Decision {
    Decision::act(
        Reason::KeyFromBefore,
        Step::Abandon {
            epoch: epoch.clone(),
            lease,
        },
    )
}

fn backing_off(memory: &Memory, now: Boottime) -> bool {
    memory.backoff_until.is_some_and(|until| now < until)
}

/// Where a member's PostgreSQL listens, as its own key tells.
#[must_use]
pub fn upstream_address(view: &View, name: &MemberName) -> Option<Address> {
    view.members.get(name)?.record.postgres_address()
}

/// The revisions that a bid on this view must find unchanged.
#[must_use]
pub fn guards(view: &View) -> BidGuards {
    BidGuards {
        sync: view.sync.mod_revision,
        failsafe: view.failsafe_revision,
        failover: view.failover.mod_revision,
        config: view.config.mod_revision,
    }
}

/// The role that a member publishes. A primary is one only once it has been proven to take writes under its holding.
#[must_use]
pub fn published_role(seen: &Observation, memory: &Memory) -> Role {
    match (&seen.postgres, &seen.lease) {
        (Postgres::Running(server), lease) => match (&server.wal, lease) {
            (WalStatus::Standby { .. }, LeaseSeen::Mine(_) | LeaseSeen::MineUnproven(_))
                if seen.standby_cluster.is_some() =>
            {
                Role::StandbyLeader
            }
            (WalStatus::Standby { .. }, _) => Role::Replica,
            (WalStatus::Primary { .. }, LeaseSeen::Mine(epoch) | LeaseSeen::MineUnproven(epoch)) => {
                if memory.proven.as_ref() == Some(epoch) {
                    Role::Primary
                } else {
                    Role::Promoted
                }
            }
            // Until its deadline it may still be the leader that it was.
            (WalStatus::Primary { .. }, LeaseSeen::Unknown) if memory.proven.is_some() => Role::Primary,
            (WalStatus::Primary { .. }, _) => Role::Demoted,
        },
        (Postgres::Silent { writable: true }, _) => Role::Promoted,
        (Postgres::Silent { writable: false }, _) => Role::Replica,
        (Postgres::Down | Postgres::Ending, _) => match &seen.data {
            DataDir::Empty | DataDir::Foreign(_) => Role::Uninitialized,
            DataDir::Cluster { standby: true, .. } => Role::Replica,
            DataDir::Cluster { standby: false, .. } => Role::Demoted,
        },
    }
}

#[cfg(test)]
mod tests;

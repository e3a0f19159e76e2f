//! One cycle's choice. Pure: the same inputs give the same answer; nothing here performs, logs, or reads a clock.
//!
//! A decision is a [`Reason`], from which log, REST and page speak, and at most one [`Step`]; after a step the loop
//! observes and decides again.

mod election;
mod postgres_down;
mod reason;

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::{Address, Role};
use pgherd_cluster::view::{Epoch, Initialize, View};

pub use self::reason::Reason;
use crate::lease::BidGuards;
use crate::observation::{JobKind, LeaseSeen, Memory, Observation, Postgres, Rejoin};
use crate::postgres::{Control, ControlState, DataDir};
use crate::status::WalStatus;

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
    /// Start as a primary, with the deadline that the keeper has.
    StartPrimary,
    /// Start as a standby.
    StartStandby {
        /// Whom to stream from.
        upstream: Option<MemberName>,
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
    /// A stale key that we shall not use: delete it.
    Abandon {
        /// The holding.
        epoch: Epoch,
        /// The lease that its key is bound to.
        lease: i64,
    },
    /// Ask the other members for their positions.
    Poll,
    /// Hand the lease over, as requested.
    Switchover {
        /// To whom; to the best when nobody is named.
        candidate: Option<MemberName>,
    },
    /// Clear a request that cannot be carried out.
    ClearRequest,
    /// Stop in order and hand over, before the process ends.
    HandOver,
    /// Stop a standby in order, before the process ends.
    Stop,
    /// Drop the job that is under way.
    DropJob,
    /// End the process.
    Leave(u8),
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

/// How long a standby may take to stream after it was found to fit, before that is asked again.
const REJOIN_AGAIN: Duration = Duration::from_secs(5);

/// Decides.
#[must_use]
pub fn decide(seen: &Observation, memory: &Memory, now: Boottime) -> Decision {
    if let Some(why) = &memory.fatal {
        return leave(seen, Reason::Fatal(why.clone()), 64);
    }
    if let Some(job) = seen.job {
        return during(seen, job);
    }
    if seen.stopping {
        return stopping(seen);
    }
    if let Postgres::Ending = seen.postgres {
        return Decision::wait(Reason::PostgresEnding);
    }
    match &seen.data {
        DataDir::Foreign(files) => Decision::wait(Reason::ForeignFiles(files.clone())),
        // A server whose data was taken away keeps nothing: what it acknowledges is gone with it.
        DataDir::Empty if seen.postgres != Postgres::Down => Decision::act(Reason::DataGone, Step::End),
        DataDir::Empty => without_data(seen, memory, now),
        // What runs tells better than what was seen before it was promoted.
        DataDir::Cluster { control, standby } => match seen.view.initialize {
            _ if seen.lease == LeaseSeen::Unknown => {
                with_data(seen, memory, now, comes_up_as_standby(seen, control, *standby))
            }
            Some(Initialize::Done(system_id)) if system_id != control.system_id => {
                let why = format!(
                    "postgresql.data_dir: {} belongs to another cluster: its system identifier is {}, the cluster's is \
                     {system_id}; move the directory away to have this member cloned, or name the other cluster's scope",
                    seen.data_dir.display(),
                    control.system_id
                );
                leave(seen, Reason::Fatal(why), 64)
            }
            None | Some(Initialize::Pending) if comes_up_as_standby(seen, control, *standby) => {
                Decision::wait(Reason::WaitingForPrimaryToInitialize)
            }
            None => Decision::act(Reason::Initializing, Step::Initialize),
            Some(Initialize::Pending) if seen.bootstrap_unfinished => {
                Decision::act(Reason::Initializing, Step::Initialize)
            }
            Some(Initialize::Pending) => Decision::wait_for(Reason::WaitingForBootstrap, SOON),
            Some(Initialize::Done(_)) if seen.view.config.value.is_none() => {
                Decision::act(Reason::Initializing, Step::Initialize)
            }
            Some(Initialize::Done(_)) => with_data(seen, memory, now, comes_up_as_standby(seen, control, *standby)),
        },
    }
}

/// Whether this data is a standby's. A crash in the middle of a promotion leaves a control file in recovery without a
/// standby.signal; started as primary it would go on on the former leader's timeline.
fn comes_up_as_standby(seen: &Observation, control: &Control, standby: bool) -> bool {
    if let Postgres::Running(server) = &seen.postgres {
        return matches!(server.wal, WalStatus::Standby { .. });
    }
    standby
        || matches!(
            control.state,
            ControlState::InArchiveRecovery | ControlState::ShutDownInRecovery
        )
}

/// A job is under way: only the loss of the lease interrupts it.
fn during(seen: &Observation, job: JobKind) -> Decision {
    let needs_lease = matches!(job, JobKind::StartPrimary | JobKind::Promote | JobKind::Switchover);
    let lost = match &seen.lease {
        LeaseSeen::Mine(_) | LeaseSeen::MineUnproven(_) | LeaseSeen::Unknown => false,
        LeaseSeen::Stale { .. } | LeaseSeen::Theirs(_) | LeaseSeen::Free => true,
    };
    // A switchover gives the lease up as its last act.
    if needs_lease && lost && job != JobKind::Switchover {
        return Decision::act(Reason::LostLease, Step::End);
    }
    // A stop does not wait for a clone of hours; what a dropped job leaves is stopped or cleared next.
    let is_the_stop = matches!(job, JobKind::HandOver | JobKind::Stop | JobKind::Switchover);
    if seen.stopping && !is_the_stop {
        return Decision::act(Reason::Stopping, Step::DropJob);
    }
    Decision::wait(Reason::Busy(job))
}

fn stopping(seen: &Observation) -> Decision {
    let holds = matches!(seen.lease, LeaseSeen::Mine(_) | LeaseSeen::MineUnproven(_));
    match &seen.postgres {
        Postgres::Running(_) | Postgres::Silent { .. } if holds => Decision::act(Reason::Stopping, Step::HandOver),
        Postgres::Running(_) | Postgres::Silent { .. } => Decision::act(Reason::Stopping, Step::Stop),
        Postgres::Ending => Decision::wait(Reason::PostgresEnding),
        Postgres::Down => match &seen.lease {
            LeaseSeen::Mine(epoch) | LeaseSeen::MineUnproven(epoch) => {
                Decision::act(Reason::Stopping, Step::Release { epoch: epoch.clone() })
            }
            LeaseSeen::Stale { epoch, lease } => abandon(epoch, *lease),
            LeaseSeen::Theirs(_) | LeaseSeen::Free | LeaseSeen::Unknown => {
                Decision::act(Reason::Stopping, Step::Leave(0))
            }
        },
    }
}

/// A fatal finding ends the process, but never leaves PostgreSQL behind without its keeper's agent.
fn leave(seen: &Observation, reason: Reason, code: u8) -> Decision {
    match seen.postgres {
        Postgres::Down => Decision::act(reason, Step::Leave(code)),
        Postgres::Ending => Decision::wait(reason),
        Postgres::Silent { .. } | Postgres::Running(_) => Decision::act(reason, Step::End),
    }
}

fn without_data(seen: &Observation, memory: &Memory, now: Boottime) -> Decision {
    if backing_off(memory, now) {
        return Decision::wait_for(Reason::BackingOff, SOON);
    }
    match (&seen.lease, seen.view.initialize) {
        (LeaseSeen::Unknown, _) => Decision::wait(Reason::StoreUnreachable),
        // A key from before our data went away: nobody can lead by it.
        (LeaseSeen::Stale { epoch, lease }, _) => abandon(epoch, *lease),
        (LeaseSeen::Mine(epoch) | LeaseSeen::MineUnproven(epoch), _) => {
            Decision::act(Reason::LeadsWithoutData, Step::Release { epoch: epoch.clone() })
        }
        (LeaseSeen::Theirs(epoch), _) => match seen.view.writable_leader() {
            Some(leader) => Decision::act(
                Reason::Cloning(leader.name.clone()),
                Step::Clone {
                    from: leader.name.clone(),
                },
            ),
            None => Decision::wait_for(Reason::WaitingForLeader(epoch.holder.clone()), SOON),
        },
        (LeaseSeen::Free, None)
            if seen.nofailover || seen.view.config.value.as_ref().is_some_and(|c| c.is_paused()) =>
        {
            Decision::wait(Reason::WaitingForBootstrap)
        }
        (LeaseSeen::Free, None) => Decision::act(Reason::Bootstrapping, Step::ClaimBootstrap),
        (LeaseSeen::Free, Some(Initialize::Pending | Initialize::Done(_))) => {
            Decision::wait(Reason::WaitingForBootstrap)
        }
    }
}

fn with_data(seen: &Observation, memory: &Memory, now: Boottime, standby_data: bool) -> Decision {
    let paused = seen.view.config.value.as_ref().is_some_and(|config| config.is_paused());
    match &seen.postgres {
        Postgres::Ending => Decision::wait(Reason::PostgresEnding),
        // A key without a PostgreSQL behind it is of no use to anybody until the pause ends.
        Postgres::Down if paused && matches!(seen.lease, LeaseSeen::Mine(_)) => match &seen.lease {
            LeaseSeen::Mine(epoch) => Decision::act(Reason::Paused, Step::Release { epoch: epoch.clone() }),
            _ => Decision::wait(Reason::Paused),
        },
        Postgres::Down if paused && !memory.handed_over => Decision::wait(Reason::Paused),
        Postgres::Down => postgres_down::decide(seen, memory, now, standby_data),
        Postgres::Silent { writable: true } => as_primary(seen, memory, Reason::PostgresSilent),
        Postgres::Silent { writable: false } => Decision::wait_for(Reason::PostgresSilent, SOON),
        Postgres::Running(server) => match server.wal {
            WalStatus::Primary { .. } => as_primary(seen, memory, Reason::Leading),
            WalStatus::Standby { .. } if paused => in_pause(seen, memory, now),
            WalStatus::Standby { .. } => as_standby(seen, memory, now),
        },
    }
}

/// A running standby in pause follows whoever leads, and takes over in a switchover that names it. It is not cloned.
fn in_pause(seen: &Observation, memory: &Memory, now: Boottime) -> Decision {
    let request = seen.view.failover.value.as_ref();
    let asked_for = request.is_some_and(|request| request.member.as_deref() == Some(seen.me.as_str()));
    match &seen.lease {
        LeaseSeen::Mine(_) => as_standby(seen, memory, now),
        LeaseSeen::Free if asked_for => as_standby(seen, memory, now),
        LeaseSeen::Theirs(_) => match as_standby(seen, memory, now) {
            Decision {
                step: Some(Step::Clone { .. }),
                ..
            } => Decision::wait(Reason::Paused),
            decision => decision,
        },
        LeaseSeen::MineUnproven(_) | LeaseSeen::Stale { .. } | LeaseSeen::Free | LeaseSeen::Unknown => {
            Decision::wait(Reason::Paused)
        }
    }
}

/// PostgreSQL takes writes, or may.
fn as_primary(seen: &Observation, memory: &Memory, well: Reason) -> Decision {
    match &seen.lease {
        // Promotion is over only when a write has been proven under this holding.
        LeaseSeen::Mine(epoch) if well == Reason::Leading && memory.proven.as_ref() != Some(epoch) => {
            Decision::act(Reason::Promoting, Step::Promote(epoch.clone()))
        }
        LeaseSeen::Mine(_) if well == Reason::Leading => leading(seen),
        LeaseSeen::Mine(_) => Decision::wait_for(well, SOON),
        // The keeper's deadline stands, and nobody else can hold the key before it has passed.
        LeaseSeen::MineUnproven(_) => Decision::wait(Reason::ProvingLease),
        LeaseSeen::Unknown => Decision::wait(Reason::StoreUnreachable),
        LeaseSeen::Stale { .. } | LeaseSeen::Theirs(_) | LeaseSeen::Free => Decision::act(Reason::LostLease, Step::End),
    }
}

fn leading(seen: &Observation) -> Decision {
    let Some(request) = &seen.view.failover.value else {
        return Decision::wait(Reason::Leading);
    };
    if !seen.request_due {
        return Decision::wait(Reason::SwitchoverScheduled);
    }
    let named_me = request
        .leader
        .as_deref()
        .is_none_or(|leader| leader == seen.me.as_str());
    let candidate = request.member.as_deref().map(MemberName::new);
    match candidate {
        // Ours was the promotion that it asked for, or it asks for something that is already so.
        Some(Ok(candidate)) if candidate == seen.me => Decision::act(Reason::Leading, Step::ClearRequest),
        _ if !named_me => Decision::act(Reason::RequestNamesAnother, Step::ClearRequest),
        Some(Err(_)) => Decision::act(Reason::RequestNamesAnother, Step::ClearRequest),
        Some(Ok(candidate)) => Decision::act(
            Reason::SwitchingOver(Some(candidate.clone())),
            Step::Switchover {
                candidate: Some(candidate),
            },
        ),
        None => Decision::act(Reason::SwitchingOver(None), Step::Switchover { candidate: None }),
    }
}

fn as_standby(seen: &Observation, memory: &Memory, now: Boottime) -> Decision {
    match &seen.lease {
        LeaseSeen::Mine(epoch) => Decision::act(Reason::Promoting, Step::Promote(epoch.clone())),
        LeaseSeen::MineUnproven(_) => Decision::wait(Reason::ProvingLease),
        // A deadline is out for a holding that is none: with PostgreSQL ended, the keeper takes another.
        LeaseSeen::Stale { .. } if seen.armed => Decision::act(Reason::KeyFromBefore, Step::End),
        LeaseSeen::Stale { epoch, lease } => abandon(epoch, *lease),
        LeaseSeen::Theirs(epoch) => following(seen, memory, epoch, now),
        LeaseSeen::Free => election::decide(seen, memory, now),
        LeaseSeen::Unknown => Decision::wait(Reason::StoreUnreachable),
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

fn following(seen: &Observation, memory: &Memory, leader: &Epoch, now: Boottime) -> Decision {
    let name = leader.holder.clone();
    let Some(address) = upstream_address(&seen.view, &name) else {
        return Decision::wait_for(Reason::WaitingForLeader(name), SOON);
    };
    if seen.upstream.as_ref() != Some(&address) {
        return Decision::act(Reason::Following(name.clone()), Step::Follow { upstream: Some(name) });
    }
    let Postgres::Running(server) = &seen.postgres else {
        return Decision::wait(Reason::Following(name));
    };
    if server.replication_state.as_deref() == Some("streaming") {
        return Decision::wait(Reason::Following(name));
    }
    // It does not stream. While the leader is up, one question tells whether it ever can.
    match (&memory.rejoin, seen.view.writable_leader()) {
        (Some((asked, Rejoin::Diverged)), Some(_)) if asked == leader => clone_or_wait(memory, now, name),
        (Some((asked, Rejoin::Follows)), _) if asked == leader && !verdict_is_old(memory, now) => {
            Decision::wait_for(Reason::NotStreaming(name), SOON)
        }
        (_, Some(_)) if !backing_off(memory, now) => {
            Decision::act(Reason::NotStreaming(name), Step::CheckRejoin { leader: leader.clone() })
        }
        _ => Decision::wait_for(Reason::NotStreaming(name), SOON),
    }
}

/// A standby that should stream by now and does not may have replayed past the fork since it was asked.
fn verdict_is_old(memory: &Memory, now: Boottime) -> bool {
    memory
        .rejoin_asked_at
        .is_none_or(|asked_at| now.since(asked_at) > REJOIN_AGAIN)
}

fn clone_or_wait(memory: &Memory, now: Boottime, from: MemberName) -> Decision {
    if backing_off(memory, now) {
        return Decision::wait_for(Reason::BackingOff, SOON);
    }
    Decision::act(Reason::Diverged(from.clone()), Step::Clone { from })
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

//! The cluster is in maintenance: what runs goes on running, and what an operator asks for by name is done.

use pgherd_cluster::clock::Boottime;

use super::{Decision, Reason, Step, guards, leader, postgres_down, standby, standby_leader};
use crate::memory::Memory;
use crate::observation::{LeaseSeen, Observation, Postgres};
use crate::status::WalStatus;

/// The fence is paused with the cluster, and resumed with it.
pub(super) fn switch(seen: &Observation) -> Option<Decision> {
    // Before the first look at the cluster nobody knows; and a configuration may be old while etcd does not answer: a
    // deadline stands until it is known.
    let known = seen.view.revision > 0;
    if !known || (seen.lease == LeaseSeen::Unknown && seen.lease_paused == Some(false)) {
        return None;
    }
    match (seen.is_paused(), seen.lease_paused, seen.fence_paused) {
        (true, None | Some(false), _) | (true, Some(true), false) => {
            Some(Decision::act(Reason::Paused, Step::PauseFence))
        }
        // What cannot take writes is not ended when its deadline passes.
        (false, lease, _) if standby_leader::gives_no_deadline(seen) && lease != Some(true) => {
            Some(Decision::act(Reason::NothingToFence, Step::ResumeFence))
        }
        (false, None | Some(true), _) if !standby_leader::gives_no_deadline(seen) => {
            Some(Decision::act(Reason::Resuming, Step::ResumeFence))
        }
        // A primary ends the pause of its fence by its next deadline; what cannot take writes needs none.
        (false, _, true) if !is_writable(seen) => Some(Decision::act(Reason::Resuming, Step::ResumeFence)),
        (true, Some(true), true) | (false, ..) => None,
    }
}

pub(crate) fn is_writable(seen: &Observation) -> bool {
    match &seen.postgres {
        Postgres::Running(server) => matches!(server.wal, WalStatus::Primary { .. }),
        Postgres::Silent { writable } => *writable,
        Postgres::Ending => true,
        Postgres::Down => false,
    }
}

pub(super) fn decide(seen: &Observation, memory: &Memory, now: Boottime, standby_data: bool) -> Decision {
    match &seen.postgres {
        Postgres::Ending => Decision::wait(Reason::PostgresEnding),
        Postgres::Silent { .. } => Decision::wait(Reason::PostgresSilent),
        // What follows a hand-over goes on.
        Postgres::Down if memory.handed_over => postgres_down::decide(seen, memory, now, standby_data),
        Postgres::Down => match &seen.lease {
            // A key without a PostgreSQL behind it is of no use to anybody until the pause ends.
            LeaseSeen::Mine(epoch) | LeaseSeen::MineUnproven(epoch) => {
                Decision::act(Reason::Paused, Step::Release { epoch: epoch.clone() })
            }
            LeaseSeen::Stale { .. } | LeaseSeen::Theirs(_) | LeaseSeen::Free | LeaseSeen::Unknown => {
                Decision::wait(Reason::Paused)
            }
        },
        Postgres::Running(server) => match server.wal {
            WalStatus::Primary { .. } => primary(seen, memory, now),
            WalStatus::Standby { .. } => in_recovery(seen, memory, now),
        },
    }
}

/// A running primary keeps the key, and takes it while nobody has it; without it, it runs on.
fn primary(seen: &Observation, memory: &Memory, now: Boottime) -> Decision {
    match &seen.lease {
        LeaseSeen::Mine(_) | LeaseSeen::MineUnproven(_) => leader::decide(seen, memory, Reason::Leading, now),
        LeaseSeen::Stale { epoch, lease } => leader::rebind(epoch, *lease),
        LeaseSeen::Free if leader::may_take_the_key(seen, memory, now) => {
            Decision::act(Reason::Bidding, Step::Bid(guards(&seen.view)))
        }
        LeaseSeen::Free | LeaseSeen::Theirs(_) | LeaseSeen::Unknown => Decision::wait(Reason::PrimaryWithoutLease),
    }
}

/// A running standby follows whoever leads, and takes over in a switchover that names it. It is not cloned.
fn in_recovery(seen: &Observation, memory: &Memory, now: Boottime) -> Decision {
    let request = seen.view.failover.value.as_ref();
    let asked_for = request.is_some_and(|request| request.member.as_deref() == Some(seen.me.as_str()));
    match &seen.lease {
        LeaseSeen::Mine(_) => standby::decide(seen, memory, now),
        LeaseSeen::Free if asked_for => standby::decide(seen, memory, now),
        LeaseSeen::Theirs(_) => match standby::decide(seen, memory, now) {
            Decision {
                step: Some(Step::Clone { .. } | Step::CloneRemote | Step::Rewind { .. }),
                ..
            } => Decision::wait(Reason::Paused),
            decision => decision,
        },
        LeaseSeen::MineUnproven(_) | LeaseSeen::Stale { .. } | LeaseSeen::Free | LeaseSeen::Unknown => {
            Decision::wait(Reason::Paused)
        }
    }
}

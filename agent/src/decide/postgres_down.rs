//! PostgreSQL is down, whole, and there is data.

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::view::Epoch;

use super::{Decision, Reason, SOON, Step, abandon, backing_off, guards};
use crate::memory::Memory;
use crate::observation::{LeaseSeen, Observation, Rejoin};

/// Two failed crash recoveries in a row: the third would not do better, and a replica could lead meanwhile.
const START_FAILURES_MAX: u32 = 2;

pub(super) fn decide(seen: &Observation, memory: &Memory, now: Boottime, standby_data: bool) -> Decision {
    let cannot_start = memory.start_failures >= START_FAILURES_MAX;
    match &seen.lease {
        LeaseSeen::Mine(epoch) if cannot_start => {
            Decision::act(Reason::CannotStart, Step::Release { epoch: epoch.clone() })
        }
        LeaseSeen::Mine(epoch) if super::leader::disk_is_lost(seen, now) => {
            Decision::act(Reason::DiskFails, Step::Release { epoch: epoch.clone() })
        }
        LeaseSeen::Mine(_) if standby_data => start_standby(None, memory, now),
        LeaseSeen::Mine(_) if seen.bootstrap_unfinished => Decision::act(Reason::Bootstrapping, Step::StartPrimary),
        LeaseSeen::Mine(_) => Decision::act(Reason::RestartingInPlace, Step::StartPrimary),
        LeaseSeen::MineUnproven(_) => Decision::wait(Reason::ProvingLease),
        // All that was acknowledged here is here: to lead again loses nothing, which nobody else can say.
        // Only for a holding of this machine's own memory: a key that a restored etcd brought back says nothing of what
        // others have acknowledged since.
        LeaseSeen::Stale { epoch, lease }
            if !standby_data
                && !cannot_start
                && seen.view.failover.value.is_none()
                && seen.last_held.as_ref() == Some(epoch) =>
        {
            let step = Step::WinAnew {
                epoch: epoch.clone(),
                lease: *lease,
                guards: guards(&seen.view),
            };
            Decision::act(Reason::WinningAnew, step)
        }
        LeaseSeen::Stale { epoch, lease } => abandon(epoch, *lease),
        LeaseSeen::Theirs(leader) if standby_data => start_standby(Some(leader), memory, now),
        LeaseSeen::Theirs(leader) => rejoin(seen, memory, leader, now),
        // The member that makes the cluster has nobody to ask.
        LeaseSeen::Free if seen.bootstrap_unfinished => Decision::act(Reason::Bidding, Step::Bid(guards(&seen.view))),
        LeaseSeen::Free => start_standby(None, memory, now),
        // Our deadline has passed while etcd could not be reached, and the key may still keep the others from leading.
        // An agent that has just begun only has not heard of etcd yet.
        LeaseSeen::Unknown if !standby_data && memory.last_leader.as_ref() == Some(&seen.me) => match &seen.last_held {
            Some(epoch) if memory.release_asked.as_ref() != Some(epoch) => {
                Decision::act(Reason::AskingForRelease, Step::AskRelease { epoch: epoch.clone() })
            }
            Some(_) | None => Decision::wait(Reason::StoreUnreachable),
        },
        LeaseSeen::Unknown if standby_data => start_standby(None, memory, now),
        LeaseSeen::Unknown => Decision::wait(Reason::StoreUnreachable),
    }
}

fn start_standby(leader: Option<&Epoch>, memory: &Memory, now: Boottime) -> Decision {
    if backing_off(memory, now) {
        return Decision::wait_for(Reason::BackingOff, SOON);
    }
    let upstream = leader.map(|leader| leader.holder.clone());
    Decision::act(Reason::StartingStandby, Step::StartStandby { upstream })
}

/// A former primary meets another's lease. Only the leader's history tells whether its data fits.
fn rejoin(seen: &Observation, memory: &Memory, leader: &Epoch, now: Boottime) -> Decision {
    let name = leader.holder.clone();
    if seen.view.writable_leader().is_none() {
        return Decision::wait_for(Reason::WaitingForLeader(name), SOON);
    }
    if backing_off(memory, now) {
        return Decision::wait_for(Reason::BackingOff, SOON);
    }
    match &memory.rejoin {
        Some((asked, Rejoin::Follows)) if asked == leader => start_standby(Some(leader), memory, now),
        Some((asked, Rejoin::Diverged)) if asked == leader => {
            Decision::act(Reason::Diverged(name.clone()), Step::Clone { from: name })
        }
        _ => Decision::act(
            Reason::WaitingForLeader(name),
            Step::CheckRejoin { leader: leader.clone() },
        ),
    }
}

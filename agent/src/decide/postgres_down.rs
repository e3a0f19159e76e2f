//! PostgreSQL is down, whole, and there is data.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::view::Epoch;

use super::election::has_given_way;
use super::standby::source_of;
use super::{Decision, Reason, SOON, Step, abandon, backing_off, guards};
use crate::memory::Memory;
use crate::observation::{LeaseSeen, Observation, Peer, Rejoin, WatchdogSeen};
use crate::postgres::DataDir;

/// An older answer of the others is asked for again.
const POLL_AGE_MAX: Duration = Duration::from_secs(1);
/// Two failed crash recoveries in a row: the third would not do better, and a replica could lead meanwhile.
const START_FAILURES_MAX: u32 = 2;

pub(super) fn decide(seen: &Observation, memory: &Memory, now: Boottime, standby_data: bool) -> Decision {
    if seen.standby_cluster.is_some() {
        return super::standby_leader::down(seen, memory, standby_data, now);
    }
    let cannot_start = memory.start_failures >= START_FAILURES_MAX;
    match &seen.lease {
        // Nobody can have what is not there yet: another try, by anybody, is all that is left.
        LeaseSeen::Mine(_) if cannot_start && seen.bootstrap_unfinished => {
            let why = "PostgreSQL cannot be started; its log says why".to_owned();
            Decision::act(Reason::BootstrapFailed(why), Step::UndoBootstrap)
        }
        LeaseSeen::Mine(epoch) if cannot_start => {
            Decision::act(Reason::CannotStart, Step::Release { epoch: epoch.clone() })
        }
        LeaseSeen::Mine(epoch) if super::leader::disk_is_lost(seen, now) => {
            Decision::act(Reason::DiskFails, Step::Release { epoch: epoch.clone() })
        }
        LeaseSeen::Mine(_) if standby_data => start_standby(seen, None, memory, now),
        LeaseSeen::Mine(_) if seen.bootstrap_unfinished => Decision::act(Reason::Bootstrapping, Step::StartPrimary),
        LeaseSeen::Mine(epoch) => {
            let release = Step::Release { epoch: epoch.clone() };
            super::leader::start_overdue(seen, memory, now, Reason::RestartingInPlace, release)
                .unwrap_or_else(|| Decision::act(Reason::RestartingInPlace, Step::StartPrimary))
        }
        LeaseSeen::MineUnproven(_) => Decision::wait(Reason::ProvingLease),
        // All that was acknowledged here is here: to lead again loses nothing, which nobody else can say.
        // Only for a holding of this machine's own memory: a key that a restored etcd brought back says nothing of what
        // others have acknowledged since.
        LeaseSeen::Stale { epoch, lease }
            if !standby_data
                && !cannot_start
                && !has_given_way(seen, memory, now)
                && may_lead(seen, now)
                && seen.view.failover.value.is_none()
                && seen.last_held.as_ref() == Some(epoch) =>
        {
            win_anew(seen, memory, epoch, *lease, now)
        }
        LeaseSeen::Stale { epoch, lease } => abandon(epoch, *lease),
        LeaseSeen::Theirs(leader) if standby_data => start_standby(seen, Some(leader), memory, now),
        LeaseSeen::Theirs(leader) => rejoin(seen, memory, leader, now),
        // The member that makes the cluster has nobody to ask.
        LeaseSeen::Free if seen.bootstrap_unfinished => Decision::act(Reason::Bidding, Step::Bid(guards(&seen.view))),
        LeaseSeen::Free => start_standby(seen, None, memory, now),
        // Our deadline has passed while etcd could not be reached, and the key may still keep the others from leading.
        // An agent that has just begun only has not heard of etcd yet.
        LeaseSeen::Unknown if !standby_data && memory.last_leader.as_ref() == Some(&seen.me) => match &seen.last_held {
            Some(epoch) if memory.release_asked.as_ref() != Some(epoch) => {
                Decision::act(Reason::AskingForRelease, Step::AskRelease { epoch: epoch.clone() })
            }
            Some(_) | None => Decision::wait(Reason::StoreUnreachable),
        },
        LeaseSeen::Unknown if standby_data => start_standby(seen, None, memory, now),
        LeaseSeen::Unknown => Decision::wait(Reason::StoreUnreachable),
    }
}

/// What a key of this machine's own memory says may be older than all that the others know: an etcd that was restored from
/// a backup brings back a key, and a record, of before another led. Somebody who is on a later timeline knows better.
fn win_anew(seen: &Observation, memory: &Memory, epoch: &Epoch, lease: i64, now: Boottime) -> Decision {
    let poll = memory.poll.as_ref();
    let Some(poll) = poll.filter(|poll| now.since(poll.answered_at) <= POLL_AGE_MAX) else {
        return Decision::act(Reason::WinningAnew, Step::Poll);
    };
    let own = match &seen.data {
        DataDir::Cluster { control, .. } => Some(control.timeline),
        DataDir::Empty | DataDir::Foreign(_) => None,
    };
    let newer = |peer: &Peer| peer.primary || (peer.timeline > own && peer.timeline.is_some());
    if poll.peers.iter().any(newer) {
        return abandon(epoch, lease);
    }
    let step = Step::WinAnew {
        epoch: epoch.clone(),
        lease,
        guards: guards(&seen.view),
    };
    Decision::act(Reason::WinningAnew, step)
}

/// Whether nothing but the key keeps this member from leading.
fn may_lead(seen: &Observation, now: Boottime) -> bool {
    seen.watchdog != WatchdogSeen::Unusable
        && seen.vouched_for.is_none()
        && !super::leader::disk_is_lost(seen, now)
        && super::election::not_ours_to_lead(seen).is_none()
}

fn start_standby(seen: &Observation, leader: Option<&Epoch>, memory: &Memory, now: Boottime) -> Decision {
    if backing_off(memory, now) {
        return Decision::wait_for(Reason::BackingOff, SOON);
    }
    let upstream = leader.and_then(|leader| source_of(seen, leader));
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
        Some((asked, verdict)) if verdict.fits() && asked == leader => start_standby(seen, Some(leader), memory, now),
        Some((asked, Rejoin::Diverged)) if asked == leader => super::standby::diverged(seen, memory, leader, now),
        _ => Decision::act(
            Reason::WaitingForLeader(name),
            Step::CheckRejoin { leader: leader.clone() },
        ),
    }
}

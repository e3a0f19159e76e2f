//! PostgreSQL takes writes, or may.

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::view::Epoch;

use super::{Decision, Reason, SOON, Step, backing_off, election, guards, synchronous};
use crate::memory::{Memory, Why};
use crate::observation::{LeaseSeen, Observation, Postgres, WatchdogSeen};

pub(super) fn decide(seen: &Observation, memory: &Memory, well: Reason, now: Boottime) -> Decision {
    match &seen.lease {
        // Promotion is over only when a write has been proven under this holding.
        LeaseSeen::Mine(epoch) if well == Reason::Leading && memory.proven.as_ref() != Some(epoch) => {
            Decision::act(Reason::Promoting, Step::Promote(epoch.clone()))
        }
        LeaseSeen::Mine(epoch) if well == Reason::Leading => leading(seen, memory, epoch, now),
        LeaseSeen::Mine(_) => Decision::wait_for(well, SOON),
        // The keeper's deadline stands, and nobody else can hold the key before it has passed.
        LeaseSeen::MineUnproven(_) => Decision::wait(Reason::ProvingLease),
        LeaseSeen::Unknown => Decision::wait(Reason::StoreUnreachable),
        // It runs by a holding of another process, as when this agent takes over from Patroni's.
        LeaseSeen::Stale { epoch, lease } if !seen.armed => rebind(epoch, *lease),
        LeaseSeen::Free if !seen.armed && may_take_the_key(seen, memory, now) => {
            Decision::act(Reason::Bidding, Step::Bid(guards(&seen.view)))
        }
        LeaseSeen::Stale { .. } | LeaseSeen::Theirs(_) | LeaseSeen::Free => Decision::act(Reason::LostLease, Step::End),
    }
}

/// Binds the key of another process of this member to our lease.
pub(super) fn rebind(epoch: &Epoch, lease: i64) -> Decision {
    let step = Step::Rebind {
        epoch: epoch.clone(),
        lease,
    };
    // Whether it went well shows in the lease's state.
    Decision {
        again_after: Some(SOON),
        ..Decision::act(Reason::ProvingLease, step)
    }
}

/// A primary that no deadline of ours was ever given to was started by somebody else. While nobody holds the key it is the
/// one that takes writes: nobody else can have more, unless the cluster went on to a later timeline.
pub(super) fn may_take_the_key(seen: &Observation, memory: &Memory, now: Boottime) -> bool {
    let Postgres::Running(server) = &seen.postgres else {
        return false;
    };
    let cluster = seen.view.timeline();
    let old = cluster.is_some_and(|cluster| server.timeline.is_none_or(|own| own < cluster));
    !old && !seen.nofailover
        && seen.watchdog != WatchdogSeen::Unusable
        && seen.vouched_for.is_none()
        && election::not_ours_to_lead(seen).is_none()
        && !backing_off(memory, now)
}

fn leading(seen: &Observation, memory: &Memory, epoch: &Epoch, now: Boottime) -> Decision {
    if seen.watchdog == WatchdogSeen::Unusable && !seen.is_paused() {
        return Decision::act(Reason::WatchdogUnusable, Step::End);
    }
    if let Some(decision) = synchronous::leader(seen, memory, now) {
        return decision;
    }
    let wait = |reason| {
        if synchronous::is_on(seen) {
            Decision::wait_for(reason, synchronous::LOOK_EVERY)
        } else {
            Decision::wait(reason)
        }
    };
    let Some(request) = &seen.view.failover.value else {
        return wait(Reason::Leading);
    };
    if !seen.request_due {
        return wait(Reason::SwitchoverScheduled);
    }
    let named_me = request
        .leader
        .as_deref()
        .is_none_or(|leader| leader == seen.me.as_str());
    let candidate = match request.member.as_deref().map(MemberName::new) {
        // Ours was the promotion that it asked for, or it asks for something that is already so.
        Some(Ok(candidate)) if candidate == seen.me => {
            return Decision::act(Reason::Leading, Step::ClearRequest);
        }
        _ if !named_me => return Decision::act(Reason::RequestNamesAnother, Step::ClearRequest),
        Some(Err(_)) => return Decision::act(Reason::RequestNamesAnother, Step::ClearRequest),
        // In maintenance a lease goes only to whom the operator names.
        None if seen.is_paused() => return Decision::act(Reason::RequestNamesAnother, Step::ClearRequest),
        Some(Ok(candidate)) => Some(candidate),
        None => None,
    };
    let step = Step::BeginHandover {
        epoch: epoch.clone(),
        why: Why::Requested {
            candidate: candidate.clone(),
        },
    };
    Decision::act(Reason::SwitchingOver(candidate), step)
}

//! PostgreSQL takes writes, or may.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::{Lsn, MemberName};
use pgherd_cluster::view::Epoch;

use super::{Decision, Reason, SOON, Step, backing_off, election, guards, synchronous};
use crate::memory::{Memory, Why};
use crate::observation::{LeaseSeen, Observation, Peer, Postgres, WatchdogSeen};

/// No probe fails for this long because of a freeze, a pause of the network, a checkpoint or a busy machine.
const HUNG_AFTER_MIN: Duration = Duration::from_secs(10);
/// That another can take over is believed for as long as a turn may take whose every question to a hung server runs into its
/// limit.
const ABLE_MAX: Duration = Duration::from_secs(10);
/// That nobody can is asked anew after this.
const ASKED_AGAIN_AFTER: Duration = Duration::from_secs(2);

pub(super) fn decide(seen: &Observation, memory: &Memory, well: Reason, now: Boottime) -> Decision {
    match &seen.lease {
        // The cluster is to follow another one: what was acknowledged is sent to whoever streams, and no more is.
        LeaseSeen::Mine(_) if seen.standby_cluster.is_some() && !seen.is_paused() => {
            Decision::act(Reason::BecomesStandby, Step::Stop)
        }
        // Promotion is over only when a write has been proven under this holding.
        LeaseSeen::Mine(epoch) if well == Reason::Leading && memory.proven.as_ref() != Some(epoch) => {
            Decision::act(Reason::Promoting, Step::Promote(epoch.clone()))
        }
        LeaseSeen::Mine(epoch) if well == Reason::Leading => leading(seen, memory, epoch, now),
        LeaseSeen::Mine(_) => hung(seen, memory, now)
            .or_else(|| start_overdue(seen, memory, now, well.clone(), Step::End))
            .unwrap_or_else(|| Decision::wait_for(well, SOON)),
        // The keeper's deadline stands, and nobody else can hold the key before it has passed.
        LeaseSeen::MineUnproven(_) => Decision::wait(Reason::ProvingLease),
        // Nobody watches what no deadline was given to: it was adopted, or left by a pause, and nobody says that it may go
        // on.
        LeaseSeen::Unknown if !seen.armed && unknown_for_a_ttl(seen, memory, now) => {
            Decision::act(Reason::LostLease, Step::End)
        }
        LeaseSeen::Unknown => Decision::wait(Reason::StoreUnreachable),
        // It runs by a holding of another process, as when this agent takes over from Patroni's.
        LeaseSeen::Stale { epoch, lease } if !seen.armed && !is_condemned(seen, memory, epoch) => rebind(epoch, *lease),
        LeaseSeen::Free if !seen.armed && may_take_the_key(seen, memory, now) => {
            Decision::act(Reason::Bidding, Step::Bid(guards(&seen.view)))
        }
        LeaseSeen::Stale { .. } | LeaseSeen::Theirs(_) | LeaseSeen::Free => Decision::act(Reason::LostLease, Step::End),
    }
}

/// Whether it runs only because its end has not come yet: no deadline will ever be given to it by this holding.
fn is_condemned(seen: &Observation, memory: &Memory, epoch: &Epoch) -> bool {
    memory.ending_since.is_some() || seen.fenced_term == Some(crate::lease::term_of(epoch))
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
        && seen.standby_cluster.is_none()
        && seen.watchdog != WatchdogSeen::Unusable
        && seen.vouched_for.is_none()
        && synchronous::needs_no_votes(seen)
        && election::not_ours_to_lead(seen).is_none()
        && !backing_off(memory, now)
}

/// Whether the configuration is known not to be a pause's, and for one ttl nobody has known who holds the key.
fn unknown_for_a_ttl(seen: &Observation, memory: &Memory, now: Boottime) -> bool {
    let for_long = memory
        .unknown_since
        .is_some_and(|since| now.since(since) >= seen.view.timing().ttl());
    for_long && seen.view.config.value.is_some()
}

/// PostgreSQL runs and does not work. A server that answers nobody is ended: a start in place is the soonest cure, and loses
/// nothing. A disk that cannot be written is no place to start again: it is left, when another member can take over.
fn hung(seen: &Observation, memory: &Memory, now: Boottime) -> Option<Decision> {
    let patience = (2 * seen.view.timing().ttl()).max(HUNG_AFTER_MIN);
    let for_long = |since: Option<Boottime>| since.is_some_and(|since| now.since(since) >= patience);
    if seen.is_paused() {
        return None;
    }
    if disk_is_lost(seen, now) {
        return if_another_can(seen, memory, now, Reason::DiskFailsAlone, Reason::DiskFails, Step::End);
    }
    for_long(seen.server_hangs_since).then(|| Decision::act(Reason::ServerHangs, Step::End))
}

/// The leader's PostgreSQL is down, or starts for longer than it may. It is `given_up` when another member can take over;
/// when none can, a late start is better than none.
pub(super) fn start_overdue(
    seen: &Observation,
    memory: &Memory,
    now: Boottime,
    meanwhile: Reason,
    given_up: Step,
) -> Option<Decision> {
    let config = seen.view.config.value.clone().unwrap_or_default();
    let limit = config.primary_start_timeout();
    let overdue = memory
        .starting_since
        .map_or(limit.is_zero(), |since| now.since(since) >= limit);
    if !overdue || seen.is_paused() || seen.bootstrap_unfinished {
        return None;
    }
    if_another_can(seen, memory, now, meanwhile, Reason::StartTooSlow, given_up)
}

/// A step that leaves the lead to another member: nothing while none can take it, the question first. While it is asked, and
/// asked again, the reason stays what it is `meanwhile`: nobody gives way before somebody is found.
fn if_another_can(
    seen: &Observation,
    memory: &Memory,
    now: Boottime,
    meanwhile: Reason,
    why: Reason,
    step: Step,
) -> Option<Decision> {
    let config = seen.view.config.value.clone().unwrap_or_default();
    let cluster = seen.view.timeline();
    let able = |peer: &Peer| {
        let behind = |position: Lsn| position.behind(seen.view.status.optime.unwrap_or_default());
        let near = peer
            .position
            .is_some_and(|position| behind(position) <= config.maximum_lag_on_failover());
        let old = cluster.is_some_and(|cluster| peer.timeline.is_none_or(|timeline| timeline < cluster));
        // Without a key of its own it has no lease to bind the leader key to.
        let can_bid = seen.view.members.contains_key(&peer.name);
        can_bid && !peer.primary && !peer.nofailover && near && !old && synchronous::counts(seen, &peer.name)
    };
    let answered_within = |age| {
        let poll = memory.poll.as_ref();
        poll.filter(|poll| now.since(poll.answered_at) <= age)
    };
    if answered_within(ABLE_MAX).is_some_and(|poll| poll.peers.iter().any(able)) {
        return Some(Decision::act(why, step));
    }
    let asked = answered_within(ASKED_AGAIN_AFTER).is_some();
    (!asked).then(|| Decision::act(meanwhile, Step::Poll))
}

/// Whether the data directory has not been writable for longer than a long checkpoint or a busy machine explains.
pub(super) fn disk_is_lost(seen: &Observation, now: Boottime) -> bool {
    let patience = (2 * seen.view.timing().ttl()).max(HUNG_AFTER_MIN);
    let since = seen.disk_fails_since;
    since.is_some_and(|since| now.since(since) >= patience)
}

fn leading(seen: &Observation, memory: &Memory, epoch: &Epoch, now: Boottime) -> Decision {
    if seen.watchdog == WatchdogSeen::Unusable && !seen.is_paused() {
        return Decision::act(Reason::WatchdogUnusable, Step::End);
    }
    if let Some(decision) = hung(seen, memory, now) {
        return decision;
    }
    if let Some(decision) = synchronous::leader(seen, memory, now) {
        return decision;
    }
    let wait = |reason| {
        let reason = if disk_is_lost(seen, now) && !seen.is_paused() {
            Reason::DiskFailsAlone
        } else {
            reason
        };
        if synchronous::is_on(seen) {
            Decision::wait_for(reason, synchronous::LOOK_EVERY)
        } else {
            Decision::wait(reason)
        }
    };
    request(seen, memory, epoch, Reason::Leading).unwrap_or_else(|| {
        let scheduled = seen.view.failover.value.is_some();
        wait(if scheduled {
            Reason::SwitchoverScheduled
        } else {
            Reason::Leading
        })
    })
}

/// What a leader does about a request that is due.
pub(super) fn request(seen: &Observation, memory: &Memory, epoch: &Epoch, leads: Reason) -> Option<Decision> {
    let request = seen.view.failover.value.as_ref().filter(|_| seen.request_due)?;
    let named_me = request
        .leader
        .as_deref()
        .is_none_or(|leader| leader == seen.me.as_str());
    let clear = || Decision::act(Reason::RequestNamesAnother, Step::ClearRequest);
    let candidate = match request.member.as_deref().map(MemberName::new) {
        // Ours was the promotion that it asked for, or it asks for something that is already so.
        Some(Ok(candidate)) if candidate == seen.me => {
            return Some(Decision::act(leads, Step::ClearRequest));
        }
        // It won because that candidate had its time; handing over to it again would never end.
        _ if memory.bid_despite == Some(seen.view.failover.mod_revision) => {
            return Some(clear());
        }
        _ if !named_me => return Some(clear()),
        Some(Err(_)) => return Some(clear()),
        // In maintenance a lease goes only to whom the operator names.
        None if seen.is_paused() => return Some(clear()),
        Some(Ok(candidate)) => Some(candidate),
        None => None,
    };
    let step = Step::BeginHandover {
        epoch: epoch.clone(),
        why: Why::Requested {
            candidate: candidate.clone(),
        },
    };
    Some(Decision::act(Reason::SwitchingOver(candidate), step))
}

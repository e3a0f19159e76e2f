//! Nobody holds the leader key, and our standby runs: may this member bid? The rules are Patroni's for the asynchronous
//! mode, so that a mixed cluster elects by one set of rules.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::{MemberName, Timeline};
use pgherd_cluster::record::{DynamicConfig, FailoverRequest, PgState};

use super::{Decision, Reason, SOON, Step, guards, synchronous};
use crate::memory::Memory;
use crate::observation::{Observation, Poll, Postgres, WatchdogSeen};
use crate::status::ServerStatus;
use crate::sync::may_run;

/// An older poll is asked again: positions move while a former leader's last bytes arrive.
const POLL_AGE_MAX: Duration = Duration::from_millis(1000);

pub(super) fn decide(seen: &Observation, memory: &Memory, now: Boottime) -> Decision {
    let Postgres::Running(server) = &seen.postgres else {
        return Decision::wait(Reason::PostgresSilent);
    };
    let config = seen.view.config.value.clone().unwrap_or_default();
    if seen.nofailover {
        return Decision::wait(Reason::MayNotLead);
    }
    if seen.watchdog == WatchdogSeen::Unusable {
        return Decision::wait(Reason::WatchdogUnusable);
    }
    if let Some(leader) = &seen.vouched_for {
        return Decision::wait_for(Reason::VouchedFor(leader.clone()), SOON);
    }
    // Before any request: an operator's word does not make this version able to lead such a cluster.
    if let Some(refusal) = not_ours_to_lead(seen) {
        return Decision::wait(refusal);
    }
    if let Some(leader) = may_still_run(seen, memory, now) {
        return Decision::wait_for(Reason::JustResumed(leader), SOON);
    }
    let request = seen.view.failover.value.as_ref();
    if request.is_some_and(|request| names(request.member.as_deref(), &seen.me) && allowed(seen, request)) {
        // Whoever asked for this member decided; lag and peers are not weighed again.
        return bid(seen);
    }
    if let Some(refusal) = behind_the_cluster(seen, server, &config) {
        return Decision::wait_for(refusal, SOON);
    }
    let fresh = memory.poll.as_ref().filter(|poll| {
        now.since(poll.answered_at) <= POLL_AGE_MAX && memory.free_since.is_some_and(|since| poll.asked_at >= since)
    });
    let Some(poll) = fresh else {
        return Decision::act(Reason::Polling, Step::Poll);
    };
    if let Some(request) = request
        && let Some(wait) = leave_to_the_candidate(seen, memory, request, poll, now)
    {
        return wait;
    }
    if let Some(bytes) = lacks_of_last_leader(seen, memory, poll)
        && !patience_is_over(seen, memory, now)
    {
        return Decision::wait_for(Reason::WaitingForLastLeader { bytes }, SOON);
    }
    if let Some(reason) = healthier(seen, poll) {
        return Decision::wait_for(reason, SOON);
    }
    if on_an_old_timeline(seen, poll.own_timeline) && !patience_is_over(seen, memory, now) {
        return Decision::wait_for(Reason::OldTimeline, SOON);
    }
    if let Some(reason) = synchronous::too_few_votes(seen, poll) {
        return Decision::wait_for(reason, SOON);
    }
    bid(seen)
}

/// A switchover keeps what synchronous replication promises. A manual failover, which names no leader, is an order.
fn allowed(seen: &Observation, request: &FailoverRequest) -> bool {
    let sync = &seen.view.sync.value;
    request.leader.is_none() || !synchronous::is_on(seen) || !sync.is_active() || sync.lists(&seen.me)
}

/// What this version cannot honour it must not break: a cluster that follows another, a synchronous set, and a failsafe
/// list all say who may not be promoted, whoever maintains them.
pub(super) fn not_ours_to_lead(seen: &Observation) -> Option<Reason> {
    let config = seen.view.config.value.clone().unwrap_or_default();
    if config.is_standby_cluster() {
        return Some(Reason::StandbyCluster);
    }
    if !may_run(seen.sync.settings.mode, &seen.view.sync.value, &seen.me) {
        return Some(Reason::NotSynchronous);
    }
    let failsafe = &seen.view.failsafe;
    let left_out = !failsafe.is_empty() && !failsafe.contains_key(seen.me.as_str());
    (config.is_failsafe() && left_out).then_some(Reason::NotInFailsafe)
}

/// In maintenance nobody fences: its leader may have lost the key and its agent, and still take writes. After it, whoever
/// led has one ttl to show that it does not, or to take the key again.
fn may_still_run(seen: &Observation, memory: &Memory, now: Boottime) -> Option<MemberName> {
    let resumed_at = memory.resumed_at?;
    let leader = memory.last_leader.as_ref().filter(|leader| **leader != seen.me)?;
    let stopped = seen
        .view
        .members
        .get(leader)
        .is_some_and(|member| member.record.state == PgState::Stopped);
    let just = now.since(resumed_at) <= seen.view.timing().ttl();
    (just && !stopped).then(|| leader.clone())
}

/// At the start of a whole cluster the first member that is up may lack what the last leader acknowledged last. While a
/// leader was seen before, it is gone and the others are asked; here they may only not be up yet.
fn lacks_of_last_leader(seen: &Observation, memory: &Memory, poll: &Poll) -> Option<u64> {
    if memory.last_leader.is_some() {
        return None;
    }
    let bytes = poll.own_position.behind(seen.view.status.optime?);
    (bytes > 0).then_some(bytes)
}

/// The cluster has been on a later timeline: what was acknowledged there is missing here. Only when nobody who has it
/// comes back within a lease's length is the rest better than nothing.
fn on_an_old_timeline(seen: &Observation, own: Option<Timeline>) -> bool {
    let cluster = seen.view.timeline();
    cluster.is_some_and(|cluster| own.is_none_or(|own| own < cluster))
}

fn patience_is_over(seen: &Observation, memory: &Memory, now: Boottime) -> bool {
    let patience = seen.view.timing().ttl();
    memory.free_since.is_none_or(|since| now.since(since) > patience)
}

fn bid(seen: &Observation) -> Decision {
    Decision::act(Reason::Bidding, Step::Bid(guards(&seen.view)))
}

fn names(text: Option<&str>, name: &MemberName) -> bool {
    text == Some(name.as_str())
}

fn behind_the_cluster(seen: &Observation, server: &ServerStatus, config: &DynamicConfig) -> Option<Reason> {
    let bytes_max = config.maximum_lag_on_failover();
    let bytes = seen
        .view
        .status
        .optime
        .map_or(0, |optime| server.wal.position().behind(optime));
    if bytes > bytes_max {
        return Some(Reason::LagTooGreat { bytes, bytes_max });
    }
    let cluster_timeline = seen.view.timeline().filter(|_| config.check_timeline());
    let too_old = cluster_timeline.is_some_and(|cluster| server.timeline.is_none_or(|mine| mine < cluster));
    too_old.then_some(Reason::OldTimeline)
}

/// While a request stands, its candidate goes first, and the leader that handed over goes last; for one lease's length,
/// lest a candidate that has died meanwhile keeps the cluster without a leader.
fn leave_to_the_candidate(
    seen: &Observation,
    memory: &Memory,
    request: &FailoverRequest,
    poll: &Poll,
    now: Boottime,
) -> Option<Decision> {
    if patience_is_over(seen, memory, now) {
        return None;
    }
    let able = |peer: &&crate::observation::Peer| !peer.nofailover && peer.position.is_some();
    if let Some(candidate) = poll
        .peers
        .iter()
        .filter(able)
        .find(|peer| names(request.member.as_deref(), &peer.name))
    {
        return Some(Decision::wait_for(Reason::LeavesItTo(candidate.name.clone()), SOON));
    }
    let former_leader = names(request.leader.as_deref(), &seen.me);
    (former_leader && poll.peers.iter().any(|peer| able(&peer)))
        .then(|| Decision::wait_for(Reason::FormerLeaderWaits, SOON))
}

/// Whether somebody else should lead. Members that did not answer do not matter, as in Patroni's asynchronous mode.
fn healthier(seen: &Observation, poll: &Poll) -> Option<Reason> {
    let former_leader = seen
        .view
        .failover
        .value
        .as_ref()
        .and_then(|request| request.leader.clone());
    for peer in &poll.peers {
        if peer.primary {
            return Some(Reason::PrimaryAlive(peer.name.clone()));
        }
        let Some(position) = peer.position else { continue };
        if peer.nofailover || names(former_leader.as_deref(), &peer.name) || !synchronous::counts(seen, &peer.name) {
            continue;
        }
        // A position counts only on one's own timeline. A later timeline has what was acknowledged last; an earlier one
        // may be longer and has not.
        match (peer.timeline, poll.own_timeline) {
            (Some(theirs), Some(ours)) if theirs > ours => return Some(Reason::OnLaterTimeline(peer.name.clone())),
            (Some(theirs), Some(ours)) if theirs < ours => continue,
            _ => {}
        }
        if position > poll.own_position {
            return Some(Reason::Behind {
                of: peer.name.clone(),
                bytes: poll.own_position.behind(position),
            });
        }
        if position == poll.own_position && peer.failover_priority > seen.failover_priority {
            return Some(Reason::Outranked(peer.name.clone()));
        }
    }
    None
}

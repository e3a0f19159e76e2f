//! Nobody holds the leader key, and our standby runs: may this member bid? The rules are Patroni's for the asynchronous
//! mode, so that a mixed cluster elects by one set of rules.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::{DynamicConfig, FailoverRequest};

use super::{Decision, Reason, SOON, Step, guards};
use crate::observation::{Memory, Observation, Poll, Postgres};
use crate::status::ServerStatus;

/// An older poll is asked again: positions move while a former leader's last bytes arrive.
const POLL_AGE_MAX: Duration = Duration::from_millis(500);

pub(super) fn decide(seen: &Observation, memory: &Memory, now: Boottime) -> Decision {
    let Postgres::Running(server) = &seen.postgres else {
        return Decision::wait(Reason::PostgresSilent);
    };
    let config = seen.view.config.value.clone().unwrap_or_default();
    if seen.nofailover {
        return Decision::wait(Reason::MayNotLead);
    }
    let request = seen.view.failover.value.as_ref();
    if request.is_some_and(|request| names(request.member.as_deref(), &seen.me)) {
        // Whoever asked for this member decided; lag and peers are not weighed again.
        return bid(seen);
    }
    if let Some(refusal) = behind_the_cluster(seen, server, &config) {
        return Decision::wait_for(refusal, SOON);
    }
    let fresh = memory.poll.as_ref().filter(|poll| {
        now.since(poll.asked_at) <= POLL_AGE_MAX && memory.free_since.is_some_and(|since| poll.asked_at >= since)
    });
    let Some(poll) = fresh else {
        return Decision::act(Reason::Polling, Step::Poll);
    };
    if let Some(request) = request
        && let Some(wait) = leave_to_the_candidate(seen, memory, request, poll, &config, now)
    {
        return wait;
    }
    match healthier(seen, poll) {
        Some(reason) => Decision::wait_for(reason, SOON),
        None => bid(seen),
    }
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
    config: &DynamicConfig,
    now: Boottime,
) -> Option<Decision> {
    let patience = config.timing_in_force().ttl();
    if memory.free_since.is_none_or(|since| now.since(since) > patience) {
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
        if peer.nofailover || names(former_leader.as_deref(), &peer.name) {
            continue;
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

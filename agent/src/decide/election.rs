//! Nobody holds the leader key, and our standby runs: may this member bid? The rules are Patroni's for the asynchronous
//! mode, so that a mixed cluster elects by one set of rules.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::{MemberName, Timeline};
use pgherd_cluster::record::{DynamicConfig, FailoverRequest, PgState, Role};

use super::{Decision, Reason, SOON, Step, guards, synchronous};
use crate::memory::Memory;
use crate::observation::{Observation, Peer, Poll, Postgres, WatchdogSeen};
use crate::status::ServerStatus;
use crate::sync::may_run;

/// An older poll is asked again: positions move while a former leader's last bytes arrive.
const POLL_AGE_MAX: Duration = Duration::from_millis(1000);

pub(super) fn decide(seen: &Observation, memory: &Memory, now: Boottime) -> Decision {
    let Postgres::Running(server) = &seen.postgres else {
        return Decision::wait(Reason::PostgresSilent);
    };
    let config = seen.view.config.value.clone().unwrap_or_default();
    if let Some(reason) = forbidden(seen) {
        return Decision::wait(reason);
    }
    if let Some(reason) = bound_not_to_bid(seen, memory, now) {
        return Decision::wait_for(reason, SOON);
    }
    // Before any request: an operator's word does not make this version able to lead such a cluster.
    if let Some(refusal) = not_ours_to_lead(seen).filter(|refusal| !overruled(seen, refusal)) {
        return Decision::wait(refusal);
    }
    if let Some(leader) = may_still_run(seen, memory, now) {
        return Decision::wait_for(Reason::JustResumed(leader), SOON);
    }
    let request = seen.view.failover.value.as_ref();
    if let Some(leader) = may_have_vouched(seen, memory, now) {
        return leader;
    }
    let by_order = request.is_some_and(|request| {
        // In quorum mode a switchover's candidate may lack what only another voter has.
        let without_votes = request.leader.is_none() || synchronous::needs_no_votes(seen);
        let named = names(request.member.as_deref(), &seen.me);
        named && seen.request_due && without_votes && allowed(seen, request)
    });
    if by_order {
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
    let somebody = poll
        .peers
        .iter()
        .any(|peer| !peer.nofailover && peer.position.is_some());
    if has_given_way(seen, memory, now) && somebody {
        return Decision::wait_for(Reason::FormerLeaderWaits, SOON);
    }
    if !patience_is_over(seen, memory, now)
        && let Some(reason) = somebody_may_have_more(seen, memory, poll)
    {
        return Decision::wait_for(reason, SOON);
    }
    if let Some(reason) = healthier(seen, poll, patience_is_over(seen, memory, now)) {
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

/// What keeps this member from leading, whoever else could.
fn forbidden(seen: &Observation) -> Option<Reason> {
    if seen.nofailover {
        return Some(Reason::MayNotLead);
    }
    if !seen.lacks_slots.is_empty() {
        return Some(Reason::LacksSlots(seen.lacks_slots.clone()));
    }
    (seen.watchdog == WatchdogSeen::Unusable).then_some(Reason::WatchdogUnusable)
}

/// A leader whose PostgreSQL did not come up has given its key up for somebody else: it goes last, while there is somebody,
/// for one lease's length.
pub(super) fn has_given_way(seen: &Observation, memory: &Memory, now: Boottime) -> bool {
    let just = |gave_way_at: Boottime| now.since(gave_way_at) <= seen.view.timing().ttl();
    memory.gave_way_at.is_some_and(just)
}

/// A word given, or an operator's program that has just said no.
fn bound_not_to_bid(seen: &Observation, memory: &Memory, now: Boottime) -> Option<Reason> {
    let vouched = seen
        .vouched_for
        .as_ref()
        .map(|leader| Reason::VouchedFor(leader.clone()));
    vouched.or_else(|| was_refused(seen, memory, now).then_some(Reason::PrePromoteRefuses))
}

/// Whether the operator's program has refused a promotion less than one lease's length ago: whoever else can lead has that
/// long, and a program that asks this machine would say the same.
pub(super) fn was_refused(seen: &Observation, memory: &Memory, now: Boottime) -> bool {
    let just = |refused_at: Boottime| now.since(refused_at) <= seen.view.timing().ttl();
    memory.pre_promote_refused_at.is_some_and(just)
}

/// A vouch is kept in memory only: an agent that has begun anew does not know whom the one before it has promised not to
/// bid. The last holder has promised nothing.
pub(super) fn may_have_vouched(seen: &Observation, memory: &Memory, now: Boottime) -> Option<Decision> {
    let config = seen.view.config.value.as_ref()?;
    // An empty list may be one that a restored etcd has forgotten.
    let list = &seen.view.failsafe;
    let alone = !list.is_empty() && list.keys().all(|name| name == seen.me.as_str());
    let asked = config.is_failsafe() && !alone;
    let just = memory
        .began_at
        .is_some_and(|began_at| now.since(began_at) <= seen.view.timing().ttl());
    let owed = asked && just && seen.last_held.is_none() && !ended_in_order(seen, memory);
    owed.then(|| Decision::wait_for(Reason::MayHaveVouched, SOON))
}

/// Whether the last holding was given up in order: its leader has said since that its PostgreSQL is stopped, or a standby.
/// No vouch for it matters any more. What it said does not outlive a lease that expires, since its own key ends with it: a
/// leader that goes on by the word of the others has no key, or says that it is the primary.
fn ended_in_order(seen: &Observation, memory: &Memory) -> bool {
    let Some(epoch) = &memory.last_epoch else { return false };
    let member = seen.view.members.get(&epoch.holder);
    member.is_some_and(|member| {
        let record = &member.record;
        let ended = record.state == PgState::Stopped || record.role == Role::Replica;
        ended && member.mod_revision > epoch.create_revision
    })
}

/// A manual failover to this member, which names no leader, is an operator's order: it overrules the synchronous set, and
/// nothing else.
fn overruled(seen: &Observation, refusal: &Reason) -> bool {
    let request = seen.view.failover.value.as_ref();
    let ordered = |request: &FailoverRequest| request.leader.is_none() && names(request.member.as_deref(), &seen.me);
    *refusal == Reason::NotSynchronous && seen.request_due && request.is_some_and(ordered)
}

/// A switchover keeps what synchronous replication promises. A manual failover, which names no leader, is an order.
fn allowed(seen: &Observation, request: &FailoverRequest) -> bool {
    let sync = &seen.view.sync.value;
    request.leader.is_none() || !synchronous::is_on(seen) || !sync.is_active() || sync.lists(&seen.me)
}

/// What an election must not break: a synchronous set and a failsafe list say who may not be promoted, whoever maintains them.
pub(super) fn not_ours_to_lead(seen: &Observation) -> Option<Reason> {
    let config = seen.view.config.value.clone().unwrap_or_default();
    let failsafe = &seen.view.failsafe;
    let left_out = !failsafe.is_empty() && !failsafe.contains_key(seen.me.as_str());
    if config.is_failsafe() && left_out {
        return Some(Reason::NotInFailsafe);
    }
    // Who has what was acknowledged before the cluster began to follow another one.
    let sync = &seen.view.sync.value;
    let left_over = seen.standby_cluster.is_some() && sync.is_active();
    if left_over && sync.leader.as_deref() != Some(seen.me.as_str()) && !sync.lists(&seen.me) {
        return Some(Reason::NotSynchronous);
    }
    // Last, since an operator may overrule this one.
    (!may_run(seen.sync.settings.mode, &seen.view.sync.value, &seen.me)).then_some(Reason::NotSynchronous)
}

/// In maintenance nobody fences: its leader may have lost the key and its agent, and still take writes. After it, whoever
/// led has one ttl to show that it does not, or to take the key again.
fn may_still_run(seen: &Observation, memory: &Memory, now: Boottime) -> Option<Option<MemberName>> {
    let resumed_at = memory.resumed_at?;
    let just = now.since(resumed_at) <= seen.view.timing().ttl();
    let leader = memory.last_leader.as_ref();
    let stopped = leader.and_then(|leader| seen.view.members.get(leader));
    let stopped = stopped.is_some_and(|member| member.record.state == PgState::Stopped);
    // Who led may be known to nobody here: its key had ended before this agent began.
    let by_another = leader != Some(&seen.me);
    (just && by_another && !stopped).then(|| leader.cloned())
}

/// Whether what others have, or may have, is not known yet; each is waited for as long as patience lasts.
fn somebody_may_have_more(seen: &Observation, memory: &Memory, poll: &Poll) -> Option<Reason> {
    if let Some(bytes) = lacks_of_last_leader(seen, memory, poll) {
        return Some(Reason::WaitingForLastLeader { bytes });
    }
    if let Some(peer) = is_coming_up(seen, memory, poll) {
        return Some(Reason::ComingUp(peer));
    }
    (has_no_record(seen) && poll.silent > 0).then_some(Reason::OthersAreSilent)
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

/// At the start of a whole cluster, who answers and cannot say yet how far it is may be further than all others.
fn is_coming_up(seen: &Observation, memory: &Memory, poll: &Poll) -> Option<MemberName> {
    let unsure = memory.last_leader.is_none() || has_no_record(seen);
    let unknown = |peer: &&Peer| unsure && peer.position.is_none() && !peer.nofailover;
    poll.peers.iter().find(unknown).map(|peer| peer.name.clone())
}

/// In synchronous mode the record says who has what was acknowledged. Where there is none, as after a restore, whoever is
/// silent may be the one, and may only not be up yet.
fn has_no_record(seen: &Observation) -> bool {
    synchronous::is_on(seen) && !seen.view.sync.value.is_active()
}

/// The cluster has been on a later timeline: what was acknowledged there is missing here. Only when nobody who has it
/// comes back within a lease's length is the rest better than nothing.
fn on_an_old_timeline(seen: &Observation, own: Option<Timeline>) -> bool {
    // What a standby cluster was before it began to follow says nothing of the timelines that come.
    let cluster = seen.view.timeline().filter(|_| seen.standby_cluster.is_none());
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
    let checks = config.check_timeline() && seen.standby_cluster.is_none();
    let cluster_timeline = seen.view.timeline().filter(|_| checks);
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

/// Whether somebody else should lead. Members that did not answer do not matter, as in Patroni's asynchronous mode. One that
/// answers and has no key cannot bid; it may have one soon, as after an outage of etcd, and is waited for only so long.
fn healthier(seen: &Observation, poll: &Poll, patience_is_over: bool) -> Option<Reason> {
    let former_leader = seen
        .view
        .failover
        .value
        .as_ref()
        .and_then(|request| request.leader.clone());
    let may_bid = |peer: &&crate::observation::Peer| !patience_is_over || seen.view.members.contains_key(&peer.name);
    // Whoever still runs as primary may take writes, as after a pause, with or without a key.
    if let Some(alive) = poll.peers.iter().find(|peer| peer.primary) {
        return Some(Reason::PrimaryAlive(alive.name.clone()));
    }
    for peer in poll.peers.iter().filter(may_bid) {
        let Some(position) = peer.position.filter(|_| !peer.nofailover) else {
            continue;
        };
        // A position counts only on one's own timeline. A later timeline has what was acknowledged last, whatever a record
        // says that a restored etcd may have brought back; an earlier one may be longer and has not.
        match (peer.timeline, poll.own_timeline) {
            (Some(theirs), Some(ours)) if theirs > ours => return Some(Reason::OnLaterTimeline(peer.name.clone())),
            (Some(theirs), Some(ours)) if theirs < ours => continue,
            _ => {}
        }
        // While its candidate has its time, the leader that handed over comes last.
        let hands_over = !patience_is_over && names(former_leader.as_deref(), &peer.name);
        if hands_over || !synchronous::counts(seen, &peer.name) {
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

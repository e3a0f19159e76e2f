//! Where synchronous replication meets the other decisions.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;

use super::{Decision, Reason, SOON, Step};
use crate::memory::Memory;
use crate::observation::{Observation, Poll, Postgres};
use crate::status::WalStatus;
use crate::sync::{
    NameSet, Standby, StandbyName, SyncInputs, SyncMode, SyncNames, SyncStep, any_may_be_synchronous, before_promotion,
    eligible_names, may_run, needs_votes_of, next_step, quorum_reached,
};

/// A lost standby holds commits up: the senders are looked at more often than once a period.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(250);

fn inputs(seen: &Observation, memory: &Memory, now: Boottime) -> SyncInputs {
    let (running, flush_lsn) = match &seen.postgres {
        Postgres::Running(server) => (matches!(server.wal, WalStatus::Primary { .. }), server.wal.position()),
        _ => Default::default(),
    };
    let loop_wait = seen.view.timing().loop_wait();
    let waiting = memory
        .waiting
        .as_ref()
        .filter(|waiting| waiting.names == seen.sync.configured);
    SyncInputs {
        me: seen.me.clone(),
        settings: seen.sync.settings,
        state: seen.view.sync.value.clone(),
        sync_revision: seen.view.sync.mod_revision,
        configured: seen.sync.configured.clone(),
        user_names: seen.sync.user_names.clone(),
        senders: seen.sync.senders.clone(),
        members: seen
            .view
            .members
            .values()
            .map(|member| Standby::of(&member.name, &member.record))
            .collect(),
        running,
        flush_lsn,
        guc_changed_at: waiting.and_then(|waiting| waiting.since),
        waited: memory
            .unprotected_since
            .is_some_and(|since| now.since(since) >= loop_wait),
        commit_level: seen.sync.commit_level,
    }
}

/// What a leader does next for its synchronous standbys.
pub(super) fn leader(seen: &Observation, memory: &Memory, now: Boottime) -> Option<Decision> {
    let mut next = next_step(&inputs(seen, memory, now))?;
    let unsettled = memory.sync_sent == Some(seen.view.sync.mod_revision);
    if unsettled && matches!(next.step, SyncStep::SetNames(_)) {
        // The record may already say more than is seen. What is seen is written once more: when that succeeds, the other
        // write has not been done, and never will be.
        next.step = SyncStep::WriteSync {
            state: seen.view.sync.value.clone(),
            revision: seen.view.sync.mod_revision,
        };
    }
    Some(Decision::act(Reason::Synchronous(next.reason), Step::Sync(next.step)))
}

/// Whether a standby streams that commits may wait for. Others that stream, a copy of the log among them, protect nothing.
pub(crate) fn protects_any(seen: &Observation, memory: &Memory, now: Boottime) -> bool {
    !eligible_names(&inputs(seen, memory, now)).is_empty()
}

/// Whether a member runs that commits may wait for once it streams.
pub(super) fn may_protect_any(seen: &Observation, memory: &Memory, now: Boottime) -> bool {
    any_may_be_synchronous(&inputs(seen, memory, now))
}

/// Whether, by the record, one of the standbys that stream could win without this leader's vote.
pub(super) fn somebody_may_follow(seen: &Observation, memory: &Memory, now: Boottime) -> bool {
    let (state, mode) = (&seen.view.sync.value, seen.sync.settings.mode);
    let streaming = eligible_names(&inputs(seen, memory, now));
    let mut candidates = seen.view.members.keys();
    candidates.any(|name| {
        streaming.contains(&StandbyName::from(name))
            && may_run(mode, state, name)
            && quorum_reached(state, name, &streaming)
    })
}

/// Whether the leader has senders to look after.
pub(super) fn is_on(seen: &Observation) -> bool {
    seen.sync.settings.mode != SyncMode::Off
}

/// What has to be in place before the winner of an election promotes its standby: the record first, the setting second.
pub(super) fn before_promoting(seen: &Observation, memory: &Memory, now: Boottime) -> Option<Decision> {
    let inputs = inputs(seen, memory, now);
    let before = before_promotion(&inputs);
    let step = match before.write_sync {
        Some(state) => SyncStep::WriteSync {
            state,
            revision: inputs.sync_revision,
        },
        None if !inputs.configured.same_as(&before.names) => SyncStep::SetNames(before.names),
        // A server that is promoted before it has taken the setting over would acknowledge commits alone for a moment.
        None if is_on(seen) && before.names != SyncNames::Off && !seen.sync.taken_over => {
            return Some(Decision::wait_for(Reason::Promoting, SOON));
        }
        None => return None,
    };
    Some(Decision::act(Reason::Promoting, Step::Sync(step)))
}

/// Whether this member may lead without having asked anybody: it has all that was acknowledged.
pub(super) fn needs_no_votes(seen: &Observation) -> bool {
    !is_on(seen) || quorum_reached(&seen.view.sync.value, &seen.me, &NameSet::new())
}

/// Quorum commit: whether enough of the voters said that they are not ahead. How many did, and how many are needed,
/// otherwise.
pub(super) fn too_few_votes(seen: &Observation, poll: &Poll) -> Option<Reason> {
    let state = &seen.view.sync.value;
    let votes: NameSet = poll
        .peers
        .iter()
        .filter(|peer| {
            let known = peer.position.is_some_and(|position| position <= poll.own_position);
            let later = matches!((peer.timeline, poll.own_timeline), (Some(theirs), Some(ours)) if theirs > ours);
            known && !later && !peer.primary
        })
        .map(|peer| StandbyName::from(&peer.name))
        .collect();
    // An operator who turns the mode off to get out of an outage relies on that.
    if !is_on(seen) || quorum_reached(state, &seen.me, &votes) {
        return None;
    }
    let voters = needs_votes_of(state, &seen.me);
    Some(Reason::TooFewVotes {
        votes: voters.intersection(&votes).count(),
        needed: usize::try_from(state.quorum).unwrap_or(usize::MAX),
    })
}

/// Whether the position of another member matters in an election: while a synchronous set is in force only those in it can
/// have what was acknowledged. What the leader of the record has beyond that was acknowledged to nobody.
pub(super) fn counts(seen: &Observation, name: &pgherd_cluster::name::MemberName) -> bool {
    let state = &seen.view.sync.value;
    !is_on(seen) || !state.is_active() || state.lists(name)
}

//! Which standbys can be waited for, the best first, and which of them have caught up.

use std::cmp::Reverse;

use pgherd_cluster::name::Lsn;

use super::{NameSet, Sender, Standby, StandbyName, SyncInputs, SyncRank};

/// A standby that streams and may be synchronous.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub(super) name: StandbyName,
    pub(super) nofailover: bool,
    /// Whether it has every commit that was acknowledged before the setting in force made commits wait for it.
    pub(super) confirmed: bool,
    sync_priority: i64,
    rank: SyncRank,
    position: Lsn,
}

/// All of them, in the order in which they are to be chosen. `waited_for` is how PostgreSQL ranks a standby that the mode
/// in force waits for.
pub(super) fn eligible(inputs: &SyncInputs, waited_for: SyncRank) -> Vec<Candidate> {
    let settled = reload_reached(inputs);
    let mut found: Vec<Candidate> = inputs
        .members
        .iter()
        .filter(|member| may_be_synchronous(inputs, member))
        .filter_map(|member| candidate(inputs, member, waited_for, settled))
        .collect();
    if let Some(lag_max) = inputs.settings.lag_max {
        // One alone is measured by the primary: there is no better standby to prefer to it.
        let best = match found.as_slice() {
            [] | [_] => inputs.flush_lsn,
            several => several
                .iter()
                .map(|candidate| candidate.position)
                .max()
                .unwrap_or_default(),
        };
        found.retain(|candidate| candidate.position.behind(best) <= lag_max);
    }
    found.sort_by_key(|candidate| {
        let better = (candidate.sync_priority, candidate.rank, candidate.position);
        (candidate.nofailover, Reverse(better))
    });
    found
}

/// The standbys that stream and may be synchronous.
#[must_use]
pub fn eligible_names(inputs: &SyncInputs) -> NameSet {
    let found = eligible(inputs, SyncRank::Sync).into_iter();
    found.map(|candidate| candidate.name).collect()
}

/// Whether any member runs whose tags and state allow it to be synchronous, whether it streams or not.
#[must_use]
pub fn any_may_be_synchronous(inputs: &SyncInputs) -> bool {
    inputs.members.iter().any(|member| may_be_synchronous(inputs, member))
}

/// Whether a member's tags and state allow it; streaming is another matter.
pub(super) fn may_be_synchronous(inputs: &SyncInputs, member: &Standby) -> bool {
    let me = inputs.own_name();
    let cascades = member
        .replicatefrom
        .as_ref()
        .is_some_and(|source| *source != me && inputs.members.iter().any(|other| other.name == *source));
    member.running && !member.nosync && !cascades && member.name != me && member.name.is_listable()
}

fn candidate(inputs: &SyncInputs, member: &Standby, waited_for: SyncRank, settled: bool) -> Option<Candidate> {
    // A standby that has reconnected may have two rows for a while. What either acknowledged, it has.
    let own: Vec<&Sender> = inputs
        .senders
        .iter()
        .filter(|sender| sender.application_name == member.name && sender.streams())
        .collect();
    let position = own
        .iter()
        .filter_map(|sender| sender.position(inputs.commit_level))
        .max()?;
    let rank = own.iter().map(|sender| sender.sync_state).max()?;
    let caught_up = inputs.guc_changed_at.is_some_and(|changed_at| position >= changed_at);
    Some(Candidate {
        name: member.name.clone(),
        nofailover: member.nofailover,
        confirmed: settled && caught_up && rank == waited_for && inputs.configured.covers(&member.name),
        sync_priority: member.sync_priority,
        rank,
        position,
    })
}

/// Whether no walsender is seen to work by an earlier setting. One that does may still acknowledge commits alone.
fn reload_reached(inputs: &SyncInputs) -> bool {
    let mut senders = inputs.senders.iter();
    senders.all(|sender| {
        // PostgreSQL shows a standby as asynchronous that has not said yet how far it has flushed.
        let ranked = sender.state == "streaming" && sender.flush.is_some();
        !ranked || inputs.configured.covers(&sender.application_name) == (sender.sync_state != SyncRank::Async)
    })
}

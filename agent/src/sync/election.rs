//! Who may be promoted, by what `/sync` says.

use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::SyncState;

use super::{NameSet, StandbyName, SyncMode, listed};

/// Whether this member may try at all. Without synchronous mode, or before a leader has begun with it, everybody may; an
/// operator who turns it off to get out of an outage relies on that. In quorum mode everybody may, the votes decide.
#[must_use]
pub fn may_run(mode: SyncMode, state: &SyncState, me: &MemberName) -> bool {
    match mode {
        SyncMode::Off | SyncMode::Quorum => true,
        SyncMode::Priority => !state.is_active() || group(state).contains(&StandbyName::from(me)),
    }
}

/// Whose votes count for this member: the leader's and the voters' but its own. Nobody's while none are needed.
#[must_use]
pub fn needs_votes_of(state: &SyncState, me: &MemberName) -> NameSet {
    let mut group = group(state);
    group.remove(&StandbyName::from(me));
    group
}

/// Whether `votes` are enough. A vote is given by a member that answered, is not on a later timeline, and whose position is
/// known and, on the same timeline, not ahead of the candidate's; names that have no vote are ignored. A timeline is the
/// one of the log that is there: a standby that follows a new leader and has not reached the fork yet is on the old one.
///
/// The record decides, in every mode: in priority mode it asks for no votes, and while a leader has not taken the change of
/// a mode over yet the numbers are the earlier mode's. A candidate that is not in the group needs one vote more. The leader
/// whom the record names needs none: it has all that it ever acknowledged, and nobody else has led since.
#[must_use]
pub fn quorum_reached(state: &SyncState, me: &MemberName, votes: &NameSet) -> bool {
    let own = StandbyName::from(me);
    let leads_record = state
        .leader
        .as_deref()
        .is_some_and(|leader| StandbyName::from(leader) == own);
    if !state.is_active() || leads_record {
        return true;
    }
    let needed = usize::try_from(state.quorum).unwrap_or(usize::MAX);
    let from_outside = usize::from(!group(state).contains(&own));
    needs_votes_of(state, me).intersection(votes).count() >= needed.saturating_add(from_outside)
}

/// The leader and the voters of the record.
fn group(state: &SyncState) -> NameSet {
    let mut group = listed(state);
    group.extend(
        state
            .leader
            .as_deref()
            .filter(|leader| !leader.is_empty())
            .map(StandbyName::from),
    );
    group
}

//! Priority mode: a commit waits for all standbys that `/sync` lists, and only those may lead.
//!
//! Every listed name is waited for, at every moment. So a name leaves the record before the setting, and enters the
//! setting before the record; and it enters the record only when it also has what was acknowledged before.

use super::candidates::eligible;
use super::{NameSet, Next, SyncInputs, SyncNames, SyncRank, SyncReason, SyncStep, listed};

pub(super) fn next_step(inputs: &SyncInputs) -> Option<Next> {
    let none = NameSet::new();
    if !inputs.state.is_active() {
        return Some(inputs.write(0, &none, SyncReason::Enabled));
    }
    if !inputs.is_own_record() {
        return Some(inputs.write(0, &none, SyncReason::TookOver));
    }
    if inputs.state.quorum != 0 {
        // Votes made up for what a single voter may lack. Without them none of the voters may lead alone.
        return Some(inputs.write(0, &none, SyncReason::Repaired));
    }
    let listed = listed(&inputs.state);
    let kept: NameSet = &listed & &inputs.configured.required();
    if kept != listed {
        return Some(inputs.write(0, &kept, SyncReason::Repaired));
    }
    let count = usize::try_from(inputs.settings.node_count).unwrap_or(usize::MAX);
    let mut picked = eligible(inputs, SyncRank::Sync);
    picked.truncate(count);
    if picked.is_empty() {
        return nobody_streams(inputs, &listed);
    }
    let names: NameSet = picked.iter().map(|candidate| candidate.name.clone()).collect();
    let departed: NameSet = &listed - &names;
    if !departed.is_empty() {
        return Some(inputs.write(0, &(&listed & &names), inputs.departure(departed)));
    }
    let wanted = SyncNames::all_of(&names);
    if !inputs.configured.same_as(&wanted) {
        return Some(inputs.set(wanted));
    }
    let confirmed = picked.into_iter().filter(|candidate| candidate.confirmed);
    let added: NameSet = &confirmed.map(|candidate| candidate.name).collect::<NameSet>() - &listed;
    (!added.is_empty()).then(|| inputs.write(0, &(&listed | &added), SyncReason::StandbyAdded(added)))
}

/// Commits go on waiting for a while: after a promotion the standbys are on their way, and a listed standby that comes back
/// has all that was acknowledged.
fn nobody_streams(inputs: &SyncInputs, listed: &NameSet) -> Option<Next> {
    let (wanted, reason) = inputs.nobody();
    if inputs.configured.same_as(&wanted) {
        return None;
    }
    if inputs.configured != SyncNames::Off && !inputs.waited {
        return None;
    }
    if !listed.is_empty() {
        return Some(inputs.write(0, &NameSet::new(), inputs.departure(listed.clone())));
    }
    let step = SyncStep::SetNames(wanted);
    Some(Next { step, reason })
}

//! What the winner of an election does before it promotes.

use pgherd_cluster::record::SyncState;

use super::candidates::may_be_synchronous;
use super::{NameSet, Standby, StandbyName, SyncInputs, SyncMode, SyncNames, listed, record};

/// To be done in this order, both before the promotion. When the write fails, the promotion waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BeforePromotion {
    /// The new `/sync`, compared with the revision that the bid rested on; nothing when it stays as it is.
    pub write_sync: Option<SyncState>,
    /// What `synchronous_standby_names` is to be when the server comes up as primary.
    pub names: SyncNames,
}

/// What has to be in place before our standby becomes a primary. Of the inputs it reads the name, the settings, the
/// record, the user's own names and the members: there are no walsenders yet.
#[must_use]
pub fn before_promotion(inputs: &SyncInputs) -> BeforePromotion {
    let (state, names) = match inputs.settings.mode {
        SyncMode::Off => (None, inputs.user_names.clone()),
        SyncMode::Priority => (Some(record(&inputs.me, 0, &NameSet::new())), running_members(inputs)),
        SyncMode::Quorum => {
            let (state, names) = by_the_record(inputs);
            (Some(state), names)
        }
    };
    BeforePromotion {
        write_sync: state.filter(|state| !same_record(state, &inputs.state)),
        names,
    }
}

fn same_record(new: &SyncState, old: &SyncState) -> bool {
    old.is_active() && new.leader == old.leader && new.quorum == old.quorum && listed(new) == listed(old)
}

/// Priority mode. Nobody else may lead until a standby is confirmed, so any standbys do; but a commit waits for as many
/// as are wanted from the very first on.
fn running_members(inputs: &SyncInputs) -> SyncNames {
    let mut members: Vec<&Standby> = inputs
        .members
        .iter()
        .filter(|member| may_be_synchronous(inputs, member))
        .collect();
    members.sort_by_key(|member| {
        (
            member.nofailover,
            std::cmp::Reverse(member.sync_priority),
            member.name.clone(),
        )
    });
    let names: Vec<StandbyName> = members.into_iter().map(|member| member.name.clone()).collect();
    let count = u32::try_from(names.len()).unwrap_or(u32::MAX);
    at_least_one_if_strict(inputs, SyncNames::first(count.min(inputs.settings.node_count), names))
}

/// Quorum mode. The voters stay, and so many of them have every new commit that no candidate with enough votes misses one.
/// The record names us from now on: a former leader may lead again without a vote only while nobody else has led.
fn by_the_record(inputs: &SyncInputs) -> (SyncState, SyncNames) {
    let me = inputs.own_name();
    let former = inputs.state.leader.as_deref().filter(|leader| !leader.is_empty());
    let Some(former) = former else {
        let nobody = at_least_one_if_strict(inputs, SyncNames::Off);
        return (record(&inputs.me, 0, &NameSet::new()), nobody);
    };
    let mut others = listed(&inputs.state);
    others.insert(StandbyName::from(former));
    others.remove(&me);
    let quorum = usize::try_from(inputs.state.quorum).unwrap_or(usize::MAX);
    // The group is we and the others, whether we were one of it or not: a winner has what `quorum + 1` of it have, so a
    // commit has to be on all of it but `quorum`.
    let count = others
        .len()
        .saturating_sub(quorum)
        .max(usize::from(inputs.settings.strict));
    let names = SyncNames::any_of(u32::try_from(count).unwrap_or(u32::MAX), &others);
    (
        record(&inputs.me, quorum, &others),
        at_least_one_if_strict(inputs, names),
    )
}

fn at_least_one_if_strict(inputs: &SyncInputs, names: SyncNames) -> SyncNames {
    if names == SyncNames::Off && inputs.settings.strict {
        SyncNames::anybody(inputs.settings.mode == SyncMode::Quorum)
    } else {
        names
    }
}

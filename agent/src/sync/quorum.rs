//! Quorum mode: a commit waits for any `n` of the names `S` in the setting; a candidate needs `q` votes out of the voters
//! `V` in `/sync` and the leader `M`.
//!
//! A winner has all that `q + 1` of `V + M` have; a commit is on `n + 1` of `S + M`. The two groups share a member, and so no
//! acknowledged commit is lost, as long as `#(V + S + M) <= q + n + 1`. Without voters only `M` itself may lead, and
//! nothing can be lost. The setting is changed only to what satisfies this together with the record of the moment.
//!
//! What was acknowledged under an *earlier* setting obeys the earlier numbers. So the record is changed in one of two ways
//! only: to one by which nobody wins who could not win before, or, once enough standbys of the setting in force are
//! confirmed to have all that is older than it, to the numbers that this many give.

use super::candidates::{Candidate, eligible};
use super::{NameSet, Next, StandbyName, SyncInputs, SyncNames, SyncRank, SyncReason, SyncStep, listed};

/// The numbers in force.
#[derive(Clone, Debug)]
struct Numbers {
    /// Votes that a candidate needs.
    q: usize,
    /// The voters, without the leader.
    voters: NameSet,
    /// Standbys that a commit is on.
    n: usize,
    /// Those out of which they are.
    names: NameSet,
}

impl Numbers {
    fn of(inputs: &SyncInputs) -> Self {
        let (n, mut names) = inputs.configured.guarantee();
        let mut voters = listed(&inputs.state);
        names.remove(&inputs.own_name());
        voters.remove(&inputs.own_name());
        Self {
            q: usize::try_from(inputs.state.quorum).unwrap_or(usize::MAX),
            n: n.min(names.len()),
            voters,
            names,
        }
    }

    fn allows(&self, n: usize, names: &NameSet) -> bool {
        agree(self.q, &self.voters, n, names)
    }
}

/// Whether record and setting agree: every winner has every commit. One set within the other is not needed for that; it is
/// what Patroni's members take for a sound state.
pub(super) fn agree(q: usize, voters: &NameSet, n: usize, names: &NameSet) -> bool {
    let nested = voters.is_subset(names) || names.is_subset(voters);
    voters.is_empty() || (nested && (voters | names).len() <= q.saturating_add(n))
}

pub(super) fn next_step(inputs: &SyncInputs) -> Option<Next> {
    if !inputs.state.is_active() {
        return Some(inputs.write(0, &NameSet::new(), SyncReason::Enabled));
    }
    let mut now = Numbers::of(inputs);
    if !inputs.is_own_record() {
        let former = inputs.state.leader.as_deref().map(StandbyName::from);
        now.voters.extend(former);
        return Some(if now.allows(now.n, &now.names) {
            inputs.write(now.q, &now.voters, SyncReason::TookOver)
        } else {
            inputs.write(0, &NameSet::new(), SyncReason::TookOver)
        });
    }
    if !now.allows(now.n, &now.names) {
        return Some(inputs.write(0, &NameSet::new(), SyncReason::Repaired));
    }
    let candidates = wanted(inputs);
    if candidates.is_empty() {
        return nobody_streams(inputs, &now);
    }
    let active: NameSet = candidates.iter().map(|candidate| candidate.name.clone()).collect();
    let confirmed = candidates
        .iter()
        .filter(|candidate| candidate.confirmed && now.names.contains(&candidate.name))
        .count();
    // Those that are gone hold commits up. They go first, others come afterwards.
    let left: NameSet = &now.names & &active;
    let names = if left.is_empty() || left == now.names {
        active.clone()
    } else {
        left
    };
    let count = usize::try_from(inputs.settings.node_count).unwrap_or(usize::MAX);
    let n = names.len().min(count);
    let setting = SyncNames::any_of(u32::try_from(n).unwrap_or(u32::MAX), &names);
    if inputs.configured.same_as(&setting) {
        return record_follows(inputs, &now, &active, confirmed);
    }
    if grows_past_the_departed(&now, &names) && confirmed >= now.n {
        return record_follows(inputs, &now, &active, confirmed);
    }
    if now.allows(n, &names) {
        return Some(inputs.set(setting));
    }
    Some(make_way(inputs, &now, n, &names))
}

/// Whether voters that are gone for good are still in the record while the setting is about to get new names.
fn grows_past_the_departed(now: &Numbers, names: &NameSet) -> bool {
    !now.names.is_empty() && now.names.is_subset(names) && !now.voters.is_subset(names)
}

/// The standbys to wait for. One that may not lead is of no use as a voter, unless there are too few others.
fn wanted(inputs: &SyncInputs) -> Vec<Candidate> {
    let count = usize::try_from(inputs.settings.node_count).unwrap_or(usize::MAX);
    let mut chosen = Vec::new();
    for candidate in eligible(inputs, SyncRank::Quorum) {
        if !candidate.nofailover || chosen.len() < count {
            chosen.push(candidate);
        }
    }
    chosen
}

/// Changes the record so that the setting may become any `n` of `names`: whoever wins by the new record would have won by
/// the old one. A candidate then has the votes of `q + 1` of the new voters, hence of `q + 1` less the new names among the old.
fn make_way(inputs: &SyncInputs, now: &Numbers, n: usize, names: &NameSet) -> Next {
    let joining = names.difference(&now.voters).count();
    let q = now.q.saturating_add(joining).max(names.len().saturating_sub(n));
    let leaving: NameSet = &now.voters - names;
    let reason = if leaving.is_empty() {
        SyncReason::Adjusted
    } else {
        inputs.departure(leaving)
    };
    let nested = names.is_subset(&now.names) || now.names.is_subset(names);
    if q >= names.len() || !nested {
        // A candidate would need the leader's own vote: the same as no voters, and said more plainly.
        return inputs.write(0, &NameSet::new(), reason);
    }
    inputs.write(q, names, reason)
}

/// The setting is as it is to be: the record takes its names over, as soon as that does not cost more than it brings.
fn record_follows(inputs: &SyncInputs, now: &Numbers, active: &NameSet, confirmed: usize) -> Option<Next> {
    let proven = confirmed.min(now.n);
    let q = now.names.len() - proven;
    if now.voters == now.names {
        return (proven > 0 && q < now.q).then(|| inputs.write(q, &now.names, SyncReason::Adjusted));
    }
    // How many of the voters that are here may fail with the leader, and one can still win; one more, to stay above zero.
    let spare_now = now.voters.intersection(active).count().saturating_sub(now.q);
    if proven == 0 || (proven < now.n && proven <= spare_now) {
        return None;
    }
    let (joining, leaving): (NameSet, NameSet) = (&now.names - &now.voters, &now.voters - &now.names);
    let reason = if joining.is_empty() {
        inputs.departure(leaving)
    } else {
        SyncReason::StandbyAdded(joining)
    };
    Some(inputs.write(q, &now.names, reason))
}

fn nobody_streams(inputs: &SyncInputs, now: &Numbers) -> Option<Next> {
    let (wanted, reason) = inputs.nobody();
    let as_wanted = inputs.configured.same_as(&wanted);
    if !as_wanted && inputs.configured != SyncNames::Off && !inputs.waited {
        return None;
    }
    if as_wanted && now.voters.is_empty() && now.q == 0 {
        return None;
    }
    if !now.voters.is_empty() || now.q != 0 {
        return Some(inputs.write(0, &NameSet::new(), inputs.departure(now.voters.clone())));
    }
    let step = SyncStep::SetNames(wanted);
    Some(Next { step, reason })
}

//! A new copy of the leader's data that an operator asked for: in a maintenance too, and whatever is here now.

use super::{Decision, Reason, Step};
use crate::memory::Memory;
use crate::observation::{LeaseSeen, Observation};
use crate::postgres::DataDir;

pub(super) fn decide(seen: &Observation, memory: &Memory) -> Option<Decision> {
    memory.reinitialize_asked_at?;
    // Only while another leads: what a leader or a candidate has may be the last of its kind.
    let LeaseSeen::Theirs(_) = &seen.lease else { return None };
    // Files that are nobody's data are not ours to move.
    if matches!(seen.data, DataDir::Foreign(_)) {
        return None;
    }
    let from = seen.view.ready_leader()?.name.clone();
    Some(Decision::act(
        Reason::Reinitializing(from.clone()),
        Step::Clone { from },
    ))
}

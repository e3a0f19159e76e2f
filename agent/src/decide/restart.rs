//! A restart that an operator asked for: checkpoint while still serving, stop in order, start in the same role. In a
//! maintenance too, where nothing else starts what is down.

use pgherd_cluster::clock::Boottime;

use super::standby::source_of;
use super::{Decision, Reason, Step, synchronous};
use crate::memory::{Memory, RestartStage};
use crate::observation::{LeaseSeen, Observation, Postgres};

pub(super) fn decide(seen: &Observation, memory: &Memory, now: Boottime, standby_data: bool) -> Option<Decision> {
    let stage = memory.restart.as_ref()?.stage;
    let act = |step| Some(Decision::act(Reason::Restarting, step));
    match &seen.lease {
        // One that is to follow another cluster does not come up as primary.
        LeaseSeen::Mine(_) if !standby_data && seen.standby_cluster.is_none() => {}
        LeaseSeen::Mine(_) if standby_data && seen.standby_cluster.is_some() => {}
        LeaseSeen::Theirs(_) if standby_data => {}
        // Nobody's order is worth more than a lease that is lost or free, or a promotion that is due.
        _ => return None,
    }
    // Commits may wait for a step of synchronous replication: it interrupts a checkpoint, and comes before the next.
    if stage == RestartStage::Checkpoint
        && !standby_data
        && let Some(sync) = synchronous::leader(seen, memory, now)
    {
        return Some(sync);
    }
    match (stage, &seen.postgres) {
        (RestartStage::Checkpoint, Postgres::Running(_)) => act(Step::Checkpoint { to: seen.me.clone() }),
        (RestartStage::Checkpoint | RestartStage::Stop, Postgres::Running(_) | Postgres::Silent { .. }) => {
            act(Step::Stop)
        }
        (_, Postgres::Down) if standby_data => act(match &seen.lease {
            LeaseSeen::Theirs(leader) => Step::StartStandby {
                upstream: source_of(seen, leader),
            },
            _ => Step::StartStandbyLeader,
        }),
        // Whatever `primary_start_timeout` says: it was stopped in order, and is whole.
        (_, Postgres::Down) => act(Step::StartPrimary),
        (RestartStage::Start, _) | (_, Postgres::Ending) => None,
    }
}

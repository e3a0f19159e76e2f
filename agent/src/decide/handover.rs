//! Giving the lease up in order: choose, checkpoint while still serving, stop, see that a candidate has everything, and
//! only then delete the key. Each turn of the loop takes one step; whatever fails on the way, the leader leads on, by a
//! start in place when PostgreSQL was stopped already.

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::{Lsn, MemberName, Timeline};
use pgherd_cluster::view::Epoch;

use super::{Decision, Reason, SOON, Step, abandon, synchronous};
use crate::memory::{Handover, Memory, Stage, Why};
use crate::observation::{LeaseSeen, Observation, Peer, Poll, Postgres};
use crate::postgres::{ControlState, DataDir};

/// The process was told to stop.
pub(super) fn stopping(seen: &Observation, memory: &Memory, now: Boottime) -> Decision {
    let why = || Reason::Stopping;
    let leave = |keep_postgres| Decision::act(why(), Step::Leave { code: 0, keep_postgres });
    // Maintenance of the service itself: PostgreSQL and its key are left as they are.
    if seen.fence_paused && seen.is_paused() && seen.postgres != Postgres::Down {
        return leave(true);
    }
    match (&seen.postgres, &seen.lease) {
        (Postgres::Ending, _) => Decision::wait(Reason::PostgresEnding),
        (Postgres::Running(_) | Postgres::Silent { .. }, LeaseSeen::Mine(epoch) | LeaseSeen::MineUnproven(epoch)) => {
            if let Some(decision) = nobody_may_follow_yet(seen, memory, epoch, now) {
                return decision;
            }
            let epoch = epoch.clone();
            Decision::act(
                why(),
                Step::BeginHandover {
                    epoch,
                    why: Why::Stopping,
                },
            )
        }
        // Commits wait for it: its record asks the leader to choose another first.
        (Postgres::Running(_), LeaseSeen::Theirs(_)) if awaited(seen, memory, now) => {
            Decision::wait_for(Reason::LeavingSync, SOON)
        }
        (Postgres::Running(_) | Postgres::Silent { .. }, _) => Decision::act(why(), Step::Stop),
        (Postgres::Down, LeaseSeen::Mine(epoch) | LeaseSeen::MineUnproven(epoch)) => {
            Decision::act(why(), Step::Release { epoch: epoch.clone() })
        }
        (Postgres::Down, LeaseSeen::Stale { epoch, lease }) => abandon(epoch, *lease),
        (Postgres::Down, LeaseSeen::Theirs(_) | LeaseSeen::Free | LeaseSeen::Unknown) => leave(false),
    }
}

/// Whether the leader still lists this standby, for as long as the last wish of a member is worth.
fn awaited(seen: &Observation, memory: &Memory, now: Boottime) -> bool {
    has_just_been_told(seen, memory, now) && seen.view.sync.value.lists(&seen.me)
}

/// Two periods: a standby or its leader has had its turn in either.
fn has_just_been_told(seen: &Observation, memory: &Memory, now: Boottime) -> bool {
    let patience = 2 * seen.view.timing().loop_wait();
    memory.stopping_since.is_none_or(|since| now.since(since) < patience)
}

/// A leader that stops while the record lets nobody else lead, as in the moment after its promotion, would leave the cluster
/// without one until it is back. It serves, and looks after its standbys, until one of them may follow it.
fn nobody_may_follow_yet(seen: &Observation, memory: &Memory, epoch: &Epoch, now: Boottime) -> Option<Decision> {
    let serves = matches!(seen.postgres, Postgres::Running(_)) && memory.proven.as_ref() == Some(epoch);
    if !serves || !synchronous::is_on(seen) || !has_just_been_told(seen, memory, now) {
        return None;
    }
    if synchronous::somebody_may_follow(seen, memory, now) {
        return None;
    }
    let wait = || Decision::wait_for(Reason::NobodyMayFollowYet, SOON);
    synchronous::leader(seen, memory, now).or_else(|| synchronous::may_protect_any(seen, memory, now).then(wait))
}

pub(super) fn decide(seen: &Observation, memory: &Memory, handover: &Handover, _now: Boottime) -> Decision {
    let candidate = match &handover.why {
        Why::Requested { candidate } => candidate.clone(),
        Why::Stopping => None,
    };
    let reason = || match &handover.why {
        Why::Requested { candidate } => Reason::SwitchingOver(candidate.clone()),
        Why::Stopping => Reason::Stopping,
    };
    match &handover.stage {
        Stage::Choose => match memory.poll.as_ref().filter(|poll| poll.asked_at >= handover.began_at) {
            None => Decision::act(reason(), Step::Poll),
            Some(poll) => match choose(seen, poll, candidate.as_ref()) {
                // A standby leader has nothing that others lack for long: it serves on, and follows.
                Ok(to) if seen.standby_cluster.is_some() && !super::is_writable(seen) => {
                    let step = Step::HandTo {
                        epoch: handover.epoch.clone(),
                        successor: Some(to),
                        last: None,
                    };
                    Decision::act(reason(), step)
                }
                Ok(to) => Decision::act(reason(), Step::Checkpoint { to }),
                Err(why) => Decision::act(reason(), Step::FailHandover(why)),
            },
        },
        // The job was lost, with what it knew: nothing has been stopped yet.
        Stage::Checkpoint { .. } => {
            let why = "the checkpoint before the stop was given up".to_owned();
            Decision::act(reason(), Step::FailHandover(why))
        }
        Stage::Stop { .. } => Decision::act(reason(), Step::Stop),
        Stage::Confirm { to } => confirm(seen, handover, to.as_ref(), reason()),
        Stage::Release { successor } => match &seen.postgres {
            Postgres::Down => {
                let step = Step::HandTo {
                    epoch: handover.epoch.clone(),
                    successor: successor.clone(),
                    last: shutdown_end(seen).map(|(checkpoint, _)| checkpoint),
                };
                Decision::act(reason(), step)
            }
            _ => Decision::act(reason(), Step::Stop),
        },
        // It was stopped for nothing: what serves again comes before the clearing of a request, for which etcd is needed.
        Stage::Failed(why) if may_start(seen, memory) => {
            Decision::act(Reason::HandoverFailed(why.clone()), Step::StartPrimary)
        }
        Stage::Failed(why) => Decision::act(Reason::HandoverFailed(why.clone()), Step::ClearRequest),
    }
}

fn confirm(seen: &Observation, handover: &Handover, to: Option<&MemberName>, reason: Reason) -> Decision {
    if seen.postgres != Postgres::Down {
        return Decision::act(reason, Step::Stop);
    }
    let requested = matches!(handover.why, Why::Requested { .. });
    let others = || {
        seen.view
            .members
            .values()
            .filter(|member| member.name != seen.me && !member.record.nofailover())
            // Who is not in the synchronous set may have everything and still must not lead.
            .filter(|member| synchronous::counts(seen, &member.name))
            .map(|member| member.name.clone())
    };
    let members: Vec<MemberName> = to.map_or_else(|| others().collect(), |to| vec![to.clone()]);
    match shutdown_end(seen) {
        Some((checkpoint, timeline)) => Decision::act(
            reason,
            Step::Confirm {
                members,
                checkpoint,
                timeline,
            },
        ),
        None if requested => {
            let why = "PostgreSQL could not be stopped in order".to_owned();
            Decision::act(reason, Step::FailHandover(why))
        }
        // Told to stop: the key is given up all the same, and an election finds who has most.
        None => Decision::act(
            reason,
            Step::HandTo {
                epoch: handover.epoch.clone(),
                successor: None,
                last: None,
            },
        ),
    }
}

fn may_start(seen: &Observation, memory: &Memory) -> bool {
    let primary_data = matches!(&seen.data, DataDir::Cluster { standby: false, .. }) && seen.standby_cluster.is_none();
    seen.postgres == Postgres::Down
        && primary_data
        && memory.start_failures == 0
        && matches!(seen.lease, LeaseSeen::Mine(_))
        && !seen.stopping
}

/// Where a primary that was stopped in order ended: where its last record begins, and on which timeline.
fn shutdown_end(seen: &Observation) -> Option<(Lsn, Timeline)> {
    match &seen.data {
        DataDir::Cluster { control, .. } if control.state == ControlState::ShutDown => {
            Some((control.checkpoint, control.timeline))
        }
        DataDir::Cluster { .. } | DataDir::Empty | DataDir::Foreign(_) => None,
    }
}

/// Who takes over: the named candidate if it is able, else the one that is furthest.
fn choose(seen: &Observation, poll: &Poll, candidate: Option<&MemberName>) -> Result<MemberName, String> {
    let config = seen.view.config.value.clone().unwrap_or_default();
    let lag_max = config.maximum_lag_on_failover();
    let own = poll.own_position;
    let request = seen.view.failover.value.as_ref();
    // A switchover keeps what synchronous replication promises; a manual failover is an order.
    let sync = &seen.view.sync.value;
    let only_listed = sync.is_active() && request.is_some_and(|request| request.leader.is_some());
    let able = |peer: &Peer| {
        let same_timeline = peer.timeline == poll.own_timeline;
        let position = peer
            .position
            .filter(|_| !peer.primary && !peer.nofailover && same_timeline);
        // Without a key of its own it has no lease to bind the leader key to.
        seen.view.members.contains_key(&peer.name)
            && position.is_some_and(|position| position.behind(own) <= lag_max)
            && (!only_listed || sync.lists(&peer.name))
    };
    let best = poll
        .peers
        .iter()
        .filter(|peer| able(peer) && candidate.is_none_or(|candidate| *candidate == peer.name))
        .max_by_key(|peer| (peer.position, peer.failover_priority));
    let asked = poll.peers.len() + poll.silent;
    best.map(|peer| peer.name.clone()).ok_or_else(|| match candidate {
        Some(name) if only_listed && !sync.lists(name) => {
            format!("no candidate can take over: {name} is not in the synchronous set")
        }
        Some(name) => format!(
            "no candidate can take over: {name} does not answer, is not a standby on our timeline, or lags more than \
             {lag_max} bytes"
        ),
        None => format!(
            "no candidate can take over: none of {asked} other members answers as a standby within {lag_max} bytes"
        ),
    })
}

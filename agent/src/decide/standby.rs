//! A standby runs.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::view::Epoch;

use super::{
    Decision, Reason, SOON, Step, abandon, backing_off, data, election, standby_leader, synchronous, upstream_address,
};
use crate::memory::Memory;
use crate::observation::{LeaseSeen, Observation, Postgres, Rejoin};
use crate::postgres::Upstream;
use crate::topology::source;

/// How long a standby may take to stream after it was found to fit, before that is asked again.
const REJOIN_AGAIN: Duration = Duration::from_secs(5);

pub(super) fn decide(seen: &Observation, memory: &Memory, now: Boottime) -> Decision {
    if let (LeaseSeen::Mine(epoch), Some(section)) = (&seen.lease, &seen.standby_cluster) {
        return standby_leader::decide(seen, memory, section, epoch, now);
    }
    match &seen.lease {
        // A restored cluster that recovers is promoted by its own recovery, when that is over.
        LeaseSeen::Mine(_) if seen.bootstrap_unfinished => Decision::act(Reason::Bootstrapping, Step::StartPrimary),
        LeaseSeen::Mine(epoch) => {
            synchronous::before_promoting(seen, memory, now).unwrap_or_else(|| promote(seen, memory, epoch, now))
        }
        LeaseSeen::MineUnproven(_) => Decision::wait(Reason::ProvingLease),
        // A deadline is out for a holding that is none: with PostgreSQL ended, the keeper takes another.
        LeaseSeen::Stale { .. } if seen.armed => Decision::act(Reason::KeyFromBefore, Step::End),
        LeaseSeen::Stale { epoch, lease } => abandon(epoch, *lease),
        LeaseSeen::Theirs(epoch) => following(seen, memory, epoch, now),
        LeaseSeen::Free => election::decide(seen, memory, now),
        LeaseSeen::Unknown => Decision::wait(Reason::StoreUnreachable),
    }
}

/// The operator's program is asked once per holding. When it refuses, the holding is over: with PostgreSQL ended the keeper
/// takes its deadline back, and the key can be given up.
fn promote(seen: &Observation, memory: &Memory, epoch: &Epoch, now: Boottime) -> Decision {
    if election::was_refused(seen, memory, now) {
        // In maintenance no deadline is out, and what is ended stays so.
        let key = seen.view.leader.as_ref().filter(|_| seen.is_paused() && !seen.armed);
        let step = match key {
            Some(key) => Step::Abandon {
                epoch: epoch.clone(),
                lease: key.lease,
            },
            None => Step::End,
        };
        return Decision::act(Reason::PrePromoteRefuses, step);
    }
    if seen.pre_promote && memory.pre_promoted.as_ref() != Some(epoch) {
        return Decision::act(Reason::Promoting, Step::PrePromote(epoch.clone()));
    }
    Decision::act(Reason::Promoting, Step::Promote(epoch.clone()))
}

/// How often a standby may be found to follow the leader, and neither stream nor move.
const STANDS_STILL_MAX: u32 = 6;

fn following(seen: &Observation, memory: &Memory, leader: &Epoch, now: Boottime) -> Decision {
    let Some(name) = source_of(seen, leader) else {
        return from_the_archive(seen, memory, leader, now);
    };
    let Some(address) = upstream_address(&seen.view, &name) else {
        return Decision::wait_for(Reason::WaitingForLeader(name), SOON);
    };
    if seen.upstream.as_ref() != Some(&Upstream::Member(address)) {
        return Decision::act(Reason::Following(name.clone()), Step::Follow { upstream: Some(name) });
    }
    let Postgres::Running(server) = &seen.postgres else {
        return Decision::wait(Reason::Following(name));
    };
    if server.replication_state.as_deref() == Some("streaming") {
        return Decision::wait(Reason::Following(name));
    }
    // Two timelines may have one number and one beginning, and a segment that it lacks may be gone: what its history says
    // is then not all. Whoever moves, by replay or from an archive, is not meant.
    let from = leader.holder.clone();
    if stands_still(seen, memory, leader, &name) && !backing_off(memory, now) {
        return Decision::act(Reason::CannotFollow(name), Step::Clone { from });
    }
    // It does not stream. While the leader is up, one question tells whether it ever can.
    match (&memory.rejoin, seen.view.ready_leader()) {
        (Some((asked, Rejoin::Diverged)), Some(_)) if asked == leader => diverged(seen, memory, leader, now),
        (Some((asked, verdict)), _) if verdict.fits() && asked == leader && !verdict_is_old(memory, now) => {
            Decision::wait_for(Reason::NotStreaming(name), SOON)
        }
        (_, Some(_)) if !backing_off(memory, now) => {
            Decision::act(Reason::NotStreaming(name), Step::CheckRejoin { leader: leader.clone() })
        }
        _ => Decision::wait_for(Reason::NotStreaming(name), SOON),
    }
}

/// Whom this member streams from while `leader` leads; nobody where its tags say so.
pub(super) fn source_of(seen: &Observation, leader: &Epoch) -> Option<MemberName> {
    source(&seen.view, &seen.me, &seen.place, &leader.holder)
}

/// It stands still whenever nothing is archived, and that says nothing. Whether its data fits is asked once per leader.
fn from_the_archive(seen: &Observation, memory: &Memory, leader: &Epoch, now: Boottime) -> Decision {
    if seen.upstream.is_some() {
        return Decision::act(Reason::FollowingArchive, Step::Follow { upstream: None });
    }
    match (&memory.rejoin, seen.view.ready_leader()) {
        (Some((asked, Rejoin::Diverged)), Some(_)) if asked == leader => diverged(seen, memory, leader, now),
        (Some((asked, verdict)), _) if verdict.fits() && asked == leader => Decision::wait(Reason::FollowingArchive),
        (_, Some(_)) if !backing_off(memory, now) => {
            Decision::act(Reason::FollowingArchive, Step::CheckRejoin { leader: leader.clone() })
        }
        _ => Decision::wait_for(Reason::FollowingArchive, SOON),
    }
}

/// A source that is no further itself has nothing to send, and a clone would not change that.
fn stands_still(seen: &Observation, memory: &Memory, leader: &Epoch, from: &MemberName) -> bool {
    if memory.cloned_under.as_ref() == Some(leader) {
        return false;
    }
    let sources = seen.view.members.get(from);
    let sources = sources.and_then(|member| member.record.xlog_location);
    let behind = |(at, count)| count >= STANDS_STILL_MAX && sources.is_some_and(|sources| sources > at);
    memory.stands_still.is_some_and(behind) && seen.view.ready_leader().is_some() && !seen.is_paused()
}

/// A standby that should stream by now and does not may have replayed past the fork since it was asked.
fn verdict_is_old(memory: &Memory, now: Boottime) -> bool {
    memory
        .rejoin_asked_at
        .is_none_or(|asked_at| now.since(asked_at) > REJOIN_AGAIN)
}

/// Our data holds what the leader's does not. It is rewound once under each holding of a leader, and copied anew where that
/// is not wanted, or did not help.
pub(super) fn diverged(seen: &Observation, memory: &Memory, leader: &Epoch, now: Boottime) -> Decision {
    if backing_off(memory, now) {
        return Decision::wait_for(Reason::BackingOff, SOON);
    }
    let from = leader.holder.clone();
    // pg_rewind takes the word of a primary only.
    let rewinds = seen.rewinds && seen.standby_cluster.is_none();
    if !rewinds || memory.rewound_under.as_ref() == Some(leader) {
        let source = data::source(seen, memory, &from);
        return Decision::act(Reason::Diverged(from), Step::Clone { from: source });
    }
    // Before that, its control file says that it is still on the timeline that we share.
    let record = seen.view.members.get(&from).map(|member| &member.record);
    if record.is_some_and(|record| record.checkpoint_after_promote == Some(false)) {
        return Decision::wait_for(Reason::WaitingForCheckpoint(from), SOON);
    }
    Decision::act(Reason::Rewinding(from), Step::Rewind { leader: leader.clone() })
}

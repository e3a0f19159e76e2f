//! What the data directory says before anything else: nothing is there, or whose it is.

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::PgState;
use pgherd_cluster::view::{Initialize, Member};

use super::{Decision, Reason, SOON, Step, abandon, backing_off, leave};
use crate::memory::Memory;
use crate::observation::{LeaseSeen, Observation, Postgres};
use crate::postgres::Control;

/// There is no data.
pub(super) fn none(seen: &Observation, memory: &Memory, now: Boottime) -> Decision {
    if backing_off(memory, now) {
        return Decision::wait_for(Reason::BackingOff, SOON);
    }
    match (&seen.lease, seen.view.initialize) {
        (LeaseSeen::Unknown, _) => Decision::wait(Reason::StoreUnreachable),
        // A key from before our data went away: nobody can lead by it.
        (LeaseSeen::Stale { epoch, lease }, _) => abandon(epoch, *lease),
        (LeaseSeen::Mine(epoch) | LeaseSeen::MineUnproven(epoch), _) => {
            Decision::act(Reason::LeadsWithoutData, Step::Release { epoch: epoch.clone() })
        }
        (LeaseSeen::Theirs(epoch), _) => match seen.view.ready_leader() {
            Some(leader) => {
                let from = source(seen, memory, &leader.name);
                Decision::act(Reason::Cloning(from.clone()), Step::Clone { from })
            }
            None => Decision::wait_for(Reason::WaitingForLeader(epoch.holder.clone()), SOON),
        },
        (LeaseSeen::Free, None) if seen.nofailover || seen.is_paused() => Decision::wait(Reason::WaitingForBootstrap),
        (LeaseSeen::Free, None) => Decision::act(Reason::Bootstrapping, Step::ClaimBootstrap),
        // What an agent before this one had begun is not here, nor is a copy that failed. While its key stands, on the lease
        // that is this agent's now, nobody would ever make the cluster.
        (LeaseSeen::Free, Some(Initialize::Pending | Initialize::Done(_))) if !memory.withdrawn => {
            Decision::act(Reason::WaitingForBootstrap, Step::Withdraw)
        }
        (LeaseSeen::Free, Some(Initialize::Done(_))) if seen.made_without_leader && !seen.is_paused() => {
            Decision::act(Reason::Restoring, Step::Restore)
        }
        (LeaseSeen::Free, Some(Initialize::Pending | Initialize::Done(_))) => {
            Decision::wait(Reason::WaitingForBootstrap)
        }
    }
}

/// Whom to copy from: a replica that offers itself by its `clonefrom` tag and streams on the leader's timeline, since that
/// costs the leader nothing; the leader itself where there is none, and when those that offer themselves have failed.
/// Members that begin with another one's name begin with another source.
pub(super) fn source(seen: &Observation, memory: &Memory, leader: &MemberName) -> MemberName {
    let timeline = seen.view.members.get(leader).and_then(|member| member.record.timeline);
    let offers = |member: &&Member| {
        let record = &member.record;
        let streams = record.state == PgState::Running && record.replication_state.as_deref() == Some("streaming");
        let other = member.name != seen.me && member.name != *leader;
        other
            && record.tag("clonefrom")
            && streams
            && record.timeline == timeline
            && record.postgres_address().is_some()
    };
    let offered: Vec<&Member> = seen.view.members.values().filter(offers).collect();
    let tried = usize::try_from(memory.clone_failures).unwrap_or(usize::MAX) % (offered.len() + 1);
    if tried == offered.len() {
        return leader.clone();
    }
    let first: usize = seen.me.as_str().bytes().map(usize::from).sum();
    let chosen = offered.get((first + tried) % offered.len());
    chosen.map_or_else(|| leader.clone(), |member| member.name.clone())
}

/// A cluster could not be made: nothing of it is to run, and then nothing of it is to be left in the way of another try.
pub(super) fn undo_bootstrap(seen: &Observation, why: &str) -> Decision {
    let reason = Reason::BootstrapFailed(why.to_owned());
    match seen.postgres {
        Postgres::Down => Decision::act(reason, Step::UndoBootstrap),
        Postgres::Ending => Decision::wait(reason),
        Postgres::Silent { .. } | Postgres::Running(_) => Decision::act(reason, Step::End),
    }
}

/// Whether the data that is here belongs to this cluster, and whether the cluster's first keys are written. Nothing when
/// both is so, or cannot be known.
pub(super) fn identity(seen: &Observation, control: &Control, standby: bool) -> Option<Decision> {
    if seen.lease == LeaseSeen::Unknown {
        return None;
    }
    match seen.view.initialize {
        // In maintenance an operator may be about to change that.
        Some(Initialize::Done(system_id)) if system_id != control.system_id && seen.is_paused() => {
            Some(Decision::wait(Reason::Paused))
        }
        // Its keys ended with its lease, and another member made the cluster: nobody was ever shown what is here.
        Some(Initialize::Done(system_id)) if system_id != control.system_id && seen.bootstrap_unfinished => {
            Some(match seen.postgres {
                Postgres::Down => Decision::act(Reason::MadeByAnother, Step::Discard),
                Postgres::Ending => Decision::wait(Reason::MadeByAnother),
                Postgres::Silent { .. } | Postgres::Running(_) => Decision::act(Reason::MadeByAnother, Step::End),
            })
        }
        Some(Initialize::Done(system_id)) if system_id != control.system_id => {
            let why = format!(
                "postgresql.data_dir: {} belongs to another cluster: its system identifier is {}, the cluster's is \
                 {system_id}; move the directory away to have this member cloned, or name the other cluster's scope",
                seen.data_dir.display(),
                control.system_id
            );
            Some(leave(seen, Reason::Fatal(why), 64))
        }
        // A restored etcd may have forgotten it; the leader writes it again.
        None | Some(Initialize::Pending) if standby && matches!(seen.lease, LeaseSeen::Theirs(_)) => None,
        // There is no primary to do it.
        None | Some(Initialize::Pending) if standby && seen.standby_cluster.is_some() => {
            Some(Decision::act(Reason::Initializing, Step::Initialize))
        }
        None | Some(Initialize::Pending) if standby => Some(Decision::wait(Reason::WaitingForPrimaryToInitialize)),
        None => Some(Decision::act(Reason::Initializing, Step::Initialize)),
        Some(Initialize::Pending) if seen.bootstrap_unfinished => {
            Some(Decision::act(Reason::Initializing, Step::Initialize))
        }
        Some(Initialize::Pending) => Some(Decision::wait_for(Reason::WaitingForBootstrap, SOON)),
        Some(Initialize::Done(_)) if seen.view.config.value.is_none() => {
            Some(Decision::act(Reason::Initializing, Step::Initialize))
        }
        Some(Initialize::Done(_)) => None,
    }
}

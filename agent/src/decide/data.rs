//! What the data directory says before anything else: nothing is there, or whose it is.

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::view::Initialize;

use super::{Decision, Reason, SOON, Step, abandon, backing_off, leave};
use crate::memory::Memory;
use crate::observation::{LeaseSeen, Observation};
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
            Some(leader) => Decision::act(
                Reason::Cloning(leader.name.clone()),
                Step::Clone {
                    from: leader.name.clone(),
                },
            ),
            None => Decision::wait_for(Reason::WaitingForLeader(epoch.holder.clone()), SOON),
        },
        (LeaseSeen::Free, None) if seen.nofailover || seen.is_paused() => Decision::wait(Reason::WaitingForBootstrap),
        (LeaseSeen::Free, None) => Decision::act(Reason::Bootstrapping, Step::ClaimBootstrap),
        // Our own claim, after a copy that failed or an agent that did.
        (LeaseSeen::Free, Some(Initialize::Pending)) if seen.standby_cluster.is_some() && memory.claimed => {
            Decision::act(Reason::Bootstrapping, Step::ClaimBootstrap)
        }
        (LeaseSeen::Free, Some(Initialize::Pending | Initialize::Done(_))) => {
            Decision::wait(Reason::WaitingForBootstrap)
        }
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

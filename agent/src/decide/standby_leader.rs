//! The cluster follows another one. Its leader holds the key and is a standby: it streams from the other cluster, and the
//! members from it. Nothing here may take writes, so that no deadline is given to the keeper, and PostgreSQL goes on without
//! etcd.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::record::StandbyCluster;
use pgherd_cluster::view::Epoch;

use super::leader::request;
use super::pause::is_writable;
use super::{Decision, Reason, SOON, Step, abandon, backing_off};
use crate::memory::Memory;
use crate::observation::{LeaseSeen, Observation, Postgres, Rejoin};
use crate::postgres::Upstream;
use crate::sync::SyncStep;

/// How long a standby leader may take to stream after it was found to fit, before that is asked again.
const REJOIN_AGAIN: Duration = Duration::from_secs(5);

/// Whether the lease is held without a deadline for the keeper: in maintenance, and where nothing can take writes.
#[must_use]
pub fn gives_no_deadline(seen: &Observation) -> bool {
    seen.is_paused() || (seen.standby_cluster.is_some() && !is_writable(seen))
}

/// A standby runs, and this member holds the key.
pub(super) fn decide(
    seen: &Observation,
    memory: &Memory,
    section: &StandbyCluster,
    epoch: &Epoch,
    now: Boottime,
) -> Decision {
    // It was won for a promotion, and the keeper would end what runs at its end.
    if seen.armed {
        return Decision::act(Reason::BecomesStandby, Step::End);
    }
    let leads = || Reason::LeadsStandbys(source(section));
    let wait = |reason| Decision::wait_for(reason, SOON);
    if let Some(decision) = request(seen, memory, epoch, leads()) {
        return decision;
    }
    if seen.upstream.as_ref().and_then(Upstream::remote) != Some(section) {
        return Decision::act(leads(), Step::FollowRemote);
    }
    let Postgres::Running(server) = &seen.postgres else {
        return wait(Reason::PostgresSilent);
    };
    if server.replication_state.is_some() || !section.streams() {
        // Who has what matters by what the other cluster has from here on.
        if seen.view.sync.value.is_active() && !seen.is_paused() {
            let revision = seen.view.sync.mod_revision;
            return Decision::act(leads(), Step::Sync(SyncStep::DeleteSync { revision }));
        }
        return Decision::wait(leads());
    }
    let silent = || Reason::RemoteSilent(source(section));
    match &memory.rejoin {
        Some((asked, Rejoin::Diverged)) if asked == epoch && seen.is_paused() => wait(Reason::Paused),
        Some((asked, Rejoin::Diverged)) if asked == epoch && backing_off(memory, now) => wait(Reason::BackingOff),
        // What a copy did not cure, another does not either.
        Some((asked, Rejoin::Diverged)) if asked == epoch && memory.cloned_under.as_ref() != Some(epoch) => {
            Decision::act(Reason::RemoteDiverged(source(section)), Step::CloneRemote)
        }
        Some((asked, _)) if asked == epoch && !is_old(memory, now) => wait(silent()),
        _ if backing_off(memory, now) => wait(silent()),
        _ => Decision::act(silent(), Step::CheckRemote { epoch: epoch.clone() }),
    }
}

fn is_old(memory: &Memory, now: Boottime) -> bool {
    memory
        .rejoin_asked_at
        .is_none_or(|asked_at| now.since(asked_at) > REJOIN_AGAIN)
}

/// PostgreSQL is down, whole, and there is data.
pub(super) fn down(seen: &Observation, memory: &Memory, standby_data: bool, now: Boottime) -> Decision {
    let start = |step| {
        if backing_off(memory, now) {
            Decision::wait_for(Reason::BackingOff, SOON)
        } else {
            Decision::act(Reason::StartingStandby, step)
        }
    };
    match &seen.lease {
        // Under this holding it has taken writes, and is known to. What comes up is another thing, and needs another.
        LeaseSeen::Mine(epoch) if !standby_data => give_up(seen, epoch),
        LeaseSeen::Mine(_) => start(Step::StartStandbyLeader),
        LeaseSeen::MineUnproven(_) => Decision::wait(Reason::ProvingLease),
        LeaseSeen::Stale { epoch, lease } => abandon(epoch, *lease),
        LeaseSeen::Theirs(leader) => start(Step::StartStandby {
            upstream: Some(leader.holder.clone()),
        }),
        LeaseSeen::Free | LeaseSeen::Unknown => start(Step::StartStandby { upstream: None }),
    }
}

fn give_up(seen: &Observation, epoch: &Epoch) -> Decision {
    let lease = seen.view.leader.as_ref().filter(|leader| leader.epoch == *epoch);
    let step = match lease.map(|leader| leader.lease) {
        Some(lease) => Step::Abandon {
            epoch: epoch.clone(),
            lease,
        },
        None => return Decision::wait_for(Reason::BecomesStandby, SOON),
    };
    Decision::act(Reason::BecomesStandby, step)
}

/// Whom the cluster follows, for people.
fn source(section: &StandbyCluster) -> String {
    let addresses: Vec<String> = section.addresses().iter().map(ToString::to_string).collect();
    if addresses.is_empty() {
        "an archive".to_owned()
    } else {
        addresses.join(", ")
    }
}

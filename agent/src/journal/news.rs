//! What is worth an event: found by comparing what is seen with what was seen before. Pure.

use pgherd_cluster::event::Kind;
use pgherd_cluster::record::{Role, SyncState};
use pgherd_cluster::view::Epoch;
use serde_json::{Map, Value};

use super::Draft;
use crate::decide::{Reason, published_role};
use crate::memory::Memory;
use crate::observation::{LeaseSeen, Observation};
use crate::sync::SyncReason;

/// What was seen last. Nothing is news at the first look.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct News {
    role: Option<Role>,
    sync: Option<SyncState>,
    config: Option<(i64, Map<String, Value>)>,
    fenced: Option<Option<u64>>,
    /// The last holding of this member's own.
    held: Option<Epoch>,
}

impl News {
    /// What has changed since the last look. What all members see is told by the leader alone.
    pub fn note(&mut self, seen: &Observation, memory: &Memory) -> Vec<Draft> {
        let mut drafts = Vec::new();
        drafts.extend(self.note_fence(seen));
        drafts.extend(self.note_role(seen, memory));
        let leads = matches!(seen.lease, LeaseSeen::Mine(_));
        if let LeaseSeen::Mine(epoch) = &seen.lease {
            self.held = Some(epoch.clone());
        }
        drafts.extend(self.note_sync(seen).filter(|_| leads));
        drafts.extend(self.note_config(seen).into_iter().filter(|_| leads));
        drafts
    }

    fn note_fence(&mut self, seen: &Observation) -> Option<Draft> {
        let before = self.fenced.replace(seen.fenced_term);
        let fenced = seen
            .fenced_term
            .filter(|_| before.is_some_and(|before| before != seen.fenced_term))?;
        let what = format!("the deadline of {} passed: the keeper has ended PostgreSQL", seen.me);
        let from = self.held.as_ref().or(seen.last_held.as_ref());
        let draft = Draft::new(Kind::Fence, what).from(from.map(Epoch::to_string));
        Some(draft.with("term", fenced))
    }

    fn note_role(&mut self, seen: &Observation, memory: &Memory) -> Option<Draft> {
        let role = published_role(seen, memory);
        let passing = match role {
            // On the way to something else.
            Role::Promoted | Role::Unknown => true,
            // A leader that restarts stays what it is.
            Role::Demoted => matches!(seen.lease, LeaseSeen::Mine(_)),
            Role::Primary | Role::Replica | Role::StandbyLeader | Role::Uninitialized => false,
        };
        if passing || self.role == Some(role) {
            return None;
        }
        let before = self.role.replace(role)?;
        let what = format!("{} is {} now, and was {}", seen.me, role.as_str(), before.as_str());
        Some(Draft::new(Kind::Role, what))
    }

    fn note_sync(&mut self, seen: &Observation) -> Option<Draft> {
        let now = &seen.view.sync.value;
        let before = self.sync.replace(now.clone())?;
        let names = |state: &SyncState| state.sync_standby.clone().filter(|_| state.is_active());
        let (old, new) = (names(&before), names(now));
        if old == new && before.quorum == now.quorum {
            return None;
        }
        let word = |names: Option<String>| {
            names
                .filter(|names| !names.is_empty())
                .unwrap_or_else(|| "nobody".to_owned())
        };
        let what = format!("/sync lists {}, and listed {}", word(new), word(old));
        let draft = Draft::new(Kind::Sync, what).with("quorum", now.quorum);
        Some(draft.with("revision", seen.view.sync.mod_revision))
    }

    fn note_config(&mut self, seen: &Observation) -> Vec<Draft> {
        let revision = seen.view.config.mod_revision;
        if self.config.as_ref().is_some_and(|(last, _)| *last == revision) {
            return Vec::new();
        }
        let Some(now) = seen.view.config.value.as_ref().map(|config| config.document().clone()) else {
            return Vec::new();
        };
        let Some((_, before)) = self.config.replace((revision, now.clone())) else {
            return Vec::new();
        };
        let mut drafts = Vec::new();
        let paused = |config: &Map<String, Value>| crate::record::is_set(config, "pause");
        match (paused(&before), paused(&now)) {
            (false, true) => drafts.push(Draft::new(Kind::Operator, "the cluster is paused")),
            (true, false) => drafts.push(Draft::new(Kind::Operator, "the pause has ended")),
            _ => {}
        }
        let mut changed = Vec::new();
        compare("", &before, &now, &mut changed);
        changed.retain(|key| key != "pause");
        if !changed.is_empty() {
            // Values may be secrets, such as those of another cluster's connection.
            let what = format!("the dynamic configuration has changed: {}", changed.join(", "));
            drafts.push(Draft::new(Kind::Configuration, what));
        }
        drafts
            .into_iter()
            .map(|draft| draft.with("revision", revision))
            .collect()
    }
}

/// The paths of what differs.
fn compare(path: &str, before: &Map<String, Value>, now: &Map<String, Value>, changed: &mut Vec<String>) {
    let gone = before.keys().filter(|key| !now.contains_key(*key));
    for key in now.keys().chain(gone) {
        let at = if path.is_empty() {
            key.clone()
        } else {
            format!("{path}.{key}")
        };
        match (before.get(key), now.get(key)) {
            (Some(one), Some(other)) if one == other => {}
            (Some(Value::Object(one)), Some(Value::Object(other))) => compare(&at, one, other, changed),
            _ => changed.push(at),
        }
    }
}

/// What an event would be about that this reason makes; nothing for what is everyday life, or is told by what comes of it.
#[must_use]
#[expect(
    clippy::too_many_lines,
    reason = "a line for each reason; there is nothing to take apart"
)]
pub fn kind_of(reason: &Reason) -> Option<Kind> {
    Some(match reason {
        Reason::LostLease | Reason::CannotEnd | Reason::AskingForRelease => Kind::Fence,
        Reason::HandoverFailed(_) | Reason::PrePromoteRefuses | Reason::LacksSlots(_) | Reason::WatchdogUnusable => {
            Kind::Refusal
        }
        Reason::StartTooSlow | Reason::CannotStart | Reason::DiskFails => Kind::Leader,
        Reason::Synchronous(SyncReason::Relaxed) => Kind::Sync,
        Reason::RestartingInPlace
        | Reason::DataGone
        | Reason::DiskFailsAlone
        | Reason::ServerHangs
        | Reason::Diverged(_)
        | Reason::Rewinding(_)
        | Reason::CannotFollow(_)
        | Reason::RemoteDiverged(_)
        | Reason::Cloning(_)
        | Reason::Restoring
        | Reason::Reinitializing(_)
        | Reason::Restarting
        | Reason::Bootstrapping
        | Reason::BootstrapFailed(_)
        | Reason::MadeByAnother
        | Reason::ForeignFiles(_)
        | Reason::Fatal(_) => Kind::Postgres,
        Reason::Leading
        | Reason::Following(_)
        | Reason::NotStreaming(_)
        | Reason::WaitingForLeader(_)
        | Reason::WaitingForBootstrap
        | Reason::WaitingForPrimaryToInitialize
        | Reason::Initializing
        | Reason::WaitingForCheckpoint(_)
        | Reason::StartingStandby
        | Reason::WinningAnew
        | Reason::KeyFromBefore
        | Reason::LeadsWithoutData
        | Reason::ProvingLease
        | Reason::Promoting
        | Reason::Bidding
        | Reason::Polling
        | Reason::Behind { .. }
        | Reason::Outranked(_)
        | Reason::LagTooGreat { .. }
        | Reason::OldTimeline
        | Reason::OnLaterTimeline(_)
        | Reason::LeadsStandbys(_)
        | Reason::RemoteSilent(_)
        | Reason::BecomesStandby
        | Reason::NothingToFence
        | Reason::NotSynchronous
        | Reason::NotInFailsafe
        | Reason::PrimaryAlive(_)
        | Reason::MayNotLead
        | Reason::FollowingArchive
        | Reason::LeavesItTo(_)
        | Reason::FormerLeaderWaits
        | Reason::SwitchingOver(_)
        | Reason::SwitchoverScheduled
        | Reason::RequestNamesAnother
        | Reason::Busy(_)
        | Reason::BackingOff
        | Reason::PostgresEnding
        | Reason::PostgresSilent
        | Reason::StoreUnreachable
        | Reason::Paused
        | Reason::Resuming
        | Reason::JustResumed(_)
        | Reason::PrimaryWithoutLease
        | Reason::Adopting
        | Reason::VouchedFor(_)
        | Reason::MayHaveVouched
        | Reason::WaitingForLastLeader { .. }
        | Reason::ComingUp(_)
        | Reason::OthersAreSilent
        | Reason::TooFewVotes { .. }
        | Reason::Synchronous(_)
        | Reason::LeavingSync
        | Reason::NobodyMayFollowYet
        | Reason::Stopping => return None,
    })
}

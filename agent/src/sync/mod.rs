//! Synchronous replication: who waits for whom, and who may be promoted. Pure.
//!
//! Two records must agree at every moment: `synchronous_standby_names` says what an acknowledged commit is on, `/sync` says
//! who may lead next. [`next_step`] compares them with what is to be and gives **one** step. The caller performs it,
//! observes everything anew and asks again, until there is none; a step that fails or is lost needs no repair, since
//! nothing is remembered between two questions.
//!
//! # The leader's part
//! * Ask in each cycle while the lease is ours and PostgreSQL runs as primary, in pause too, and at once after each step.
//! * [`SyncStep::WriteSync`] and [`SyncStep::DeleteSync`] are one transaction that compares the key's mod revision with the
//!   given one (0: the key does not exist) and our holding of the leader key. When it fails, observe anew.
//! * [`SyncStep::SetNames`] writes the setting and reloads. `configured` is what the *running* server says it has.
//! * `guc_changed_at` is the flush position read **after** the setting in force has reached every process. A walsender takes
//!   a reload over within milliseconds. The checkpointer switches the waiting itself on, and does not look while it syncs
//!   files: after a change from [`SyncNames::Off`] read the position only once `pg_stat_activity` shows it in
//!   `CheckpointerMain` or `CheckpointWriteDelay`. Any later position is right too, so an agent that starts beside a running
//!   primary takes the first that it sees. `None` is always safe: nobody new is listed.
//! * `waited`: for one `loop_wait` no eligible standby has streamed. Only then does a primary give its standbys up.
//! * With the mode off, leave the managed setting in place until a step says otherwise: `/sync` goes first.
//!
//! # Around an election
//! A candidate asks [`may_run`], polls [`needs_votes_of`] beside the others, and needs [`quorum_reached`]. The winner performs
//! [`before_promotion`], the write first, the setting second, and promotes only when both are done.

mod candidates;
mod election;
mod names;
mod priority;
mod promotion;
mod quorum;
mod settings;
mod staleness;

use pgherd_cluster::name::{Lsn, MemberName};
use pgherd_cluster::record::{MemberRecord, PgState, SyncState};
use serde_json::Value;

pub use self::candidates::{any_may_be_synchronous, eligible_names};
pub use self::election::{may_run, needs_votes_of, quorum_reached};
pub use self::names::{NameSet, StandbyName, SyncNames, SyncNamesError};
pub use self::promotion::{BeforePromotion, before_promotion};
pub use self::settings::{SyncMode, SyncSettings};
pub use self::staleness::{Acknowledgements, is_lost};

/// Everything that a step rests on.
#[derive(Clone, Debug)]
pub struct SyncInputs {
    /// This member, the leader.
    pub me: MemberName,
    /// What is wanted.
    pub settings: SyncSettings,
    /// The value of `/sync`.
    pub state: SyncState,
    /// Its mod revision; 0 while the key does not exist.
    pub sync_revision: i64,
    /// `synchronous_standby_names`, as the running server has it.
    pub configured: SyncNames,
    /// What the user's own parameters say, for when the mode is off.
    pub user_names: SyncNames,
    /// `pg_stat_replication`.
    pub senders: Vec<Sender>,
    /// The members that have a key.
    pub members: Vec<Standby>,
    /// Whether our PostgreSQL runs and is the primary.
    pub running: bool,
    /// How far it has flushed.
    pub flush_lsn: Lsn,
    /// How far it had flushed when `configured` had come into force; nothing while that is not known.
    pub guc_changed_at: Option<Lsn>,
    /// Whether no eligible standby has streamed for one `loop_wait`.
    pub waited: bool,
    /// `synchronous_commit`.
    pub commit_level: CommitLevel,
}

/// What a commit waits for, from `synchronous_commit`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CommitLevel {
    /// The standby has written it.
    Write,
    /// The standby has flushed it.
    #[default]
    Flush,
    /// The standby has replayed it.
    Replay,
}

impl CommitLevel {
    /// From the setting's value; whatever waits for no standby counts as `on`.
    #[must_use]
    pub fn of(synchronous_commit: &str) -> Self {
        match synchronous_commit {
            "remote_write" => Self::Write,
            "remote_apply" => Self::Replay,
            _ => Self::Flush,
        }
    }
}

/// `sync_state`, the better the greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SyncRank {
    /// Not waited for.
    Async,
    /// Named, and spare.
    Potential,
    /// One of those of which some are waited for.
    Quorum,
    /// Waited for.
    Sync,
}

impl SyncRank {
    /// From the column's value.
    #[must_use]
    pub fn of(sync_state: &str) -> Self {
        match sync_state {
            "sync" => Self::Sync,
            "quorum" => Self::Quorum,
            "potential" => Self::Potential,
            _ => Self::Async,
        }
    }
}

/// A row of `pg_stat_replication`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sender {
    /// The standby's name.
    pub application_name: StandbyName,
    /// The walsender's process.
    pub pid: i32,
    /// Such as `streaming`.
    pub state: String,
    /// How PostgreSQL ranks it.
    pub sync_state: SyncRank,
    /// Sent so far; like the others nothing while the standby has not said.
    pub sent: Option<Lsn>,
    /// Written there.
    pub write: Option<Lsn>,
    /// Flushed there.
    pub flush: Option<Lsn>,
    /// Replayed there.
    pub replay: Option<Lsn>,
    /// Whether it has not acknowledged anything for too long, by [`Acknowledgements`].
    pub stale: bool,
}

impl Sender {
    /// Whether its standby can acknowledge commits.
    #[must_use]
    pub fn streams(&self) -> bool {
        self.state == "streaming" && !self.stale
    }

    /// The position that commits of this level wait for.
    #[must_use]
    pub const fn position(&self, level: CommitLevel) -> Option<Lsn> {
        match level {
            CommitLevel::Write => self.write,
            CommitLevel::Flush => self.flush,
            CommitLevel::Replay => self.replay,
        }
    }
}

/// A member, as far as its being a synchronous standby goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standby {
    /// Its name.
    pub name: StandbyName,
    /// Whether its PostgreSQL runs and takes connections.
    pub running: bool,
    /// Whether it may never be synchronous.
    pub nosync: bool,
    /// The greater, the sooner it is chosen.
    pub sync_priority: i64,
    /// Whether it may never lead.
    pub nofailover: bool,
    /// Whom it is tagged to stream from.
    pub replicatefrom: Option<StandbyName>,
}

impl Standby {
    /// Reads a member's key. The boolean `nosync` wins over the priority.
    #[must_use]
    pub fn of(name: &MemberName, record: &MemberRecord) -> Self {
        let sync_priority = match record.tags.get("sync_priority") {
            Some(Value::Number(number)) => number.as_i64().unwrap_or(1),
            Some(Value::String(text)) => text.trim().parse().unwrap_or(1),
            _ => 1,
        };
        let source = record.tags.get("replicatefrom").and_then(Value::as_str);
        Self {
            name: StandbyName::from(name),
            running: record.state == PgState::Running,
            nosync: if record.tags.contains_key("nosync") {
                record.tag("nosync")
            } else {
                sync_priority <= 0
            },
            sync_priority,
            nofailover: record.nofailover(),
            replicatefrom: source.filter(|source| !source.is_empty()).map(StandbyName::from),
        }
    }
}

/// The one thing to do next, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Next {
    /// What to do.
    pub step: SyncStep,
    /// Why.
    pub reason: SyncReason,
}

/// A change of one of the two records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SyncStep {
    /// Write `/sync`, if it is still at this revision.
    WriteSync {
        /// The new value.
        state: SyncState,
        /// The key's mod revision; 0: it does not exist.
        revision: i64,
    },
    /// Set `synchronous_standby_names` and reload.
    SetNames(SyncNames),
    /// Delete `/sync`, if it is still at this revision.
    DeleteSync {
        /// The key's mod revision.
        revision: i64,
    },
}

/// Why a step is taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SyncReason {
    /// The mode has been turned on.
    Enabled,
    /// The mode has been turned off.
    Disabled,
    /// The record is another leader's.
    TookOver,
    /// The record promises more than PostgreSQL keeps, or is the other mode's.
    Repaired,
    /// These do not stream any more.
    StandbyLost(NameSet),
    /// These stream, but are not to be waited for any more.
    StandbyRemoved(NameSet),
    /// Commits begin to wait for these; they may lead once they have caught up.
    StandbyAwaited(NameSet),
    /// These have caught up and may lead.
    StandbyAdded(NameSet),
    /// The numbers change, the names do not.
    Adjusted,
    /// Nobody has streamed for too long: commits wait no more.
    Relaxed,
    /// Nobody has streamed for too long, and the mode is strict: commits wait for whoever comes first.
    Blocked,
}

impl std::fmt::Display for SyncReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |names: &NameSet| names.iter().map(StandbyName::as_str).collect::<Vec<_>>().join(", ");
        match self {
            Self::Enabled => f.write_str("synchronous replication begins"),
            Self::Disabled => f.write_str("synchronous replication ends"),
            Self::TookOver => f.write_str("takes the synchronous set over"),
            Self::Repaired => f.write_str("mends the record of the synchronous set"),
            Self::StandbyLost(names) => write!(f, "lost the synchronous standby {}", list(names)),
            Self::StandbyRemoved(names) => write!(f, "commits wait no more for {}", list(names)),
            Self::StandbyAwaited(names) => write!(f, "commits wait for {}", list(names)),
            Self::StandbyAdded(names) => write!(f, "{} may lead from now on", list(names)),
            Self::Adjusted => f.write_str("adjusts how many standbys commits wait for"),
            Self::Relaxed => f.write_str("no standby streams: commits are acknowledged without one"),
            Self::Blocked => f.write_str("no standby streams: commits wait for the first that comes"),
        }
    }
}

/// The leader's next step; nothing when everything is in order.
#[must_use]
pub fn next_step(inputs: &SyncInputs) -> Option<Next> {
    if !inputs.running {
        return None;
    }
    match inputs.settings.mode {
        SyncMode::Off => switched_off(inputs),
        SyncMode::Priority => priority::next_step(inputs),
        SyncMode::Quorum => quorum::next_step(inputs),
    }
}

/// The record goes before the waiting ends: as long as it is there, it may let a listed standby lead.
fn switched_off(inputs: &SyncInputs) -> Option<Next> {
    let step = if inputs.state.is_active() {
        SyncStep::DeleteSync {
            revision: inputs.sync_revision,
        }
    } else if !inputs.configured.same_as(&inputs.user_names) {
        SyncStep::SetNames(inputs.user_names.clone())
    } else {
        return None;
    };
    let reason = SyncReason::Disabled;
    Some(Next { step, reason })
}

impl SyncInputs {
    fn own_name(&self) -> StandbyName {
        StandbyName::from(&self.me)
    }

    fn is_own_record(&self) -> bool {
        self.state
            .leader
            .as_deref()
            .is_some_and(|leader| StandbyName::from(leader) == self.own_name())
    }

    /// What the setting is when nobody can be waited for.
    fn nobody(&self) -> (SyncNames, SyncReason) {
        if self.settings.strict {
            let quorum = self.settings.mode == SyncMode::Quorum;
            (SyncNames::anybody(quorum), SyncReason::Blocked)
        } else {
            (SyncNames::Off, SyncReason::Relaxed)
        }
    }

    fn write(&self, quorum: usize, standbys: &NameSet, reason: SyncReason) -> Next {
        Next {
            step: SyncStep::WriteSync {
                state: record(&self.me, quorum, standbys),
                revision: self.sync_revision,
            },
            reason,
        }
    }

    /// Why these are given up: gone, or sent away.
    fn departure(&self, names: NameSet) -> SyncReason {
        let streams = |name: &StandbyName| {
            let mut senders = self.senders.iter();
            senders.any(|sender| sender.application_name == *name && sender.streams())
        };
        let gone: NameSet = names.iter().filter(|name| !streams(name)).cloned().collect();
        if gone.is_empty() {
            SyncReason::StandbyRemoved(names)
        } else {
            SyncReason::StandbyLost(gone)
        }
    }

    /// Sets the setting; the reason is what it does to those who are waited for.
    fn set(&self, names: SyncNames) -> Next {
        let (before, after) = (self.configured.guarantee().1, names.guarantee().1);
        let awaited: NameSet = &after - &before;
        let departed: NameSet = &before - &after;
        let reason = match (awaited.is_empty(), departed.is_empty()) {
            (false, _) => SyncReason::StandbyAwaited(awaited),
            (true, false) => self.departure(departed),
            (true, true) => SyncReason::Adjusted,
        };
        let step = SyncStep::SetNames(names);
        Next { step, reason }
    }
}

/// The names that a record lists.
fn listed(state: &SyncState) -> NameSet {
    state.standbys().map(StandbyName::from).collect()
}

fn record(leader: &MemberName, quorum: usize, standbys: &NameSet) -> SyncState {
    let mut names: Vec<&str> = standbys.iter().map(StandbyName::as_str).collect();
    names.sort_unstable();
    SyncState {
        leader: Some(leader.as_str().to_owned()),
        quorum: u32::try_from(quorum).unwrap_or(u32::MAX),
        sync_standby: (!names.is_empty()).then(|| names.join(",")),
    }
}

#[cfg(test)]
mod tests;

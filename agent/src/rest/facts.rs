//! What every answer is made from: the member's own status, the last view, and the questions that answers share. Pure.

use std::sync::Arc;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::{DynamicConfig, PgState, Role};
use pgherd_cluster::view::View;
use serde_json::Value;

use crate::record::is_set;
use crate::status::{MemberStatus, ServerStatus, WalStatus};

/// The inputs of one answer, taken at one moment.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    /// This member.
    pub(super) status: Arc<MemberStatus>,
    /// The last view; see [`Facts::known_view`] for whether it may still be believed.
    pub(super) view: Arc<View>,
    /// Since when the source of the view is out of touch with the store.
    pub(super) failing_since: Option<Boottime>,
    /// When the answer is made.
    pub(super) now: Boottime,
}

/// Which kind of synchronous replication the dynamic configuration asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SyncMode {
    Off,
    Priority,
    Quorum,
}

/// What a member listed in the synchronous set is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SyncStanding {
    Sync,
    Quorum,
}

impl SyncStanding {
    /// The field in a status, and the role in `/cluster`.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Sync => "sync_standby",
            Self::Quorum => "quorum_standby",
        }
    }
}

impl Facts {
    /// The view, unless nothing has been read yet or the store has been out of reach for a whole lease: by then anybody
    /// may lead, and an answer from it would be a guess.
    pub(super) fn known_view(&self) -> Option<&View> {
        let read = self.view.revision > 0;
        let lost = self
            .failing_since
            .is_some_and(|since| self.now.since(since) > self.view.timing().ttl());
        (read && !lost).then_some(&*self.view)
    }

    /// Whether this member leads on by the word of the others, since etcd does not answer.
    pub(super) fn is_failsafe_active(&self) -> bool {
        let holding = self.status.holding.as_ref();
        holding.is_some_and(|holding| holding.by_vouches && self.now < holding.deadline)
    }

    /// What SQL told, in the states in which it is asked.
    pub(super) fn server(&self) -> Option<&ServerStatus> {
        let asked = matches!(
            self.status.state,
            PgState::Running | PgState::Starting | PgState::Restarting
        );
        self.status.server.as_ref().filter(|_| asked)
    }

    /// A PostgreSQL that should run and does not answer is in no known state.
    pub(super) fn state(&self) -> PgState {
        match self.status.state {
            PgState::Running if self.server().is_none() => PgState::Unknown,
            state => state,
        }
    }

    /// By SQL while it answers, by what the agent did last otherwise.
    pub(super) fn role(&self) -> Role {
        match (self.server().map(|server| &server.wal), self.status.role) {
            (Some(WalStatus::Primary { .. }), _) => Role::Primary,
            // SQL cannot tell the leader of a standby cluster from any other standby.
            (Some(WalStatus::Standby { .. }), Role::StandbyLeader) => Role::StandbyLeader,
            (Some(WalStatus::Standby { .. }), _) => Role::Replica,
            (None, role) => role,
        }
    }

    /// Whether this member holds the leader key.
    pub(super) fn leads(&self) -> bool {
        self.status.leads(self.now)
    }

    /// The dynamic configuration as last read: an outage of the store does not end a pause.
    pub(super) fn config(&self) -> Option<&DynamicConfig> {
        self.view.config.value.as_ref()
    }

    pub(super) fn is_paused(&self) -> bool {
        self.config().is_some_and(DynamicConfig::is_paused)
    }

    pub(super) fn is_standby_cluster(&self) -> bool {
        match self.config() {
            Some(_) => is_standby_cluster(&self.view),
            None => self.status.role == Role::StandbyLeader,
        }
    }

    /// How this member is listed in the synchronous set, while it is a replica and the view is known.
    pub(super) fn sync_standing(&self) -> Option<SyncStanding> {
        let view = self.known_view()?;
        (self.server().is_some() && self.role() == Role::Replica).then_some(())?;
        sync_standing(view, &self.status.name)
    }

    /// How far the leader is known to be: by the store, or by what the WAL receiver last heard.
    pub(super) fn leader_position(&self) -> u64 {
        let stored = self
            .known_view()
            .and_then(|view| view.status.optime)
            .map_or(0, |lsn| lsn.0);
        stored.max(self.latest_end().unwrap_or(0))
    }

    /// What the WAL receiver last heard of its upstream.
    pub(super) fn latest_end(&self) -> Option<u64> {
        match &self.server()?.wal {
            WalStatus::Standby { latest_end, .. } => latest_end.map(|lsn| lsn.0),
            WalStatus::Primary { .. } => None,
        }
    }
}

/// Whether the cluster follows another one: the section must name a source.
pub(super) fn is_standby_cluster(view: &View) -> bool {
    let section = view
        .config
        .value
        .as_ref()
        .and_then(|config| config.document().get("standby_cluster"));
    let Some(Value::Object(section)) = section else {
        return false;
    };
    ["host", "port", "restore_command"]
        .iter()
        .any(|name| is_set(section, name))
}

/// The kind of synchronous replication asked for; a standby cluster has none of its own.
pub(super) fn sync_mode(view: &View) -> SyncMode {
    let Some(config) = view.config.value.as_ref().filter(|_| !is_standby_cluster(view)) else {
        return SyncMode::Off;
    };
    match config.document().get("synchronous_mode") {
        Some(Value::String(text)) if text.eq_ignore_ascii_case("quorum") => SyncMode::Quorum,
        Some(_) if is_set(config.document(), "synchronous_mode") => SyncMode::Priority,
        _ => SyncMode::Off,
    }
}

/// How `name` is listed in the synchronous set.
pub(super) fn sync_standing(view: &View, name: &MemberName) -> Option<SyncStanding> {
    let sync = &view.sync.value;
    if !sync.is_active() || !sync.lists(name) {
        return None;
    }
    // The mode decides, not the stored quorum: that is 0 in quorum mode too while there is one voter.
    match sync_mode(view) {
        SyncMode::Off => None,
        SyncMode::Priority => Some(SyncStanding::Sync),
        SyncMode::Quorum => Some(SyncStanding::Quorum),
    }
}

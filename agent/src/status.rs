//! What a member knows of itself: written once a cycle, read by REST, the member key and the log.

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::{Lsn, MemberName, Scope, SystemId, Timeline};
use pgherd_cluster::record::{PgState, Role};
use pgherd_cluster::view::Epoch;
use serde_json::{Map, Value};

/// One member, seen by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberStatus {
    /// Its name.
    pub name: MemberName,
    /// Its cluster.
    pub scope: Scope,
    /// The state of its PostgreSQL.
    pub state: PgState,
    /// Its role: what SQL says while PostgreSQL answers, what the agent did last otherwise.
    pub role: Role,
    /// What SQL told, while PostgreSQL answers.
    pub server: Option<ServerStatus>,
    /// The holding of the leader key that this member believes to be its own, with the deadline of its last proof.
    pub holding: Option<Holding>,
    /// Whether a watchdog is required and cannot be used, so that this member may not lead.
    pub watchdog_failed: bool,
    /// Tags, as configured.
    pub tags: Map<String, Value>,
    /// Known once there is a data directory.
    pub system_id: Option<SystemId>,
    /// When etcd last answered, in seconds since 1970; 0 for never.
    pub dcs_last_seen: u64,
    /// When the next cycle begins at the latest.
    pub next_cycle_at: Boottime,
    /// A restart at a time to come, as the member key has it.
    pub scheduled_restart: Option<Value>,
    /// Why the last new copy of the leader's data that an operator asked for was not made; nothing while one is being made.
    pub reinitialize_failed: Option<String>,
    /// The parameters whose values wait for a restart, with old and new value.
    pub pending_restart: Map<String, Value>,
    /// Why the member is as it is: the reason of the last decision, in words.
    pub reason: String,
}

/// A holding of the leader key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// Holder and create revision.
    pub epoch: Epoch,
    /// Until when it entitles to write.
    pub deadline: Boottime,
    /// Whether that rests on the word of the other members, since etcd does not answer.
    pub by_vouches: bool,
}

/// What a running PostgreSQL told of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerStatus {
    /// `YYYY-MM-DD HH:MM:SS.ffffff+00:00`.
    pub postmaster_start_time: String,
    /// Such as 150020.
    pub server_version: u32,
    /// Positions in the write-ahead log.
    pub wal: WalStatus,
    /// The timeline, when it could be told.
    pub timeline: Option<Timeline>,
    /// A replica's `streaming` or `in archive recovery`.
    pub replication_state: Option<String>,
    /// Who streams from here.
    pub replication: Vec<WalSender>,
    /// What commits wait for.
    pub waiting: CommitWaiting,
}

/// What the running server makes commits wait for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommitWaiting {
    /// `synchronous_standby_names`.
    pub names: String,
    /// Whether the checkpointer, which switches the waiting on, is sure to have taken the setting over.
    pub taken_over: bool,
}

/// Positions, by role.
#[derive(Clone, Debug, PartialEq)]
pub enum WalStatus {
    /// A primary.
    Primary {
        /// Flushed so far.
        location: Lsn,
    },
    /// A standby.
    Standby {
        /// Received and written so far.
        received: Lsn,
        /// Replayed so far.
        replayed: Lsn,
        /// The commit time of the last replayed transaction.
        replayed_at: Option<String>,
        /// Whether replay is paused.
        paused: bool,
        /// How far the upstream said it was, when it last said so.
        latest_end: Option<Lsn>,
    },
}

impl WalStatus {
    /// What counts in an election: flushed, or the greater of received and replayed.
    #[must_use]
    pub fn position(&self) -> Lsn {
        match self {
            Self::Primary { location } => *location,
            Self::Standby { received, replayed, .. } => (*received).max(*replayed),
        }
    }
}

/// One row of `pg_stat_replication`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WalSender {
    /// Its user.
    pub usename: String,
    /// The member's name.
    pub application_name: String,
    /// Its address; empty for a unix socket.
    pub client_addr: String,
    /// Such as `streaming`.
    pub state: String,
    /// Such as `async`.
    pub sync_state: String,
    /// Its rank.
    pub sync_priority: i32,
    /// The walsender's process.
    pub pid: i32,
    /// Sent so far; like the others nothing while the standby has not said.
    pub sent: Option<Lsn>,
    /// Written there.
    pub written: Option<Lsn>,
    /// Flushed there.
    pub flushed: Option<Lsn>,
    /// Replayed there.
    pub replayed: Option<Lsn>,
}

impl MemberStatus {
    /// Whether this member holds the leader key at `now`, by its own deadline.
    #[must_use]
    pub fn leads(&self, now: Boottime) -> bool {
        self.holding.as_ref().is_some_and(|holding| now < holding.deadline)
    }
}

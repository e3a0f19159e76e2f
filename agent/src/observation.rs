//! What a decision rests on: plain data, gathered by `observe`, read by `decide`.

use std::path::PathBuf;
use std::sync::Arc;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::{Lsn, MemberName, Timeline};
use pgherd_cluster::record::StandbyCluster;
use pgherd_cluster::view::{Epoch, View};

use crate::postgres::{DataDir, Upstream};
use crate::status::ServerStatus;
use crate::sync::{CommitLevel, Sender, SyncNames, SyncSettings};
use crate::topology::Place;

/// Everything that one decision looks at.
#[derive(Clone, Debug)]
pub struct Observation {
    /// This member's name.
    pub me: MemberName,
    /// The newest view.
    pub view: Arc<View>,
    /// The leader key, as far as this member may rely on it.
    pub lease: LeaseSeen,
    /// The keeper's name for the holding, while there is one.
    pub lease_term: Option<u64>,
    /// Where the data directory is, for the words of an error.
    pub data_dir: PathBuf,
    /// What lies in the data directory.
    pub data: DataDir,
    /// Whether initdb ran here and the roles were not made yet.
    pub bootstrap_unfinished: bool,
    /// Whether the operator has a program that is asked before a promotion.
    pub pre_promote: bool,
    /// Whether a replica can be made while nobody leads, as from a backup.
    pub made_without_leader: bool,
    /// PostgreSQL.
    pub postgres: Postgres,
    /// Whether the keeper has a deadline in force.
    pub armed: bool,
    /// The keeper's name for the last holding whose end it has enforced: no deadline of that will ever be in force.
    pub fenced_term: Option<u64>,
    /// Whether the keeper leaves PostgreSQL alone, as in maintenance.
    pub fence_paused: bool,
    /// Whether the lease's thread gives the keeper no deadlines, as in maintenance; nothing while it has not been told.
    pub lease_paused: Option<bool>,
    /// Whether a postmaster runs on the data directory that this keeper has not started or adopted.
    pub stranger: bool,
    /// The kernel's watchdog.
    pub watchdog: WatchdogSeen,
    /// The leader that this member has vouched for; it does not bid meanwhile.
    pub vouched_for: Option<MemberName>,
    /// The last holding that this member is known to have had since the machine started.
    pub last_held: Option<Epoch>,
    /// Since when PostgreSQL has answered no new connection.
    pub server_hangs_since: Option<Boottime>,
    /// Since when its data directory cannot be written.
    pub disk_fails_since: Option<Boottime>,
    /// What commits wait for, and should.
    pub sync: SyncSeen,
    /// The one long job that is under way.
    pub job: Option<JobKind>,
    /// Whom our standby is configured to stream from.
    pub upstream: Option<Upstream>,
    /// The cluster that this one follows; nothing for an ordinary one.
    pub standby_cluster: Option<StandbyCluster>,
    /// Whether data that holds what the leader's does not is rewound rather than copied anew.
    pub rewinds: bool,
    /// Whether this member may never lead.
    pub nofailover: bool,
    /// What its tags say of whom it streams from.
    pub place: Place,
    /// The leader's failover slots that are not here, where a member without them may not lead.
    pub lacks_slots: Vec<String>,
    /// This member's rank among equals in an election.
    pub failover_priority: i64,
    /// Whether the requested switchover's time has come.
    pub request_due: bool,
    /// Whether the process was told to stop.
    pub stopping: bool,
}

/// The leader key, as far as this member may rely on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeaseSeen {
    /// Ours, proven, with the deadline ahead.
    Mine(Epoch),
    /// Ours by an earlier agent's word; the proof is under way.
    MineUnproven(Epoch),
    /// It names us, but no deadline may rest on it: ours has passed, or it is from before this machine's start.
    Stale {
        /// The holding.
        epoch: Epoch,
        /// The lease that the key is bound to.
        lease: i64,
    },
    /// Another member's.
    Theirs(Epoch),
    /// Nobody's.
    Free,
    /// etcd does not answer.
    Unknown,
}

/// Synchronous replication, as far as this member's own PostgreSQL goes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SyncSeen {
    /// What the dynamic configuration wants.
    pub settings: SyncSettings,
    /// `synchronous_standby_names`, as the running server has it; as it would come up, while none runs.
    pub configured: SyncNames,
    /// Whether every process of the server is sure to have taken that over.
    pub taken_over: bool,
    /// What the user's own parameters say, for when the mode is off.
    pub user_names: SyncNames,
    /// Who streams from here.
    pub senders: Vec<Sender>,
    /// What commits wait for a standby to have done.
    pub commit_level: CommitLevel,
}

/// The kernel's watchdog, as far as it matters to who may lead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WatchdogSeen {
    /// There is none, or none is needed.
    #[default]
    NotNeeded,
    /// It is required and can be used.
    Usable,
    /// It is required and cannot be used: this member may not lead.
    Unusable,
}

/// PostgreSQL, as seen from outside and by SQL.
#[derive(Clone, Debug, PartialEq)]
pub enum Postgres {
    /// No postmaster and no process of it.
    Down,
    /// No postmaster, but processes of it are left; the keeper is ending them.
    Ending,
    /// A postmaster that does not answer SQL. It came up writable, or as a standby.
    Silent {
        /// Whether it may take writes.
        writable: bool,
    },
    /// A postmaster that answers.
    Running(Box<ServerStatus>),
}

/// Long work, one at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// initdb.
    Initdb,
    /// The operator's own program that makes a cluster.
    CustomBootstrap,
    /// A base backup, or what the operator has in its stead.
    Clone,
    /// Starting PostgreSQL as primary.
    StartPrimary,
    /// Starting PostgreSQL as standby.
    StartStandby,
    /// The operator's program that is asked before a promotion.
    PrePromote,
    /// Promotion.
    Promote,
    /// A checkpoint while still serving, before a hand-over.
    Checkpoint,
    /// Stopping in order.
    Stop,
    /// Asking who has received the shutdown checkpoint.
    Confirm,
    /// Asking the other members in an election.
    Poll,
    /// Asking the leader whether our data can follow it.
    CheckRejoin,
    /// Taking back what the leader has not.
    Rewind,
}

impl JobKind {
    /// Whether it makes a data directory.
    #[must_use]
    pub const fn makes_data(self) -> bool {
        matches!(self, Self::Initdb | Self::CustomBootstrap | Self::Clone)
    }
}

/// The answer to "can our data follow this leader?".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejoin {
    /// Its history contains all that we have.
    Follows,
    /// The same, and our standby does nothing but wait for more.
    Waits,
    /// We have something that it has not.
    Diverged,
}

/// What the other members said when asked in an election.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Poll {
    /// When they were asked.
    pub asked_at: Boottime,
    /// When the last of them had answered or was given up.
    pub answered_at: Boottime,
    /// Our own position, read after their answers: what they said can then only be older, and two candidates under live
    /// WAL cannot both see the other ahead.
    pub own_position: Lsn,
    /// Our own timeline, read with it.
    pub own_timeline: Option<Timeline>,
    /// Those that answered.
    pub peers: Vec<Peer>,
    /// How many did not.
    pub silent: usize,
}

/// A member's answer in an election.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its name.
    pub name: MemberName,
    /// Whether its PostgreSQL is a primary.
    pub primary: bool,
    /// Its position; nothing when its PostgreSQL does not answer.
    pub position: Option<Lsn>,
    /// Its timeline.
    pub timeline: Option<Timeline>,
    /// Whether it may never lead.
    pub nofailover: bool,
    /// Its rank among equals.
    pub failover_priority: i64,
}

impl Rejoin {
    /// Whether the leader's history contains all that we have.
    #[must_use]
    pub const fn fits(self) -> bool {
        matches!(self, Self::Follows | Self::Waits)
    }
}

impl Observation {
    /// Whether the cluster is in maintenance.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.view.config.value.as_ref().is_some_and(|config| config.is_paused())
    }
}

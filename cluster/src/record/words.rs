//! The words for roles and states.

use serde::{Deserialize, Serialize};

/// A member's role as its key tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Running as primary. Members before Patroni 4 write `master`.
    #[serde(alias = "master")]
    Primary,
    /// Holds the lease, promotion has been asked for, production has not been seen.
    Promoted,
    /// A standby.
    Replica,
    /// Holder of the lease of a standby cluster.
    StandbyLeader,
    /// A former primary that was or is being stopped.
    Demoted,
    /// No usable data directory.
    Uninitialized,
    /// A word that this build does not know.
    #[serde(other)]
    Unknown,
}

impl Role {
    /// The word in records and answers.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Promoted => "promoted",
            Self::Replica => "replica",
            Self::StandbyLeader => "standby_leader",
            Self::Demoted => "demoted",
            Self::Uninitialized => "uninitialized",
            Self::Unknown => "unknown",
        }
    }
}

/// The state of a member's PostgreSQL as its key tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PgState {
    /// initdb runs.
    #[serde(rename = "initializing new cluster")]
    Initializing,
    /// initdb or what follows it failed.
    #[serde(rename = "initdb failed")]
    InitdbFailed,
    /// A custom bootstrap command runs.
    #[serde(rename = "running custom bootstrap script")]
    CustomBootstrap,
    /// A custom bootstrap command failed.
    #[serde(rename = "custom bootstrap failed")]
    CustomBootstrapFailed,
    /// A clone is under way.
    #[serde(rename = "creating replica")]
    CreatingReplica,
    /// Accepts connections: the only healthy state.
    #[serde(rename = "running")]
    Running,
    /// Started, not yet accepting connections.
    #[serde(rename = "starting")]
    Starting,
    /// As `starting`, after a custom bootstrap.
    #[serde(rename = "starting after custom bootstrap")]
    StartingAfterCustomBootstrap,
    /// Could not be started.
    #[serde(rename = "start failed")]
    StartFailed,
    /// Restarts.
    #[serde(rename = "restarting")]
    Restarting,
    /// Could not be restarted.
    #[serde(rename = "restart failed")]
    RestartFailed,
    /// Is being stopped.
    #[serde(rename = "stopping")]
    Stopping,
    /// Stopped on purpose.
    #[serde(rename = "stopped")]
    Stopped,
    /// Did not stop when told to.
    #[serde(rename = "stop failed")]
    StopFailed,
    /// Ended unasked.
    #[serde(rename = "crashed")]
    Crashed,
    /// A word that this build does not know, or a server that does not answer.
    #[serde(rename = "unknown", other)]
    Unknown,
}

impl PgState {
    /// The words in records and answers.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Initializing => "initializing new cluster",
            Self::InitdbFailed => "initdb failed",
            Self::CustomBootstrap => "running custom bootstrap script",
            Self::CustomBootstrapFailed => "custom bootstrap failed",
            Self::CreatingReplica => "creating replica",
            Self::Running => "running",
            Self::Starting => "starting",
            Self::StartingAfterCustomBootstrap => "starting after custom bootstrap",
            Self::StartFailed => "start failed",
            Self::Restarting => "restarting",
            Self::RestartFailed => "restart failed",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::StopFailed => "stop failed",
            Self::Crashed => "crashed",
            Self::Unknown => "unknown",
        }
    }
}

//! The cases: what happens, in which modes, and what clients may feel of it.

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The cluster's ttl in every run.
pub const TTL: Duration = Duration::from_secs(5);
/// What a zero in the table means: so much more than the longest gap of a quiet run.
const UNNOTICED: Duration = Duration::from_millis(200);

/// How commits are replicated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Acknowledged when the leader has them.
    Asynchronous,
    /// Acknowledged when the leader and one named replica have them.
    Synchronous,
    /// Acknowledged when the leader and any one of the replicas have them.
    Quorum,
}

impl Mode {
    /// All modes.
    pub const ALL: [Self; 3] = [Self::Asynchronous, Self::Synchronous, Self::Quorum];

    /// As it is written in records and tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Asynchronous => "asynchronous",
            Self::Synchronous => "synchronous",
            Self::Quorum => "quorum",
        }
    }

    /// What the first dynamic configuration says about it.
    #[must_use]
    pub fn dcs(self) -> Value {
        match self {
            Self::Asynchronous => json!({"synchronous_mode": false}),
            Self::Synchronous => json!({"synchronous_mode": true}),
            Self::Quorum => json!({"synchronous_mode": "quorum"}),
        }
    }

    /// How PostgreSQL calls the replicas whose answer a commit waits for; nothing where it waits for none.
    #[must_use]
    pub const fn sync_state(self) -> Option<&'static str> {
        match self {
            Self::Asynchronous => None,
            Self::Synchronous => Some("sync"),
            Self::Quorum => Some("quorum"),
        }
    }
}

/// Whose waiting a case is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Clients of the write port.
    Writers,
    /// Clients of the read port.
    Readers,
}

/// How long clients may wait.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// This long.
    Within(Duration),
    /// Not so long that they would notice.
    Unnoticed,
    /// The case is not about waiting.
    Unbounded,
}

impl Bound {
    const fn seconds(seconds: u64) -> Self {
        Self::Within(Duration::from_secs(seconds))
    }

    const fn millis(millis: u64) -> Self {
        Self::Within(Duration::from_millis(millis))
    }

    /// The longest gap that holds the bound, where a quiet run's longest is `quiet`.
    #[must_use]
    pub fn limit(self, quiet: Duration) -> Option<Duration> {
        match self {
            Self::Within(limit) => Some(limit),
            Self::Unnoticed => Some(quiet + UNNOTICED),
            Self::Unbounded => None,
        }
    }
}

/// Declares the cases once: identifier, name, what it is about, bound.
macro_rules! cases {
    ($($(#[$doc:meta])* $case:ident, $name:literal, $side:ident, $bound:expr;)*) => {
        /// What happens to a cluster.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Case { $($(#[$doc])* $case,)* }

        impl Case {
            /// All cases, in the order of the table.
            pub const ALL: &[Self] = &[$(Self::$case,)*];

            /// As it is written in records and tables.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$case => $name,)* }
            }

            /// Whose waiting it is about.
            #[must_use]
            pub const fn side(self) -> Side {
                match self { $(Self::$case => Side::$side,)* }
            }

            /// How long these may wait.
            #[must_use]
            pub const fn bound(self) -> Bound {
                match self { $(Self::$case => $bound,)* }
            }
        }
    };
}

const TTL_AND_ONE: Bound = Bound::seconds(TTL.as_secs() + 1);

cases! {
    /// Nothing: what the machine itself does to clients.
    Quiet, "quiet", Writers, Bound::Unbounded;
    /// An operator moves the lead.
    Switchover, "planned switchover", Writers, Bound::millis(800);
    /// The leader's postmaster is killed.
    PostmasterKilled, "postmaster killed", Writers, Bound::seconds(1);
    /// The leader's agent is killed.
    AgentKilled, "agent killed", Writers, Bound::Unnoticed;
    /// The leader's agent is killed, and its program cannot be run any more.
    AgentForbidden, "agent killed and kept from starting", Writers, TTL_AND_ONE;
    /// The leader's agent stands still.
    AgentFrozen, "agent frozen", Writers, TTL_AND_ONE;
    /// The leader's host loses its power: no word from it any more.
    MemberLost, "whole member lost", Writers, TTL_AND_ONE;
    /// All processes of the leader are killed, and its service manager starts them again.
    ProcessesKilled, "all processes killed", Writers, Bound::seconds(2);
    /// The leader's keeper and agent stand still; PostgreSQL and the sentinel do not.
    KeeperAndAgentFrozen, "keeper and agent frozen", Writers, TTL_AND_ONE;
    /// The leader's host reaches nobody.
    Partitioned, "leader partitioned", Writers, TTL_AND_ONE;
    /// The leader's host reaches everybody but etcd.
    CutFromEtcd, "leader cut from etcd only", Writers, Bound::Unnoticed;
    /// Everything of the leader stands still, and goes on later.
    MemberFrozen, "member frozen and thawed", Writers, TTL_AND_ONE;
    /// The leader of etcd is killed.
    EtcdLeaderKilled, "etcd leader killed", Writers, Bound::Unnoticed;
    /// The leader of etcd stands still.
    EtcdLeaderFrozen, "etcd leader frozen", Writers, Bound::Unnoticed;
    /// Two of three etcd members are killed.
    EtcdQuorumLost, "etcd quorum lost", Writers, Bound::Unnoticed;
    /// All processes of a replica are killed.
    ReplicaKilled, "replica killed", Readers, Bound::millis(500);
    /// No word from a replica's host any more.
    ReplicaSilent, "replica silent", Readers, Bound::seconds(3);
    /// All processes of the synchronous replica are killed.
    SyncStandbyKilled, "synchronous standby killed", Writers, Bound::seconds(1);
    /// No word from the synchronous replica's host any more.
    SyncStandbySilent, "synchronous standby silent", Writers, Bound::seconds(4);
    /// All processes of one of the replicas of the quorum are killed.
    QuorumStandbyKilled, "quorum standby killed", Writers, Bound::Unnoticed;
    /// The proxy reads its configuration again, and later the leader's host reaches nobody.
    ReloadThenPartitioned, "proxy reloaded then leader partitioned", Writers, TTL_AND_ONE;
    /// Each member is stopped and started.
    RestartedOneByOne, "all members restarted one by one", Writers, Bound::seconds(1);
    /// Replication stands still, and then the leader's host loses its power.
    ReplicationCutThenLost, "replication cut then leader lost", Writers, Bound::Unbounded;
}

impl Case {
    /// Whether it is one in this mode.
    #[must_use]
    pub const fn applies_in(self, mode: Mode) -> bool {
        match self {
            Self::SyncStandbyKilled | Self::SyncStandbySilent => matches!(mode, Mode::Synchronous),
            Self::QuorumStandbyKilled => matches!(mode, Mode::Quorum),
            _ => true,
        }
    }

    /// Whether rows that were acknowledged through the proxy may be missing afterwards: only where commits wait for no
    /// replica, and another member takes over from a leader that did not hand over.
    #[must_use]
    pub const fn may_lose_rows_in(self, mode: Mode) -> bool {
        let takes_over = matches!(
            self,
            Self::AgentForbidden
                | Self::AgentFrozen
                | Self::MemberLost
                | Self::ProcessesKilled
                | Self::KeeperAndAgentFrozen
                | Self::Partitioned
                | Self::MemberFrozen
                | Self::ReloadThenPartitioned
                | Self::ReplicationCutThenLost
        );
        takes_over && matches!(mode, Mode::Asynchronous)
    }

    /// Whether clients on the leader's own host may be answered by it after another leads: its backends go on at the
    /// same moment as whatever would end them.
    #[must_use]
    pub const fn may_answer_after_thaw(self) -> bool {
        matches!(self, Self::MemberFrozen)
    }

    /// Whether the leader goes on by itself, out of everybody's reach, until its own deadline.
    #[must_use]
    pub const fn ends_at_deadline(self) -> bool {
        matches!(self, Self::Partitioned | Self::ReloadThenPartitioned)
    }

    /// The case of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|case| case.name() == name)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_names_one_case() {
        for case in Case::ALL {
            assert_eq!(Case::named(case.name()), Some(*case));
        }
    }

    #[test]
    fn nothing_may_be_lost_where_commits_wait_for_a_replica() {
        for case in Case::ALL {
            assert!(!case.may_lose_rows_in(Mode::Synchronous) && !case.may_lose_rows_in(Mode::Quorum));
        }
    }

    #[test]
    fn unnoticed_is_measured_against_a_quiet_run() {
        let quiet = Duration::from_millis(60);
        assert_eq!(Bound::Unnoticed.limit(quiet), Some(Duration::from_millis(260)));
        assert_eq!(TTL_AND_ONE.limit(quiet), Some(Duration::from_secs(6)));
    }
}

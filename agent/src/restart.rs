//! What an operator orders: restarts, at once or at a time and only under conditions; a new copy of the leader's data; the
//! configuration read again.

use std::time::Duration;

use jiff::Timestamp;
use pgherd_cluster::record::Role;
use serde_json::Value;
use tokio::sync::oneshot;

use crate::status::MemberStatus;

/// How late a scheduled restart may be. One whose time passed while nobody could carry it out does not come as a surprise
/// hours later.
const LATENESS_MAX: Duration = Duration::from_secs(10);

/// What must be so for a restart to be carried out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conditions {
    /// The member's role.
    pub role: Option<Role>,
    /// PostgreSQL is older than this, as in `server_version_num`.
    pub older_than: Option<u32>,
    /// A parameter has changed that only a restart puts in force.
    pub pending: bool,
}

impl Conditions {
    /// Whether `status` meets them; `pending` says whether a parameter waits for a restart.
    #[must_use]
    pub fn hold(&self, status: &MemberStatus, pending: bool) -> bool {
        let version = status.server.as_ref().map(|server| server.server_version);
        self.role.is_none_or(|role| role == status.role)
            && self
                .older_than
                .is_none_or(|limit| version.is_some_and(|version| version < limit))
            && (!self.pending || pending)
    }
}

/// A restart at a time to come.
#[derive(Clone, Debug, PartialEq)]
pub struct Scheduled {
    /// When.
    pub at: Timestamp,
    /// Under which conditions.
    pub conditions: Conditions,
    /// The request in the words of the member key, with the start of the postmaster that is meant: one that was started
    /// later needs no restart.
    pub document: Value,
}

/// What a scheduled restart comes to at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Its time has not come.
    NotYet,
    /// Its time has come.
    Now,
    /// Its time has passed while it could not be carried out.
    TooLate,
    /// PostgreSQL has been started anew since.
    Needless,
}

impl Scheduled {
    /// What it comes to at `now`, with the postmaster that runs since `started`.
    #[must_use]
    pub fn due(&self, now: Timestamp, started: Option<&str>) -> Due {
        let meant = self.document.get("postmaster_start_time").and_then(Value::as_str);
        if let (Some(started), Some(meant)) = (started, meant)
            && started != meant
        {
            return Due::Needless;
        }
        let late = now.duration_since(self.at);
        if late.is_negative() {
            Due::NotYet
        } else if late.unsigned_abs() <= LATENESS_MAX {
            Due::Now
        } else {
            Due::TooLate
        }
    }
}

/// What an operator orders.
#[derive(Debug)]
pub enum Order {
    /// Restart now.
    Now {
        /// Under these conditions.
        conditions: Conditions,
        /// Told what became of it.
        reply: oneshot::Sender<Restarted>,
    },
    /// Restart at a time.
    At {
        /// When, and under which conditions; the start of the postmaster is filled in.
        scheduled: Scheduled,
        /// Told whether none was scheduled before.
        reply: oneshot::Sender<bool>,
    },
    /// Take a scheduled restart back.
    TakeBack {
        /// Told whether there was one.
        reply: oneshot::Sender<bool>,
    },
    /// Replace what is in the data directory by a new copy of the leader's. What was there is moved aside.
    Reinitialize {
        /// Drop what is under way instead of refusing.
        force: bool,
        /// Told whether it begins.
        reply: oneshot::Sender<Result<(), NotBegun>>,
    },
    /// Put the configuration in force again, as a SIGHUP does.
    Reload,
}

/// Why a member is not cloned anew.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotBegun {
    /// There is nobody to clone from.
    #[error("Cluster has no leader, can not reinitialize")]
    NoLeader,
    /// Others clone from this member.
    #[error("I am the leader, can not reinitialize")]
    Leads,
    /// Something else is under way.
    #[error("{0} already in progress")]
    Busy(String),
}

/// What became of a restart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Restarted {
    /// PostgreSQL has been restarted and answers.
    Done,
    /// The conditions were not met.
    Refused,
    /// Something else is under way.
    Busy(String),
    /// It did not come up again, or was given up before that.
    Failed,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::rest::fixtures::{leader_status, replica_status};
    use pgherd_cluster::clock::Boottime;

    #[test]
    fn every_condition_must_hold() {
        let (leader, replica) = (leader_status(Boottime::now()), replica_status(Boottime::now()));
        let any = Conditions::default();
        assert!(any.hold(&leader, false) && any.hold(&replica, false));
        let role = Conditions {
            role: Some(Role::Replica),
            ..Conditions::default()
        };
        assert!(!role.hold(&leader, true) && role.hold(&replica, false));
        let version = leader
            .server
            .as_ref()
            .map(|server| server.server_version)
            .unwrap_or_default();
        for (older_than, expected) in [(version, false), (version + 1, true)] {
            let older = Conditions {
                older_than: Some(older_than),
                ..Conditions::default()
            };
            assert_eq!(older.hold(&leader, false), expected);
            let silent = MemberStatus {
                server: None,
                ..leader.clone()
            };
            assert!(!older.hold(&silent, false), "nobody knows its version");
        }
        let pending = Conditions {
            pending: true,
            ..Conditions::default()
        };
        assert!(!pending.hold(&leader, false) && pending.hold(&leader, true));
    }

    #[test]
    fn a_schedule_is_due_for_a_moment_and_for_one_postmaster() {
        let scheduled = Scheduled {
            at: "2040-01-01T00:00:00Z".parse().expect("a time"),
            conditions: Conditions::default(),
            document: json!({"postmaster_start_time": "then"}),
        };
        let due = |now: &str, started| scheduled.due(now.parse().expect("a time"), started);
        assert_eq!(due("2039-12-31T23:59:59Z", Some("then")), Due::NotYet);
        assert_eq!(due("2040-01-01T00:00:00Z", Some("then")), Due::Now);
        assert_eq!(due("2040-01-01T00:00:10Z", None), Due::Now);
        assert_eq!(due("2040-01-01T00:00:11Z", Some("then")), Due::TooLate);
        assert_eq!(due("2039-12-31T23:59:59Z", Some("later")), Due::Needless);
    }
}

//! What is stored under the keys: records that read and write Patroni's JSON exactly.
//!
//! Readers tolerate what Patroni's readers tolerate: unknown fields, missing fields, texts that are not JSON. Writers emit
//! compact JSON in Patroni's field order.

mod address;
mod config;
mod history;
mod member;
mod slots;
mod standby_cluster;
mod words;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::address::Address;
pub use self::config::DynamicConfig;
pub use self::history::{History, HistoryEntry};
pub use self::member::MemberRecord;
pub use self::slots::{FailoverSlots, IgnoredSlot, PermanentSlot, PermanentSlots};
pub use self::standby_cluster::StandbyCluster;
pub use self::words::{PgState, Role};
use crate::name::{Lsn, MemberName};

/// The value of `status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Status {
    /// The leader's position when it last wrote this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optime: Option<Lsn>,
    /// Positions of the slots that the leader keeps, its own name among them.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub slots: BTreeMap<String, Lsn>,
    /// Slots to keep for members that were here lately.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub retain_slots: Vec<String>,
    /// What Patroni's readers pass over.
    #[serde(skip_serializing_if = "OurStatus::is_empty")]
    pub pgherd: OurStatus,
}

/// What a leader of ours says in `status` beside Patroni's fields.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OurStatus {
    /// The logical slots that PostgreSQL itself is to copy to the standbys.
    #[serde(default)]
    pub failover_slots: Vec<String>,
}

impl OurStatus {
    fn is_empty(&self) -> bool {
        self.failover_slots.is_empty()
    }
}

impl Status {
    /// Reads the value; the older forms are a bare number, and `slots` or `retain_slots` as JSON text.
    #[must_use]
    pub fn parse(value: &str) -> Self {
        let Ok(json) = serde_json::from_str::<Value>(value) else {
            return Self::default();
        };
        let object = match json {
            Value::Number(number) => {
                return Self {
                    optime: number.as_u64().map(Lsn),
                    ..Self::default()
                };
            }
            Value::Object(object) => object,
            _ => return Self::default(),
        };
        let field = |name: &str| match object.get(name) {
            Some(Value::String(text)) => serde_json::from_str(text).ok(),
            other => other.cloned(),
        };
        Self {
            optime: field("optime").and_then(|value| value.as_u64()).map(Lsn),
            slots: field("slots")
                .and_then(|value| serde_json::from_value(value).ok())
                .unwrap_or_default(),
            retain_slots: field("retain_slots")
                .and_then(|value| serde_json::from_value(value).ok())
                .unwrap_or_default(),
            pgherd: field("pgherd")
                .and_then(|value| serde_json::from_value(value).ok())
                .unwrap_or_default(),
        }
    }
}

/// The value of `sync`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncState {
    /// Who wrote it; nothing while synchronous mode is not active yet.
    #[serde(default)]
    pub leader: Option<String>,
    /// How many voters a candidate needs beside itself; 0 in priority mode.
    #[serde(default)]
    pub quorum: u32,
    /// Sorted names, with commas and without spaces.
    #[serde(default)]
    pub sync_standby: Option<String>,
}

impl SyncState {
    /// Whether `name` is listed. PostgreSQL compares application names without case, so does this.
    #[must_use]
    pub fn lists(&self, name: &MemberName) -> bool {
        let listed = self.sync_standby.as_deref().unwrap_or_default();
        listed
            .split(',')
            .any(|standby| standby.eq_ignore_ascii_case(name.as_str()))
    }

    /// The listed standbys, as they are spelled.
    pub fn standbys(&self) -> impl Iterator<Item = &str> {
        let listed = self.sync_standby.as_deref().unwrap_or_default();
        listed.split(',').map(str::trim).filter(|standby| !standby.is_empty())
    }

    /// Whether synchronous mode is active.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.leader.as_deref().is_some_and(|leader| !leader.is_empty())
    }
}

/// The value of `failover`: a request for a switchover (with `leader`) or a manual failover (without).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailoverRequest {
    /// Who is to give the lease up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<String>,
    /// Who is to take it; anybody when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<String>,
    /// When, as ISO 8601; at once when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheduled_at: Option<String>,
}

impl FailoverRequest {
    /// Reads the value; nothing is requested by `{}`, an empty value, or garbage. The old text `leader:candidate` is read.
    #[must_use]
    pub fn parse(value: &str) -> Option<Self> {
        let request = match serde_json::from_str::<Self>(value) {
            Ok(request) => request,
            Err(_) => {
                let (leader, member) = value.split_once(':')?;
                let some = |text: &str| (!text.trim().is_empty()).then(|| text.trim().to_owned());
                Self {
                    leader: some(leader),
                    member: some(member),
                    scheduled_at: None,
                }
            }
        };
        (request != Self::default()).then_some(request)
    }
}

#[cfg(test)]
mod tests;

//! A member's key and what can be read from it.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::{Address, PgState, Role};
use crate::http::Endpoint;
use crate::name::{Lsn, Timeline};

/// The value of a member's key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// `postgres://HOST:PORT/DBNAME`, without user and password.
    pub conn_url: String,
    /// `http(s)://HOST:PORT/patroni`.
    pub api_url: String,
    /// The state of its PostgreSQL.
    #[serde(default = "unknown_state", deserialize_with = "lenient")]
    pub state: PgState,
    /// Its role.
    #[serde(default = "unknown_role", deserialize_with = "lenient")]
    pub role: Role,
    /// The Patroni release that it speaks.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "lenient_option"
    )]
    pub version: Option<String>,
    /// The pgherd release that it is, absent for Patroni's members.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "lenient_option"
    )]
    pub pgherd: Option<String>,
    /// A pooler beside PostgreSQL.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "lenient_option"
    )]
    pub proxy_url: Option<String>,
    /// `false` while a new leader has not finished its first checkpoint, absent otherwise.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "lenient_option"
    )]
    pub checkpoint_after_promote: Option<bool>,
    /// Tags, as configured.
    #[serde(default, skip_serializing_if = "Map::is_empty", deserialize_with = "lenient_map")]
    pub tags: Map<String, Value>,
    /// Whether a changed parameter waits for a restart.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "lenient_option"
    )]
    pub pending_restart: Option<bool>,
    /// Which parameters, with old and new value.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "lenient_option"
    )]
    pub pending_restart_reason: Option<Value>,
    /// Leader: flushed position. Replica: the greater of received and replayed.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "lenient_option"
    )]
    pub xlog_location: Option<Lsn>,
    /// A replica's replayed position.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "lenient_option"
    )]
    pub replay_lsn: Option<Lsn>,
    /// A replica's received position.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "lenient_option"
    )]
    pub receive_lsn: Option<Lsn>,
    /// `streaming` or `in archive recovery`.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "lenient_option"
    )]
    pub replication_state: Option<String>,
    /// The timeline that it is on.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "lenient_option"
    )]
    pub timeline: Option<Timeline>,
    /// A restart that waits for its time.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "lenient_option"
    )]
    pub scheduled_restart: Option<Value>,
    /// Present once the member has seen the pause.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "lenient_option"
    )]
    pub pause: Option<bool>,
}

fn unknown_state() -> PgState {
    PgState::Unknown
}

fn unknown_role() -> Role {
    Role::Unknown
}

/// A field of a wrong type counts as absent, so that one odd member does not hide itself whole.
fn lenient<'de, D: Deserializer<'de>, T: serde::de::DeserializeOwned>(from: D) -> Result<T, D::Error> {
    let value = Value::deserialize(from)?;
    serde_json::from_value(value)
        .or_else(|_| serde_json::from_value(Value::String("unknown".to_owned())))
        .map_err(serde::de::Error::custom)
}

fn lenient_option<'de, D: Deserializer<'de>, T: serde::de::DeserializeOwned>(from: D) -> Result<Option<T>, D::Error> {
    let value = Value::deserialize(from)?;
    Ok(serde_json::from_value(value).ok())
}

fn lenient_map<'de, D: Deserializer<'de>>(from: D) -> Result<Map<String, Value>, D::Error> {
    Ok(match Value::deserialize(from)? {
        Value::Object(map) => map,
        _ => Map::new(),
    })
}

impl MemberRecord {
    /// A record with the two addresses and nothing known.
    #[must_use]
    pub fn new(conn_url: String, api_url: String) -> Self {
        Self {
            conn_url,
            api_url,
            state: PgState::Unknown,
            role: Role::Unknown,
            version: None,
            pgherd: None,
            proxy_url: None,
            checkpoint_after_promote: None,
            tags: Map::new(),
            pending_restart: None,
            pending_restart_reason: None,
            xlog_location: None,
            replay_lsn: None,
            receive_lsn: None,
            replication_state: None,
            timeline: None,
            scheduled_restart: None,
            pause: None,
        }
    }

    /// Reads a member's value. The ancient plain form `postgres://...?application_name=<api_url>` is read too; anything
    /// else that is not JSON counts as a member of which nothing is known.
    #[must_use]
    pub fn parse(value: &str) -> Self {
        if let Ok(record) = serde_json::from_str(value) {
            return record;
        }
        match value.split_once("?application_name=") {
            Some((conn_url, api_url)) if value.starts_with("postgres") => {
                Self::new(conn_url.to_owned(), api_url.to_owned())
            }
            _ => Self::new(String::new(), String::new()),
        }
    }

    /// Where its PostgreSQL listens.
    #[must_use]
    pub fn postgres_address(&self) -> Option<Address> {
        Address::of_url(&self.conn_url, 5432)
    }

    /// Where its REST interface listens.
    #[must_use]
    pub fn api_address(&self) -> Option<Address> {
        Address::of_url(&self.api_url, 8008)
    }

    /// The same with the way to speak to it.
    #[must_use]
    pub fn api_endpoint(&self) -> Option<Endpoint> {
        Endpoint::of(&self.api_url)
    }

    /// A tag that is set to something other than false, 0 or nothing. Tags may come as texts.
    #[must_use]
    pub fn tag(&self, name: &str) -> bool {
        match self.tags.get(name) {
            Some(Value::Bool(set)) => *set,
            Some(Value::Number(number)) => number.as_f64() != Some(0.0),
            Some(Value::String(text)) => !matches!(text.to_lowercase().as_str(), "" | "false" | "off" | "no" | "0"),
            Some(Value::Null) | None => false,
            Some(_) => true,
        }
    }

    /// Whether it may never become leader: the boolean tag wins over the priority.
    #[must_use]
    pub fn nofailover(&self) -> bool {
        if self.tags.contains_key("nofailover") {
            return self.tag("nofailover");
        }
        self.failover_priority() <= 0
    }

    /// The member that it is to stream from; the leader where there is none.
    #[must_use]
    pub fn replicatefrom(&self) -> Option<&str> {
        let source = self.tags.get("replicatefrom").and_then(Value::as_str);
        source.map(str::trim).filter(|source| !source.is_empty())
    }

    /// Its rank among equals in an election; 1 unless set.
    #[must_use]
    pub fn failover_priority(&self) -> i64 {
        match self.tags.get("failover_priority") {
            Some(Value::Number(number)) => number.as_i64().unwrap_or(1),
            Some(Value::String(text)) => text.parse().unwrap_or(1),
            _ => 1,
        }
    }
}

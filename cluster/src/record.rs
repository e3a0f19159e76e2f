//! What is stored under the keys: records that read and write Patroni's JSON exactly.
//!
//! Readers tolerate what Patroni's readers tolerate: unknown fields, missing fields, texts that are not JSON. Writers emit
//! compact JSON in Patroni's field order.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::name::{Lsn, MemberName, Timeline};
use crate::timing::{LeaseTiming, TimingError};

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

/// The parts of a member's address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// A name or a literal address, without brackets.
    pub host: String,
    /// The TCP port.
    pub port: u16,
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl Address {
    /// Reads `host:port`, `[v6]:port` or a bare host with `port_default`.
    #[must_use]
    pub fn parse(text: &str, port_default: u16) -> Option<Self> {
        if let Some(rest) = text.strip_prefix('[') {
            let (host, rest) = rest.split_once(']')?;
            let port = match rest.strip_prefix(':') {
                Some(port) => port.parse().ok()?,
                None if rest.is_empty() => port_default,
                None => return None,
            };
            return Some(Self {
                host: host.to_owned(),
                port,
            });
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) if !host.contains(':') => (host, port.parse().ok()?),
            Some(_) | None => (text, port_default), // A bare IPv6 address has several colons.
        };
        (!host.is_empty()).then(|| Self {
            host: host.to_owned(),
            port,
        })
    }

    fn of_url(url: &str, port_default: u16) -> Option<Self> {
        let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
        let authority = rest.split(['/', '?']).next()?;
        let host_port = authority.rsplit_once('@').map_or(authority, |(_, host_port)| host_port);
        Self::parse(host_port, port_default)
    }
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

/// One ended timeline in `history`: `[timeline, lsn, reason, timestamp?, new_leader?]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistoryEntry {
    /// The timeline that ended.
    pub timeline: Timeline,
    /// Where it ended.
    pub lsn: Lsn,
    /// Why, in PostgreSQL's words.
    pub reason: String,
    /// When, as ISO 8601.
    pub timestamp: Option<String>,
    /// Who led next.
    pub new_leader: Option<String>,
}

impl HistoryEntry {
    fn parse(value: &Value) -> Option<Self> {
        let row = value.as_array()?;
        let text = |index: usize| row.get(index).and_then(Value::as_str).map(str::to_owned);
        Some(Self {
            timeline: Timeline(u32::try_from(row.first()?.as_u64()?).ok()?),
            lsn: Lsn(row.get(1)?.as_u64()?),
            reason: text(2).unwrap_or_default(),
            timestamp: text(3),
            new_leader: text(4),
        })
    }

    /// The array that is stored.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut row = vec![
            Value::from(self.timeline.0),
            Value::from(self.lsn.0),
            Value::from(self.reason.clone()),
        ];
        if let Some(timestamp) = &self.timestamp {
            row.push(Value::from(timestamp.clone()));
            if let Some(leader) = &self.new_leader {
                row.push(Value::from(leader.clone()));
            }
        }
        Value::Array(row)
    }
}

/// The value of `history`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History(pub Vec<HistoryEntry>);

impl History {
    /// Reads the value; rows that are not understood are left out.
    #[must_use]
    pub fn parse(value: &str) -> Self {
        let rows: Vec<Value> = serde_json::from_str(value).unwrap_or_default();
        Self(rows.iter().filter_map(HistoryEntry::parse).collect())
    }

    /// The JSON that is stored and answered.
    #[must_use]
    pub fn to_json(&self) -> Value {
        Value::Array(self.0.iter().map(HistoryEntry::to_json).collect())
    }

    /// The timeline that the cluster is on: one past the last ended one.
    #[must_use]
    pub fn timeline(&self) -> Timeline {
        Timeline(self.0.last().map_or(1, |entry| entry.timeline.0 + 1))
    }
}

/// The dynamic configuration: the document as it is, unknown keys included, with typed readers for what is acted on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DynamicConfig(Map<String, Value>);

impl DynamicConfig {
    /// Wraps a document.
    #[must_use]
    pub const fn new(document: Map<String, Value>) -> Self {
        Self(document)
    }

    /// Reads the value; a document that is not a JSON object counts as empty.
    #[must_use]
    pub fn parse(value: &str) -> Self {
        Self(serde_json::from_str(value).unwrap_or_default())
    }

    /// The document.
    #[must_use]
    pub const fn document(&self) -> &Map<String, Value> {
        &self.0
    }

    /// The three times, with Patroni's defaults for what is absent.
    ///
    /// # Errors
    /// When they cannot work together.
    pub fn timing(&self) -> Result<LeaseTiming, TimingError> {
        let (ttl, loop_wait, retry_timeout) = self.times();
        LeaseTiming::new(ttl, loop_wait, retry_timeout)
    }

    /// The three times, adjusted as Patroni adjusts them where they cannot work together: every reader gets the same.
    #[must_use]
    pub fn timing_in_force(&self) -> LeaseTiming {
        let (ttl, loop_wait, retry_timeout) = self.times();
        LeaseTiming::new(ttl, loop_wait, retry_timeout)
            .unwrap_or_else(|_| LeaseTiming::adjusted(ttl, loop_wait, retry_timeout))
    }

    fn times(&self) -> (Duration, Duration, Duration) {
        let default = LeaseTiming::PATRONI_DEFAULT;
        (
            self.seconds("ttl").unwrap_or(default.ttl()),
            self.seconds("loop_wait").unwrap_or(default.loop_wait()),
            self.seconds("retry_timeout").unwrap_or(default.retry_timeout()),
        )
    }

    /// How far behind `status.optime` a candidate may be, in bytes.
    #[must_use]
    pub fn maximum_lag_on_failover(&self) -> u64 {
        self.number("maximum_lag_on_failover").unwrap_or(1_048_576)
    }

    /// Whether the cluster is in maintenance.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.flag("pause")
    }

    /// Whether candidates must be on the cluster's timeline.
    #[must_use]
    pub fn check_timeline(&self) -> bool {
        self.flag("check_timeline")
    }

    /// How many entries `history` keeps; 0 for all.
    #[must_use]
    pub fn max_timelines_history(&self) -> usize {
        self.number("max_timelines_history")
            .and_then(|n| usize::try_from(n).ok())
            .unwrap_or(0)
    }

    /// How long the slot of a member that has gone is kept, 30 minutes unless set.
    #[must_use]
    pub fn member_slots_ttl(&self) -> Duration {
        self.seconds("member_slots_ttl").unwrap_or(Duration::from_secs(1800))
    }

    /// The `postgresql` section, empty when absent.
    #[must_use]
    pub fn postgresql(&self) -> Map<String, Value> {
        match self.0.get("postgresql") {
            Some(Value::Object(section)) => section.clone(),
            _ => Map::new(),
        }
    }

    /// `postgresql.parameters`, empty when absent.
    #[must_use]
    pub fn parameters(&self) -> Map<String, Value> {
        match self.0.get("postgresql").and_then(|section| section.get("parameters")) {
            Some(Value::Object(parameters)) => parameters.clone(),
            _ => Map::new(),
        }
    }

    fn flag(&self, name: &str) -> bool {
        match self.0.get(name) {
            Some(Value::Bool(set)) => *set,
            Some(Value::String(text)) => matches!(text.to_lowercase().as_str(), "on" | "true" | "yes" | "1"),
            Some(Value::Number(number)) => number.as_i64() == Some(1),
            _ => false,
        }
    }

    fn number(&self, name: &str) -> Option<u64> {
        match self.0.get(name)? {
            Value::Number(number) => number.as_u64(),
            Value::String(text) => text.trim().parse().ok(),
            _ => None,
        }
    }

    fn seconds(&self, name: &str) -> Option<Duration> {
        if let Some(seconds) = self.number(name) {
            return Some(Duration::from_secs(seconds));
        }
        let text = self.0.get(name)?.as_str()?.trim();
        let unit_at = text.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = text.get(..unit_at)?.parse().ok()?;
        let unit = text.get(unit_at..)?.trim();
        let millis = match unit {
            "ms" => 1,
            "s" => 1_000,
            "min" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return None,
        };
        Some(Duration::from_millis(number.checked_mul(millis)?))
    }
}

#[cfg(test)]
mod tests;

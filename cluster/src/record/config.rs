//! The dynamic configuration.

use std::time::Duration;

use serde_json::{Map, Value};

use super::StandbyCluster;
use crate::timing::{LeaseTiming, TimingError};

/// Longer times count as this one, a century: others are added to them and multiplied, and clocks have an end.
const TIME_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

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

    /// How long a leader's PostgreSQL may take to start before another member that can take over does; 0 for not at all, five
    /// minutes unless set.
    #[must_use]
    pub fn primary_start_timeout(&self) -> Duration {
        self.seconds("primary_start_timeout")
            .or_else(|| self.seconds("master_start_timeout"))
            .unwrap_or(Duration::from_secs(300))
    }

    /// How long a leader's PostgreSQL may take to stop in synchronous mode, where it is said and not 0.
    #[must_use]
    pub fn primary_stop_timeout(&self) -> Option<Duration> {
        self.seconds("primary_stop_timeout")
            .or_else(|| self.seconds("master_stop_timeout"))
            .filter(|limit| !limit.is_zero())
    }

    /// Whether the cluster is in maintenance.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.flag("pause")
    }

    /// Whether a leader without etcd may go on while all members vouch for it.
    #[must_use]
    pub fn is_failsafe(&self) -> bool {
        self.flag("failsafe_mode")
    }

    /// Whether the cluster follows another one: its leader is a standby.
    #[must_use]
    pub fn is_standby_cluster(&self) -> bool {
        self.standby_cluster().is_some()
    }

    /// The cluster that this one follows; nothing unless the section names a host, a port or a `restore_command`.
    #[must_use]
    pub fn standby_cluster(&self) -> Option<StandbyCluster> {
        StandbyCluster::read(self.0.get("standby_cluster")?.as_object()?)
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
            return Some(Duration::from_secs(seconds).min(TIME_MAX));
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
        Some(Duration::from_millis(number.checked_mul(millis)?).min(TIME_MAX))
    }
}

//! What the dynamic configuration says about synchronous replication.

use pgherd_cluster::record::DynamicConfig;
use serde_json::Value;

/// Whether and how commits wait for standbys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SyncMode {
    /// They do not, as far as we manage it.
    #[default]
    Off,
    /// For all standbys that `/sync` lists; only those may be promoted.
    Priority,
    /// For a number of standbys out of those that `/sync` lists; a candidate needs votes.
    Quorum,
}

/// The settings of synchronous replication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncSettings {
    /// `synchronous_mode`; off in a standby cluster.
    pub mode: SyncMode,
    /// `synchronous_mode_strict`: rather no commit than one without a standby.
    pub strict: bool,
    /// `synchronous_node_count`: how many standbys a commit is to be on; at least 1.
    pub node_count: u32,
    /// `maximum_lag_on_syncnode`, in bytes; nothing while it is not above 0.
    pub lag_max: Option<u64>,
}

impl Default for SyncSettings {
    fn default() -> Self {
        Self {
            mode: SyncMode::Off,
            strict: false,
            node_count: 1,
            lag_max: None,
        }
    }
}

impl SyncSettings {
    /// Reads them; what is absent or makes no sense counts as Patroni's default.
    #[must_use]
    pub fn of(config: &DynamicConfig) -> Self {
        let value = |name: &str| config.document().get(name);
        let number = |name: &str| value(name).and_then(integer);
        let quorum = |value: &Value| value.as_str().is_some_and(|text| text.eq_ignore_ascii_case("quorum"));
        let mode = match value("synchronous_mode") {
            _ if config.is_standby_cluster() => SyncMode::Off,
            Some(value) if quorum(value) => SyncMode::Quorum,
            Some(value) if is_on(value) => SyncMode::Priority,
            Some(_) | None => SyncMode::Off,
        };
        Self {
            mode,
            strict: value("synchronous_mode_strict").is_some_and(is_on),
            node_count: number("synchronous_node_count")
                .and_then(|count| u32::try_from(count).ok())
                .filter(|count| *count > 0)
                .unwrap_or(1),
            lag_max: number("maximum_lag_on_syncnode")
                .and_then(|bytes| u64::try_from(bytes).ok())
                .filter(|bytes| *bytes > 0),
        }
    }
}

fn is_on(value: &Value) -> bool {
    match value {
        Value::Bool(set) => *set,
        Value::String(text) => matches!(text.to_lowercase().as_str(), "on" | "true" | "yes" | "1"),
        Value::Number(number) => number.as_i64() == Some(1),
        _ => false,
    }
}

fn integer(value: &Value) -> Option<i64> {
    match value {
        Value::Number(number) => number.as_i64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

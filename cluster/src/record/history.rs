//! The value of `history`.

use serde_json::Value;

use crate::name::{Lsn, Timeline};

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
        if self.timestamp.is_some() || self.new_leader.is_some() {
            row.push(Value::from(self.timestamp.clone()));
        }
        row.extend(self.new_leader.clone().map(Value::from));
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
        Timeline(self.0.last().map_or(1, |entry| entry.timeline.0.saturating_add(1)))
    }
}

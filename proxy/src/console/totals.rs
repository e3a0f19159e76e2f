//! What was counted, as PgBouncer's STATS tell it: a row for each listener, in the place of a database.
//!
//! Bytes are counted by route, and the relay looks at nothing else, so what they were is 0.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pgherd_cluster::clock::Boottime;

use super::columns::{column, total};
use super::show::{Row, number, text};
use crate::shared::Shared;
use crate::wire::console::{Cell, Column, Kind};

/// PgBouncer's `stats_period`: what averages are of.
const PERIOD: Duration = Duration::from_secs(60);

pub(super) const STATS: &[Column] = &[
    column("database", Kind::Text),
    total("total_server_assignment_count"),
    total("total_xact_count"),
    total("total_query_count"),
    total("total_received"),
    total("total_sent"),
    total("total_xact_time"),
    total("total_query_time"),
    total("total_wait_time"),
    total("total_client_parse_count"),
    total("total_server_parse_count"),
    total("total_bind_count"),
    total("avg_server_assignment_count"),
    total("avg_xact_count"),
    total("avg_query_count"),
    total("avg_recv"),
    total("avg_sent"),
    total("avg_xact_time"),
    total("avg_query_time"),
    total("avg_wait_time"),
    total("avg_client_parse_count"),
    total("avg_server_parse_count"),
    total("avg_bind_count"),
];

/// Of totals and averages alike.
pub(super) const STATS_TOTALS: &[Column] = &[
    column("database", Kind::Text),
    total("server_assignment_count"),
    total("xact_count"),
    total("query_count"),
    total("bytes_received"),
    total("bytes_sent"),
    total("xact_time"),
    total("query_time"),
    total("wait_time"),
    total("client_parse_count"),
    total("server_parse_count"),
    total("bind_count"),
];

pub(super) const TOTALS: &[Column] = &[column("name", Kind::Text), total("value")];

/// The names of what is summed in [`TOTALS`].
const SUMMED: [&str; 11] = [
    "server_assignment_count",
    "xact_count",
    "query_count",
    "client_bytes",
    "server_bytes",
    "xact_time",
    "query_time",
    "wait_time",
    "ps_client_parse_count",
    "ps_server_parse_count",
    "ps_bind_count",
];

/// What one listener has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    sessions: u64,
    received: u64,
    sent: u64,
    /// What clients have waited for their sessions, in microseconds.
    waited: u64,
}

impl Count {
    fn cells(self) -> [u64; 11] {
        let Self {
            sessions,
            received,
            sent,
            waited,
        } = self;
        [sessions, 0, 0, received, sent, 0, 0, waited, 0, 0, 0]
    }

    fn add(self, other: Self) -> Self {
        Self {
            sessions: self.sessions + other.sessions,
            received: self.received + other.received,
            sent: self.sent + other.sent,
            waited: self.waited + other.waited,
        }
    }

    /// Per second, and the time per session, of what came since `before`.
    fn average(self, before: Self, over: Duration) -> Self {
        let per_second = |now: u64, before: u64| {
            let micros = over.as_micros().max(1);
            u64::try_from(u128::from(now.saturating_sub(before)) * 1_000_000 / micros).unwrap_or(u64::MAX)
        };
        let sessions = self.sessions.saturating_sub(before.sessions);
        Self {
            sessions: per_second(self.sessions, before.sessions),
            received: per_second(self.received, before.received),
            sent: per_second(self.sent, before.sent),
            waited: self.waited.saturating_sub(before.waited) / sessions.max(1),
        }
    }
}

/// What was counted, and when.
#[derive(Clone, Debug)]
struct Snapshot {
    at: Boottime,
    counts: Vec<Count>,
}

/// The last two, a period apart unless nobody asked for longer.
#[derive(Debug, Default)]
pub(crate) struct Snapshots(Mutex<Option<(Snapshot, Snapshot)>>);

impl Snapshots {
    /// What averages begin at; and keeps `now` for later.
    fn before(&self, now: &Snapshot, started: Boottime) -> Snapshot {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let beginning = || Snapshot {
            at: started,
            counts: Vec::new(),
        };
        let (older, newer) = kept.take().unwrap_or_else(|| (beginning(), now.clone()));
        let next = if now.at.since(newer.at) >= PERIOD {
            (newer, now.clone())
        } else {
            (older, newer)
        };
        kept.insert(next).0.clone()
    }
}

/// By listener, in the order in which they were opened.
pub(super) struct Totals {
    names: Vec<String>,
    counts: Vec<Count>,
    averages: Vec<Count>,
}

impl Totals {
    pub(super) fn of(shared: &Shared) -> Self {
        let listeners = shared.listeners();
        let mut counts = vec![Count::default(); listeners.len()];
        for route in shared.routes.counts() {
            if let Some(count) = counts.get_mut(route.listener) {
                count.sessions += route.total;
                count.received += route.bytes_to_server;
                count.sent += route.bytes_to_client;
            }
        }
        for (count, listener) in counts.iter_mut().zip(listeners.iter()) {
            count.waited = u64::try_from(listener.startup_time.sum().as_micros()).unwrap_or(u64::MAX);
        }
        let now = Snapshot {
            at: Boottime::now(),
            counts,
        };
        let before = shared.console.snapshots.before(&now, shared.started);
        let over = now.at.since(before.at);
        let average = |(index, count): (usize, &Count)| {
            let before = before.counts.get(index).copied().unwrap_or_default();
            count.average(before, over)
        };
        Self {
            names: listeners.iter().map(|listener| listener.name.clone()).collect(),
            averages: now.counts.iter().enumerate().map(average).collect(),
            counts: now.counts,
        }
    }

    fn rows(&self, cells: impl Fn(usize) -> Vec<u64>) -> Vec<Row> {
        let row = |(index, name): (usize, &String)| {
            let cells = cells(index).into_iter().map(number);
            std::iter::once(text(name.clone())).chain(cells).collect()
        };
        self.names.iter().enumerate().map(row).collect()
    }

    pub(super) fn stats(&self) -> Vec<Row> {
        self.rows(|index| {
            let of = |counts: &[Count]| counts.get(index).copied().unwrap_or_default().cells();
            [of(&self.counts), of(&self.averages)].concat()
        })
    }

    pub(super) fn totals(&self) -> Vec<Row> {
        self.rows(|index| self.counts.get(index).copied().unwrap_or_default().cells().to_vec())
    }

    pub(super) fn averages(&self) -> Vec<Row> {
        self.rows(|index| self.averages.get(index).copied().unwrap_or_default().cells().to_vec())
    }

    pub(super) fn sums(&self) -> Vec<Row> {
        let sum = |counts: &[Count]| counts.iter().copied().fold(Count::default(), Count::add).cells();
        let rows = |prefix: &'static str, sums: [u64; 11]| {
            let row = move |(name, value): (&str, u64)| vec![text(format!("{prefix}_{name}")), number(value)];
            SUMMED.into_iter().zip(sums).map(row).collect::<Vec<Vec<Cell>>>()
        };
        [rows("total", sum(&self.counts)), rows("avg", sum(&self.averages))].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_are_of_the_last_whole_period_and_of_all_time_before_there_is_one() {
        let at = |seconds: u64, received| Snapshot {
            at: Boottime::from_nanos(seconds * 1_000_000_000),
            counts: vec![Count {
                received,
                ..Count::default()
            }],
        };
        let (kept, started) = (Snapshots::default(), Boottime::from_nanos(0));
        assert_eq!(kept.before(&at(10, 100), started).at, started);
        assert_eq!(kept.before(&at(60, 200), started).at, started);
        // The one of second 10 is a period old by now.
        assert_eq!(kept.before(&at(71, 300), started).counts, at(10, 100).counts);
        assert_eq!(kept.before(&at(80, 400), started).at, at(10, 0).at);
        assert_eq!(kept.before(&at(131, 500), started).counts, at(71, 300).counts);
        let average = at(131, 6500).counts[0].average(at(71, 500).counts[0], PERIOD);
        assert_eq!(average.received, 100);
    }

    #[test]
    fn every_row_has_as_many_cells_as_there_are_columns() {
        assert_eq!(STATS.len(), 1 + 2 * Count::default().cells().len());
        assert_eq!(STATS_TOTALS.len(), 1 + Count::default().cells().len());
    }
}

//! The ledger: writers that note each acknowledged row, and the comparison with what the surviving leader holds.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::cluster::Cluster;
use crate::member::Member;
use crate::sql::{Sql, SqlFailure};
use crate::wait::eventually;

/// Between two rows of one writer.
const WRITE_PACE: Duration = Duration::from_millis(15);
const READ_PACE: Duration = Duration::from_millis(25);
/// A client waits this long for an answer, then gives up and connects anew.
const ANSWER_MAX: Duration = Duration::from_secs(20);
const COMPARE_MAX: Duration = Duration::from_secs(30);
const START_MAX: Duration = Duration::from_secs(30);
/// Where each report is appended as one line, when set.
const GAPS_ENV: &str = "PGHERD_TEST_GAPS";

/// A row that a writer was told of.
#[derive(Clone, Copy, Debug)]
struct Acknowledged {
    writer: u32,
    seq: u64,
    sent: Instant,
    at: Instant,
}

#[derive(Default)]
struct Book {
    acknowledged: Vec<Acknowledged>,
    errors: BTreeMap<String, usize>,
    reads: Vec<Instant>,
    read_errors: BTreeMap<String, usize>,
}

/// Writers and a reader at work, until this is finished or dropped.
pub struct Ledger {
    book: Arc<Mutex<Book>>,
    tasks: JoinSet<()>,
    started: Instant,
}

fn open(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ledger {
    /// Makes the table or empties it, starts `writers` writers on the write port and a reader on the read port, and waits until all
    /// are at work.
    ///
    /// # Errors
    /// When they do not get to work.
    pub async fn start(cluster: &Cluster, writers: u32) -> Result<Self> {
        Self::start_on(cluster.write_address(), cluster.read_address(), writers).await
    }

    /// The same on any two addresses that lead to one PostgreSQL.
    ///
    /// # Errors
    /// When they do not get to work.
    pub async fn start_on(write: SocketAddr, read: SocketAddr, writers: u32) -> Result<Self> {
        let sql = Sql::connect(write, ANSWER_MAX).await?;
        let table = "CREATE TABLE IF NOT EXISTS ledger (writer int NOT NULL, seq bigint NOT NULL); TRUNCATE ledger";
        sql.rows(table, ANSWER_MAX).await?;
        let ledger = Self::spawn(write, read, writers);
        ledger
            .wait_for_rows(Instant::now(), 20 * writers as usize, START_MAX)
            .await?;
        Ok(ledger)
    }

    fn spawn(write: SocketAddr, read: SocketAddr, writers: u32) -> Self {
        let book = Arc::new(Mutex::new(Book::default()));
        let mut tasks = JoinSet::new();
        for writer in 0..writers {
            tasks.spawn(write_rows(write, writer, Arc::clone(&book)));
        }
        tasks.spawn(read_rows(read, Arc::clone(&book)));
        Self {
            book,
            tasks,
            started: Instant::now(),
        }
    }

    /// Waits until `count` rows that were sent after `since` have been acknowledged.
    ///
    /// # Errors
    /// When they have not been within `limit`.
    pub async fn wait_for_rows(&self, since: Instant, count: usize, limit: Duration) -> Result<()> {
        let what = format!("{count} more rows are acknowledged");
        let written = eventually(&what, limit, async || {
            let book = open(&self.book);
            let seen = book.acknowledged.iter().filter(|row| row.sent > since).count();
            ensure!(seen >= count, "{seen} rows; errors {}", shown(&book.errors));
            Ok(())
        });
        written.await
    }

    /// The longest time between two acknowledgements one after the other, from the last one before `since` until now.
    #[must_use]
    pub fn gap_since(&self, since: Instant) -> Duration {
        let book = open(&self.book);
        longest_gap(book.acknowledged.iter().map(|row| row.at), since).1
    }

    /// Stops all, and compares what was acknowledged with what `leader` holds. `fault` is when the trouble called `name`
    /// began.
    ///
    /// # Errors
    /// When the leader cannot be read.
    pub async fn finish(self, name: &str, fault: Instant, leader: &Member) -> Result<LedgerReport> {
        let report = self.finish_at(name, fault, leader.postgres()).await?;
        report.publish()?;
        Ok(report)
    }

    async fn finish_at(mut self, name: &str, fault: Instant, leader: SocketAddr) -> Result<LedgerReport> {
        self.tasks.shutdown().await;
        let book = std::mem::take(&mut *open(&self.book));
        let sql = Sql::connect(leader, COMPARE_MAX).await?;
        let rows = sql
            .rows("SELECT writer, seq, count(*) FROM ledger GROUP BY 1, 2", COMPARE_MAX)
            .await?;
        let mut held = BTreeMap::new();
        for row in rows {
            let column = |index: usize| row.get(index).and_then(|text| text.parse::<u64>().ok());
            let (writer, seq, count) = (column(0), column(1), column(2));
            let key = writer.zip(seq).context("a row of numbers")?;
            held.insert(key, count.context("a count")?);
        }
        Ok(LedgerReport::new(name, &book, &held, fault.max(self.started)))
    }
}

async fn write_rows(address: SocketAddr, writer: u32, book: Arc<Mutex<Book>>) {
    let mut pace = interval(WRITE_PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut connection = None;
    // A number is used once, whatever became of it: no row may be there twice.
    for seq in 1_u64.. {
        pace.tick().await;
        let sent = Instant::now();
        match write_row(address, &mut connection, writer, seq).await {
            Ok(()) => open(&book).acknowledged.push(Acknowledged {
                writer,
                seq,
                sent,
                at: Instant::now(),
            }),
            Err(failure) => {
                connection = None;
                *open(&book).errors.entry(failure.code().to_owned()).or_default() += 1;
            }
        }
    }
}

async fn write_row(address: SocketAddr, connection: &mut Option<Sql>, writer: u32, seq: u64) -> Result<(), SqlFailure> {
    let sql = connected(address, connection).await?;
    sql.rows(&format!("INSERT INTO ledger VALUES ({writer}, {seq})"), ANSWER_MAX)
        .await?;
    Ok(())
}

async fn read_rows(address: SocketAddr, book: Arc<Mutex<Book>>) {
    let mut pace = interval(READ_PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut connection = None;
    loop {
        pace.tick().await;
        let read = async {
            let sql = connected(address, &mut connection).await?;
            sql.value("SELECT seq FROM ledger LIMIT 1", ANSWER_MAX).await
        };
        match read.await {
            Ok(_) => open(&book).reads.push(Instant::now()),
            // A replica that has not got so far as to have the table.
            Err(failure) if failure.code() == "42P01" && open(&book).reads.is_empty() => connection = None,
            Err(failure) => {
                connection = None;
                *open(&book).read_errors.entry(failure.code().to_owned()).or_default() += 1;
            }
        }
    }
}

async fn connected(address: SocketAddr, connection: &mut Option<Sql>) -> Result<&Sql, SqlFailure> {
    match connection {
        Some(sql) => Ok(sql),
        None => Ok(connection.insert(Sql::connect(address, ANSWER_MAX).await?)),
    }
}

/// An acknowledged row that the leader does not hold.
#[derive(Clone, Copy, Debug)]
pub struct LostRow {
    /// Who wrote it.
    pub writer: u32,
    /// Its number.
    pub seq: u64,
    /// How long before the outage, that is the longest gap, it was acknowledged; nothing for a row after that.
    pub before_outage: Option<Duration>,
}

/// What became of the acknowledged rows.
#[derive(Clone, Debug)]
pub struct LedgerReport {
    /// What happened to the cluster.
    pub name: String,
    /// The longest time between two acknowledgements one after the other, of all writers, from the last one before the
    /// fault on.
    pub write_gap: Duration,
    /// How many rows were acknowledged.
    pub acknowledged: usize,
    /// Those of them that are gone.
    pub lost: Vec<LostRow>,
    /// Rows that are there and were not acknowledged: their writers could not know.
    pub unacknowledged: usize,
    /// Rows that are there more than once: writer and number.
    pub duplicates: Vec<(u64, u64)>,
    /// The writers' errors by SQLSTATE; `cut` for a connection that ended without a word, `silent` for no answer.
    pub errors: BTreeMap<String, usize>,
    /// As `write_gap`, for the reader.
    pub read_gap: Duration,
    /// The reader's errors.
    pub read_errors: BTreeMap<String, usize>,
}

impl LedgerReport {
    fn new(name: &str, book: &Book, held: &BTreeMap<(u64, u64), u64>, fault: Instant) -> Self {
        let (outage, write_gap) = longest_gap(book.acknowledged.iter().map(|row| row.at), fault);
        let (_, read_gap) = longest_gap(book.reads.iter().copied(), fault);
        let key = |row: &Acknowledged| (u64::from(row.writer), row.seq);
        let lost = book.acknowledged.iter().filter(|row| !held.contains_key(&key(row)));
        let lost = lost.map(|row| LostRow {
            writer: row.writer,
            seq: row.seq,
            before_outage: outage.checked_duration_since(row.at),
        });
        let known: BTreeSet<(u64, u64)> = book.acknowledged.iter().map(key).collect();
        Self {
            name: name.to_owned(),
            write_gap,
            acknowledged: book.acknowledged.len(),
            lost: lost.collect(),
            unacknowledged: held.keys().filter(|key| !known.contains(key)).count(),
            duplicates: held
                .iter()
                .filter(|(_, count)| **count > 1)
                .map(|(key, _)| *key)
                .collect(),
            errors: book.errors.clone(),
            read_gap,
            read_errors: book.read_errors.clone(),
        }
    }

    /// Prints the report, and appends it to the file that the environment names.
    fn publish(&self) -> Result<()> {
        println!("{self}");
        if let Some(file) = std::env::var_os(GAPS_ENV) {
            let mut file = std::fs::OpenOptions::new().create(true).append(true).open(file)?;
            writeln!(file, "{self}")?;
        }
        Ok(())
    }

    /// For a change that may cost nothing: every acknowledged row is there, and none twice.
    ///
    /// # Errors
    /// When that is not so; names rows.
    pub fn ensure_complete(&self) -> Result<()> {
        ensure!(self.lost.is_empty(), "acknowledged rows are lost: {}", self.lost_rows());
        self.ensure_no_duplicates()
    }

    /// For the death of a leader that replicates asynchronously: what was lost was acknowledged just before the outage,
    /// and had not left the leader yet.
    ///
    /// # Errors
    /// When a lost row is older than `window`, or a row is there twice.
    pub fn ensure_lost_only_within(&self, window: Duration) -> Result<()> {
        let older = self
            .lost
            .iter()
            .find(|row| row.before_outage.is_none_or(|before| before > window));
        ensure!(
            older.is_none(),
            "rows are lost that were not on their way: {}",
            self.lost_rows()
        );
        self.ensure_no_duplicates()
    }

    fn ensure_no_duplicates(&self) -> Result<()> {
        ensure!(
            self.duplicates.is_empty(),
            "rows are there twice (writer, number): {:?}",
            self.duplicates
        );
        Ok(())
    }

    /// The first lost rows, by name.
    #[must_use]
    pub fn lost_rows(&self) -> String {
        let named = self.lost.iter().take(12).map(|row| {
            let when = row.before_outage.map_or("after the outage".to_owned(), |before| {
                format!("{:.3} s before the outage", before.as_secs_f64())
            });
            format!("writer {} row {} ({when})", row.writer, row.seq)
        });
        named.collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for LedgerReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "write gap: {} {:.3} s; lost {} of {} acknowledged; errors {}; read gap {:.3} s, read errors {}",
            self.name,
            self.write_gap.as_secs_f64(),
            self.lost.len(),
            self.acknowledged,
            shown(&self.errors),
            self.read_gap.as_secs_f64(),
            shown(&self.read_errors),
        )?;
        if self.lost.is_empty() {
            Ok(())
        } else {
            write!(f, "; lost: {}", self.lost_rows())
        }
    }
}

/// `{57P01: 4, cut: 1}`.
fn shown(errors: &BTreeMap<String, usize>) -> String {
    let counted: Vec<String> = errors.iter().map(|(code, count)| format!("{code}: {count}")).collect();
    format!("{{{}}}", counted.join(", "))
}

/// The longest time between two neighbours, from the last one before `from` on, and when it began.
fn longest_gap(times: impl Iterator<Item = Instant>, from: Instant) -> (Instant, Duration) {
    let mut times: Vec<Instant> = times.collect();
    times.sort_unstable();
    let first = times.partition_point(|time| *time <= from).saturating_sub(1);
    let gaps = times[first..].windows(2).map(|pair| (pair[0], pair[1] - pair[0]));
    gaps.max_by_key(|(_, gap)| *gap).unwrap_or((from, Duration::ZERO))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn book(start: Instant, rows: &[(u32, u64, u32)]) -> Book {
        let row = |(writer, seq, at): &(u32, u64, u32)| Acknowledged {
            writer: *writer,
            seq: *seq,
            sent: start + MS * (*at - 1),
            at: start + MS * *at,
        };
        Book {
            acknowledged: rows.iter().map(row).collect(),
            ..Book::default()
        }
    }

    #[test]
    fn the_gap_is_counted_over_all_writers_from_the_last_row_before_the_fault() {
        let start = Instant::now();
        let book = book(
            start,
            &[(0, 1, 10), (1, 1, 700), (0, 2, 720), (1, 2, 1100), (0, 3, 1110)],
        );
        let held = [
            ((0, 1), 1),
            ((1, 1), 1),
            ((0, 2), 1),
            ((1, 2), 1),
            ((0, 3), 1),
            ((0, 9), 1),
        ]
        .into();
        let report = LedgerReport::new("x", &book, &held, start + MS * 730);
        assert_eq!(
            (report.write_gap, report.acknowledged, report.unacknowledged),
            (MS * 380, 5, 1)
        );
        report.ensure_complete().unwrap();
        assert!(
            report
                .to_string()
                .starts_with("write gap: x 0.380 s; lost 0 of 5 acknowledged; errors {};"),
            "{report}"
        );
    }

    #[tokio::test]
    async fn a_crash_of_postgresql_shows_as_a_gap_and_no_loss() {
        let site = Arc::new(crate::Site::new().unwrap());
        let server = crate::Postgres::start(&site, "pg", site.addresses().member(0))
            .await
            .unwrap();
        let ledger = Ledger::start_on(server.address(), server.address(), 4).await.unwrap();
        let fault = Instant::now();
        server.end(crate::process::Signal::KILL).await.unwrap();
        server.start_again().await.unwrap();
        ledger.wait_for_rows(Instant::now(), 20, START_MAX).await.unwrap();
        let report = ledger
            .finish_at("crash and restart by hand", fault, server.address())
            .await
            .unwrap();
        report.ensure_complete().unwrap();
        assert!(report.acknowledged > 80 && report.write_gap > Duration::from_millis(20) && !report.errors.is_empty());
        site.pass();
    }

    #[test]
    fn lost_and_doubled_rows_are_named() {
        let start = Instant::now();
        let book = book(start, &[(0, 1, 10), (0, 2, 500), (1, 1, 520), (1, 2, 3000)]);
        let held = [((0, 1), 1), ((1, 1), 2), ((1, 2), 1)].into();
        let report = LedgerReport::new("x", &book, &held, start + MS * 525);
        assert_eq!(report.lost_rows(), "writer 0 row 2 (0.020 s before the outage)");
        assert_eq!(report.duplicates, [(1, 1)]);
        assert!(report.ensure_complete().is_err() && report.ensure_lost_only_within(MS * 30).is_err());
        let single = LedgerReport {
            duplicates: Vec::new(),
            ..report
        };
        assert!(single.ensure_lost_only_within(MS * 30).is_ok() && single.ensure_lost_only_within(MS * 10).is_err());
    }
}

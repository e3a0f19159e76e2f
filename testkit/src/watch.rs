//! The watch for two writers at once: writes to every member directly, past any proxy, as a client on the old leader's
//! host would.
//!
//! A *reign* is what one member writes on one timeline. Of two reigns the earlier is the one whose first acknowledgement
//! came first. Two leaders wrote at once if a write was acknowledged in the earlier reign that had been sent after the
//! later reign's first acknowledgement had arrived: no order of the two explains that. All times are this process's own.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::cluster::Cluster;
use crate::member::Member;
use crate::sql::{Sql, SqlFailure};

const PACE: Duration = Duration::from_millis(20);
const CONNECT_MAX: Duration = Duration::from_secs(1);
/// A write to a frozen server may be answered when it goes on, and that is what is looked for.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// A direct write that was acknowledged.
#[derive(Clone, Debug)]
struct DirectWrite {
    member: String,
    timeline: String,
    seq: u64,
    sent: Instant,
    acknowledged: Instant,
}

type Writes = Arc<Mutex<Vec<DirectWrite>>>;

fn open(writes: &Writes) -> MutexGuard<'_, Vec<DirectWrite>> {
    writes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Direct writers at work, one for each member, until this is finished or dropped.
pub struct WriterWatch {
    writes: Writes,
    tasks: JoinSet<()>,
}

impl WriterWatch {
    /// Makes the table or empties it, and starts.
    ///
    /// # Errors
    /// When the table cannot be made.
    pub async fn start(cluster: &Cluster) -> Result<Self> {
        let leader = cluster.primary().await?;
        leader
            .sql("CREATE TABLE IF NOT EXISTS direct_write (member text NOT NULL, seq bigint NOT NULL); TRUNCATE direct_write")
            .await?;
        let writes = Writes::default();
        let mut tasks = JoinSet::new();
        for member in cluster.members() {
            tasks.spawn(write_directly(
                member.name().to_owned(),
                member.postgres(),
                Arc::clone(&writes),
            ));
        }
        Ok(Self { writes, tasks })
    }

    /// Stops, and compares what was acknowledged with what `leader` holds.
    ///
    /// # Errors
    /// When the leader cannot be read.
    pub async fn finish(mut self, leader: &Member) -> Result<WatchReport> {
        self.tasks.shutdown().await;
        let writes = std::mem::take(&mut *open(&self.writes));
        let rows = leader
            .client()
            .await?
            .rows("SELECT member, seq FROM direct_write", CONNECT_MAX * 10)
            .await?;
        let mut report = WatchReport::new(&writes);
        let mut held = std::collections::BTreeSet::new();
        for row in rows {
            let seq: u64 = row.get(1).context("a number")?.parse()?;
            held.insert((row.get(0).unwrap_or_default().to_owned(), seq));
        }
        for write in writes
            .into_iter()
            .filter(|write| !held.contains(&(write.member.clone(), write.seq)))
        {
            report.lost.entry(write.member).or_default().push(write.seq);
        }
        println!("{report}");
        Ok(report)
    }
}

async fn write_directly(member: String, address: SocketAddr, writes: Writes) {
    let mut pace = interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut connection = None;
    for seq in 1_u64.. {
        pace.tick().await;
        let sql = match connection.take() {
            Some(sql) => sql,
            None => match Sql::connect(address, CONNECT_MAX).await {
                Ok(sql) => sql,
                Err(_) => continue, // A member that is down takes no writes.
            },
        };
        match write(&sql, &member, seq).await {
            Ok(Some(written)) => open(&writes).push(written),
            Ok(None) => {}
            Err(_) => continue, // The connection is not put back.
        }
        connection = Some(sql);
    }
}

/// One write, unless the member is a replica, whose log would fill with refusals.
async fn write(sql: &Sql, member: &str, seq: u64) -> Result<Option<DirectWrite>, SqlFailure> {
    if sql.value("SELECT pg_is_in_recovery()", ANSWER_MAX).await? != "f" {
        return Ok(None);
    }
    let insert = format!(
        "INSERT INTO direct_write VALUES ('{member}', {seq}) \
         RETURNING left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)"
    );
    let sent = Instant::now();
    let timeline = sql.value(&insert, ANSWER_MAX).await?;
    Ok(Some(DirectWrite {
        member: member.to_owned(),
        timeline,
        seq,
        sent,
        acknowledged: Instant::now(),
    }))
}

/// What one member wrote on one timeline.
#[derive(Clone, Debug)]
pub struct Reign {
    /// Who.
    pub member: String,
    /// On which timeline, in the eight digits of a WAL file's name.
    pub timeline: String,
    /// How many direct writes were acknowledged.
    pub writes: usize,
    first_acknowledged: Instant,
    last_sent: Instant,
}

/// What the direct writers saw.
#[derive(Clone, Debug)]
pub struct WatchReport {
    /// In the order of their first acknowledgements.
    pub reigns: Vec<Reign>,
    /// Direct writes that were acknowledged and that the leader does not hold, by member.
    pub lost: BTreeMap<String, Vec<u64>>,
}

impl WatchReport {
    fn new(writes: &[DirectWrite]) -> Self {
        let mut reigns: BTreeMap<(&str, &str), Reign> = BTreeMap::new();
        for write in writes {
            let reign = reigns.entry((&write.member, &write.timeline)).or_insert_with(|| Reign {
                member: write.member.clone(),
                timeline: write.timeline.clone(),
                writes: 0,
                first_acknowledged: write.acknowledged,
                last_sent: write.sent,
            });
            reign.writes += 1;
            reign.first_acknowledged = reign.first_acknowledged.min(write.acknowledged);
            reign.last_sent = reign.last_sent.max(write.sent);
        }
        let mut reigns: Vec<Reign> = reigns.into_values().collect();
        reigns.sort_by_key(|reign| reign.first_acknowledged);
        Self {
            reigns,
            lost: BTreeMap::new(),
        }
    }

    /// Two leaders never wrote at once.
    ///
    /// # Errors
    /// When they did; says who and for how long.
    pub fn ensure_one_writer(&self) -> Result<()> {
        for (index, later) in self.reigns.iter().enumerate() {
            for earlier in &self.reigns[..index] {
                let overlap = earlier.last_sent.saturating_duration_since(later.first_acknowledged);
                ensure!(
                    overlap.is_zero(),
                    "two writers: {} (timeline {}) took a write that was sent {overlap:?} after {} (timeline {}) had \
                     acknowledged one",
                    earlier.member,
                    earlier.timeline,
                    later.member,
                    later.timeline,
                );
            }
        }
        Ok(())
    }
}

impl fmt::Display for WatchReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reigns = self.reigns.iter().map(|reign| {
            format!(
                "{} on timeline {} ({} direct writes)",
                reign.member,
                reign.timeline.trim_start_matches('0'),
                reign.writes
            )
        });
        write!(f, "reigns: {}", reigns.collect::<Vec<_>>().join(", "))?;
        for (member, lost) in &self.lost {
            write!(
                f,
                "; {} acknowledged by {member} are lost: {:?}",
                lost.len(),
                &lost[..lost.len().min(12)]
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(writes: &[(&str, &str, u64, u64)]) -> WatchReport {
        let start = Instant::now();
        let writes: Vec<DirectWrite> = (1..)
            .zip(writes)
            .map(|(seq, (member, timeline, sent, acknowledged))| DirectWrite {
                member: (*member).to_owned(),
                timeline: (*timeline).to_owned(),
                seq,
                sent: start + Duration::from_millis(*sent),
                acknowledged: start + Duration::from_millis(*acknowledged),
            })
            .collect();
        WatchReport::new(&writes)
    }

    #[test]
    fn one_leader_after_the_other_and_back_is_fine() {
        let report = report(&[
            ("a", "1", 0, 1),
            ("a", "1", 10, 25), // On its way while b became writable: may have been first.
            ("b", "2", 15, 20),
            ("a", "3", 30, 31),
        ]);
        report.ensure_one_writer().unwrap();
        assert_eq!(report.reigns.len(), 3);
    }

    #[test]
    fn a_write_that_the_old_leader_took_later_is_found() {
        let report = report(&[
            ("a", "1", 0, 1),
            ("b", "2", 15, 20),
            ("a", "1", 21, 22),
            ("b", "2", 30, 31),
        ]);
        let text = report.ensure_one_writer().unwrap_err().to_string();
        assert!(
            text.starts_with("two writers: a (timeline 1) took a write that was sent 1ms after b"),
            "{text}"
        );
    }

    #[test]
    fn two_on_one_timeline_are_found() {
        assert!(
            report(&[("a", "1", 0, 1), ("b", "1", 2, 3), ("a", "1", 4, 5)])
                .ensure_one_writer()
                .is_err()
        );
    }
}

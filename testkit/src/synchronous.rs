//! What synchronous replication promises, as it can be seen from outside: the record in etcd, the setting in PostgreSQL,
//! and a load of which no acknowledged row may be lost.

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::cluster::Cluster;
use crate::config::PREFIX;
use crate::etcd::Entry;
use crate::ledger::{Ledger, LedgerReport};
use crate::member::Member;
use crate::sql::Sql;
use crate::wait::{eventually, throughout};
use crate::watch::WriterWatch;

const WRITERS: u32 = 4;
const ROWS: usize = 100;
const ROWS_MAX: Duration = Duration::from_secs(60);
const SQL_MAX: Duration = Duration::from_secs(2);
/// Versions of the record that one test may look back upon.
const VERSIONS_MAX: usize = 200;
/// Between two looks at record and setting; each costs two calls of etcd's client program.
const STEP_PACE: Duration = Duration::from_millis(200);
/// What one commit may take that waits for a standby.
const COMMIT_MAX: Duration = Duration::from_secs(60);
/// Whether it is a standby, and what its setting is, at one moment.
const WHOM_COMMITS_WAIT_FOR: &str =
    "SELECT pg_is_in_recovery()::text || ' ' || current_setting('synchronous_standby_names')";

/// A value of `/sync`.
#[derive(Clone, PartialEq, Eq)]
pub struct SyncRecord {
    /// Whose it is; nothing while the mode has not begun.
    pub leader: Option<String>,
    /// How many votes of others a candidate needs.
    pub quorum: u64,
    /// The standbys, as they are listed.
    pub standbys: Vec<String>,
}

impl SyncRecord {
    /// The record of `leader` with these standbys.
    #[must_use]
    pub fn of(leader: &str, quorum: u64, standbys: &[&str]) -> Self {
        Self {
            leader: Some(leader.to_owned()),
            quorum,
            standbys: standbys.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    /// Reads a value, and insists on the form that other programs read: names sorted, null for none.
    ///
    /// # Errors
    /// When it has another form.
    fn parse(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text).with_context(|| format!("not JSON: {text}"))?;
        let standbys = match &value["sync_standby"] {
            Value::Null => Vec::new(),
            Value::String(names) => names.split(',').map(str::to_owned).collect(),
            other => anyhow::bail!("sync_standby is {other}"),
        };
        ensure!(
            standbys.is_sorted() && standbys.iter().all(|name| !name.is_empty() && name.trim() == name),
            "names are not as others read them: {text}"
        );
        Ok(Self {
            leader: value["leader"].as_str().map(str::to_owned),
            quorum: value["quorum"].as_u64().with_context(|| format!("no quorum: {text}"))?,
            standbys,
        })
    }

    /// Makes sure that a winner by this record has every commit that its leader acknowledges while commits wait for `names`: a
    /// winner has what one of `quorum + 1` of leader and standbys has, a commit is on so many of leader and names that these
    /// share one.
    fn ensure_kept_by(&self, names: &str) -> Result<()> {
        let (count, awaited) = awaited(names).with_context(|| format!("not understood: {names:?}"))?;
        let group: BTreeSet<&str> = self.standbys.iter().map(String::as_str).chain(awaited).collect();
        let shared = usize::try_from(self.quorum)?.saturating_add(count);
        ensure!(
            self.standbys.is_empty() || group.len() <= shared,
            "/sync is {self:?}, commits wait for {names:?}: a winner may lack what was acknowledged"
        );
        Ok(())
    }

    /// Whether it lists `name` as a standby.
    #[must_use]
    pub fn lists(&self, name: &str) -> bool {
        self.standbys.iter().any(|listed| listed == name)
    }
}

/// How many of whom `synchronous_standby_names` lets commits wait for; nothing when it has another form than agents write.
fn awaited(names: &str) -> Option<(usize, BTreeSet<&str>)> {
    let names = names.trim();
    let Some((count, list)) = names.strip_suffix(')').and_then(|names| names.split_once('(')) else {
        let single: BTreeSet<&str> = Some(names).filter(|name| !name.is_empty()).into_iter().collect();
        return Some((single.len(), single));
    };
    let count = count.trim();
    let count = count.strip_prefix("ANY ").unwrap_or(count).trim().parse().ok()?;
    Some((count, list.split(',').map(str::trim).collect()))
}

impl fmt::Debug for SyncRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let leader = self.leader.as_deref().unwrap_or("nobody");
        write!(f, "({leader}, {}, [{}])", self.quorum, self.standbys.join(","))
    }
}

impl Cluster {
    /// What `/sync` says; nothing when there is no such key.
    ///
    /// # Errors
    /// When etcd does not answer, or it is not a record.
    pub async fn sync_record(&self) -> Result<Option<SyncRecord>> {
        let entry = self.etcd().entry(&format!("{PREFIX}sync")).await?;
        entry.map(|entry| SyncRecord::parse(&entry.value)).transpose()
    }

    /// All values that `/sync` has had since `revision`, the earliest first.
    ///
    /// # Errors
    /// When etcd does not answer, or one is not a record.
    pub async fn sync_history(&self, revision: i64) -> Result<Vec<SyncRecord>> {
        let key = format!("{PREFIX}sync");
        let mut found = Vec::new();
        let mut at: Option<Entry> = self.etcd().entry(&key).await?;
        while let Some(entry) = at.filter(|entry| entry.mod_revision > revision) {
            found.push(SyncRecord::parse(&entry.value)?);
            ensure!(found.len() < VERSIONS_MAX, "/sync does not come to rest: {found:?}");
            at = self.etcd().entry_at(&key, entry.mod_revision - 1).await?;
        }
        found.reverse();
        Ok(found)
    }

    /// The revision of etcd at which `/sync` was last written; 0 when there is none.
    ///
    /// # Errors
    /// When etcd does not answer.
    pub async fn sync_revision(&self) -> Result<i64> {
        let entry = self.etcd().entry(&format!("{PREFIX}sync")).await?;
        Ok(entry.map_or(0, |entry| entry.mod_revision))
    }

    /// Waits until `/sync` is `record` and the leader that it names has the setting `names`.
    ///
    /// # Errors
    /// When that has not come about within `limit`; says what is instead.
    pub async fn sync_settles(&self, record: &SyncRecord, names: &str, limit: Duration) -> Result<()> {
        let leader = self.member(record.leader.as_deref().unwrap_or_default())?;
        let what = format!("/sync is {record:?} and {} has {names:?}", leader.name());
        let settles = eventually(&what, limit, async || {
            let (seen, set) = (self.sync_record().await?, leader.sync_names().await?);
            ensure!(
                seen.as_ref() == Some(record) && set == names,
                "/sync is {seen:?}, the setting is {set:?}"
            );
            Ok(())
        });
        settles.await
    }

    /// Looks at record and setting once: whoever may lead by the record has every commit that the setting lets pass. Nothing
    /// is said of a moment in which the record changes, or in which its leader does not answer or takes no writes.
    ///
    /// # Errors
    /// When a winner by the record could lack a commit that was acknowledged.
    pub async fn ensure_in_step(&self) -> Result<()> {
        let key = format!("{PREFIX}sync");
        let Ok(Some(entry)) = self.etcd().entry(&key).await else {
            return Ok(());
        };
        let record = SyncRecord::parse(&entry.value)?;
        let Some(leader) = record.leader.as_deref() else {
            return Ok(());
        };
        let Ok(answer) = self.member(leader)?.sql(WHOM_COMMITS_WAIT_FOR).await else {
            return Ok(());
        };
        let Some(names) = answer.strip_prefix("false ") else {
            return Ok(());
        };
        let after = self.etcd().entry(&key).await;
        if after.is_ok_and(|after| after.is_some_and(|after| after.mod_revision == entry.mod_revision)) {
            record.ensure_kept_by(names)?;
        }
        Ok(())
    }

    /// Does what `scenario` does, and looks all the while as [`Cluster::ensure_in_step`] does.
    ///
    /// # Errors
    /// As soon as record and setting are seen to be out of step, or the scenario fails.
    pub async fn in_step<T>(&self, scenario: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            done = scenario => done,
            broken = self.falls_out_of_step() => Err(broken),
        }
    }

    async fn falls_out_of_step(&self) -> anyhow::Error {
        let mut pace = interval(STEP_PACE);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            pace.tick().await;
            if let Err(broken) = self.ensure_in_step().await {
                return broken;
            }
        }
    }
}

impl Member {
    /// Its `synchronous_standby_names`, without spaces between names.
    ///
    /// # Errors
    /// When its PostgreSQL does not answer.
    pub async fn sync_names(&self) -> Result<String> {
        Ok(self.sql("SHOW synchronous_standby_names").await?.replace(", ", ","))
    }
}

/// Writers through the proxy and past it, of whose acknowledged rows none may be lost.
pub struct SyncLoad {
    ledger: Ledger,
    watch: WriterWatch,
}

impl SyncLoad {
    /// Starts them, and waits until they are at work.
    ///
    /// # Errors
    /// When they do not get to work.
    pub async fn start(cluster: &Cluster) -> Result<Self> {
        let watch = WriterWatch::start(cluster).await?;
        let ledger = Ledger::start(cluster, WRITERS).await?;
        let load = Self { ledger, watch };
        load.goes_on().await?;
        Ok(load)
    }

    /// Waits until rows that are sent from now on have been acknowledged.
    ///
    /// # Errors
    /// When they have not within a minute.
    pub async fn goes_on(&self) -> Result<()> {
        self.ledger.wait_for_rows(Instant::now(), ROWS, ROWS_MAX).await
    }

    /// Waits until `up` members are well and clients have written on; then stops, and makes sure that no acknowledged row is
    /// missing, of those through the proxy and of those past it, and that there were never two writers.
    ///
    /// # Errors
    /// When one of that is not so.
    pub async fn end<'a>(
        self,
        cluster: &'a Cluster,
        up: usize,
        name: &str,
        fault: Instant,
    ) -> Result<(&'a Member, LedgerReport)> {
        cluster.settled_with(up).await?;
        self.goes_on().await?;
        let leader = cluster.primary().await?;
        let report = self.ledger.finish(name, fault, leader).await?;
        let direct = self.watch.finish(leader).await?;
        direct.ensure_one_writer()?;
        report.ensure_complete()?;
        ensure!(direct.lost.is_empty(), "acknowledged direct writes are lost: {direct}");
        Ok((leader, report))
    }
}

/// One commit on one member, past the proxy.
pub struct Commit(JoinSet<Result<()>>);

impl Commit {
    /// Sends `statement`, and does not wait for the answer.
    #[must_use]
    pub fn send(member: &Member, statement: &str) -> Self {
        let (address, statement) = (member.postgres(), statement.to_owned());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let session = Sql::connect(address, SQL_MAX).await?;
            session.rows(&statement, COMMIT_MAX).await?;
            Ok(())
        });
        Self(tasks)
    }

    /// Makes sure that it is not acknowledged within `span`.
    ///
    /// # Errors
    /// When it is, or fails.
    pub async fn still_waits(&mut self, span: Duration) -> Result<()> {
        throughout("a commit waits for a standby", span, async || {
            match self.0.try_join_next() {
                None => Ok(()),
                Some(ended) => Err(ended?.err().unwrap_or_else(|| anyhow!("it was acknowledged"))),
            }
        })
        .await
    }

    /// Waits until it is acknowledged.
    ///
    /// # Errors
    /// When it fails, or is not acknowledged within a minute.
    pub async fn acknowledged(mut self) -> Result<()> {
        self.0.join_next().await.context("it has ended before")??
    }
}

/// Looks at members without a pause, through the promotion of one of them: whom commits wait for from the very first on.
pub struct Promotions {
    seen: watch::Receiver<BTreeSet<(String, String)>>,
    _tasks: JoinSet<()>,
}

impl Promotions {
    /// Begins to look at `members`, which are standbys.
    ///
    /// # Errors
    /// When one of them does not answer.
    pub async fn watch(members: &[&Member]) -> Result<Self> {
        let (publish, seen) = watch::channel(BTreeSet::new());
        let mut tasks = JoinSet::new();
        for member in members {
            let (session, name, publish) = (member.client().await?, member.name().to_owned(), publish.clone());
            tasks.spawn(async move { look(&session, &name, &publish).await });
        }
        Ok(Self { seen, _tasks: tasks })
    }

    /// Each setting that a member was seen to have while it took writes: its name, and the setting.
    #[must_use]
    pub fn seen(&self) -> BTreeSet<(String, String)> {
        self.seen.borrow().clone()
    }
}

async fn look(session: &Sql, name: &str, publish: &watch::Sender<BTreeSet<(String, String)>>) {
    // The session ends with its server, and with that the looking.
    while let Ok(answer) = session.value(WHOM_COMMITS_WAIT_FOR, SQL_MAX).await {
        if let Some(names) = answer.strip_prefix("false ") {
            let look = (name.to_owned(), names.to_owned());
            publish.send_if_modified(|seen| seen.insert(look));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_others_read_it() {
        let text = r#"{"leader":"n1","quorum":1,"sync_standby":"n2,n3"}"#;
        assert_eq!(SyncRecord::parse(text).unwrap(), SyncRecord::of("n1", 1, &["n2", "n3"]));
        let empty = r#"{"leader":"n1","quorum":0,"sync_standby":null}"#;
        assert_eq!(SyncRecord::parse(empty).unwrap(), SyncRecord::of("n1", 0, &[]));
        for wrong in [
            r#"{"leader":"n1","quorum":0,"sync_standby":""}"#,
            r#"{"leader":"n1","quorum":0,"sync_standby":"n3,n2"}"#,
            r#"{"leader":"n1","sync_standby":null}"#,
        ] {
            assert!(SyncRecord::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_record_is_kept_when_a_winner_and_a_commit_share_a_member() {
        let both = |quorum| SyncRecord::of("n1", quorum, &["n2", "n3"]);
        let one = SyncRecord::of("n1", 0, &["n2"]);
        for (record, names) in [
            (&one, "n2"),
            (&one, "ANY 1 (n2)"),
            (&one, "2 (n2,n3)"),
            (&both(0), "2 (n2, n3)"),
            (&both(0), "ANY 2 (n2,n3)"),
            (&both(1), "ANY 1 (n2,n3)"),
            (&SyncRecord::of("n1", 0, &[]), ""),
            (&SyncRecord::of("n1", 0, &[]), "1 (n2,n3)"),
        ] {
            record.ensure_kept_by(names).unwrap();
        }
        for (record, names) in [
            (&one, ""),
            (&one, "*"),
            (&one, "n3"),
            (&one, "1 (n2,n3)"),
            (&one, "ANY 1 (n2,n3)"),
            (&both(0), "ANY 1 (n2,n3)"),
            (&both(1), "ANY 1 (*)"),
            (&one, "FIRST (n2"),
        ] {
            assert!(record.ensure_kept_by(names).is_err(), "{record:?} {names:?}");
        }
    }
}

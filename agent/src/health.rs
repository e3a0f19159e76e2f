//! Whether our PostgreSQL and its disk still do their work: probes that do some of it, each on a budget.
//!
//! A hung postmaster keeps its sessions and takes no new ones; a hung disk lets everything stand that does not touch it. So
//! a connection of its own is made, and a file is written and synced beside PostgreSQL's own. "Too many clients" is an
//! answer, and so is every other error that the server itself sends.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use tokio::sync::watch;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::context::Context;
use crate::postgres::ToolError;
use crate::postgres::sql::ask_once;

/// One probe of the server may take this long before it counts as not answered.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// One probe of the disk may take this long before it counts as hung. A checkpoint's fsyncs can hold one up for seconds.
const WRITE_MAX: Duration = Duration::from_secs(4);
/// A whole page of PostgreSQL's, so that a full disk is noticed too.
const PROBE_BYTES: usize = 8192;
/// So many in a row that were written say that a disk which failed does not any more.
const WORKS_MIN: u32 = 3;
/// In the data directory, where PostgreSQL ignores it.
const PROBE_FILE: &str = "pgherd.probe";

/// Since when a probe has found its object not at work; nothing while it is, or while nobody knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// New connections are not answered; by which postmaster, since when.
    pub server_hangs: Option<(i32, Boottime)>,
    /// The data directory cannot be written.
    pub disk_fails_since: Option<Boottime>,
}

impl Health {
    /// Since when this postmaster has not answered. What was found of the one before it says nothing of this one.
    #[must_use]
    pub fn server_hangs_since(&self, postmaster: Option<i32>) -> Option<Boottime> {
        let (pid, since) = self.server_hangs?;
        (Some(pid) == postmaster).then_some(since)
    }
}

/// What one probe found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Works,
    Fails,
    /// Nothing can be said, as while PostgreSQL starts or ends.
    Unknown,
}

/// Folds a finding in: a trouble lasts from its first sign on.
fn fold(since: Option<Boottime>, found: Found, now: Boottime) -> Option<Boottime> {
    match found {
        Found::Works | Found::Unknown => None,
        Found::Fails => since.or(Some(now)),
    }
}

/// What is known of the disk. One that is full takes a page now and then, as when a server has crashed and its temporary files
/// are gone: it is well again when it has taken several in a row.
#[derive(Debug, Default)]
struct Disk {
    works_in_a_row: u32,
}

impl Disk {
    fn fold(&mut self, since: Option<Boottime>, found: Found, now: Boottime) -> Option<Boottime> {
        self.works_in_a_row = match found {
            Found::Works => self.works_in_a_row.saturating_add(1),
            Found::Fails | Found::Unknown => 0,
        };
        match found {
            Found::Works if self.works_in_a_row < WORKS_MIN => since,
            found => fold(since, found, now),
        }
    }
}

/// Probes once a period until told to stop, as long as a postmaster runs.
pub(crate) async fn probe(context: Arc<Context>, health: watch::Sender<Health>, stop: CancellationToken) {
    let mut disk = DiskProbe::new(&context.config.postgresql.data_dir);
    let mut known = Disk::default();
    loop {
        let mut tick = interval(context.timing().loop_wait());
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tick.tick().await;
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        let began = Boottime::now();
        let postmaster = context.keeper.instance().borrow().postmaster;
        let runs = postmaster.is_some();
        let before = *health.borrow();
        // A directory that is being made must stay as its maker left it; one that failed is looked at until it works.
        let (server, written) = match (runs, before.disk_fails_since) {
            (true, _) => tokio::join!(probe_server(&context), disk.run()),
            (false, Some(_)) => (Found::Unknown, disk.run().await),
            (false, None) => (Found::Unknown, Found::Unknown),
        };
        let hung = before.server_hangs.filter(|(pid, _)| Some(*pid) == postmaster);
        let hung = fold(hung.map(|(_, since)| since), server, began);
        let after = Health {
            server_hangs: postmaster.zip(hung),
            disk_fails_since: known.fold(before.disk_fails_since, written, began),
        };
        if after != before {
            tracing::debug!(?after, "the health of PostgreSQL has changed");
            health.send_replace(after);
        }
    }
}

async fn probe_server(context: &Context) -> Found {
    let target = context.sql.target();
    match ask_once(&target, "probing PostgreSQL", "SELECT 1", ANSWER_MAX).await {
        Ok(_) => Found::Works,
        Err(ToolError::Timeout { .. }) => Found::Fails,
        Err(ToolError::Sql { source, .. }) if source.as_db_error().is_some() => Found::Works,
        // Refused or cut: it starts, or ends.
        Err(_) => Found::Unknown,
    }
}

/// Writes on a thread of its own, and never on more than one: what hangs in the kernel cannot be taken back.
struct DiskProbe {
    path: PathBuf,
    writing: JoinSet<std::io::Result<()>>,
}

impl DiskProbe {
    fn new(data_dir: &Path) -> Self {
        Self {
            path: data_dir.join(PROBE_FILE),
            writing: JoinSet::new(),
        }
    }

    async fn run(&mut self) -> Found {
        if self.writing.is_empty() {
            let path = self.path.clone();
            self.writing.spawn(async move {
                let written = spawn_blocking(move || write_and_sync(&path)).await;
                written.unwrap_or_else(|defect| Err(std::io::Error::other(defect)))
            });
        }
        match timeout(WRITE_MAX, self.writing.join_next()).await {
            Ok(Some(Ok(Ok(())))) => Found::Works,
            Ok(Some(Ok(Err(error)))) if error.kind() == std::io::ErrorKind::NotFound => Found::Unknown,
            Ok(Some(Ok(Err(error)))) => {
                tracing::warn!(%error, "the data directory cannot be written");
                Found::Fails
            }
            Ok(Some(Err(_)) | None) => Found::Unknown,
            Err(_) => {
                tracing::warn!(
                    "a write to the data directory has not come back for {} s",
                    WRITE_MAX.as_secs()
                );
                Found::Fails
            }
        }
    }
}

fn write_and_sync(path: &Path) -> std::io::Result<()> {
    let mut file = std::fs::File::create(path)?;
    file.write_all(&[0; PROBE_BYTES])?;
    file.sync_data()?;
    std::fs::remove_file(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Boottime {
        Boottime::from_nanos(seconds * 1_000_000_000)
    }

    #[test]
    fn a_trouble_lasts_from_its_first_sign_until_something_works() {
        let mut since = None;
        for (second, found, wanted) in [
            (1, Found::Works, None),
            (2, Found::Fails, Some(2)),
            (4, Found::Fails, Some(2)),
            (6, Found::Works, None),
            (7, Found::Fails, Some(7)),
            (8, Found::Unknown, None),
        ] {
            since = fold(since, found, at(second));
            assert_eq!(since, wanted.map(at), "second {second}");
        }
    }

    #[test]
    fn a_full_disk_that_takes_a_page_now_and_then_is_not_well() {
        let mut disk = Disk::default();
        let mut since = None;
        for (second, found, wanted) in [
            (1, Found::Works, None),
            (2, Found::Fails, Some(2)),
            (3, Found::Works, Some(2)),
            (4, Found::Works, Some(2)),
            (5, Found::Fails, Some(2)),
            (6, Found::Works, Some(2)),
            (7, Found::Works, Some(2)),
            (8, Found::Works, None),
            (9, Found::Fails, Some(9)),
            (10, Found::Unknown, None),
        ] {
            since = disk.fold(since, found, at(second));
            assert_eq!(since, wanted.map(at), "second {second}");
        }
    }

    #[tokio::test]
    async fn a_directory_that_cannot_be_written_is_found_out() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(DiskProbe::new(dir.path()).run().await, Found::Works);
        assert_eq!(DiskProbe::new(&dir.path().join("gone")).run().await, Found::Unknown);
        // A file where the directory should be: what root may not write either.
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("a file");
        assert_eq!(DiskProbe::new(&file).run().await, Found::Fails);
    }
}

//! What every fault is watched by: the ledger through the proxy, and direct writers past it.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::cluster::Cluster;
use crate::ledger::{Ledger, LedgerReport};
use crate::member::Member;
use crate::watch::WriterWatch;

const WRITERS: u32 = 4;
/// Rows that go through before a fault, and again when all is well.
const ROWS: usize = 100;
const ROWS_MAX: Duration = Duration::from_secs(60);

/// Ledger and direct writers at work on a cluster.
pub struct Load {
    ledger: Ledger,
    watch: WriterWatch,
}

impl Load {
    /// Starts both, and waits until they are at work.
    ///
    /// # Errors
    /// When they do not get to work.
    pub async fn start(cluster: &Cluster) -> Result<Self> {
        let watch = WriterWatch::start(cluster).await?;
        let ledger = Ledger::start(cluster, WRITERS).await?;
        ledger.wait_for_rows(Instant::now(), ROWS, ROWS_MAX).await?;
        Ok(Self { ledger, watch })
    }

    /// Waits until clients have written on for a while.
    ///
    /// # Errors
    /// When they have not within a minute.
    pub async fn goes_on(&self) -> Result<()> {
        self.ledger.wait_for_rows(Instant::now(), ROWS, ROWS_MAX).await
    }

    /// The longest time between two acknowledged rows, from the last one before `since` until now.
    #[must_use]
    pub fn gap_since(&self, since: Instant) -> Duration {
        self.ledger.gap_since(since)
    }

    /// Waits until the cluster is well and clients have written on; then stops, and makes sure that there were never two
    /// writers. `fault` is when the trouble called `name` began. What may be lost is for the test to say.
    ///
    /// # Errors
    /// When the cluster does not get well, or there were two writers.
    pub async fn end<'a>(self, cluster: &'a Cluster, name: &str, fault: Instant) -> Result<(&'a Member, LedgerReport)> {
        cluster.settled().await?;
        self.goes_on().await?;
        let leader = cluster.primary().await?;
        let report = self.ledger.finish(name, fault, leader).await?;
        self.watch.finish(leader).await?.ensure_one_writer()?;
        Ok((leader, report))
    }
}

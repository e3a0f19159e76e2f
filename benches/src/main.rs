//! `make bench`: how long clients cannot write for each kind of fault, and what the proxy adds to a query.
//!
//! With arguments, only the parts named: `failover`, `latency`. `RUNS` says how often each is measured.

mod failover;
mod latency;

use std::time::Duration;

use anyhow::Result;
use pgherd_testkit::Cluster;

#[tokio::main]
async fn main() -> Result<()> {
    let parts: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|named| named == part);
    let runs = std::env::var("RUNS")
        .ok()
        .and_then(|runs| runs.parse().ok())
        .unwrap_or(3_usize);

    let cluster = Cluster::builder().start().await?;
    if wanted("latency") {
        latency::measure(&cluster, runs).await?;
    }
    if wanted("failover") {
        failover::measure(&cluster, runs).await?;
    }
    cluster.pass();
    Ok(())
}

/// The middle one, with the least and the greatest.
fn spread(mut times: Vec<Duration>) -> (Duration, Duration, Duration) {
    times.sort_unstable();
    let at = |index: usize| times.get(index).copied().unwrap_or_default();
    (at(times.len() / 2), at(0), at(times.len().saturating_sub(1)))
}

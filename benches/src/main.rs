//! `make bench`: how long clients cannot write for each kind of fault, and what the proxy costs.
//!
//! With arguments, only the part named: `failover`, or `wire`, which the names of its measures may follow. `RUNS` says how
//! often each fault is measured, `ROUNDS` how often each way through the proxy and its rivals.

mod failover;
mod wire;

use std::time::Duration;

use anyhow::{Context, Result, bail};
use pgherd_testkit::Cluster;

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.split_first() {
        None => {
            wire::measure(&[]).await?;
            measure_failover().await
        }
        Some((part, names)) if part == "wire" => wire::measure(names).await,
        Some((part, _)) if part == "failover" => measure_failover().await,
        // The server that the proxies are measured before is this program too, so that one build has both.
        Some((part, address)) if part == wire::STUB => pgherd_stub::run(address.first().context("no address")?),
        Some((part, _)) => bail!("there is no part {part:?}: failover, or wire with the names of measures"),
    }
}

async fn measure_failover() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    failover::measure(&cluster, number("RUNS", 3)).await?;
    cluster.pass();
    Ok(())
}

/// A number from the environment.
fn number(variable: &str, otherwise: usize) -> usize {
    let found = std::env::var(variable).ok();
    found.and_then(|number| number.parse().ok()).unwrap_or(otherwise)
}

/// The middle one, with the least and the greatest.
fn spread(mut times: Vec<Duration>) -> (Duration, Duration, Duration) {
    times.sort_unstable();
    let at = |index: usize| times.get(index).copied().unwrap_or_default();
    (at(times.len() / 2), at(0), at(times.len().saturating_sub(1)))
}

//! PostgreSQL behind the proxies: what a user feels.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use pgherd_testkit::client::libpq;
use pgherd_testkit::process::{Pid, Signal};
use pgherd_testkit::{Postgres, Site};

use super::tally::Sample;
use super::usage::{Pinned, Usage};
use super::way::{Bed, Way};
use super::work::float;

const RUN_MAX: Duration = Duration::from_secs(60);
const SECONDS: &str = "2";
/// Rows of 1000 bytes, 128 MiB of them, that are there already.
pub(crate) const COPY_OUT: &str = "COPY wide TO STDOUT";
/// Reads and drops them: what is written would be measured otherwise.
pub(crate) const COPY_IN: &str = "COPY wide FROM STDIN WHERE false";
const ROWS: &str = "CREATE UNLOGGED TABLE wide (t text); ALTER TABLE wide ALTER t SET STORAGE plain; \
                    INSERT INTO wide SELECT repeat('x', 1000) FROM generate_series(1, 134000); VACUUM wide";

/// Starts one that lets everybody in, with pgbench's tables and one of wide rows.
pub(crate) async fn start(site: &Arc<Site>) -> Result<Postgres> {
    let postgres = Postgres::start(site, "postgres", site.addresses().member(0)).await?;
    site.write_file(
        "postgres/data/pg_hba.conf",
        "local all all trust\nhost all all 127.0.0.0/8 trust\n",
    )?;
    postgres.end(Signal::INT).await?;
    postgres.start_again().await?;
    let run = async |program: &str, args: &[&str]| {
        let mut command = libpq(site, program, postgres.address());
        command.args(args);
        site.run(command, RUN_MAX).await?.success()
    };
    run("pgbench", &["-i", "-q"]).await?;
    for statement in ROWS.split("; ") {
        run("psql", &["-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", statement]).await?;
    }
    Ok(postgres)
}

/// One client that reads by primary key, everything on one processor.
pub(crate) async fn pgbench(bed: &Bed, way: &Way) -> Result<Sample> {
    let pid = way.pid();
    let server = bed.server_pid;
    // The thread that starts pgbench is pinned too, and with it what it starts.
    let _pinned = Pinned::new(pid.into_iter().chain([server]).collect())?;
    let mut command = libpq(&bed.site, "pgbench", way.door.address);
    command.args(["-n", "-S", "-M", "prepared", "-c", "1", "-T", SECONDS]);
    let before = used(pid)?;
    let report = bed.site.run(command, RUN_MAX).await?.success()?;
    let after = used(pid)?;
    let rate = after_words(&report, "tps = ").with_context(|| format!("no rate in {report}"))?;
    let count = after_words(&report, "number of transactions actually processed: ").context("no count")?;
    let cpu = before
        .zip(after)
        .and_then(|(before, after)| float(after.since(before).cpu));
    Ok(vec![Some(1e6 / rate), cpu.map(|nanos| nanos / 1e3 / count)])
}

fn used(pid: Option<Pid>) -> Result<Option<Usage>> {
    pid.map(Usage::of).transpose()
}

fn after_words(report: &str, words: &str) -> Option<f64> {
    let line = report.lines().find_map(|line| line.strip_prefix(words))?;
    line.split([' ', '/']).next()?.parse().ok()
}

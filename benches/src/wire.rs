//! What the proxy's hot path costs, beside its rivals: by a server that costs nothing, and by PostgreSQL.
//!
//! Ways take turns, round by round, and what counts are the ratios to HAProxy within one round: a machine that has other
//! things to do slows all of them. Processor time is the steadiest; of the times on the clock, those with everything on one
//! processor. Each process has one thread that matters.

mod certificate;
mod client;
mod crowd;
mod measure;
mod plot;
mod postgres;
mod sidecar;
mod syscalls;
mod table;
mod tally;
mod usage;
mod way;
mod work;

use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::process::{Daemon, Pid};
use pgherd_testkit::{Etcd, Site, address, eventually, program};
use tokio::task::spawn_blocking;

use crate::number;
use client::{Client, Door};
use measure::{Before, MEASURES, Measure};
use tally::Tally;
use way::{Bed, Kind, Way};

/// The argument with which this program is the server that costs nothing.
pub(crate) const STUB: &str = "stub";
const STUB_PORT: u16 = 15_999;
const UP_MAX: Duration = Duration::from_secs(10);
/// At least this many of them, for quartiles that mean something.
const ROUNDS: usize = 9;

/// Measures what is named, or everything, and writes tables and plot beside this crate.
pub(crate) async fn measure(names: &[String]) -> Result<()> {
    for name in names {
        let known = MEASURES.iter().any(|measure| measure.name.starts_with(name.as_str()));
        let all: Vec<&str> = MEASURES.iter().map(|measure| measure.name).collect();
        ensure!(known, "there is no measure {name:?}, but {}", all.join(", "));
    }
    let wanted = |measure: &&Measure| names.is_empty() || names.iter().any(|name| measure.name.starts_with(name));
    let mut wanted: Vec<&Measure> = MEASURES.iter().filter(wanted).collect();
    let files = usize::try_from(usage::raise_open_files()?).unwrap_or(usize::MAX);
    for measure in wanted.extract_if(.., |measure| measure.files() > files) {
        println!(
            "{} needs {} open files, and is not measured",
            measure.name,
            measure.files()
        );
    }
    let site = Arc::new(Site::new()?);
    let etcd = Arc::new(Etcd::start(&site, 1).await?);
    let rounds = number("ROUNDS", ROUNDS);
    let mut tallies = Vec::new();

    let (stub, daemon) = stub(&site).await?;
    let bed = Bed::new(&site, &etcd, "stub", stub, daemon).await?;
    measure_on(&bed, Before::Stub, &wanted, rounds, &mut tallies).await?;
    if wanted.iter().any(|measure| measure.before == Before::Postgres) {
        let postgres = postgres::start(&site).await?;
        let bed = Bed::new(&site, &etcd, "postgres", postgres.address(), postgres.pid().await?).await?;
        measure_on(&bed, Before::Postgres, &wanted, rounds, &mut tallies).await?;
    }
    if names.is_empty() {
        let directory = program::workspace().join("benches");
        let text: Vec<String> = tallies.iter().map(table::table).collect();
        fs::write(directory.join("wire.txt"), text.join("\n"))?;
        fs::write(directory.join("wire.svg"), plot::plot(&tallies))?;
    }
    site.pass();
    Ok(())
}

/// Starts the server that costs nothing, as a process of its own.
async fn stub(site: &Arc<Site>) -> Result<(SocketAddr, Pid)> {
    let here = address::at(site.addresses().member(9), STUB_PORT);
    let mut command = site.client_command(std::env::current_exe()?);
    command.arg(STUB).arg(here.to_string());
    let daemon: Daemon = site.start("stub", command)?;
    eventually("the stub answers", UP_MAX, async || {
        let door = Door {
            address: here,
            tls: None,
        };
        spawn_blocking(move || Client::connect(&door)?.end()).await?
    })
    .await
    .with_context(|| daemon.output())?;
    Ok((here, daemon.pid()))
}

async fn measure_on(
    bed: &Bed,
    before: Before,
    wanted: &[&'static Measure],
    rounds: usize,
    tallies: &mut Vec<Tally>,
) -> Result<()> {
    for tls in [false, true] {
        let wanted = wanted
            .iter()
            .filter(|measure| measure.before == before && measure.tls == tls);
        let wanted: Vec<&Measure> = wanted.copied().collect();
        if wanted.is_empty() {
            continue;
        }
        let mut ways = Vec::new();
        for kind in Kind::ALL {
            match bed.way(kind, tls).await? {
                Some(way) => ways.push(way),
                None if kind == Kind::Before => {}
                None => println!("{} is not installed, and not measured", kind.name()),
            }
        }
        for measure in wanted {
            let ways: Vec<&Way> = ways.iter().filter(|way| measure.takes(way.kind)).collect();
            let tally = in_turns(measure, bed, &ways, rounds).await?;
            println!("{}", table::table(&tally));
            tallies.push(tally);
        }
        for way in ways {
            way.end().await?;
        }
    }
    Ok(())
}

async fn in_turns(measure: &'static Measure, bed: &Bed, ways: &[&Way], rounds: usize) -> Result<Tally> {
    let mut tally = Tally::new(measure, ways.iter().map(|way| way.kind));
    if measure.tls {
        tally.remarks.push("direct is without TLS".to_owned());
    }
    for _ in 0..rounds.min(measure.rounds_max) {
        tally.begin_round(usage::load());
        for way in ways {
            let sample = work::sample(measure.work, bed, way).await;
            let sample = sample.with_context(|| format!("{} through {}", measure.name, way.kind.name()))?;
            let (sample, remark) = sample;
            tally.remarks.extend(remark);
            tally.add(way.kind, sample);
        }
    }
    Ok(tally)
}

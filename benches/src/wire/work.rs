//! What is done once per round and way.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{ScopedJoinHandle, scope};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use pgherd_testkit::process::Pid;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use super::client::{self, Client, Door};
use super::crowd::Crowd;
use super::measure::{Form, Work};
use super::postgres;
use super::sidecar;
use super::syscalls;
use super::tally::{Sample, percentile};
use super::usage::{Holding, Pinned, Usage, kernel_memory};
use super::way::{Bed, Way};

pub(crate) const QUERY: &str = "select 1";
const ASKING: Duration = Duration::from_millis(1000);
const CROWDED: Duration = Duration::from_millis(1000);
const BESIDE: Duration = Duration::from_millis(1500);
const BESIDE_STREAMS: usize = 3;
const BESIDE_ROWS: &str = "bulk 64";
const WARM_UP: usize = 300;
const CONNECTIONS: usize = 600;
/// For a proxy to notice what its clients have done last.
const SETTLING: Duration = Duration::from_millis(30);
const IDLE_SETTLING: Duration = Duration::from_millis(500);
const IDLING: Duration = Duration::from_millis(1500);

/// Does it. What is said beside the numbers comes with them.
pub(crate) async fn sample(work: Work, bed: &Bed, way: &Way) -> Result<(Sample, Option<String>)> {
    let (door, pid) = (way.door.clone(), way.pid());
    let server = bed.server_pid;
    let sample = match work {
        Work::PingPong(form) => spawn_blocking(move || ping_pong(form, &door, pid, server)).await??,
        Work::Crowd(size) => spawn_blocking(move || crowd(size, &door, pid)).await??,
        Work::Rows(text) => {
            spawn_blocking(move || bulk(&door, pid, |client| client.ask(&client::simple(text)))).await??
        }
        Work::CopyIn(text, mebibytes) => {
            let copy = move |client: &mut Client| client.copy_in(&client::simple(text), mebibytes);
            spawn_blocking(move || bulk(&door, pid, copy)).await??
        }
        Work::Connect => connect(door, pid).await?,
        Work::Idle(size) => idle(size, bed, way).await?,
        Work::Sidecar => sidecar::sample(bed, way).await?,
        Work::Beside => spawn_blocking(move || beside(&door)).await??,
        Work::Pgbench => postgres::pgbench(bed, way).await?,
        Work::Calls(traced) => return syscalls::count(traced, bed, way).await,
    };
    Ok((sample, None))
}

/// Puts numbers into other units; nothing where there is none.
pub(crate) fn per(count: u64, of: f64) -> Option<f64> {
    float(count).map(|count| count / of)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "nothing that is counted here has more than 52 bits"
)]
pub(crate) fn float(count: u64) -> Option<f64> {
    Some(count as f64)
}

fn used(pid: Option<Pid>) -> Result<Option<Usage>> {
    pid.map(Usage::of).transpose()
}

/// What was used between two looks.
fn between(earlier: Option<Usage>, later: Option<Usage>) -> Option<Usage> {
    Some(later?.since(earlier?))
}

fn ping_pong(form: Form, door: &Door, pid: Option<Pid>, server: Pid) -> Result<Sample> {
    let _pinned = Pinned::new(pid.into_iter().chain([server]).collect())?;
    let mut client = Client::connect(door)?;
    let request = match form {
        Form::Simple => client::simple(QUERY),
        Form::Prepared => {
            client.ask(&client::prepare(QUERY))?;
            client::prepared()
        }
    };
    for _ in 0..WARM_UP {
        client.ask(&request)?;
    }
    let before = used(pid)?;
    let mut times = client.ping_pong(&request, ASKING)?;
    let usage = between(before, used(pid)?);
    client.end()?;
    times.sort_unstable();
    let count = float(times.len() as u64).context("it was asked")?;
    let micros = |thousandths| percentile(&times, thousandths).and_then(|nanos| per(nanos, 1e3));
    Ok(vec![
        micros(500),
        micros(990),
        micros(999),
        usage.and_then(|usage| per(usage.cpu, 1e3 * count)),
        usage.and_then(|usage| per(usage.switches, count / 1e3)),
    ])
}

fn crowd(size: usize, door: &Door, pid: Option<Pid>) -> Result<Sample> {
    let mut crowd = Crowd::gather(door, size, &client::prepare(QUERY), &client::prepared())?;
    crowd.run(Duration::from_millis(50))?;
    let before = used(pid)?;
    let (answers, took) = crowd.run(CROWDED)?;
    let usage = between(before, used(pid)?);
    let count = float(answers).context("it was asked")?;
    Ok(vec![
        usage.and_then(|usage| per(usage.cpu, 1e3 * count)),
        Some(count / took.as_secs_f64()),
        usage.and_then(|usage| per(usage.switches, count / 1e3)),
    ])
}

/// One client that moves much; what `transfer` gives is how many bytes.
fn bulk(door: &Door, pid: Option<Pid>, transfer: impl Fn(&mut Client) -> Result<usize>) -> Result<Sample> {
    let mut client = Client::connect(door)?;
    let before = used(pid)?;
    let began = Instant::now();
    let bytes = transfer(&mut client)?;
    let took = began.elapsed();
    let usage = between(before, used(pid)?);
    client.end()?;
    let bytes = float(bytes as u64).context("something was moved")?;
    Ok(vec![
        usage.and_then(|usage| per(usage.cpu, bytes)),
        Some(bytes / 1e9 / took.as_secs_f64()),
        usage.and_then(|usage| per(usage.switches, bytes / 1e6)),
    ])
}

async fn connect(door: Door, pid: Option<Pid>) -> Result<Sample> {
    sleep(SETTLING).await;
    let before = used(pid)?;
    let connecting = move || -> Result<(Vec<u64>, Duration)> {
        let mut times = Vec::new();
        let request = client::simple(QUERY);
        let began = Instant::now();
        for _ in 0..CONNECTIONS {
            let one = Instant::now();
            let mut client = Client::connect(&door)?;
            client.ask(&request)?;
            client.end()?;
            times.push(u64::try_from(one.elapsed().as_nanos())?);
        }
        Ok((times, began.elapsed()))
    };
    let (mut times, took) = spawn_blocking(connecting).await??;
    sleep(SETTLING).await;
    let usage = between(before, used(pid)?);
    times.sort_unstable();
    let count = float(times.len() as u64).context("it was connected")?;
    Ok(vec![
        usage.and_then(|usage| per(usage.cpu, 1e3 * count)),
        percentile(&times, 500).and_then(|nanos| per(nanos, 1e3)),
        Some(count / took.as_secs_f64()),
    ])
}

/// Takes a process of its own: one that has served before has memory to spare.
async fn idle(size: usize, bed: &Bed, way: &Way) -> Result<Sample> {
    let fresh = bed
        .way(way.kind, way.door.tls.is_some())
        .await?
        .context("it was there before")?;
    let (door, pid) = (fresh.door.clone(), fresh.pid());
    let request = client::simple(QUERY);
    let first = Client::connect_idle(&door, &request)?;
    sleep(IDLE_SETTLING).await;
    let holding = pid.map(Holding::of).transpose()?;
    let kernel = kernel_memory()?;
    let open = move || -> Result<Vec<_>> { (0..size).map(|_| Client::connect_idle(&door, &request)).collect() };
    let clients = spawn_blocking(open).await??;
    sleep(IDLE_SETTLING).await;
    let held = pid.map(Holding::of).transpose()?;
    let kernel = kernel_memory()?.saturating_sub(kernel);
    let before = used(pid)?;
    sleep(IDLING).await;
    let usage = between(before, used(pid)?);
    drop((first, clients));
    fresh.end().await?;
    let count = float(size as u64).context("it was asked for")?;
    let more = |what: fn(&Holding) -> u64| {
        let (held, holding) = (held.as_ref()?, holding.as_ref()?);
        Some(what(held).saturating_sub(what(holding)))
    };
    Ok(vec![
        more(|holding| holding.memory).and_then(|bytes| per(bytes, 1024.0 * count)),
        per(kernel, 1024.0 * count),
        more(|holding| holding.files).and_then(|files| per(files, count)),
        usage.and_then(|usage| per(usage.cpu, 1e6 * IDLING.as_secs_f64())),
    ])
}

/// One that asks little beside some that ask for much.
fn beside(door: &Door) -> Result<Sample> {
    let over = AtomicBool::new(false);
    let stream = || -> Result<usize> {
        let mut client = Client::connect(door)?;
        let mut bytes = 0;
        while !over.load(Ordering::Relaxed) {
            bytes += client.ask(&client::simple(BESIDE_ROWS))?;
        }
        Ok(bytes)
    };
    let began = Instant::now();
    let (times, bytes) = scope(|threads| {
        let streams: Vec<ScopedJoinHandle<'_, Result<usize>>> =
            (0..BESIDE_STREAMS).map(|_| threads.spawn(stream)).collect();
        let small = || -> Result<Vec<u64>> {
            let mut client = Client::connect(door)?;
            client.ask(&client::prepare(QUERY))?;
            client.ping_pong(&client::prepared(), BESIDE)
        };
        let times = small();
        over.store(true, Ordering::Relaxed);
        let bytes: Result<Vec<usize>> = streams
            .into_iter()
            .map(|stream| stream.join().map_err(|_| anyhow!("a stream panicked"))?)
            .collect();
        Ok::<_, anyhow::Error>((times?, bytes?))
    })?;
    let took = began.elapsed().as_secs_f64();
    let mut times = times;
    times.sort_unstable();
    let millis = |thousandths| percentile(&times, thousandths).and_then(|nanos| per(nanos, 1e6));
    let bytes = bytes.iter().map(|bytes| *bytes as u64).sum();
    Ok(vec![millis(500), millis(990), per(bytes, 1e9 * took)])
}

//! What a proxy beside an application has in memory while nobody uses it: by the example's file, and before an agent that tells of
//! a cluster.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::process::{self, Signal};
use pgherd_testkit::{eventually, http, program};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::tally::Sample;
use super::usage::Holding;
use super::way::{Bed, Kind, Way};
use super::work::per;

const UP_MAX: Duration = Duration::from_secs(10);
const END_MAX: Duration = Duration::from_secs(10);
/// For what is done once at a start.
const SETTLING: Duration = Duration::from_secs(2);
const SIGN_OF_LIFE: Duration = Duration::from_secs(2);
const MEBIBYTE: f64 = 1_048_576.0;

/// Takes a process of its own, as an idle one is. A rival is one that has let a client in and out.
pub(crate) async fn sample(bed: &Bed, way: &Way) -> Result<Sample> {
    let held = match way.kind {
        Kind::Pgherd | Kind::Before => ours(bed, way.kind).await?,
        _ => {
            let fresh = bed.way(way.kind, false).await?.context("it was there before")?;
            sleep(SETTLING).await;
            let held = Holding::of(fresh.pid().context("a proxy is a process")?);
            fresh.end().await?;
            held?
        }
    };
    Ok(vec![
        per(held.resident, MEBIBYTE),
        per(held.memory, MEBIBYTE),
        per(held.own, MEBIBYTE),
    ])
}

async fn ours(bed: &Bed, kind: Kind) -> Result<Holding> {
    let listener = TcpListener::bind((bed.ip(), 0)).await?;
    let agent = listener.local_addr()?;
    let mut agents = JoinSet::new();
    agents.spawn(tell(listener, view(bed.server, agent).to_string()));
    let (file, page) = file(bed, agent)?;
    let mut command = bed.site.command(bed.program_of(kind)?.context("it was there before")?);
    command.arg("proxy").arg("--config").arg(file);
    let mut daemon = bed.site.start("sidecar", command)?;
    eventually("the sidecar knows its cluster and is idle", UP_MAX, async || {
        let state = http::get(page, "/stats.json").await?.json()?;
        ensure!(state["verdict"]["word"] == "IDLE", "{}", state["verdict"]);
        Ok(())
    })
    .await
    .with_context(|| daemon.output())?;
    sleep(SETTLING).await;
    let held = Holding::of(daemon.pid());
    process::signal(daemon.pid(), Signal::KILL)?;
    daemon.end(END_MAX).await?;
    held
}

/// The example beside the images, with the addresses and paths of this bed.
fn file(bed: &Bed, agent: SocketAddr) -> Result<(std::path::PathBuf, SocketAddr)> {
    let mut text = fs::read_to_string(program::workspace().join("docker").join("sidecar.yml"))?;
    for member in 1..=3 {
        text = text.replace(&format!("http://10.0.0.{member}:8008"), &format!("http://{agent}"));
    }
    let page = bed.free_address();
    let name = format!("sidecar-{}", page.port());
    let directory = bed.site.make_dir(&name)?;
    text = text.replace("/run/pgherd", &directory.display().to_string());
    text = text.replace("127.0.0.1:8080", &page.to_string());
    Ok((bed.site.write_file(&format!("{name}.yml"), &text)?, page))
}

/// What one of our agents says of a cluster of one, in the words of its `/api/v1/view`.
fn view(server: SocketAddr, agent: SocketAddr) -> Value {
    json!({
        "revision": 5, "scope": "main", "leader": "m1", "epoch": {"holder": "m1", "create_revision": 3},
        "members": [{
            "name": "m1", "role": "primary", "state": "running", "timeline": 1, "lsn": 67_108_960,
            "conn_url": format!("postgres://{server}/postgres"), "api_url": format!("http://{agent}/patroni"),
            "tags": {}, "pgherd": "0.1.0", "mod_revision": 4,
        }],
        "sync": {}, "optime": 67_108_960, "timing": {"ttl_ms": 5000, "loop_wait_ms": 1000, "retry_timeout_ms": 2000},
        "pause": false, "failover": null, "age_ms": 100, "in_touch": true,
    })
}

/// An agent that tells this and nothing else.
async fn tell(listener: TcpListener, view: String) {
    let mut asked = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let view = view.clone();
        asked.spawn(async move {
            let _ = answer(stream, &view).await; // Who has gone needs no answer.
        });
    }
}

async fn answer(stream: TcpStream, view: &str) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let (mut request, mut line) = (String::new(), String::new());
    stream.read_line(&mut request).await?;
    while stream.read_line(&mut line).await? > 2 {
        line.clear();
    }
    if !request.starts_with("GET /api/v1/events") {
        let head = format!(
            "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            view.len()
        );
        return stream.write_all(format!("{head}{view}").as_bytes()).await;
    }
    let head = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n";
    stream.write_all(format!("{head}data: {view}\n\n").as_bytes()).await?;
    loop {
        sleep(SIGN_OF_LIFE).await;
        stream.write_all(b": alive\n\n").await?;
    }
}

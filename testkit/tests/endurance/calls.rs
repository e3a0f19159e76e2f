//! What the relay costs the kernel: receive, send and one wait for each message, counted by strace.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::process::{self, Pid, Signal};
use pgherd_testkit::{client, eventually, program};
use serde_json::json;

use crate::stage::{Door, Guest, SOON, Stage};

const QUERIES: u32 = 3000;
/// Three for each message, and what the control plane does meanwhile.
const CALLS_PER_MESSAGE_MAX: f64 = 3.1;

#[tokio::test]
async fn a_message_costs_three_system_calls() -> Result<()> {
    let mut stage = Stage::start(json!({"proxy": {"workers": 1}})).await?;
    let Some(strace) = program::find("strace") else {
        stage.site.pass();
        client::skip(&anyhow::anyhow!("strace is not installed (scripts/deps.sh tests)"));
        return Ok(());
    };
    let pid = stage.proxy.pid();
    let mut guest = Guest::enter(&stage, Door::Plain).await?;
    guest.ask("select 1").await?;
    let report = stage.site.dir().join("calls");
    let mut command = stage.site.client_command(strace);
    command.args(["-c", "-f", "-U", "calls,name", "-o"]).arg(&report);
    command
        .arg("-p")
        .arg(pid.as_raw_nonzero().to_string())
        .stderr(Stdio::null());
    let mut tracer = stage.site.start("strace", command)?;
    eventually("strace has begun", SOON, async || {
        ensure!(tracer.ended()?.is_some() || is_traced(pid), "{}", tracer.output());
        Ok(())
    })
    .await?;
    if tracer.ended()?.is_some() {
        stage.site.pass();
        client::skip(&anyhow::anyhow!("strace may not look here: {}", tracer.output()));
        return Ok(());
    }
    for _ in 0..QUERIES {
        guest.ask("select 1").await?;
    }
    process::signal(tracer.pid(), Signal::INT)?;
    tracer.end(SOON).await?;
    let summary = fs::read_to_string(&report).with_context(|| tracer.output())?;
    let total = summary.lines().find_map(|line| line.trim().strip_suffix("total"));
    let total: u32 = total.and_then(|count| count.trim().parse().ok()).context("no total")?;
    // A query is two messages: its own and the answer.
    let each = f64::from(total) / f64::from(2 * QUERIES);
    println!("{each:.2} system calls per message\n{summary}");
    ensure!(
        each <= CALLS_PER_MESSAGE_MAX,
        "{each:.2} system calls per message:\n{summary}"
    );
    guest.leave().await?;
    stage.ensure_sound().await?;
    stage.site.pass();
    Ok(())
}

/// Whether every thread of a process is being traced.
fn is_traced(pid: Pid) -> bool {
    let tasks = PathBuf::from(format!("/proc/{}/task", pid.as_raw_nonzero()));
    let traced = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
        let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
        // One that has just ended makes no calls.
        tracer.is_none_or(|tracer| tracer.trim() != "0")
    };
    fs::read_dir(tasks).is_ok_and(|tasks| tasks.flatten().all(traced))
}

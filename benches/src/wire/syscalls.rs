//! Which system calls a proxy makes, counted by strace where that is installed. Times mean nothing under it.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::eventually;
use pgherd_testkit::process::{self, Pid, Signal};
use tokio::task::spawn_blocking;

use super::client::{self, Client, Door};
use super::measure::Traced;
use super::tally::Sample;
use super::usage::is_traced;
use super::way::{Bed, Way, installed};
use super::work::{QUERY, float};

const QUERIES: u32 = 3000;
const CONNECTIONS: u32 = 300;
const BEGIN_MAX: Duration = Duration::from_secs(10);
const END_MAX: Duration = Duration::from_secs(20);
/// What is rarer than this share of all is the control plane's.
const SHARE_MIN: f64 = 0.01;

/// Calls per message, one query being two, or per MiB; and which.
pub(crate) async fn count(traced: Traced, bed: &Bed, way: &Way) -> Result<(Sample, Option<String>)> {
    let (Some(pid), Some(strace)) = (way.pid(), installed("strace")) else {
        return Ok((vec![None], Some("skipped: strace is not installed".to_owned())));
    };
    let mut client = connected(way).await?;
    let report = bed.site.dir().join(format!("strace-{}", pid.as_raw_nonzero()));
    let mut command = bed.site.client_command(strace);
    command.args(["-c", "-f", "-U", "calls,name", "-o"]).arg(&report);
    command
        .arg("-p")
        .arg(pid.as_raw_nonzero().to_string())
        .stderr(Stdio::null());
    let mut tracer = bed.site.start("strace", command)?;
    let begun = eventually("strace has begun", BEGIN_MAX, async || {
        ensure!(tracer.ended()?.is_some() || is_traced(pid), "{}", tracer.output());
        Ok(())
    });
    begun.await?;
    if tracer.ended()?.is_some() {
        // Many systems let only root, or an ancestor, look at another process.
        let said = tracer.output();
        let said = said.lines().next().unwrap_or_default();
        return Ok((vec![None], Some(format!("skipped: {said}"))));
    }
    let door = way.door.clone();
    let (done, units) = spawn_blocking(move || work(traced, &door, &mut client).map(|units| (client, units))).await??;
    process::signal(tracer.pid(), Signal::INT)?;
    tracer.end(END_MAX).await?;
    untraced(pid).await?;
    done.end()?;
    let text = fs::read_to_string(&report).with_context(|| tracer.output())?;
    let calls = calls(&text);
    let total = calls.iter().filter_map(|(count, _)| float(*count)).sum::<f64>();
    let shown: Vec<String> = calls
        .iter()
        .filter_map(|(count, name)| Some((float(*count)?, name)))
        .filter(|(count, _)| *count >= total * SHARE_MIN)
        .map(|(count, name)| format!("{name} {:.2}", count / units))
        .collect();
    let remark = format!("{:<14} {}", way.kind.name(), shown.join(", "));
    Ok((vec![Some(total / units)], Some(remark)))
}

async fn connected(way: &Way) -> Result<Client> {
    let door = way.door.clone();
    let connecting = move || {
        let mut client = Client::connect(&door)?;
        client.ask(&client::prepare(QUERY))?;
        Ok(client)
    };
    spawn_blocking(connecting).await?
}

/// Does what is counted. How many messages, connections or MiB that was.
fn work(traced: Traced, door: &Door, client: &mut Client) -> Result<f64> {
    match traced {
        Traced::Messages => {
            for _ in 0..QUERIES {
                client.ask(&client::prepared())?;
            }
            Ok(f64::from(2 * QUERIES))
        }
        Traced::Connections => {
            for _ in 0..CONNECTIONS {
                let mut one = Client::connect(door)?;
                one.ask(&client::simple(QUERY))?;
                one.end()?;
            }
            // The proxy is heard once more when it has seen the last of them end.
            client.ask(&client::prepared())?;
            Ok(f64::from(CONNECTIONS))
        }
        Traced::Rows(text, mebibytes) => {
            client.ask(&client::simple(text))?;
            float(mebibytes as u64).context("it was asked for")
        }
    }
}

async fn untraced(pid: Pid) -> Result<()> {
    eventually("strace has let go", END_MAX, async || {
        ensure!(!is_traced(pid), "it is traced");
        Ok(())
    })
    .await
}

/// Counts and names, from the summary: a line each between two of dashes.
fn calls(summary: &str) -> Vec<(u64, String)> {
    let rows = summary.lines().filter_map(|line| {
        let (count, name) = line.trim().split_once(' ')?;
        Some((count.parse().ok()?, name.trim().to_owned()))
    });
    let mut rows: Vec<(u64, String)> = rows.filter(|(_, name)| name != "total").collect();
    rows.sort_unstable_by(|one, other| other.cmp(one));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_is_read_without_its_total() {
        let summary = "    calls syscall\n--------- ----------------\n      100 recvfrom\n      205 epoll_wait\n--------- ----------------\n      305 total\n";
        assert_eq!(
            calls(summary),
            [(205, "epoll_wait".to_owned()), (100, "recvfrom".to_owned())]
        );
    }
}

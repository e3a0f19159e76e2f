//! What a quiet cluster costs: etcd's requests, and the leader's processor time and memory.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use pgherd_cluster::clock::Boottime;
use pgherd_testkit::process::Pid;
use pgherd_testkit::{Cluster, Etcd, http};
use tokio::time::sleep;

use crate::record::{Cost, Subject};

/// What etcd counts: requests, and for streams each message.
const RECEIVED: &str = "grpc_server_msg_received_total{";
/// The kernel's unit of processor time in /proc, for programs of any architecture that it supports.
const TICKS_PER_SECOND: f64 = 100.0;
const MINUTE: f64 = 60.0;

/// Measures for `span`, with neither clients nor a proxy. The proxy is started again.
///
/// # Errors
/// When something cannot be read.
pub async fn measure(cluster: &Cluster, subject: &Subject, span: Duration) -> Result<Cost> {
    let leader = cluster.settled().await?;
    // Its requests are not a member's.
    cluster.stop_proxy().await?;
    let pids = [leader.keeper_pid().await?, leader.agent_pid().await?];
    let sentinel = leader.sentinel_pid().await?;
    let (began, before) = (Boottime::now(), received(cluster.etcd()).await?);
    let ticks_before = ticks(pids[0])? + ticks(pids[1])?;
    // The span is what is measured: there is no condition to wait for.
    sleep(span).await;
    let ticks_after = ticks(pids[0])? + ticks(pids[1])?;
    let after = received(cluster.etcd()).await?;
    let seconds = Boottime::now().since(began).as_secs_f64();
    let members = f64::from(u32::try_from(cluster.members().len())?);
    let mut per_member_minute = BTreeMap::new();
    for (method, count) in after {
        let grown = count - before.get(&method).copied().unwrap_or_default();
        if grown > 0.0 {
            per_member_minute.insert(method, grown / members * MINUTE / seconds);
        }
    }
    let all = [pids[0], pids[1], sentinel];
    let cost = Cost {
        subject: subject.clone(),
        etcd_per_member_minute: per_member_minute,
        cpu_percent: (ticks_after - ticks_before) / TICKS_PER_SECOND / seconds * 100.0,
        rss_mib: mib(&all, "status", "VmRSS:")?,
        pss_mib: mib(&all, "smaps_rollup", "Pss:")?,
    };
    cluster.start_proxy().await?;
    Ok(cost)
}

/// By method, all etcd members together.
async fn received(etcd: &Etcd) -> Result<BTreeMap<String, f64>> {
    let mut counts: BTreeMap<String, f64> = BTreeMap::new();
    for index in 0..etcd.size() {
        let answer = http::get(etcd.client_address(index), "/metrics").await?;
        for line in answer.body.lines().filter_map(|line| line.strip_prefix(RECEIVED)) {
            let (labels, count) = line.split_once("} ").context("a metric and its value")?;
            let method = labels.split(',').find_map(|label| label.strip_prefix("grpc_method="));
            let method = method.unwrap_or_default().trim_matches('"').to_owned();
            *counts.entry(method).or_default() += count.trim().parse::<f64>()?;
        }
    }
    Ok(counts)
}

/// User and system time of a process.
fn ticks(pid: Pid) -> Result<f64> {
    let file = format!("/proc/{}/stat", pid.as_raw_nonzero());
    let stat = fs::read_to_string(&file).with_context(|| format!("reading {file}"))?;
    let (_, fields) = stat.rsplit_once(") ").context("a program's name in parentheses")?;
    // Fields 14 and 15 of proc_pid_stat(5); the third comes first here.
    let times = fields.split_ascii_whitespace().skip(11).take(2);
    times.map(|time| Ok(time.parse::<f64>()?)).sum()
}

fn mib(pids: &[Pid; 3], file: &str, name: &str) -> Result<[f64; 3]> {
    let mut sizes = [0.0; 3];
    for (size, pid) in sizes.iter_mut().zip(pids) {
        let file = format!("/proc/{}/{file}", pid.as_raw_nonzero());
        let text = fs::read_to_string(&file).with_context(|| format!("reading {file}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").trim().parse::<f64>().ok());
        *size = kib.with_context(|| format!("no {name} in {file}"))? / 1024.0;
    }
    Ok(sizes)
}

//! What stands between a client and PostgreSQL costs: pgbench's `SELECT` by primary key, one client, prepared, straight
//! to the leader and through each proxy. Rounds are interleaved, so that the ratios of one run can be trusted on a
//! machine that has other things to do.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use pgherd_testkit::client::libpq;
use pgherd_testkit::process::Daemon;
use pgherd_testkit::sql::{DATABASE, SUPERUSER, SUPERUSER_PASSWORD, value};
use pgherd_testkit::{Cluster, address, eventually, program};

use crate::spread;

const ROUND_SECONDS: &str = "5";
const RUN_MAX: Duration = Duration::from_secs(60);
const UP_MAX: Duration = Duration::from_secs(10);
const HAPROXY_PORT: u16 = 15_440;
const PGBOUNCER_PORT: u16 = 15_441;

/// A way to the leader.
struct Way {
    name: &'static str,
    address: SocketAddr,
    latencies: Vec<Duration>,
    _daemon: Option<Daemon>,
}

pub(crate) async fn measure(cluster: &Cluster, runs: usize) -> Result<()> {
    let leader = cluster.settled().await?.postgres();
    let mut ways = vec![
        Way {
            name: "direct",
            address: leader,
            latencies: Vec::new(),
            _daemon: None,
        },
        Way {
            name: "pgherd",
            address: cluster.write_address(),
            latencies: Vec::new(),
            _daemon: None,
        },
    ];
    ways.extend(haproxy(cluster, leader).await?);
    ways.extend(pgbouncer(cluster, leader).await?);
    pgbench(cluster, leader, &["-i", "-q"]).await?;
    for _ in 0..runs {
        for way in &mut ways {
            let args = ["-n", "-S", "-M", "prepared", "-c", "1", "-T", ROUND_SECONDS];
            let report = pgbench(cluster, way.address, &args).await?;
            way.latencies
                .push(latency(&report).with_context(|| format!("no latency in {report}"))?);
        }
    }
    println!("\nlatency of a SELECT, {runs} rounds     median us   added us   times direct");
    let mut direct = None;
    for way in ways {
        let (median, ..) = spread(way.latencies);
        let median = median.as_secs_f64() * 1e6;
        let base = *direct.get_or_insert(median);
        println!(
            "{:<36} {median:>9.1} {:>10.1} {:>14.2}",
            way.name,
            median - base,
            median / base
        );
    }
    Ok(())
}

async fn pgbench(cluster: &Cluster, address: SocketAddr, args: &[&str]) -> Result<String> {
    let mut command = libpq(cluster.site(), "pgbench", address);
    command.args(args);
    cluster.site().run(command, RUN_MAX).await?.success()
}

/// From the line `latency average = 0.061 ms`, or better, from the rate, which has more digits.
fn latency(report: &str) -> Option<Duration> {
    let rate = report.lines().find_map(|line| line.strip_prefix("tps = "))?;
    let rate: f64 = rate.split(' ').next()?.parse().ok()?;
    Some(Duration::from_secs_f64(1.0 / rate))
}

async fn haproxy(cluster: &Cluster, leader: SocketAddr) -> Result<Option<Way>> {
    let here = address::at(cluster.site().addresses().proxy(1), HAPROXY_PORT);
    let config = format!(
        "global\n  maxconn 100\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1m\n  timeout server 1m\n\
         listen postgres\n  bind {here}\n  server leader {leader}\n"
    );
    let file = cluster.site().write_file("haproxy.cfg", &config)?;
    rival(cluster, "haproxy", here, &["-db", "-f", &file.display().to_string()]).await
}

async fn pgbouncer(cluster: &Cluster, leader: SocketAddr) -> Result<Option<Way>> {
    let here = address::at(cluster.site().addresses().proxy(2), PGBOUNCER_PORT);
    let users = cluster.site().write_file(
        "pgbouncer.users",
        &format!("\"{SUPERUSER}\" \"{SUPERUSER_PASSWORD}\"\n"),
    )?;
    let config = format!(
        "[databases]\n{DATABASE} = host={} port={}\n[pgbouncer]\nlisten_addr = {}\nlisten_port = {}\nunix_socket_dir =\n\
         auth_type = scram-sha-256\nauth_file = {}\npool_mode = session\n",
        leader.ip(),
        leader.port(),
        here.ip(),
        here.port(),
        users.display(),
    );
    let file = cluster.site().write_file("pgbouncer.ini", &config)?;
    rival(cluster, "pgbouncer", here, &[&file.display().to_string()]).await
}

/// Starts a rival, where it is installed.
async fn rival(cluster: &Cluster, name: &'static str, here: SocketAddr, args: &[&str]) -> Result<Option<Way>> {
    let installed = program::find(name)
        .or_else(|| Some(format!("/usr/sbin/{name}").into()).filter(|path: &std::path::PathBuf| path.is_file()));
    let Some(program) = installed else {
        println!("{name} is not installed, and not measured");
        return Ok(None);
    };
    let mut command = cluster.site().command(program);
    command.args(args);
    let daemon = cluster.site().start(name, command)?;
    eventually(&format!("{name} leads to PostgreSQL"), UP_MAX, async || {
        Ok(value(here, "SELECT 1", UP_MAX).await?)
    })
    .await?;
    Ok(Some(Way {
        name,
        address: here,
        latencies: Vec::new(),
        _daemon: Some(daemon),
    }))
}

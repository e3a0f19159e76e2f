//! Cancels at random, racing short statements: each hits the session whose key it carries, or nobody.
//!
//! Every statement and every cancel is noted with its times. A statement that was cancelled must be explained by a cancel
//! with the key of its own session, on its way while the statement ran or the one before it: PostgreSQL signals the process,
//! which may have gone on to its next statement meanwhile.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use pgherd_testkit::address::{READ_PORT, WRITE_PORT, at};
use pgherd_testkit::certificates::Authority;
use pgherd_testkit::process::Daemon;
use pgherd_testkit::{Cluster, ClusterBuilder, config, eventually, http, program, sql, yaml};
use serde_json::json;
use tokio::task::JoinSet;

#[path = "cancels/ledger.rs"]
mod ledger;
#[path = "cancels/session.rs"]
mod session;

use ledger::{Judged, Race};
use session::Way;

const SOON: Duration = Duration::from_secs(30);
/// For all the cancels of a race.
const RACE_MAX: Duration = Duration::from_secs(120);
const TLS_WRITE: u16 = WRITE_PORT + 10;
const TLS_READ: u16 = READ_PORT + 10;
const SESSIONS_PER_PORT: usize = 18;
const CANCELLERS: usize = 8;

/// Three members that let everybody in: what is raced for is what comes after that.
fn open_doors() -> ClusterBuilder {
    let hba = [
        "local all all trust",
        "host replication replicator 127.0.0.0/8 scram-sha-256",
        "host all all 127.0.0.0/8 trust",
    ];
    Cluster::builder().member_config(json!({"postgresql": {"pg_hba": hba}}))
}

#[tokio::test]
async fn two_thousand_cancels_hit_their_own_sessions_or_nobody() -> Result<()> {
    let cluster = open_doors().prepare().await?;
    let ip = cluster.site().addresses().proxy(0);
    let authority = Authority::new(cluster.site())?;
    let own = authority.issue(cluster.site(), "proxy", &[ip])?;
    let listener = |port, role: &str, tls: &str| json!({"address": at(ip, port).to_string(), "role": role, "tls": tls});
    let listeners = [
        listener(WRITE_PORT, "write", "off"),
        listener(READ_PORT, "read", "off"),
        listener(TLS_WRITE, "write", "require"),
        listener(TLS_READ, "read", "require"),
    ];
    let tls = json!({"certificate": own.certificate, "private_key": own.key});
    cluster.write_proxy_config(json!({"proxy": {"workers": 4, "listeners": listeners, "tls": tls}}))?;
    for member in cluster.members() {
        member.start().await?;
    }
    cluster.start_proxy().await?;
    cluster.settled().await?;

    let plain = [Way::plain(at(ip, WRITE_PORT)), Way::plain(at(ip, READ_PORT))];
    let judged = race(&plain, &plain, 1400, None).await?;
    ensure!(
        judged.hit > 50,
        "too few statements were hit to say anything: {judged:?}"
    );

    // Sessions by TLS; their cancels by TLS, as newer clients send them, and in plaintext, as older ones do.
    let connector = session::believer(authority.file())?;
    let by_tls = [
        Way::by_tls(at(ip, TLS_WRITE), &connector, ip),
        Way::by_tls(at(ip, TLS_READ), &connector, ip),
    ];
    for cancels in [&by_tls, &[Way::plain(at(ip, TLS_WRITE)), Way::plain(at(ip, TLS_READ))]] {
        let judged = race(&by_tls, cancels, 300, None).await?;
        ensure!(
            judged.hit > 10,
            "too few statements were hit to say anything: {judged:?}"
        );
    }
    let delivered = delivered(cluster.stats_address(), "known").await?;
    // Those of sessions that had just ended were not known any more.
    ensure!(
        delivered > 1500,
        "{delivered} cancels were delivered to the server of a known session"
    );
    cluster.pass();
    Ok(())
}

/// A key that the other proxy gave out: this one knows only where its session may be.
#[tokio::test]
async fn a_cancel_through_another_proxy_hits_its_own_session_or_nobody() -> Result<()> {
    let cluster = open_doors().start().await?;
    let ip = cluster.site().addresses().proxy(1);
    let _second = second_proxy(&cluster)?;
    let sessions = [Way::plain(cluster.write_address()), Way::plain(cluster.read_address())];
    let cancels = [Way::plain(at(ip, WRITE_PORT)), Way::plain(at(ip, READ_PORT))];
    for way in &cancels {
        eventually("the second proxy serves", SOON, async || {
            Ok(sql::value(way.address(), "SELECT 1", SOON).await?)
        })
        .await?;
    }
    // Below the rate at which unknown keys are passed on.
    let judged = race(&sessions, &cancels, 300, Some(Duration::from_millis(25))).await?;
    ensure!(
        judged.hit > 10,
        "too few statements were hit to say anything: {judged:?}"
    );
    let stats = at(ip, pgherd_testkit::address::STATS_PORT);
    let passed_on = delivered(stats, "unknown").await?;
    ensure!(passed_on > 250, "{passed_on} cancels were passed on");
    cluster.pass();
    Ok(())
}

/// Another proxy before the same cluster, on its own address.
fn second_proxy(cluster: &Cluster) -> Result<Daemon> {
    let site = cluster.site();
    let etcd3 = config::etcd3(&cluster.etcd().hosts(), cluster.etcd().credentials());
    let mut own = config::proxy(site.addresses().proxy(1), etcd3);
    let takeover = site.dir().join("takeover-second.sock");
    config::merge(&mut own, json!({"proxy": {"takeover": takeover}}));
    let file = site.write_file("second.yml", &yaml::write(&own))?;
    let mut command = site.command(site.reachable(&program::pgherd()?)?);
    command.arg("proxy").arg("--config").arg(file);
    site.start("second", command)
}

/// Sessions on `sessions` and cancels through `cancels`, of which the same position has the same role.
async fn race(sessions: &[Way; 2], cancels: &[Way; 2], count: usize, pace: Option<Duration>) -> Result<Judged> {
    let race = Arc::new(Race::new(count));
    let mut tasks = JoinSet::new();
    for slot in 0..2 * SESSIONS_PER_PORT {
        let port = slot % 2;
        race.add_slot(port);
        tasks.spawn(ledger::ask_on(sessions[port].clone(), slot, Arc::clone(&race)));
    }
    eventually("every session has a key", SOON, async || {
        if tasks.try_join_next().is_some() {
            bail!("a session is over before the race");
        }
        ensure!(race.all_have_keys());
        Ok(())
    })
    .await?;
    for number in 0..CANCELLERS {
        tasks.spawn(ledger::cancel_at_random(
            cancels.clone(),
            number,
            pace.map(|pace| pace * 8),
            Arc::clone(&race),
        ));
    }
    let ended = tokio::time::timeout(RACE_MAX, async {
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        anyhow::Ok(())
    });
    ended.await.context("the race does not end")??;
    let judged = race.judge()?;
    println!("{judged:?}");
    Ok(judged)
}

/// How many cancels the proxy has delivered, by whether it knew the key.
async fn delivered(stats: SocketAddr, key: &str) -> Result<u64> {
    let metrics = http::get(stats, "/metrics").await?.body;
    let lines = metrics.lines().filter(|line| line.contains("cancel"));
    let counted: BTreeMap<&str, &str> = lines.filter_map(|line| line.rsplit_once(' ')).collect();
    let of_key = counted
        .iter()
        .find(|(name, _)| name.contains("delivered") && name.contains(&format!("\"{key}\"")));
    let (_, count) = of_key.with_context(|| format!("no count of {key} keys in {counted:?}"))?;
    Ok(count.parse()?)
}

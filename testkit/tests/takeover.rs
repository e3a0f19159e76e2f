//! A new proxy takes the ports of the running one over.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pgherd_testkit::sql::{Sql, value};
use pgherd_testkit::{Cluster, eventually, http};

const SOON: Duration = Duration::from_secs(15);
const DRAIN: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_new_proxy_takes_over_and_no_client_finds_the_port_closed() -> Result<()> {
    let cluster = Cluster::builder().members(1).start().await?;
    cluster.settled().await?;
    let write = cluster.write_address();
    let before = Sql::connect(write, SOON).await?;
    let connecting = async {
        let mut connected = 0;
        loop {
            value(write, "SELECT 1", SOON)
                .await
                .with_context(|| format!("after {connected} connections"))?;
            connected += 1;
        }
    };
    let taking = async {
        let began = Instant::now();
        let mut former = cluster.take_proxy_over().await?;
        eventually("the former proxy accepts no more", SOON, async || {
            ensure!(
                former.output().contains("has taken the ports over"),
                "{}",
                former.output()
            );
            Ok(())
        })
        .await?;
        // Both would answer there, if the former proxy still did.
        for _ in 0..20 {
            let metrics = http::get(cluster.stats_address(), "/metrics").await?.body;
            let mut lines = metrics.lines();
            let uptime = lines.find_map(|line| line.strip_prefix("pgherd_uptime_seconds "));
            let uptime: f64 = uptime.context("no uptime")?.parse()?;
            ensure!(
                uptime <= began.elapsed().as_secs_f64(),
                "the former proxy's page: {uptime} s"
            );
        }
        // Served by the new one, while the old one serves on what it has.
        value(write, "SELECT 1", SOON).await?;
        ensure!(before.value("SELECT 2", SOON).await? == "2");
        ensure!(former.ended()?.is_none(), "it has ended before its session");
        drop(before);
        let status = former.end(DRAIN).await?;
        ensure!(status.success(), "the former proxy ended with {status}");
        let page = http::get(cluster.stats_address(), "/healthz").await?;
        ensure!(page.status == 200, "{page:?}");
        Ok(())
    };
    tokio::select! {
        taken = taking => taken?,
        failed = connecting => return failed,
    }
    cluster.stop_proxy().await?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_changed_file_is_read_without_being_told_and_a_bad_one_changes_nothing() -> Result<()> {
    let cluster = Cluster::builder().members(1).start().await?;
    cluster.settled().await?;
    let stats = cluster.stats_address();
    let counted = async |sign: &str| -> Result<()> {
        let metrics = http::get(stats, "/metrics").await?;
        let reloads = metrics.body.lines().filter(|line| line.contains("config_reloads"));
        ensure!(
            reloads.clone().any(|line| line == sign),
            "{:?}",
            reloads.collect::<Vec<_>>()
        );
        Ok(())
    };
    cluster.write_proxy_config(serde_json::json!({"proxy": {"drain": "7s"}}))?;
    eventually("the new file is in force", SOON, async || {
        counted("pgherd_config_reloads_total{result=\"applied\"} 1").await
    })
    .await?;
    cluster.write_proxy_config(serde_json::json!({"proxy": {"drain": "never"}}))?;
    eventually("a bad one is refused", SOON, async || {
        counted("pgherd_config_reloads_total{result=\"refused\"} 1").await
    })
    .await?;
    value(cluster.write_address(), "SELECT 1", SOON).await?;
    cluster.pass();
    Ok(())
}

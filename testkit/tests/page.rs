//! What the proxy shows: the page, the same as JSON, metrics and health.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use pgherd_testkit::{Cluster, eventually, http};

const SOON: Duration = Duration::from_secs(5);

#[tokio::test]
async fn the_page_shows_the_members_and_follows_the_leader() -> Result<()> {
    let cluster = Cluster::builder().members(2).start().await?;
    let former = cluster.settled().await?;
    let next = cluster.others(former.name())[0];
    let stats = cluster.stats_address();

    let page = http::get(stats, "/stats").await?;
    ensure!(
        page.status == 200
            && page
                .headers
                .iter()
                .any(|header| header.to_lowercase().contains("text/html"))
    );
    for member in cluster.members() {
        ensure!(
            page.body.contains(member.name()),
            "{} is not on the page",
            member.name()
        );
    }
    ensure!(
        !page.body.contains("http://") && !page.body.contains("https://"),
        "the page loads something from elsewhere"
    );
    eventually("the former leader is shown", SOON, async || {
        shown_leader_is(stats, former.name()).await
    })
    .await?;

    cluster
        .pgherd(
            "switchover",
            &["--leader", former.name(), "--candidate", next.name(), "--force"],
        )
        .await?
        .success()?;
    eventually("the new leader is shown", SOON, async || {
        shown_leader_is(stats, next.name()).await
    })
    .await?;
    for member in cluster.members() {
        eventually("every agent's page shows it", SOON, async || {
            let state = http::get(member.rest(), "/ui/state").await?.json()?;
            ensure!(
                state["verdict"]["word"] == "WRITABLE" && state["leader"]["name"] == next.name(),
                "{state}"
            );
            let page = http::get(member.rest(), "/ui").await?;
            ensure!(page.status == 200 && page.body.contains("What happened?"), "{page:?}");
            Ok(())
        })
        .await?;
    }
    cluster.pass();
    Ok(())
}

/// The page's own facts, as JSON: one member takes writes, and that is the leader.
async fn shown_leader_is(stats: SocketAddr, name: &str) -> Result<()> {
    let state = http::get(stats, "/api/v1/state").await?.json()?;
    ensure!(state["writable"] == true && state["leader"]["name"] == name, "{state}");
    let members = state["members"].as_array().into_iter().flatten();
    let takes_writes = members
        .filter(|member| member["takes"] == "write")
        .map(|member| member["name"].as_str());
    ensure!(takes_writes.eq([Some(name)]), "{state}");
    Ok(())
}

#[tokio::test]
async fn health_and_metrics_are_served() -> Result<()> {
    let cluster = Cluster::builder().members(1).start().await?;
    let stats = cluster.stats_address();
    let health = http::get(stats, "/healthz").await?;
    ensure!(health.status == 200, "{health:?}");
    let metrics = http::get(stats, "/metrics").await?;
    ensure!(
        metrics.status == 200 && metrics.body.contains("# TYPE pgherd_"),
        "{metrics:?}"
    );
    for line in metrics.body.lines().filter(|line| !line.starts_with('#')) {
        let value = line.rsplit(' ').next().unwrap_or_default();
        ensure!(value.parse::<f64>().is_ok(), "not a sample: {line}");
    }
    ensure!(http::get(stats, "/nosuch").await?.status == 404);
    cluster.pass();
    Ok(())
}

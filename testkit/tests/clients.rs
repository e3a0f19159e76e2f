//! What a client sees when the leader changes. What clients do while nothing changes is in `matrix.rs`, what operators do in
//! `operator.rs`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::{Cluster, Sql, SqlFailure, eventually, sql, throughout};
use serde_json::json;

const SOON: Duration = Duration::from_secs(30);
const LEASES_GONE: Duration = Duration::from_secs(8);

#[tokio::test]
async fn an_idle_write_session_is_ended_when_the_leader_changes() -> Result<()> {
    let cluster = Cluster::builder().members(2).start().await?;
    let former = cluster.settled().await?;
    let session = Sql::connect(cluster.write_address(), SOON).await?;
    session.value("SELECT 1", SOON).await?;
    cluster
        .pgherd("switchover", &["--leader", former.name(), "--force"])
        .await?
        .success()?;
    let how = eventually("the session has ended", SOON, async || {
        session.ended().cloned().context("it is open")
    })
    .await?;
    ensure!(how.code() == "57P01", "{how}");
    ensure!(cluster.next_leader(former.name()).await?.name() != former.name());
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_client_that_comes_during_an_election_is_held_and_served() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let former = cluster.settled().await?;
    former.kill_everything().await?;
    // One try, without a retry: the proxy keeps it waiting until somebody leads.
    let session = Sql::connect(cluster.write_address(), SOON).await?;
    let server = session
        .value("CREATE TABLE served (n int); SELECT host(inet_server_addr())", SOON)
        .await?;
    ensure!(
        server != former.postgres().ip().to_string(),
        "served by the dead leader"
    );
    cluster.pass();
    Ok(())
}

/// Two members, of which one may never lead, after the death of the other. The proxy holds clients for a second.
async fn leaderless() -> Result<Cluster> {
    let held_briefly = json!({"proxy": {"hold": {"timeout": "1s"}}});
    let only_reads = json!({"tags": {"nofailover": true}});
    let builder = Cluster::builder()
        .members(2)
        .proxy_config(held_briefly)
        .config_of("m2", only_reads);
    let cluster = builder.prepare().await?;
    cluster.start_proxy().await?;
    let leader = cluster.member("m1")?;
    leader.start().await?;
    cluster.settled_with(1).await?;
    cluster.member("m2")?.start().await?;
    cluster.settled().await?;
    leader.kill_everything().await?;
    Ok(cluster)
}

#[tokio::test]
async fn without_a_leader_a_writer_is_told_so() -> Result<()> {
    let cluster = leaderless().await?;
    let refused = Sql::connect(cluster.write_address(), SOON).await.err();
    let refused = refused.context("there is a write session without a leader")?;
    ensure!(
        matches!(&refused, SqlFailure::Told { code, .. } if code == "57P03"),
        "{refused}"
    );
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn without_a_leader_reads_go_on() -> Result<()> {
    let cluster = leaderless().await?;
    // For longer than the dead leader's keys live, and its death takes to be seen.
    throughout("a replica answers on the read port", LEASES_GONE, async || {
        let recovering = sql::value(cluster.read_address(), "SELECT pg_is_in_recovery()", SOON).await?;
        ensure!(recovering == "t", "{recovering}");
        Ok(())
    })
    .await?;
    cluster.pass();
    Ok(())
}

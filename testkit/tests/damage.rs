//! Damage that no member has done: a store that was emptied, and a log that is gone.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::config::PREFIX;
use pgherd_testkit::{Cluster, Member, eventually};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);

/// The files in the log's directory.
fn log_files(member: &Member) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(member.data_dir().join("pg_wal"))?.flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    Ok(names.filter(|name| name.len() == 24).collect())
}

#[tokio::test]
#[ignore = "long: a member finds out that what it lacks is gone"]
async fn a_replica_whose_log_is_gone_from_everywhere_is_copied_anew() -> Result<()> {
    let postgresql = json!({"use_slots": false, "parameters": {"wal_keep_size": 0, "min_wal_size": "32MB"}});
    let cluster = Cluster::builder()
        .members(2)
        .dcs(json!({"postgresql": postgresql}))
        .start()
        .await?;
    let leader = cluster.settled().await?;
    let replica = *cluster.others(leader.name()).first().context("two members")?;
    replica.kill_everything().await?;
    let needed = leader.sql("SELECT pg_walfile_name(pg_current_wal_lsn())").await?;
    eventually("what the replica needs is gone", SOON, async || {
        let session = leader.client().await?;
        session.rows("CREATE TABLE IF NOT EXISTS told (n int)", SOON).await?;
        session.rows("INSERT INTO told VALUES (1)", SOON).await?;
        session.rows("SELECT pg_switch_wal()", SOON).await?;
        session.rows("CHECKPOINT", SOON).await?;
        let files = log_files(leader)?;
        ensure!(!files.contains(&needed), "{needed} is still there");
        Ok(())
    })
    .await?;
    replica.start().await?;
    cluster.settled().await?;
    let says = replica.output().await;
    ensure!(says.contains("is cloned anew"), "it does not say so: {says}");
    cluster.pass();
    Ok(())
}

async fn value(cluster: &Cluster, key: &str) -> Result<String> {
    let entry = cluster.etcd().entry(&format!("{PREFIX}{key}")).await?;
    Ok(entry.with_context(|| format!("there is no {key}"))?.value)
}

#[tokio::test]
#[ignore = "long: waits for leases to end"]
async fn an_etcd_that_was_emptied_gets_back_what_it_had_and_no_data_is_replaced() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let leader = cluster.settled().await?;
    leader
        .client()
        .await?
        .rows("CREATE TABLE told AS SELECT 1 AS n", SOON)
        .await?;
    let change = json!({"loop_wait": 2, "ttl": 7, "maximum_lag_on_failover": 4242});
    let answer = leader.ask("PATCH", "/config", Some(&change)).await?;
    ensure!(answer.status == 200, "{answer:?}");
    let (system_id, config) = (value(&cluster, "initialize").await?, value(&cluster, "config").await?);
    let directories = || -> Result<Vec<u64>> {
        use std::os::unix::fs::MetadataExt;
        let inode = |dir: std::path::PathBuf| -> Result<u64> { Ok(std::fs::metadata(dir)?.ino()) };
        cluster
            .members()
            .iter()
            .map(|member| inode(member.data_dir()))
            .collect()
    };
    let before = directories()?;
    cluster.etcd().ctl(&["del", "--prefix", ""]).await?.success()?;
    eventually("the keys are back", SOON, async || {
        ensure!(value(&cluster, "initialize").await? == system_id);
        let [now, then]: [Value; 2] = [
            serde_json::from_str(&value(&cluster, "config").await?)?,
            serde_json::from_str(&config)?,
        ];
        ensure!(now == then, "{now} and not {then}");
        Ok(())
    })
    .await?;
    cluster.settled().await?;
    // Once more while nobody of the cluster runs: now only what lies beside the data can tell.
    for member in cluster.members() {
        member.stop().await?;
    }
    cluster.etcd().ctl(&["del", "--prefix", ""]).await?.success()?;
    for member in cluster.members() {
        member.start().await?;
    }
    cluster.settled().await?;
    ensure!(value(&cluster, "initialize").await? == system_id);
    let limit = "maximum_lag_on_failover";
    let now: Value = serde_json::from_str(&value(&cluster, "config").await?)?;
    ensure!(now[limit] == 4242, "{now}");
    for member in cluster.members() {
        ensure!(member.sql("SELECT n FROM told").await? == "1", "{member:?} has lost it");
    }
    ensure!(directories()? == before, "data was replaced");
    cluster.pass();
    Ok(())
}

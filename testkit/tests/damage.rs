//! What is left of a cluster when something else than a member was damaged: its store.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::config::PREFIX;
use pgherd_testkit::{Cluster, eventually};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);

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
        let inode = |dir: std::path::PathBuf| Ok(std::fs::metadata(dir)?.ino());
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
    for member in cluster.members() {
        ensure!(member.sql("SELECT n FROM told").await? == "1", "{member:?} has lost it");
    }
    ensure!(directories()? == before, "data was replaced");
    cluster.pass();
    Ok(())
}

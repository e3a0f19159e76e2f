//! The mode is turned on, over and off while clients write.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::{Cluster, SyncLoad, SyncRecord, eventually};
use serde_json::json;

use super::{IN_TIME, chosen, voters, with};

#[tokio::test]
async fn the_mode_is_turned_on_over_and_off_and_clients_do_not_notice() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let leader = cluster.settled().await?;
    let load = SyncLoad::start(&cluster).await?;
    let began = Instant::now();
    cluster.in_step(on_and_over(&cluster)).await?;
    cluster.configure(&json!({"synchronous_mode": false})).await?;
    eventually("the mode is off", IN_TIME, async || {
        let (record, names) = (cluster.sync_record().await?, leader.sync_names().await?);
        ensure!(
            record.is_none() && names.is_empty(),
            "/sync is {record:?}, the setting is {names:?}"
        );
        Ok(())
    })
    .await?;
    let (after, report) = load.end(&cluster, 3, "modes changed online", began).await?;
    ensure!(after.name() == leader.name(), "{after:?} leads");
    ensure!(report.errors.is_empty(), "writers noticed: {report}");
    cluster.pass();
    Ok(())
}

async fn on_and_over(cluster: &Cluster) -> Result<()> {
    let leader = cluster.settled().await?;
    let others = cluster.others(leader.name());
    let both: Vec<&str> = others.iter().map(|member| member.name()).collect();
    let names = both.join(",");
    let record = |quorum| SyncRecord::of(leader.name(), quorum, &both);

    cluster.configure(&json!({"synchronous_mode": "on"})).await?;
    chosen(cluster).await?;
    let strict = json!({"synchronous_mode_strict": true, "synchronous_node_count": 2});
    cluster.configure(&strict).await?;
    let all = format!("2 ({names})");
    cluster.sync_settles(&record(0), &all, IN_TIME).await?;
    cluster.configure(&json!({"synchronous_mode": "quorum"})).await?;
    let every = format!("ANY 2 ({names})");
    cluster.sync_settles(&record(0), &every, IN_TIME).await?;
    let lenient = json!({"synchronous_mode_strict": null, "synchronous_node_count": 1});
    cluster.configure(&lenient).await?;
    let any = format!("ANY 1 ({names})");
    cluster.sync_settles(&record(1), &any, IN_TIME).await?;
    cluster.configure(&json!({"synchronous_mode": true})).await?;
    chosen(cluster).await?;
    cluster.configure(&json!({"synchronous_mode": "quorum"})).await?;
    voters(cluster).await?;
    Ok(())
}

/// The leader dies in the middle of it, whatever it has done by then: both modes promise the same.
#[tokio::test]
async fn a_leader_that_dies_while_the_mode_is_turned_over_takes_no_acknowledged_row_with_it() -> Result<()> {
    let cluster = with(json!(true)).start().await?;
    chosen(&cluster).await?;
    cluster.in_step(dies_on_the_way_to(&cluster, "quorum")).await?;
    voters(&cluster).await?;
    cluster.in_step(dies_on_the_way_to(&cluster, "on")).await?;
    chosen(&cluster).await?;
    cluster.pass();
    Ok(())
}

async fn dies_on_the_way_to(cluster: &Cluster, mode: &str) -> Result<()> {
    let former = cluster.settled().await?;
    let load = SyncLoad::start(cluster).await?;
    let before = cluster.sync_revision().await?;
    cluster.configure(&json!({"synchronous_mode": mode})).await?;
    eventually("the way has begun", IN_TIME, async || {
        ensure!(cluster.sync_revision().await? > before);
        Ok(())
    })
    .await?;
    let fault = Instant::now();
    former.kill_everything().await?;
    println!("before it died: {:?}", cluster.sync_history(before).await?);
    let left = cluster.sync_record().await?.context("there is no /sync")?;
    // Between two sets nobody else may lead.
    if !left.standbys.is_empty() {
        cluster.next_leader(former.name()).await?;
        load.goes_on().await?;
    }
    former.start().await?;
    let name = format!("leader killed on the way to {mode}");
    load.end(cluster, 3, &name, fault).await?;
    Ok(())
}

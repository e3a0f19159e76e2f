//! Quorum mode: who votes, and that whoever wins has everything.

use std::time::Instant;

use anyhow::{Result, ensure};
use pgherd_testkit::config::PREFIX;
use pgherd_testkit::process::{self, Pid, Signal};
use pgherd_testkit::{Cluster, Member, Promotions, SyncLoad, SyncRecord};
use serde_json::json;

use super::{
    IN_TIME, LONG_ENOUGH, SOON, answers, die_one_by_one, promoted, stays_a_standby, voters, walreceiver, with,
};

#[tokio::test]
async fn a_set_of_voters_grows_from_nobody_to_two_and_loses_one_by_its_tag() -> Result<()> {
    let cluster = with(json!("quorum")).prepare().await?;
    let [m1, m2, m3] = cluster.members() else {
        anyhow::bail!("three members")
    };
    m1.start().await?;
    cluster.start_proxy().await?;
    cluster.settled_with(1).await?;
    let rounds = async {
        alone_and_alone_again(&cluster, m1).await?;
        one_voter_takes_over(&cluster, m1, m2).await?;
        two_voters(&cluster, m1, m3).await?;
        one_voter_is_left(&cluster, m1, m3).await
    };
    cluster.in_step(rounds).await?;
    cluster.pass();
    Ok(())
}

async fn alone_and_alone_again(cluster: &Cluster, m1: &Member) -> Result<()> {
    let alone = SyncRecord::of("m1", 0, &[]);
    cluster.sync_settles(&alone, "", IN_TIME).await?;
    m1.stop().await?;
    m1.start().await?;
    cluster.settled_with(1).await?;
    cluster.sync_settles(&alone, "", IN_TIME).await?;
    cluster.configure(&json!({"synchronous_mode_strict": true})).await?;
    cluster.sync_settles(&alone, "ANY 1 (*)", IN_TIME).await
}

async fn one_voter_takes_over(cluster: &Cluster, m1: &Member, m2: &Member) -> Result<()> {
    m2.start().await?;
    let record = SyncRecord::of("m1", 0, &["m2"]);
    cluster.sync_settles(&record, "ANY 1 (m2)", SOON).await?;
    m1.stop().await?;
    promoted(m2).await?;
    let record = SyncRecord::of("m2", 0, &[]);
    cluster.sync_settles(&record, "ANY 1 (*)", IN_TIME).await?;
    m1.start().await?;
    let record = SyncRecord::of("m2", 0, &["m1"]);
    cluster.sync_settles(&record, "ANY 1 (m1)", SOON).await
}

async fn two_voters(cluster: &Cluster, m1: &Member, m3: &Member) -> Result<()> {
    m3.start().await?;
    let both = |quorum| SyncRecord::of("m2", quorum, &["m1", "m3"]);
    cluster.sync_settles(&both(1), "ANY 1 (m1,m3)", SOON).await?;
    cluster.settled().await?;
    answers(m1, "/quorum", 200).await?;
    answers(m3, "/quorum", 200).await?;
    let shown = cluster.pgherd("list", &[]).await?.success()?;
    ensure!(shown.matches("Quorum Standby").count() == 2, "{shown}");
    cluster.configure(&json!({"synchronous_node_count": 2})).await?;
    cluster.sync_settles(&both(0), "ANY 2 (m1,m3)", IN_TIME).await?;
    cluster.configure(&json!({"synchronous_node_count": 1})).await?;
    cluster.sync_settles(&both(1), "ANY 1 (m1,m3)", IN_TIME).await
}

async fn one_voter_is_left(cluster: &Cluster, m1: &Member, m3: &Member) -> Result<()> {
    m3.stop().await?;
    m3.alter_config(json!({"tags": {"nosync": true}}))?;
    m3.start().await?;
    cluster.settled().await?;
    let record = SyncRecord::of("m2", 0, &["m1"]);
    cluster.sync_settles(&record, "ANY 1 (m1)", IN_TIME).await?;
    answers(m1, "/quorum", 200).await?;
    answers(m3, "/quorum", 503).await
}

#[tokio::test]
async fn a_dead_leader_takes_no_acknowledged_row_with_it_nor_one_whose_voter_has_died() -> Result<()> {
    let cluster = with(json!("quorum")).start().await?;
    let rounds = async {
        leader_dies(&cluster).await?;
        voter_dies_and_then_the_leader(&cluster).await?;
        voters(&cluster).await
    };
    cluster.in_step(rounds).await?;
    cluster.pass();
    Ok(())
}

async fn leader_dies(cluster: &Cluster) -> Result<()> {
    let (former, ..) = voters(cluster).await?;
    let load = SyncLoad::start(cluster).await?;
    let promotions = Promotions::watch(&cluster.others(former.name())).await?;
    let fault = Instant::now();
    former.kill_everything().await?;
    cluster.next_leader(former.name()).await?;
    load.goes_on().await?;
    let seen = promotions.seen();
    ensure!(!seen.is_empty(), "nobody was seen to be promoted");
    ensure!(
        seen.iter().all(|(_, names)| names.starts_with("ANY 1 (")),
        "commits waited for nobody after the promotion: {seen:?}"
    );
    former.start().await?;
    let name = "everything of the leader killed, quorum mode";
    load.end(cluster, 3, name, fault).await?;
    Ok(())
}

async fn voter_dies_and_then_the_leader(cluster: &Cluster) -> Result<()> {
    let (former, first, second) = voters(cluster).await?;
    let names = format!("ANY 1 ({})", second.name());
    die_one_by_one(
        cluster,
        [former, first, second],
        &names,
        "a voter and then the leader killed",
    )
    .await
}

#[tokio::test]
async fn one_voter_of_two_does_not_lead_alone() -> Result<()> {
    let cluster = with(json!("quorum")).start().await?;
    let (former, first, second) = voters(&cluster).await?;
    let load = SyncLoad::start(&cluster).await?;
    // Nobody takes the first off the list.
    let agent = former.freeze_agent().await?;
    let fault = Instant::now();
    first.kill_everything().await?;
    former.kill_everything().await?;
    ensure!(!process::is_alive(agent));
    stays_a_standby(second, LONG_ENOUGH).await?;
    first.start().await?;
    cluster.next_leader(former.name()).await?;
    former.start().await?;
    let name = "the leader and a voter killed at once";
    load.end(&cluster, 3, name, fault).await?;
    cluster.pass();
    Ok(())
}

/// What one voter acknowledges while the other one's receiver is stopped, and nobody is there to see it.
async fn one_falls_behind(former: &Member, lagging: &Member) -> Result<Pid> {
    let table = "CREATE TABLE IF NOT EXISTS told (n int, filler text); TRUNCATE told";
    former.sql(table).await?;
    let receiver = walreceiver(lagging).await?;
    former.freeze_agent().await?;
    process::signal(receiver, Signal::STOP)?;
    // More than its socket holds.
    let rows = "INSERT INTO told SELECT n, repeat(md5(n::text), 60) FROM generate_series(1, 15000) n";
    let session = former.client().await?;
    session.rows(rows, SOON).await?;
    session.rows("INSERT INTO told VALUES (0)", SOON).await?;
    Ok(receiver)
}

async fn the_other_leads(cluster: &Cluster, former: &Member, other: &Member) -> Result<()> {
    let next = cluster.next_leader(former.name()).await?;
    let rows = next.sql("SELECT count(*) FROM told").await?;
    ensure!(rows == "15001", "{next:?} leads with {rows} of 15001 rows");
    ensure!(next.name() == other.name(), "{next:?} leads");
    former.start().await
}

#[tokio::test]
async fn whichever_voter_has_everything_leads_and_not_the_one_that_a_dead_leader_named() -> Result<()> {
    let cluster = with(json!("quorum")).start().await?;
    let (former, candidate, other) = voters(&cluster).await?;
    let receiver = one_falls_behind(former, candidate).await?;
    former.kill_everything().await?;
    // A switchover was asked for, and the leader died over it.
    let request = json!({"leader": former.name(), "member": candidate.name()}).to_string();
    let key = format!("{PREFIX}failover");
    cluster.etcd().ctl(&["put", &key, &request]).await?.success()?;
    process::signal(receiver, Signal::CONT)?;
    the_other_leads(&cluster, former, other).await?;

    let (former, other, lagging) = voters(&cluster).await?;
    let receiver = one_falls_behind(former, lagging).await?;
    former.kill_everything().await?;
    process::signal(receiver, Signal::CONT)?;
    the_other_leads(&cluster, former, other).await?;
    voters(&cluster).await?;
    cluster.pass();
    Ok(())
}

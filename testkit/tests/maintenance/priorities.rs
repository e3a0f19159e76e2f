//! Who takes over, by tags and priorities.

use std::fs;

use anyhow::{Result, ensure};
use pgherd_testkit::{Cluster, Member, eventually, throughout};
use serde_json::{Value, json};

use super::{A_WHILE, SOON, led_by_the_first, nobody_leads};

/// A cluster that `m1` has made and leads, the members named having these tags.
async fn tagged(members: u8, tags: &[(&str, Value)]) -> Result<Cluster> {
    let builder = Cluster::builder().members(members);
    let builder = tags.iter().fold(builder, |builder, (name, tags)| {
        builder.config_of(name, json!({"tags": tags}))
    });
    led_by_the_first(builder).await
}

async fn same_position(leader: &Member, replicas: &[&Member]) -> Result<()> {
    let same = eventually("all replicas have all", SOON, async || {
        let position = leader.sql("SELECT pg_current_wal_lsn()").await?;
        for replica in replicas {
            let replayed = replica.sql("SELECT pg_last_wal_replay_lsn()").await?;
            ensure!(replayed == position, "{replica:?} is at {replayed}, not at {position}");
        }
        Ok(())
    });
    same.await
}

#[tokio::test]
async fn whose_priority_is_zero_and_who_may_not_lead_are_not_promoted_and_the_old_leader_leads_again() -> Result<()> {
    let tags = [
        ("m2", json!({"failover_priority": 0})),
        ("m3", json!({"nofailover": true})),
    ];
    let cluster = tagged(3, &tags).await?;
    let leader = cluster.member("m1")?;
    // In order: the key is free at once.
    leader.stop().await?;
    throughout("nobody is promoted", A_WHILE, async || nobody_leads(&cluster).await).await?;
    leader.start().await?;
    let after = cluster.settled().await?;
    ensure!(after.name() == leader.name());
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn of_two_that_are_as_far_the_higher_priority_wins() -> Result<()> {
    let tags = [
        ("m2", json!({"failover_priority": 2})),
        ("m3", json!({"failover_priority": 3})),
    ];
    let cluster = tagged(3, &tags).await?;
    let (leader, lower, higher) = (cluster.member("m1")?, cluster.member("m2")?, cluster.member("m3")?);
    same_position(leader, &[lower, higher]).await?;
    leader.kill_everything().await?;
    let next = cluster.next_leader(leader.name()).await?;
    ensure!(next.name() == higher.name(), "{next:?} leads");
    leader.start().await?;
    cluster.settled().await?;
    cluster.pass();
    Ok(())
}

fn conflict_is_said(member: &Member) -> Result<()> {
    let said = fs::read_to_string(member.log_file())?;
    let warned =
        |line: &str| line.contains("WARN") && line.contains("nofailover") && line.contains("failover_priority");
    ensure!(said.lines().any(warned), "{member:?} says nothing of the conflict");
    Ok(())
}

#[tokio::test]
async fn nofailover_goes_before_a_priority_either_way_and_a_conflict_of_both_is_said() -> Result<()> {
    let tags = [
        ("m2", json!({"nofailover": true, "failover_priority": 1})),
        ("m3", json!({"nofailover": false, "failover_priority": 0})),
    ];
    let cluster = tagged(3, &tags).await?;
    let (leader, never, able) = (cluster.member("m1")?, cluster.member("m2")?, cluster.member("m3")?);
    let record = cluster.record(never).await?;
    ensure!(
        record["tags"]["nofailover"] == true && record["tags"]["failover_priority"] == 1,
        "{record}"
    );
    let to = async |candidate: &Member| {
        let request = json!({"candidate": candidate.name()});
        leader.ask("POST", "/failover", Some(&request)).await
    };
    let refused = to(never).await?;
    let expected = "failover is not possible: no good candidates have been found";
    ensure!(
        refused.status == 412 && refused.body.starts_with(expected),
        "{refused:?}"
    );
    let answer = to(able).await?;
    ensure!(answer.status == 200, "{answer:?}");
    let after = cluster.settled().await?;
    ensure!(after.name() == able.name(), "{after:?} leads");
    conflict_is_said(able)?;
    conflict_is_said(never)?;
    cluster.pass();
    Ok(())
}

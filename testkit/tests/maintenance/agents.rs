//! Agents, keepers and whole services that freeze, die, stop and are followed by others while PostgreSQL goes on in a pause.

use std::time::Instant;

use anyhow::{Result, ensure};
use pgherd_testkit::process::{self, Signal};
use pgherd_testkit::{Cluster, Load, Patroni, eventually, throughout};
use serde_json::json;

use super::{A_WHILE, LONG_ENOUGH, Paused, SOON, TTL};
use super::{goes_on, has_another_agent, holds, is_fenced_in_the_end, key_is_gone, leads_again, paused_under_load};

#[tokio::test]
async fn in_pause_neither_a_frozen_agent_nor_a_silent_etcd_ends_postgresql() -> Result<()> {
    let cluster = Cluster::builder()
        .members(2)
        .dcs(json!({"failsafe_mode": false}))
        .start()
        .await?;
    let Paused {
        leader,
        postmaster,
        load,
        since,
    } = paused_under_load(&cluster).await?;

    let frozen = leader.freeze_keeper_and_agent().await?;
    eventually("the key expires", SOON, async || key_is_gone(&cluster).await).await?;
    throughout("PostgreSQL goes on, nobody is elected", TTL / 5, async || {
        key_is_gone(&cluster).await?;
        goes_on(&cluster, leader, postmaster).await
    })
    .await?;
    leader.thaw(&frozen);
    leads_again(&cluster, leader).await?;
    goes_on(&cluster, leader, postmaster).await?;

    cluster.etcd().stop().await?;
    throughout("PostgreSQL goes on", A_WHILE, async || {
        goes_on(&cluster, leader, postmaster).await
    })
    .await?;
    // The next agent cannot know of the pause.
    leader.kill_agent().await?;
    throughout("PostgreSQL goes on", LONG_ENOUGH, async || {
        goes_on(&cluster, leader, postmaster).await
    })
    .await?;
    cluster.etcd().start_again().await?;
    leads_again(&cluster, leader).await?;
    cluster.resume().await?;
    load.end_undisturbed(&cluster, "agent frozen, etcd away, in pause", since, leader, postmaster)
        .await?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn an_agent_that_dies_in_pause_is_followed_by_one_that_leaves_the_fence_paused_until_the_resume() -> Result<()> {
    let cluster = Cluster::builder()
        .members(2)
        .dcs(json!({"failsafe_mode": false}))
        .start()
        .await?;
    let Paused {
        leader,
        postmaster,
        load,
        ..
    } = paused_under_load(&cluster).await?;
    for _ in 0..2 {
        let agent = leader.agent_pid().await?;
        leader.kill_agent().await?;
        has_another_agent(leader, agent).await?;
        leads_again(&cluster, leader).await?;
    }
    let agent = leader.freeze_agent().await?;
    throughout("PostgreSQL goes on", LONG_ENOUGH, async || {
        goes_on(&cluster, leader, postmaster).await
    })
    .await?;
    process::signal(agent, Signal::CONT)?;
    leads_again(&cluster, leader).await?;
    cluster.resume().await?;
    goes_on(&cluster, leader, postmaster).await?;
    load.goes_on().await?;

    is_fenced_in_the_end(&cluster, leader, load, "agent killed in pause, frozen after it").await?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_leader_whose_service_stops_in_pause_writes_on_and_the_next_agent_adopts_it() -> Result<()> {
    let cluster = Cluster::builder().members(2).start().await?;
    let Paused {
        leader,
        postmaster,
        load,
        since,
    } = paused_under_load(&cluster).await?;

    leader.stop_service().await?;
    goes_on(&cluster, leader, postmaster).await?;
    leader.start().await?;
    leads_again(&cluster, leader).await?;
    load.goes_on().await?;

    // Again, for longer than the key lives.
    leader.stop_service().await?;
    eventually("the key expires", SOON, async || key_is_gone(&cluster).await).await?;
    throughout("PostgreSQL goes on", TTL / 2, async || {
        key_is_gone(&cluster).await?;
        goes_on(&cluster, leader, postmaster).await
    })
    .await?;
    leader.start().await?;
    leads_again(&cluster, leader).await?;
    load.goes_on().await?;
    cluster.resume().await?;
    load.end_undisturbed(&cluster, "service stopped twice in pause", since, leader, postmaster)
        .await?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_service_that_is_killed_or_stopped_in_pause_is_followed_by_one_that_adopts_and_fences() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let Paused {
        leader,
        postmaster: of_leader,
        load,
        ..
    } = paused_under_load(&cluster).await?;
    let replica = cluster.others(leader.name())[0];
    let of_replica = replica.postmaster_pid()?;
    leader.kill_keeper().await?;
    replica.stop_service().await?;
    throughout("PostgreSQL goes on", TTL / 2, async || {
        goes_on(&cluster, leader, of_leader).await?;
        replica.ensure_postmaster(of_replica)
    })
    .await?;
    replica.start().await?;
    leader.start().await?;
    leads_again(&cluster, leader).await?;
    cluster.settled().await?;
    replica.ensure_postmaster(of_replica)?;
    cluster.resume().await?;
    cluster.settled().await?;
    leader.ensure_postmaster(of_leader)?;
    replica.ensure_postmaster(of_replica)?;

    // What was adopted is guarded like what was started.
    is_fenced_in_the_end(&cluster, leader, load, "keeper killed in pause, frozen after it").await?;
    cluster.pass();
    Ok(())
}

/// Patroni's least times, so that both kinds count by the same.
#[tokio::test]
async fn a_postgresql_that_patroni_started_is_taken_over_as_it_runs_and_given_back() -> Result<()> {
    let times = json!({"ttl": 20, "loop_wait": 1, "retry_timeout": 3});
    let cluster = Cluster::builder().members(2).dcs(times).prepare().await?;
    let patroni = Patroni::new(cluster.site(), cluster.etcd())?;
    let [leader, replica] = cluster.members() else {
        anyhow::bail!("there are two members");
    };
    patroni.start(leader).await?;
    eventually("Patroni has made the cluster", SOON * 2, async || {
        holds(&cluster, leader).await?;
        ensure!(leader.is_primary().await?);
        Ok(())
    })
    .await?;
    patroni.start(replica).await?;
    cluster.start_proxy().await?;
    cluster.settled().await?;
    let postmasters = [leader.postmaster_pid()?, replica.postmaster_pid()?];
    let same = || {
        leader.ensure_postmaster(postmasters[0])?;
        replica.ensure_postmaster(postmasters[1])
    };
    let load = Load::start(&cluster).await?;
    let fault = Instant::now();

    patroni.ctl(&["pause"]).await?.success()?;
    cluster.pause_is_seen(true).await?;
    for member in [leader, replica] {
        patroni.stop_keeping_postgres(member).await?;
        same()?;
        member.start().await?;
        eventually("ours has taken it over", SOON, async || {
            let record = cluster.record(member).await?;
            let ours = record["state"] == "running" && record.get("pgherd").is_some();
            ensure!(ours, "{record}");
            let pending = &member.get("/patroni").await?.json()?["pending_restart_reason"];
            ensure!(pending.is_null(), "{pending}");
            holds(&cluster, leader).await
        })
        .await?;
        same()?;
    }
    cluster.resume().await?;
    cluster.settled().await?;
    load.goes_on().await?;
    same()?;

    cluster.pause().await?;
    for member in [leader, replica] {
        member.stop_service().await?;
        same()?;
        patroni.start(member).await?;
        eventually("Patroni has taken it over", SOON, async || {
            let record = cluster.record(member).await?;
            let theirs = record["state"] == "running" && record.get("pgherd").is_none();
            ensure!(theirs, "{record}");
            holds(&cluster, leader).await
        })
        .await?;
        same()?;
    }
    patroni.ctl(&["resume"]).await?.success()?;
    cluster.pause_is_seen(false).await?;
    let (after, report) = load.end(&cluster, "from Patroni to ours and back", fault).await?;
    ensure!(after.name() == leader.name());
    same()?;
    report.ensure_complete()?;
    ensure!(report.errors.is_empty(), "writers noticed: {report}");
    cluster.pass();
    Ok(())
}

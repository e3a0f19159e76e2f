//! What a pause leaves alone, and what an operator gets done in it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pgherd_testkit::config::PREFIX;
use pgherd_testkit::process::{self, Pid, Signal};
use pgherd_testkit::{Cluster, Load, Member, eventually, throughout};
use serde_json::json;

use super::{A_WHILE, ON_THEIR_WAY, Paused, SOON, TTL};
use super::{
    goes_on, holds, is_fenced_in_the_end, key_is_gone, leads_again, nobody_leads, paused_under_load, timeline,
};

#[tokio::test]
async fn a_replicas_dead_postgresql_stays_down_until_the_pause_ends_or_a_restart_is_ordered() -> Result<()> {
    let cluster = Cluster::builder().members(2).start().await?;
    let Paused {
        leader, load, since, ..
    } = paused_under_load(&cluster).await?;
    let replica = cluster.others(leader.name())[0];
    replica.kill_postmaster()?;
    eventually("its key says that it is stopped", Duration::from_secs(10), async || {
        let record = cluster.record(replica).await?;
        ensure!(record["state"] == "stopped", "{record}");
        ensure!(replica.get("/replica").await?.status == 503);
        Ok(())
    })
    .await?;
    throughout("it is not started", A_WHILE, async || {
        let left = replica.postgres_processes();
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await?;
    // `patronictl restart` sends an empty object.
    let answer = replica.ask("POST", "/restart", Some(&json!({}))).await?;
    ensure!(answer.status == 200, "{answer:?}");
    cluster.settled().await?;
    replica.kill_postmaster()?;
    replica.wait_until_gone(SOON).await?;
    load.goes_on().await?;
    cluster.resume().await?;
    let (after, report) = load.end(&cluster, "replica down in pause", since).await?;
    ensure!(after.name() == leader.name());
    report.ensure_complete()?;
    ensure!(report.errors.is_empty(), "writers noticed: {report}");
    cluster.pass();
    Ok(())
}

/// Waits until `leader` leads and the others follow it; health checks say the same.
async fn moved(cluster: &Cluster, former: &Member, leader: &Member) -> Result<()> {
    let after = cluster.settled().await?;
    ensure!(after.name() == leader.name(), "{after:?} leads");
    for (member, path, status) in [
        (leader, "/primary", 200),
        (leader, "/replica", 503),
        (former, "/primary", 503),
        (former, "/replica", 200),
    ] {
        let answer = member.get(path).await?;
        ensure!(answer.status == status, "{member:?} {path}: {answer:?}");
    }
    Ok(())
}

#[tokio::test]
async fn in_pause_the_lead_moves_to_the_member_that_is_named_and_stays_where_that_fails() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let Paused {
        leader: former,
        load,
        since,
        ..
    } = paused_under_load(&cluster).await?;
    let candidate = cluster.others(former.name())[1];

    let unnamed = former
        .ask("POST", "/switchover", Some(&json!({"leader": former.name()})))
        .await?;
    ensure!(unnamed.status == 400, "{unnamed:?}");
    let request = json!({"leader": former.name(), "candidate": candidate.name()});
    let answer = former.ask("POST", "/switchover", Some(&request)).await?;
    let expected = format!("Successfully switched over to \"{}\"", candidate.name());
    ensure!(answer.status == 200 && answer.body == expected, "{answer:?}");
    moved(&cluster, former, candidate).await?;
    load.goes_on().await?;

    let back = json!({"candidate": former.name()});
    let answer = candidate.ask("POST", "/failover", Some(&back)).await?;
    let expected = format!("Successfully failed over to \"{}\"", former.name());
    ensure!(answer.status == 200 && answer.body == expected, "{answer:?}");
    moved(&cluster, candidate, former).await?;
    load.goes_on().await?;

    switchover_that_fails(former, candidate).await?;
    leads_again(&cluster, former).await?;
    cluster.resume().await?;
    let (leader, report) = load.end(&cluster, "switchovers and failover in pause", since).await?;
    ensure!(leader.name() == former.name(), "{leader:?} leads after the resume");
    report.ensure_complete()?;
    cluster.pass();
    Ok(())
}

/// A candidate that is found able, and silent when it is to confirm. The leader has stopped by then, and has to start in
/// place although nothing is started in a pause.
async fn switchover_that_fails(leader: &Member, candidate: &Member) -> Result<()> {
    let checkpoints = "SELECT count(*) FROM pg_stat_activity WHERE query = 'CHECKPOINT' AND state = 'active'";
    let checkpoints = async |expected: &str| -> Result<()> {
        let under_way = leader.sql(checkpoints).await?;
        ensure!(under_way == expected, "{under_way} checkpoints are under way");
        Ok(())
    };
    eventually("none is under way", SOON, async || checkpoints("0").await).await?;
    let checkpointer = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'";
    let checkpointer = Pid::from_raw(leader.sql(checkpointer).await?.parse()?).context("a process")?;
    process::signal(checkpointer, Signal::STOP)?;
    let request = json!({"leader": leader.name(), "candidate": candidate.name()});
    let silent = async {
        eventually("the leader writes one", SOON, async || checkpoints("1").await).await?;
        let agent = candidate.freeze_agent().await?;
        process::signal(checkpointer, Signal::CONT)?;
        anyhow::Ok(agent)
    };
    let (answer, agent) = tokio::join!(leader.ask("POST", "/switchover", Some(&request)), silent);
    let answer = answer?;
    process::signal(agent?, Signal::CONT)?;
    ensure!(answer.status == 503, "{answer:?}");
    Ok(())
}

#[tokio::test]
async fn a_scheduled_switchover_is_refused_in_pause_and_done_at_its_time_after_it() -> Result<()> {
    let cluster = Cluster::builder().members(2).start().await?;
    let former = cluster.settled().await?;
    let candidate = cluster.others(former.name())[0];
    let in_six_seconds = async || {
        let at = "SELECT to_char(now() AT TIME ZONE 'UTC' + interval '6 s', 'YYYY-MM-DD\"T\"HH24:MI:SS\"+00:00\"')";
        let at = former.sql(at).await?;
        let request = json!({"leader": former.name(), "candidate": candidate.name(), "scheduled_at": at});
        former.ask("POST", "/switchover", Some(&request)).await
    };
    cluster.pause().await?;
    let refused = in_six_seconds().await?;
    ensure!(
        refused.status == 400 && refused.body == "Can't schedule switchover in the paused state",
        "{refused:?}"
    );
    cluster.resume().await?;
    let load = Load::start(&cluster).await?;
    let fault = Instant::now();
    let taken = in_six_seconds().await?;
    ensure!(taken.status == 202, "{taken:?}");
    // The time was told in whole seconds.
    throughout("it waits for its time", Duration::from_secs(4), async || {
        holds(&cluster, former).await
    })
    .await?;
    let next = cluster.next_leader(former.name()).await?;
    let took = fault.elapsed();
    ensure!(took < Duration::from_secs(16), "it took {took:?}");
    ensure!(next.name() == candidate.name(), "{next:?} leads");
    let (_, report) = load.end(&cluster, "scheduled switchover", fault).await?;
    report.ensure_complete()?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn the_leaders_postgresql_dies_in_pause_and_nobody_leads_until_the_pause_ends_or_one_is_named() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let first = cluster.settled().await?;
    let load = Load::start(&cluster).await?;
    let before = timeline(first).await?;
    cluster.pause().await?;
    let fault = Instant::now();
    die_in_pause(&cluster, first, A_WHILE).await?;
    let resumed = Instant::now();
    cluster.resume().await?;
    let leader = cluster.settled().await?;
    let took = resumed.elapsed();
    println!("well again {:.1} s after the resume", took.as_secs_f64());
    ensure!(took < Duration::from_secs(24), "it took {took:?}");
    ensure!(timeline(leader).await? > before, "no new timeline");
    eventually("the history tells of it", SOON, async || {
        let history = leader.get("/history").await?.json()?;
        let told = history.as_array().is_some_and(|entries| !entries.is_empty());
        ensure!(told, "{history}");
        Ok(())
    })
    .await?;
    let (second, report) = load.end(&cluster, "leader's PostgreSQL dead in pause", fault).await?;
    report.ensure_lost_only_within(ON_THEIR_WAY)?;

    let load = Load::start(&cluster).await?;
    let third = cluster.others(second.name())[1];
    cluster.pause().await?;
    let fault = Instant::now();
    die_in_pause(&cluster, second, TTL / 5).await?;
    let request = json!({"candidate": third.name()});
    let answer = third.ask("POST", "/failover", Some(&request)).await?;
    ensure!(answer.status == 200, "{answer:?}");
    leads_again(&cluster, third).await?;
    load.goes_on().await?;
    let left = second.postgres_processes();
    ensure!(left.is_empty(), "{second:?} was started in pause: {left:?}");
    cluster.resume().await?;
    let (after, report) = load.end(&cluster, "failover in pause to make a leader", fault).await?;
    ensure!(after.name() == third.name(), "{after:?} leads");
    report.ensure_lost_only_within(ON_THEIR_WAY)?;
    cluster.pass();
    Ok(())
}

/// Ends the leader's PostgreSQL, and watches for `span` that nobody takes over and nothing is started.
async fn die_in_pause(cluster: &Cluster, leader: &Member, span: Duration) -> Result<()> {
    leader.kill_postmaster()?;
    eventually("the key is released", TTL, async || key_is_gone(cluster).await).await?;
    let nobody = throughout("nobody leads", span, async || {
        nobody_leads(cluster).await?;
        ensure!(leader.postgres_processes().is_empty(), "{leader:?} was started");
        Ok(())
    });
    nobody.await
}

/// An upgrade by dump and reload makes another system identifier; it counts when the pause ends. A leader key that is
/// deleted, by whomever, is taken again by who runs as primary. A restart that is ordered is no reason to give it up.
#[tokio::test]
async fn in_pause_another_system_identifier_is_left_alone_and_a_lost_leader_key_is_taken_again() -> Result<()> {
    let cluster = Cluster::builder().members(2).start().await?;
    let Paused {
        leader,
        postmaster,
        load,
        since,
    } = paused_under_load(&cluster).await?;
    let key = format!("{PREFIX}initialize");
    let own = cluster.etcd().entry(&key).await?.context("no initialize key")?.value;
    let other = ["put", &key, "7000000000000000001"];
    cluster.etcd().ctl(&other).await?.success()?;
    throughout("PostgreSQL goes on", TTL, async || {
        leader.agent_pid().await?;
        goes_on(&cluster, leader, postmaster).await
    })
    .await?;
    cluster.etcd().ctl(&["put", &key, &own]).await?.success()?;

    cluster
        .etcd()
        .ctl(&["del", &format!("{PREFIX}leader")])
        .await?
        .success()?;
    leads_again(&cluster, leader).await?;
    goes_on(&cluster, leader, postmaster).await?;

    let answer = leader.ask("POST", "/restart", None).await?;
    ensure!(answer.status == 200, "{answer:?}");
    ensure!(leader.postmaster_pid()? != postmaster, "it was not restarted");
    leads_again(&cluster, leader).await?;
    cluster.resume().await?;
    let (after, report) = load.end(&cluster, "keys changed in pause", since).await?;
    ensure!(after.name() == leader.name());
    report.ensure_complete()?;
    cluster.pass();
    Ok(())
}

/// The end of the old postmaster is seen, and nothing is started in its place: the operator does that.
#[tokio::test]
async fn a_leader_that_is_restarted_by_hand_in_pause_is_adopted_and_leads_on_and_is_fenced_after_it() -> Result<()> {
    let cluster = Cluster::builder().members(2).start().await?;
    let Paused {
        leader,
        postmaster,
        load,
        ..
    } = paused_under_load(&cluster).await?;
    let before = timeline(leader).await?;
    let by_hand = leader.restart_by_hand(cluster.site()).await?;
    ensure!(by_hand != postmaster, "it was not restarted");
    leads_again(&cluster, leader).await?;
    throughout("it leads on, alone", A_WHILE, async || {
        holds(&cluster, leader).await?;
        goes_on(&cluster, leader, by_hand).await
    })
    .await?;
    load.goes_on().await?;
    let said = leader.output().await;
    ensure!(
        said.contains(&format!("postmaster {by_hand} is adopted")),
        "{by_hand} was not adopted"
    );
    cluster.resume().await?;
    throughout("it leads on with a deadline", TTL, async || {
        goes_on(&cluster, leader, by_hand).await
    })
    .await?;
    let after = timeline(leader).await?;
    ensure!(after == before, "somebody was promoted: {before}, now {after}");

    is_fenced_in_the_end(&cluster, leader, load, "frozen after it was restarted by hand in pause").await?;
    cluster.pass();
    Ok(())
}

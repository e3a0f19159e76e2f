//! Faults, one each: who leads afterwards, what was lost, and that never two members took writes.
//!
//! Each test prints its write gap; how long it may be is for a bench to say, not for a test.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pgherd_testkit::{Cluster, Ledger, Load, SqlFailure, eventually, process, throughout};
use serde_json::json;
use tokio::task::JoinSet;

const RETRY_INTERVAL: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_secs(30);
/// More than a ttl and an election: what has not happened by then does not happen.
const LONG_ENOUGH: Duration = Duration::from_secs(10);
/// What a leader that replicates asynchronously may take with it into its death: rows on their way to the replicas.
const ON_THEIR_WAY: Duration = Duration::from_secs(1);

/// Keeps a backend busy without a wait in which it would notice that its postmaster is gone.
const BURN: &str = "CREATE FUNCTION burn(seconds float) RETURNS int LANGUAGE plpgsql AS $$ \
                    DECLARE until timestamptz := clock_timestamp() + seconds * interval '1 s'; \
                    BEGIN WHILE clock_timestamp() < until LOOP END LOOP; RETURN 1; END $$; \
                    CREATE TABLE slow (n int)";

#[tokio::test]
async fn a_backend_that_outlives_its_postmaster_acknowledges_nothing() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let leader = cluster.settled().await?;
    leader.client().await?.rows(BURN, SOON).await?;
    let load = Load::start(&cluster).await?;

    let session = leader.client().await?;
    let mut busy = JoinSet::new();
    busy.spawn(async move {
        session
            .rows("BEGIN; INSERT INTO slow SELECT burn(10); COMMIT", 2 * SOON)
            .await
    });
    eventually("the statement runs", SOON, async || {
        let running =
            "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'BEGIN; INSERT INTO slow%'";
        ensure!(leader.sql(running).await? == "1");
        Ok(())
    })
    .await?;
    let fault = Instant::now();
    leader.kill_postmaster()?;
    let told = busy.join_next().await.expect("one was spawned")?;
    ensure!(
        told.is_err(),
        "a commit was acknowledged {:?} after the postmaster had been killed",
        fault.elapsed()
    );

    let (leader, report) = load.end(&cluster, "postmaster killed", fault).await?;
    report.ensure_complete()?;
    ensure!(
        leader.sql("SELECT count(*) FROM slow").await? == "0",
        "the row of the ended backend is there"
    );
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_killed_agent_is_back_before_anybody_notices() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let leader = cluster.settled().await?;
    let load = Load::start(&cluster).await?;
    let (agent, postmaster) = (leader.agent_pid().await?, leader.postmaster_pid()?);

    let fault = Instant::now();
    leader.kill_agent().await?;
    eventually("there is another agent", SOON, async || {
        ensure!(leader.agent_pid().await? != agent);
        Ok(())
    })
    .await?;
    throughout("nothing changes", LONG_ENOUGH, async || {
        ensure!(
            cluster.lease_holder().await? == leader.name(),
            "{} leads",
            cluster.lease_holder().await?
        );
        ensure!(leader.postmaster_pid()? == postmaster, "another postmaster");
        Ok(())
    })
    .await?;

    let (after, report) = load.end(&cluster, "agent killed", fault).await?;
    report.ensure_complete()?;
    ensure!(after.name() == leader.name() && leader.postmaster_pid()? == postmaster);
    ensure!(
        report.errors.is_empty() && report.read_errors.is_empty(),
        "sessions did not survive: {report}"
    );
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn an_agent_that_cannot_be_started_again_is_fenced_before_another_leads() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let former = cluster.settled().await?;
    let load = Load::start(&cluster).await?;

    let fault = Instant::now();
    former.hold_agent_down().await?;
    cluster.next_leader(former.name()).await?;
    let left = former.postgres_processes();
    ensure!(
        left.is_empty(),
        "another leads, and {} still has {left:?}",
        former.name()
    );
    load.goes_on().await?;
    former.release_agent().await?;

    let (_, report) = load.end(&cluster, "agent gone for good", fault).await?;
    report.ensure_lost_only_within(ON_THEIR_WAY)?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_member_that_dies_whole_is_replaced_and_comes_back_as_a_replica() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let former = cluster.settled().await?;
    let load = Load::start(&cluster).await?;

    let fault = Instant::now();
    former.kill_everything().await?;
    let next = cluster.next_leader(former.name()).await?;
    load.goes_on().await?;
    former.start().await?;

    let (leader, report) = load.end(&cluster, "everything of the leader killed", fault).await?;
    ensure!(leader.name() == next.name(), "{} took the lead back", leader.name());
    report.ensure_lost_only_within(ON_THEIR_WAY)?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_frozen_agent_is_fenced_and_follows_after_the_thaw() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let former = cluster.settled().await?;
    let load = Load::start(&cluster).await?;

    let fault = Instant::now();
    let agent = former.freeze_agent().await?;
    cluster.next_leader(former.name()).await?;
    load.goes_on().await?;
    former.thaw(&[agent]);

    let (_, report) = load.end(&cluster, "agent frozen", fault).await?;
    report.ensure_lost_only_within(ON_THEIR_WAY)?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_frozen_keeper_is_stood_in_for_by_the_sentinel() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let former = cluster.settled().await?;
    let load = Load::start(&cluster).await?;

    let fault = Instant::now();
    let keeper = former.keeper_pid().await?;
    former.freeze_keeper().await?;
    cluster.next_leader(former.name()).await?;
    load.goes_on().await?;
    former.thaw(&[keeper]);

    let (_, report) = load.end(&cluster, "keeper frozen", fault).await?;
    report.ensure_lost_only_within(ON_THEIR_WAY)?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_killed_keeper_takes_agent_and_postgresql_with_it() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let former = cluster.settled().await?;
    let load = Load::start(&cluster).await?;
    let agent = former.agent_pid().await?;

    let fault = Instant::now();
    former.kill_keeper().await?;
    cluster.next_leader(former.name()).await?;
    let left = former.postgres_processes();
    ensure!(
        left.is_empty(),
        "another leads, and {} still has {left:?}",
        former.name()
    );
    ensure!(!process::is_alive(agent), "the agent lives on without its keeper");
    load.goes_on().await?;
    former.start().await?;

    let (_, report) = load.end(&cluster, "keeper killed", fault).await?;
    report.ensure_lost_only_within(ON_THEIR_WAY)?;
    cluster.pass();
    Ok(())
}

/// Direct clients on the frozen host may be answered in the moment after the thaw, before any fence has run; the proxy's
/// clients may not, and only they are looked at here.
#[tokio::test]
async fn a_member_that_was_frozen_whole_gets_no_client_back() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let former = cluster.settled().await?;
    let ledger = Ledger::start(&cluster, 4).await?;

    let fault = Instant::now();
    let frozen = former.freeze_everything().await?;
    cluster.next_leader(former.name()).await?;
    ledger.wait_for_rows(Instant::now(), 100, SOON).await?;
    former.thaw(&frozen);
    let leader = cluster.settled().await?;
    ledger.wait_for_rows(Instant::now(), 100, SOON).await?;
    ensure!(leader.name() != former.name(), "{} took the lead back", former.name());

    let report = ledger.finish("everything of the leader frozen", fault, leader).await?;
    report.ensure_lost_only_within(ON_THEIR_WAY)?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_switchover_by_rest_loses_nothing() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let former = cluster.settled().await?;
    let candidate = cluster.others(former.name())[1];
    let load = Load::start(&cluster).await?;

    let fault = Instant::now();
    let request = json!({"leader": former.name(), "candidate": candidate.name()});
    let answer = former.ask("POST", "/switchover", Some(&request)).await?;
    let expected = format!("Successfully switched over to \"{}\"", candidate.name());
    ensure!(answer.status == 200 && answer.body == expected, "{answer:?}");

    let (leader, report) = load.end(&cluster, "planned switchover", fault).await?;
    ensure!(leader.name() == candidate.name());
    report.ensure_complete()?;
    cluster.pass();
    Ok(())
}

/// A promotion right after the old primary's stop can sleep through a whole `wal_retrieve_retry_interval`, five seconds by
/// default. `PGHERD_TEST_SWITCHOVERS` says how many are tried.
#[tokio::test]
async fn switchovers_in_a_row_never_sleep_through_a_retry_interval() -> Result<()> {
    let count = std::env::var("PGHERD_TEST_SWITCHOVERS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(5);
    let cluster = Cluster::builder().start().await?;
    cluster.settled().await?;
    let load = Load::start(&cluster).await?;
    let fault = Instant::now();
    for _ in 0..count {
        let former = cluster.settled().await?;
        let request = json!({"leader": former.name()});
        let answer = former.ask("POST", "/switchover", Some(&request)).await?;
        ensure!(answer.status == 200, "{answer:?}");
        load.goes_on().await?;
    }
    let (_, report) = load.end(&cluster, "the longest of many switchovers", fault).await?;
    println!(
        "{count} switchovers, the longest gap {:.2} s",
        report.write_gap.as_secs_f64()
    );
    report.ensure_complete()?;
    ensure!(report.write_gap < RETRY_INTERVAL, "{:?}", report.write_gap);
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_switchover_by_command_loses_nothing() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let former = cluster.settled().await?;
    let load = Load::start(&cluster).await?;

    let fault = Instant::now();
    let shown = cluster
        .pgherd("switchover", &["--leader", former.name(), "--force"])
        .await?
        .success()?;
    ensure!(shown.contains("uccessfully switched over"), "{shown}");

    let (leader, report) = load.end(&cluster, "planned switchover by command", fault).await?;
    ensure!(leader.name() != former.name());
    report.ensure_complete()?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_leader_that_is_stopped_cleanly_hands_over() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let former = cluster.settled().await?;
    let load = Load::start(&cluster).await?;

    let fault = Instant::now();
    former.stop().await?;
    cluster.next_leader(former.name()).await?;
    load.goes_on().await?;
    former.start().await?;

    let (_, report) = load.end(&cluster, "leader stopped", fault).await?;
    report.ensure_complete()?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn etcd_may_be_away_for_a_while_and_nothing_is_lost() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    cluster.settled().await?;
    let load = Load::start(&cluster).await?;

    let fault = Instant::now();
    cluster.etcd().stop().await?;
    throughout("nobody takes over", LONG_ENOUGH, async || {
        let primaries = cluster.primaries().await;
        ensure!(primaries.len() <= 1, "several take writes: {primaries:?}");
        Ok(())
    })
    .await?;
    cluster.etcd().start_again().await?;

    let (_, report) = load.end(&cluster, "etcd away for 10 s", fault).await?;
    report.ensure_complete()?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn the_death_of_one_etcd_member_of_three_is_not_noticed() -> Result<()> {
    let cluster = Cluster::builder().etcd(3).start().await?;
    let leader = cluster.settled().await?;
    let load = Load::start(&cluster).await?;
    let fault = Instant::now();
    for index in 0..cluster.etcd().size() {
        cluster.etcd().kill_member(index).await?;
        load.goes_on().await?;
        throughout("the leader goes on", LONG_ENOUGH / 2, async || {
            ensure!(leader.is_primary().await?, "it became a replica");
            Ok(())
        })
        .await?;
        cluster.etcd().start_member(index).await?;
        cluster.etcd().wait_ready().await?;
    }

    let (after, report) = load.end(&cluster, "each etcd member killed once", fault).await?;
    ensure!(after.name() == leader.name(), "the leader changed");
    report.ensure_complete()?;
    ensure!(report.errors.is_empty(), "sessions did not survive: {report}");
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_lost_replica_costs_nothing_and_comes_back() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let leader = cluster.settled().await?;
    let load = Load::start(&cluster).await?;

    let fault = Instant::now();
    let replica = cluster.others(leader.name())[0];
    replica.kill_everything().await?;
    load.goes_on().await?;
    let refused: Result<_, SqlFailure> = replica.client().await;
    ensure!(refused.is_err(), "a killed replica answers");
    replica.start().await?;

    let (after, report) = load.end(&cluster, "replica killed", fault).await?;
    ensure!(after.name() == leader.name());
    report.ensure_complete()?;
    ensure!(report.errors.is_empty(), "writers noticed: {report}");
    cluster.pass();
    Ok(())
}

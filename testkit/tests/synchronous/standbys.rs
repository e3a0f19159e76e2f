//! Which standbys are waited for, and what happens when one of them goes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pgherd_testkit::{Cluster, Member, SyncLoad, SyncRecord, eventually, throughout};
use serde_json::{Value, json};

use super::{IN_TIME, LONG_ENOUGH, SOON, answers, chosen, clock, logged, stays_a_standby, with};

/// A stall that clients would notice. A busy machine may take half of it from anybody.
const NOTICED: Duration = Duration::from_secs(1);

#[tokio::test]
async fn the_set_is_chosen_widened_narrowed_and_given_up() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    cluster.settled().await?;
    cluster.in_step(set_is_widened_and_narrowed(&cluster)).await?;
    a_look_tells_a_setting_that_keeps_too_little(&cluster).await?;
    users_own_setting_waits_for_the_end_of_the_mode(&cluster).await?;
    cluster.pass();
    Ok(())
}

async fn set_is_widened_and_narrowed(cluster: &Cluster) -> Result<()> {
    cluster.configure(&json!({"ttl": 6, "synchronous_mode": true})).await?;
    let (leader, listed, spare) = chosen(cluster).await?;
    answers(listed, "/sync", 200).await?;
    answers(spare, "/sync", 503).await?;
    answers(listed, "/async", 503).await?;
    answers(spare, "/async", 200).await?;
    let shown = cluster.pgherd("list", &[]).await?.success()?;
    ensure!(shown.matches("Sync Standby").count() == 1, "{shown}");

    let others = cluster.others(leader.name());
    let both: Vec<&str> = others.iter().map(|member| member.name()).collect();
    cluster.configure(&json!({"synchronous_node_count": 2})).await?;
    let record = SyncRecord::of(leader.name(), 0, &both);
    let names = format!("2 ({})", both.join(","));
    cluster.sync_settles(&record, &names, IN_TIME).await?;
    answers(listed, "/sync", 200).await?;
    answers(spare, "/sync", 200).await?;

    cluster.configure(&json!({"synchronous_node_count": 1})).await?;
    listed.stop().await?;
    let record = SyncRecord::of(leader.name(), 0, &[spare.name()]);
    cluster.sync_settles(&record, spare.name(), IN_TIME).await?;
    listed.start().await?;
    cluster.settled().await?;
    answers(listed, "/async", 200).await?;
    answers(spare, "/sync", 200).await
}

/// What the other steps rest on: record and setting are seen to be out of step when they are.
async fn a_look_tells_a_setting_that_keeps_too_little(cluster: &Cluster) -> Result<()> {
    let (leader, listed, _) = chosen(cluster).await?;
    let agent = leader.freeze_agent().await?;
    let becomes = async |statement: &str, wanted: &str| {
        leader.sql(statement).await?;
        leader.sql("SELECT pg_reload_conf()").await?;
        eventually("the setting is in force", IN_TIME, async || {
            let names = leader.sync_names().await?;
            ensure!(names == wanted, "{names:?}");
            Ok(())
        })
        .await
    };
    becomes("ALTER SYSTEM SET synchronous_standby_names = ''", "").await?;
    let look = cluster.ensure_in_step().await;
    becomes("ALTER SYSTEM RESET synchronous_standby_names", listed.name()).await?;
    leader.thaw(&[agent]);
    ensure!(
        look.is_err(),
        "{listed:?} is listed, commits wait for nobody, and no look tells"
    );
    cluster.ensure_in_step().await
}

async fn users_own_setting_waits_for_the_end_of_the_mode(cluster: &Cluster) -> Result<()> {
    let (leader, listed, _) = chosen(cluster).await?;
    let own = json!({"postgresql": {"parameters": {"synchronous_standby_names": "ANY 1 (m1,m2,m3)"}}});
    cluster.configure(&own).await?;
    throughout("the user's own setting changes nothing", LONG_ENOUGH / 4, async || {
        let names = leader.sync_names().await?;
        ensure!(names == listed.name(), "{names:?}");
        Ok(())
    })
    .await?;
    let off = json!({"synchronous_mode": false, "master_start_timeout": 0});
    cluster.configure(&off).await?;
    eventually("the configuration is shown", IN_TIME, async || {
        let shown = leader.get("/config").await?.json()?;
        ensure!(
            shown["synchronous_mode"] == false && shown["master_start_timeout"] == 0,
            "{shown}"
        );
        Ok(())
    })
    .await?;
    eventually(
        "the mode is off, the user's own setting in force",
        IN_TIME,
        async || {
            let (record, names) = (cluster.sync_record().await?, leader.sync_names().await?);
            ensure!(
                record.is_none() && names == "ANY 1 (m1,m2,m3)",
                "/sync is {record:?}, the setting is {names:?}"
            );
            Ok(())
        },
    )
    .await
}

#[tokio::test]
async fn a_standby_that_stops_dies_or_freezes_is_replaced_and_commits_go_on() -> Result<()> {
    let cluster = with(json!(true)).start().await?;
    let rounds = async {
        one_stops_in_order(&cluster).await?;
        one_dies(&cluster).await?;
        one_freezes(&cluster).await
    };
    cluster.in_step(rounds).await?;
    cluster.pass();
    Ok(())
}

/// Before its PostgreSQL stops, the leader gives it up.
async fn one_stops_in_order(cluster: &Cluster) -> Result<()> {
    let (leader, listed, spare) = chosen(cluster).await?;
    let load = SyncLoad::start(cluster).await?;
    let since = clock(leader).await?;

    let fault = Instant::now();
    listed.stop().await?;
    let record = SyncRecord::of(leader.name(), 0, &[spare.name()]);
    cluster.sync_settles(&record, spare.name(), IN_TIME).await?;
    load.goes_on().await?;
    let decided = logged(leader, &format!("commits wait no more for {}", listed.name()), &since)?;
    let shut_down = logged(listed, "received fast shutdown request", &since)?;
    ensure!(
        !decided.is_empty() && decided.first() < shut_down.first(),
        "{listed:?} was stopped at {shut_down:?}, and given up at {decided:?}"
    );

    listed.start().await?;
    let name = "synchronous standby stopped in order";
    let (_, report) = load.end(cluster, 3, name, fault).await?;
    ensure!(
        report.errors.is_empty() && report.write_gap < NOTICED,
        "writers noticed: {report}"
    );
    answers(listed, "/async", 200).await?;
    answers(spare, "/sync", 200).await
}

async fn one_dies(cluster: &Cluster) -> Result<()> {
    let (leader, listed, spare) = chosen(cluster).await?;
    let load = SyncLoad::start(cluster).await?;
    let fault = Instant::now();
    listed.kill_everything().await?;
    load.goes_on().await?;
    let record = SyncRecord::of(leader.name(), 0, &[spare.name()]);
    cluster.sync_settles(&record, spare.name(), IN_TIME).await?;
    listed.start().await?;
    replaced(cluster, load, leader, "synchronous standby killed", fault).await
}

/// Its connection stands: only its silence tells.
async fn one_freezes(cluster: &Cluster) -> Result<()> {
    let (leader, listed, spare) = chosen(cluster).await?;
    let load = SyncLoad::start(cluster).await?;
    let fault = Instant::now();
    let frozen = listed.freeze_everything().await?;
    load.goes_on().await?;
    let record = SyncRecord::of(leader.name(), 0, &[spare.name()]);
    cluster.sync_settles(&record, spare.name(), IN_TIME).await?;
    listed.thaw(&frozen);
    replaced(cluster, load, leader, "synchronous standby frozen", fault).await
}

async fn replaced(cluster: &Cluster, load: SyncLoad, leader: &Member, name: &str, fault: Instant) -> Result<()> {
    let (after, report) = load.end(cluster, 3, name, fault).await?;
    ensure!(after.name() == leader.name(), "{after:?} leads");
    ensure!(report.errors.is_empty(), "writers noticed: {report}");
    ensure!(report.write_gap < IN_TIME, "{report}");
    Ok(())
}

/// Starts a member that does not run, with these tags.
async fn start_with_tags(member: &Member, tags: Value) -> Result<()> {
    member.alter_config(json!({"tags": tags}))?;
    member.start().await
}

#[tokio::test]
async fn tags_say_who_is_waited_for() -> Result<()> {
    let cluster = with(json!(true)).prepare().await?;
    let [m1, m2, m3] = cluster.members() else {
        anyhow::bail!("three members")
    };
    let awaited = async |standby: &str| {
        let record = SyncRecord::of("m1", 0, &[standby]);
        cluster.sync_settles(&record, standby, IN_TIME).await
    };
    m1.start().await?;
    cluster.start_proxy().await?;
    cluster.settled_with(1).await?;
    start_with_tags(m2, json!({"replicatefrom": "m1"})).await?;
    cluster.settled_with(2).await?;
    awaited("m2").await?;
    start_with_tags(m3, json!({"sync_priority": 5})).await?;
    cluster.settled().await?;
    awaited("m3").await?;
    m3.stop().await?;
    awaited("m2").await?;

    start_with_tags(m3, json!({"sync_priority": 0})).await?;
    cluster.settled().await?;
    m2.stop().await?;
    throughout("a member of priority 0 is not listed", LONG_ENOUGH / 2, async || {
        let record = cluster.sync_record().await?.context("there is no /sync")?;
        ensure!(!record.lists("m3"), "{record:?}");
        Ok(())
    })
    .await?;
    let nobody = SyncRecord::of("m1", 0, &[]);
    cluster.sync_settles(&nobody, "", IN_TIME).await?;

    m3.stop().await?;
    start_with_tags(m3, json!({"sync_priority": 0, "nosync": false})).await?;
    cluster.settled_with(2).await?;
    awaited("m3").await?;
    m3.stop().await?;
    start_with_tags(m3, json!({"sync_priority": 5, "nosync": true})).await?;
    m2.start().await?;
    cluster.settled().await?;
    awaited("m2").await?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn the_set_is_looked_after_in_a_pause_and_says_who_leads_after_it() -> Result<()> {
    let lag = json!({
        "maximum_lag_on_syncnode": 1_000_000,
        "postgresql": {"parameters": {"synchronous_commit": "remote_apply"}},
    });
    let cluster = with(json!(true)).dcs(lag).start().await?;
    let (leader, listed, spare) = chosen(&cluster).await?;
    leader.sql("CREATE TABLE lag (n int, filler text)").await?;
    cluster.pause().await?;
    let in_pause = one_that_lags_is_replaced(&cluster, leader, listed, spare);
    cluster.in_step(in_pause).await?;

    leader.kill_everything().await?;
    stays_a_standby(listed, LONG_ENOUGH / 2).await?;
    stays_a_standby(spare, LONG_ENOUGH / 2).await?;
    cluster.resume().await?;
    let next = cluster.next_leader(leader.name()).await?;
    ensure!(next.name() == spare.name(), "{next:?} leads, {spare:?} was listed");
    ensure!(next.sql("SELECT count(*) FROM lag").await? == "5000");
    eventually("the history says who took over", IN_TIME, async || {
        let history = next.get("/history").await?.json()?;
        let last = history.as_array().and_then(|lines| lines.last());
        ensure!(
            last.is_some_and(|line| line[0] == 1 && line[4] == next.name()),
            "{history}"
        );
        Ok(())
    })
    .await?;
    leader.start().await?;
    chosen(&cluster).await?;
    cluster.pass();
    Ok(())
}

async fn one_that_lags_is_replaced(cluster: &Cluster, leader: &Member, listed: &Member, spare: &Member) -> Result<()> {
    listed.sql("SELECT pg_wal_replay_pause()").await?;
    let session = leader.client().await?;
    let rows = "SET synchronous_commit = local; \
                INSERT INTO lag SELECT n, repeat(md5(n::text), 60) FROM generate_series(1, 5000) n";
    session.rows(rows, SOON).await?;
    let record = SyncRecord::of(leader.name(), 0, &[spare.name()]);
    cluster.sync_settles(&record, spare.name(), 2 * IN_TIME).await?;
    listed.sql("SELECT pg_wal_replay_resume()").await?;
    throughout("it does not swap back", LONG_ENOUGH / 4, async || {
        let seen = cluster.sync_record().await?;
        ensure!(seen.as_ref() == Some(&record), "{seen:?}");
        Ok(())
    })
    .await?;
    answers(listed, "/async", 200).await
}

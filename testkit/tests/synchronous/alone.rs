//! A leader without a standby: for how long commits wait, and for whom.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pgherd_testkit::config::REPLICATION_PASSWORD;
use pgherd_testkit::process::{self, Daemon, Signal};
use pgherd_testkit::{Cluster, Commit, Ledger, Member, SyncRecord, eventually};
use serde_json::json;

use super::{
    IN_TIME, LONG_ENOUGH, LONG_PERIOD, SOON, chosen, clock, logged, promoted, voters, walreceiver, with,
    with_long_periods,
};

/// How the agent's log says that the promise has ended.
const RELAXED: &str = "no standby streams: commits are acknowledged without one";
/// How it says that no commit is acknowledged any more.
const BLOCKED: &str = "no standby streams: commits wait for the first that comes";

async fn table(leader: &Member) -> Result<()> {
    leader.sql("CREATE TABLE IF NOT EXISTS alone (n int)").await?;
    Ok(())
}

fn commit(member: &Member) -> Commit {
    Commit::send(member, "INSERT INTO alone VALUES (1)")
}

#[tokio::test]
async fn a_new_leader_acknowledges_nothing_alone_until_a_period_has_passed() -> Result<()> {
    let cluster = with_long_periods(json!(true)).start().await?;
    let (former, listed, spare) = chosen(&cluster).await?;
    table(former).await?;
    let since = clock(former).await?;

    // The spare one runs and says so, and gets nothing.
    let receiver = walreceiver(spare).await?;
    process::signal(receiver, Signal::STOP)?;
    former.kill_everything().await?;
    promoted(listed).await?;
    let began = Instant::now();
    let mut write = commit(listed);
    write.still_waits(LONG_PERIOD / 2).await?;
    write.acknowledged().await?;
    println!(
        "without a standby a new leader's first commit took {:?}",
        began.elapsed()
    );
    let record = SyncRecord::of(listed.name(), 0, &[]);
    cluster.sync_settles(&record, "", IN_TIME).await?;
    ensure!(
        logged(listed, RELAXED, &since)?.len() == 1,
        "the log does not say once that commits wait no more"
    );

    process::signal(receiver, Signal::CONT)?;
    let record = SyncRecord::of(listed.name(), 0, &[spare.name()]);
    cluster.sync_settles(&record, spare.name(), SOON).await?;
    cluster.pass();
    Ok(())
}

/// Somebody who streams and is no member: a backup, or a subscription.
async fn stranger(cluster: &Cluster, leader: &Member) -> Result<Daemon> {
    let dir = cluster.site().make_dir("received")?;
    let conninfo = format!(
        "host={} port={} user=replicator password={REPLICATION_PASSWORD} application_name=backup",
        leader.postgres().ip(),
        leader.postgres().port(),
    );
    let mut command = cluster.site().command("pg_receivewal");
    command.arg("-D").arg(dir).args(["--synchronous", "-d", &conninfo]);
    let daemon = cluster.site().start("receiver", command)?;
    eventually("the backup streams", SOON, async || {
        let streams =
            "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'backup' AND state = 'streaming'";
        ensure!(leader.sql(streams).await? == "1");
        Ok(())
    })
    .await?;
    Ok(daemon)
}

async fn both_standbys_die(cluster: &Cluster, name: &str) -> Result<()> {
    let leader = cluster.primary().await?;
    let since = clock(leader).await?;
    let ledger = Ledger::start(cluster, 4).await?;
    let fault = Instant::now();
    for standby in cluster.others(leader.name()) {
        standby.kill_everything().await?;
    }
    ledger.wait_for_rows(fault + LONG_PERIOD / 2, 10, SOON).await?;
    let record = SyncRecord::of(leader.name(), 0, &[]);
    cluster.sync_settles(&record, "", IN_TIME).await?;
    let report = ledger.finish(name, fault, leader).await?;
    report.ensure_complete()?;
    ensure!(
        report.write_gap > LONG_PERIOD / 2 && report.write_gap < 2 * LONG_PERIOD,
        "commits are acknowledged alone when a period has passed, not sooner, not much later: {report}"
    );
    let said = logged(leader, RELAXED, &since)?;
    ensure!(said.len() == 1, "the log says at {said:?} that commits wait no more");
    for standby in cluster.others(leader.name()) {
        standby.start().await?;
    }
    Ok(())
}

#[tokio::test]
async fn without_a_standby_commits_go_on_alone_after_a_period_whoever_else_streams() -> Result<()> {
    let cluster = with_long_periods(json!(true)).start().await?;
    let (leader, ..) = chosen(&cluster).await?;
    cluster
        .in_step(both_standbys_die(&cluster, "both standbys killed"))
        .await?;
    chosen(&cluster).await?;

    cluster.configure(&json!({"synchronous_mode": "quorum"})).await?;
    voters(&cluster).await?;
    let receiver = stranger(&cluster, leader).await?;
    let round = both_standbys_die(&cluster, "both voters killed, a backup streams on");
    cluster.in_step(round).await?;
    drop(receiver);
    voters(&cluster).await?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn where_the_mode_is_strict_no_commit_is_acknowledged_alone() -> Result<()> {
    let strict = json!({"synchronous_mode_strict": true});
    let cluster = with(json!(true)).dcs(strict).start().await?;
    let rounds = async {
        a_new_leader_waits(&cluster).await?;
        chosen(&cluster).await?;
        cluster.configure(&json!({"synchronous_mode": "quorum"})).await?;
        voters(&cluster).await?;
        a_leader_without_standbys_waits(&cluster).await
    };
    cluster.in_step(rounds).await?;
    cluster.pass();
    Ok(())
}

async fn a_new_leader_waits(cluster: &Cluster) -> Result<()> {
    let (former, listed, spare) = chosen(cluster).await?;
    table(former).await?;
    let frozen = spare.freeze_everything().await?;
    former.kill_everything().await?;
    promoted(listed).await?;
    let mut write = commit(listed);
    write.still_waits(LONG_ENOUGH / 2).await?;
    let nobody = SyncRecord::of(listed.name(), 0, &[]);
    cluster.sync_settles(&nobody, "*", IN_TIME).await?;
    write.still_waits(LONG_ENOUGH / 4).await?;

    spare.thaw(&frozen);
    write.acknowledged().await?;
    let record = SyncRecord::of(listed.name(), 0, &[spare.name()]);
    cluster.sync_settles(&record, spare.name(), SOON).await?;
    former.start().await
}

async fn a_leader_without_standbys_waits(cluster: &Cluster) -> Result<()> {
    let (leader, one, other) = voters(cluster).await?;
    let since = clock(leader).await?;
    one.kill_everything().await?;
    other.kill_everything().await?;
    let mut write = commit(leader);
    write.still_waits(Duration::from_secs(1)).await?;
    let nobody = SyncRecord::of(leader.name(), 0, &[]);
    cluster.sync_settles(&nobody, "ANY 1 (*)", IN_TIME).await?;
    write.still_waits(LONG_ENOUGH / 2).await?;
    ensure!(
        !logged(leader, BLOCKED, &since)?.is_empty(),
        "the log does not say that commits wait"
    );

    one.start().await?;
    write.acknowledged().await?;
    let record = SyncRecord::of(leader.name(), 0, &[one.name()]);
    let names = format!("ANY 1 ({})", one.name());
    cluster.sync_settles(&record, &names, IN_TIME).await
}

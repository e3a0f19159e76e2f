//! Synchronous replication: what a client was told of survives, commits stall no longer than they must, and record and
//! setting say so at every moment.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pgherd_testkit::process;
use pgherd_testkit::{Cluster, ClusterBuilder, Member, SyncLoad, SyncRecord, eventually, throughout};
use serde_json::{Value, json};

#[path = "synchronous/alone.rs"]
mod alone;
#[path = "synchronous/leaders.rs"]
mod leaders;
#[path = "synchronous/modes.rs"]
mod modes;
#[path = "synchronous/standbys.rs"]
mod standbys;
#[path = "synchronous/voters.rs"]
mod voters;

const SOON: Duration = Duration::from_secs(30);
/// What an upstream user's scenario allows for a change of the synchronous set.
const IN_TIME: Duration = Duration::from_secs(10);
/// More than a ttl and a few cycles: what has not happened by then does not happen.
const LONG_ENOUGH: Duration = Duration::from_secs(8);
/// A period that is long enough to tell what happens within it from what happens after it.
const LONG_PERIOD: Duration = Duration::from_secs(4);

fn with(mode: Value) -> ClusterBuilder {
    Cluster::builder().dcs(json!({"synchronous_mode": mode}))
}

/// The same with [`LONG_PERIOD`].
fn with_long_periods(mode: Value) -> ClusterBuilder {
    with(mode).dcs(json!({"ttl": 8, "loop_wait": 4, "retry_timeout": 2}))
}

/// The leader, its synchronous standby, and the other one, once the set of priority mode stands.
async fn chosen(cluster: &Cluster) -> Result<(&Member, &Member, &Member)> {
    let leader = cluster.settled().await?;
    let listed = eventually("one standby is listed and waited for", SOON, async || {
        let record = cluster.sync_record().await?.context("there is no /sync")?;
        let [standby] = record.standbys.as_slice() else {
            anyhow::bail!("{record:?}")
        };
        let names = leader.sync_names().await?;
        ensure!(
            record == SyncRecord::of(leader.name(), 0, &[standby]) && names == *standby,
            "/sync is {record:?}, the setting is {names:?}"
        );
        cluster.member(standby)
    })
    .await?;
    let spare = cluster.others(leader.name());
    let spare = spare.into_iter().find(|member| member.name() != listed.name());
    Ok((leader, listed, spare.context("three members")?))
}

/// The leader and its two voters in the order of their names, once the set of quorum mode stands.
async fn voters(cluster: &Cluster) -> Result<(&Member, &Member, &Member)> {
    let leader = cluster.settled().await?;
    let [one, other] = cluster.others(leader.name())[..] else {
        anyhow::bail!("three members")
    };
    let record = SyncRecord::of(leader.name(), 1, &[one.name(), other.name()]);
    let names = format!("ANY 1 ({},{})", one.name(), other.name());
    cluster.sync_settles(&record, &names, SOON).await?;
    Ok((leader, one, other))
}

async fn answers(member: &Member, path: &str, status: u16) -> Result<()> {
    let what = format!("{} answers {path} with {status}", member.name());
    eventually(&what, IN_TIME, async || {
        let seen = member.get(path).await?.status;
        ensure!(seen == status, "{seen}");
        Ok(())
    })
    .await
}

/// Orders by REST, and waits for the answer.
async fn ordered(by: &Member, path: &str, request: &Value) -> Result<()> {
    let answer = by.ask("POST", path, Some(request)).await?;
    ensure!(answer.status == 200, "{path} {request}: {answer:?}");
    Ok(())
}

async fn promoted(member: &Member) -> Result<()> {
    let what = format!("{} is promoted", member.name());
    eventually(&what, SOON, async || {
        ensure!(member.is_primary().await?, "it is a standby");
        Ok(())
    })
    .await
}

/// It may not lead, and `span` is more than it would need for it.
async fn stays_a_standby(member: &Member, span: Duration) -> Result<()> {
    let what = format!("{} does not lead", member.name());
    throughout(&what, span, async || {
        ensure!(!member.is_primary().await?, "it takes writes");
        Ok(())
    })
    .await
}

/// A standby dies, the set goes on with the other one, whom commits wait for as `names` say; then the leader dies, and the
/// other one has everything.
async fn die_one_by_one(cluster: &Cluster, members: [&Member; 3], names: &str, name: &str) -> Result<()> {
    let [leader, dies, stays] = members;
    let load = SyncLoad::start(cluster).await?;
    dies.kill_everything().await?;
    load.goes_on().await?;
    let left = SyncRecord::of(leader.name(), 0, &[stays.name()]);
    cluster.sync_settles(&left, names, IN_TIME).await?;

    let fault = Instant::now();
    leader.kill_everything().await?;
    let next = cluster.next_leader(leader.name()).await?;
    ensure!(next.name() == stays.name(), "{next:?} leads");
    load.goes_on().await?;
    leader.start().await?;
    dies.start().await?;
    load.end(cluster, 3, name, fault).await?;
    Ok(())
}

async fn walreceiver(member: &Member) -> Result<process::Pid> {
    let pid = member
        .sql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walreceiver'")
        .await?;
    let pid = pid.parse().ok().and_then(process::Pid::from_raw);
    pid.with_context(|| format!("{} has no walreceiver", member.name()))
}

/// The time by a member's clock, as [`logged`] gives it.
async fn clock(member: &Member) -> Result<String> {
    let now = "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.MS')";
    Ok(member.sql(now).await?)
}

/// When agent or PostgreSQL of `member` logged `text`, `since` then: the earliest first. Such times order as texts.
fn logged(member: &Member, text: &str, since: &str) -> Result<Vec<String>> {
    let log = fs::read_to_string(member.log_file())?;
    let times = log
        .lines()
        .filter(|line| line.contains(text))
        .filter_map(|line| line.get(..23));
    let mut times: Vec<String> = times.map(|time| time.replace('T', " ")).collect();
    times.retain(|time| time.as_str() >= since);
    times.sort_unstable();
    Ok(times)
}

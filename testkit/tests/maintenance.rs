//! Maintenance: what a pause leaves alone, what it still does, how it ends; agents that change while PostgreSQL stays; and
//! who takes over from whom, by tags, after a death that PostgreSQL survives or does not, with a watchdog or without.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pgherd_testkit::config::PREFIX;
use pgherd_testkit::process::Pid;
use pgherd_testkit::{Cluster, ClusterBuilder, Load, Member, eventually};

#[path = "maintenance/agents.rs"]
mod agents;
#[path = "maintenance/configuration.rs"]
mod configuration;
#[path = "maintenance/pause.rs"]
mod pause;
#[path = "maintenance/priorities.rs"]
mod priorities;
#[path = "maintenance/recovery.rs"]
mod recovery;
#[path = "maintenance/resume.rs"]
mod resume;
#[path = "maintenance/watchdog.rs"]
mod watchdog;

const SOON: Duration = Duration::from_secs(30);
/// The ttl that test clusters have.
const TTL: Duration = Duration::from_secs(5);
/// More than a lease and an election: what has not happened by then does not happen.
const LONG_ENOUGH: Duration = Duration::from_secs(7);
/// More than an election, where no lease has to end before it.
const A_WHILE: Duration = Duration::from_secs(3);
/// What a leader that replicates asynchronously may take with it into its death: rows on their way to the replicas.
const ON_THEIR_WAY: Duration = Duration::from_secs(1);

/// A cluster in pause, under load: who leads it, with which postmaster, and since when.
struct Paused<'a> {
    leader: &'a Member,
    postmaster: Pid,
    load: Load,
    since: Instant,
}

/// Waits until the cluster is well, puts it under load, and pauses it.
async fn paused_under_load(cluster: &Cluster) -> Result<Paused<'_>> {
    let leader = cluster.settled().await?;
    let postmaster = leader.postmaster_pid()?;
    let load = Load::start(cluster).await?;
    let since = Instant::now();
    cluster.pause().await?;
    Ok(Paused {
        leader,
        postmaster,
        load,
        since,
    })
}

/// Waits until the keeper has started another agent than `former`, which answers.
async fn has_another_agent(member: &Member, former: Pid) -> Result<()> {
    let another = eventually("there is another agent, which answers", SOON, async || {
        ensure!(member.agent_pid().await? != former);
        ensure!(member.get("/patroni").await?.json()?["pause"] == true);
        Ok(())
    });
    another.await
}

/// The same leader with the same postmaster, and nobody else.
async fn goes_on(cluster: &Cluster, leader: &Member, postmaster: Pid) -> Result<()> {
    leader.ensure_postmaster(postmaster)?;
    ensure!(leader.is_primary().await?, "{leader:?} takes no writes");
    let primaries = cluster.primaries().await;
    ensure!(primaries.len() == 1, "{primaries:?} take writes");
    Ok(())
}

async fn nobody_leads(cluster: &Cluster) -> Result<()> {
    key_is_gone(cluster).await?;
    let primaries = cluster.primaries().await;
    ensure!(primaries.is_empty(), "{primaries:?} take writes");
    Ok(())
}

async fn key_is_gone(cluster: &Cluster) -> Result<()> {
    let key = cluster.etcd().entry(&format!("{PREFIX}leader")).await?;
    ensure!(key.is_none(), "the leader key is there: {key:?}");
    Ok(())
}

async fn holds(cluster: &Cluster, member: &Member) -> Result<()> {
    let holder = cluster.lease_holder().await?;
    ensure!(holder == member.name(), "{holder} holds the key");
    Ok(())
}

/// Waits until a member holds the key and says that it leads.
async fn leads_again(cluster: &Cluster, member: &Member) -> Result<()> {
    let leads = eventually("it holds the key and leads", SOON, async || {
        holds(cluster, member).await?;
        ensure!(member.get("/primary").await?.status == 200);
        ensure!(member.is_primary().await?);
        Ok(())
    });
    leads.await
}

async fn timeline(member: &Member) -> Result<String> {
    Ok(member
        .sql("SELECT left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)")
        .await?)
}

/// The last act after a pause: what was left alone in it is guarded again. Freezes a leader's keeper and agent, makes sure that its
/// PostgreSQL has ended by the time that another leads, and that it has taken nothing with it but what was on its way.
async fn is_fenced_in_the_end(cluster: &Cluster, leader: &Member, load: Load, fault: &str) -> Result<()> {
    let since = Instant::now();
    let frozen = leader.freeze_keeper_and_agent().await?;
    let next = cluster.next_leader(leader.name()).await?;
    let left = leader.postgres_processes();
    ensure!(left.is_empty(), "{next:?} leads, and {leader:?} has {left:?}");
    load.goes_on().await?;
    leader.thaw(&frozen);
    let (_, report) = load.end(cluster, fault, since).await?;
    report.ensure_lost_only_within(ON_THEIR_WAY)
}

/// Starts a cluster that `m1` has made and leads.
async fn led_by_the_first(builder: ClusterBuilder) -> Result<Cluster> {
    let cluster = builder.prepare().await?;
    let first = cluster.member("m1")?;
    first.start().await?;
    leads_again(&cluster, first).await?;
    for member in cluster.others("m1") {
        member.start().await?;
    }
    cluster.start_proxy().await?;
    cluster.settled().await?;
    Ok(cluster)
}

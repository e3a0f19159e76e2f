//! etcd away, and the other members' word instead: who goes on, who ends itself, who may lead afterwards.
//!
//! Each test prints its write gap; how long it may be is for a bench to say, not for a test.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pgherd_testkit::process::{self, Signal};
use pgherd_testkit::{Cluster, Load, Member, Network, eventually, throughout};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);
/// The ttl that test clusters have.
const TTL: Duration = Duration::from_secs(5);
/// The lease is long over by then, and the first vouches too.
const TWO_LEASES: Duration = Duration::from_secs(11);
/// More than a lease and an election: what has not happened by then does not happen.
const LONG_ENOUGH: Duration = Duration::from_secs(7);
/// What a leader that replicates asynchronously may take with it into its death: rows on their way to the replicas.
const ON_THEIR_WAY: Duration = Duration::from_secs(1);

fn api_url(member: &Member) -> Value {
    format!("http://{}/patroni", member.rest()).into()
}

/// Waits until the list names these members, each with its own address, and nobody else; all tell the same.
async fn listed(cluster: &Cluster, members: &[&Member]) -> Result<()> {
    let expected: Value = members
        .iter()
        .map(|member| (member.name().to_owned(), api_url(member)))
        .collect::<serde_json::Map<_, _>>()
        .into();
    let listed = eventually("the failsafe list names all members", SOON, async || {
        let list = cluster.failsafe_list().await?;
        ensure!(list == expected, "{list} and not {expected}");
        for member in members {
            let answer = member.get("/failsafe").await?;
            ensure!(
                answer.status == 200 && answer.json()? == expected,
                "{member:?}: {answer:?}"
            );
        }
        Ok(())
    });
    listed.await
}

/// Waits until the list names everybody.
async fn all_listed(cluster: &Cluster) -> Result<()> {
    listed(cluster, &cluster.members().iter().collect::<Vec<_>>()).await
}

/// The leader takes writes, and nobody else does.
async fn leads_alone(cluster: &Cluster, leader: &Member) -> Result<()> {
    ensure!(leader.is_primary().await?, "{leader:?} became a replica");
    let primaries = cluster.primaries().await;
    ensure!(primaries.len() == 1, "{primaries:?} take writes");
    Ok(())
}

/// For all of `span` the leader takes writes, and nobody else does.
async fn leads_on_alone(cluster: &Cluster, leader: &Member, span: Duration) -> Result<()> {
    let goes_on = throughout("the leader goes on, alone", span, async || {
        leads_alone(cluster, leader).await
    });
    goes_on.await
}

/// Waits until no member takes writes.
async fn has_ended(cluster: &Cluster) -> Result<()> {
    eventually("the leader has ended itself", SOON, async || {
        nobody_writes(cluster).await
    })
    .await
}

async fn nobody_writes(cluster: &Cluster) -> Result<()> {
    let primaries = cluster.primaries().await;
    ensure!(primaries.is_empty(), "{primaries:?} take writes");
    Ok(())
}

/// For half a ttl nobody takes over from a leader that has ended.
async fn nobody_takes_over(cluster: &Cluster) -> Result<()> {
    throughout("nobody leads", TTL / 2, async || nobody_writes(cluster).await).await
}

/// Waits until the cluster is well and the list names everybody, and puts it under load. Returns who leads.
async fn all_listed_under_load(cluster: &Cluster) -> Result<(&Member, Load)> {
    let leader = cluster.settled().await?;
    all_listed(cluster).await?;
    Ok((leader, Load::start(cluster).await?))
}

/// What the leader writes now arrives at the replica.
async fn replicates(leader: &Member, replica: &Member) -> Result<()> {
    leader.sql("CREATE TABLE IF NOT EXISTS arrives (n int)").await?;
    let sent = leader
        .sql("INSERT INTO arrives VALUES (1) RETURNING pg_current_wal_insert_lsn()")
        .await?;
    let arrived = eventually("a row arrives at the replica", SOON, async || {
        let query = format!("SELECT pg_last_wal_replay_lsn() >= '{sent}'::pg_lsn");
        ensure!(replica.sql(&query).await? == "t", "{replica:?} is behind");
        Ok(())
    });
    arrived.await
}

#[tokio::test]
async fn the_list_names_every_member_once_the_mode_is_on_and_the_word_of_one_that_joins_later_is_needed() -> Result<()>
{
    let cluster = Cluster::builder()
        .dcs(json!({"failsafe_mode": false}))
        .prepare()
        .await?;
    let [first, second, third] = cluster.members() else {
        anyhow::bail!("there are three members");
    };
    first.start().await?;
    second.start().await?;
    cluster.start_proxy().await?;
    cluster.settled_with(2).await?;
    ensure!(first.get("/failsafe").await?.status == 502, "there is a list already");

    cluster.configure(&json!({"failsafe_mode": true})).await?;
    listed(&cluster, &[first, second]).await?;
    third.start().await?;
    let leader = cluster.settled().await?;
    ensure!(leader.name() != third.name(), "{leader:?} leads");
    all_listed(&cluster).await?;

    cluster.etcd().stop().await?;
    leads_on_alone(&cluster, leader, LONG_ENOUGH).await?;
    // It takes its word back by silence, and is too late with another.
    let agent = third.freeze_agent().await?;
    has_ended(&cluster).await?;
    process::signal(agent, Signal::CONT)?;
    nobody_takes_over(&cluster).await?;
    cluster.etcd().start_again().await?;
    cluster.settled().await?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_leader_without_others_leads_on_while_etcd_is_away_and_says_so() -> Result<()> {
    let cluster = Cluster::builder().members(1).start().await?;
    let leader = cluster.settled().await?;
    let load = Load::start(&cluster).await?;
    let fault = Instant::now();
    cluster.etcd().stop().await?;
    throughout("it takes writes", LONG_ENOUGH, async || {
        ensure!(leader.is_primary().await?);
        Ok(())
    })
    .await?;
    let status = leader.get("/primary").await?;
    ensure!(status.status == 200, "{status:?}");
    let says = status.json()?["failsafe_mode_is_active"].clone();
    load.goes_on().await?;
    cluster.etcd().start_again().await?;
    let (_, report) = load.end(&cluster, "etcd away from a single member", fault).await?;
    report.ensure_complete()?;
    ensure!(report.errors.is_empty(), "writers noticed: {report}");
    ensure!(
        says == true,
        "/primary does not say that the failsafe mode is active: {says}"
    );
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_restored_member_that_the_list_does_not_name_is_not_elected() -> Result<()> {
    let cluster = Cluster::builder().members(2).prepare().await?;
    let [leader, restored] = cluster.members() else {
        anyhow::bail!("there are two members");
    };
    leader.start().await?;
    cluster.start_proxy().await?;
    cluster.settled_with(1).await?;
    listed(&cluster, &[leader]).await?;
    leader.stop().await?;
    let mut copy = cluster.site().command("cp");
    copy.arg("-a").arg(leader.data_dir()).arg(restored.data_dir());
    cluster.site().run(copy, SOON).await?.success()?;
    cluster.site().write_file("m2/data/standby.signal", "")?;

    restored.start().await?;
    eventually("the restored member answers", SOON, async || {
        ensure!(!restored.is_primary().await?, "it was promoted");
        Ok(())
    })
    .await?;
    throughout("it stays a replica", LONG_ENOUGH, async || {
        ensure!(!restored.is_primary().await?, "it was promoted");
        ensure!(cluster.lease_holder().await.is_err(), "somebody holds the key");
        Ok(())
    })
    .await?;
    leader.start().await?;
    let after = cluster.settled().await?;
    ensure!(after.name() == leader.name(), "{after:?} leads");
    listed(&cluster, &[leader, restored]).await?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn with_the_word_of_all_no_writer_notices_that_etcd_is_away() -> Result<()> {
    let cluster = Cluster::builder().etcd(3).start().await?;
    let (leader, load) = all_listed_under_load(&cluster).await?;
    let postmaster = leader.postmaster_pid()?;

    let fault = Instant::now();
    cluster.etcd().stop().await?;
    leads_on_alone(&cluster, leader, TWO_LEASES).await?;
    for replica in cluster.others(leader.name()) {
        replicates(leader, replica).await?;
    }
    load.goes_on().await?;
    cluster.etcd().start_again().await?;

    let name = "etcd away for two leases, all vouch";
    let report = load.end_undisturbed(&cluster, name, fault, leader, postmaster).await?;
    ensure!(report.errors.is_empty(), "writers noticed: {report}");
    cluster.pass();
    Ok(())
}

/// A frozen etcd leaves connections open: nothing is refused, and nothing answers. The lease expires when it thaws.
#[tokio::test]
async fn with_the_word_of_all_no_writer_notices_a_frozen_etcd() -> Result<()> {
    let cluster = Cluster::builder().members(2).start().await?;
    let (leader, load) = all_listed_under_load(&cluster).await?;
    let postmaster = leader.postmaster_pid()?;
    let fault = Instant::now();
    cluster.etcd().freeze_member(0).await?;
    leads_on_alone(&cluster, leader, LONG_ENOUGH).await?;
    load.goes_on().await?;
    cluster.etcd().thaw_member(0).await?;
    let name = "etcd frozen for longer than a lease, all vouch";
    let report = load.end_undisturbed(&cluster, name, fault, leader, postmaster).await?;
    ensure!(report.errors.is_empty(), "writers noticed: {report}");
    cluster.pass();
    Ok(())
}

/// The lease runs out while etcd is away, so that the key is gone when it is back; and the agent does not live to see it.
/// The next agent can prove nothing.
#[tokio::test]
async fn a_leader_whose_agent_dies_while_etcd_is_away_is_fenced_and_nobody_else_leads() -> Result<()> {
    let cluster = Cluster::builder().members(2).start().await?;
    let (leader, load) = all_listed_under_load(&cluster).await?;
    let fault = Instant::now();
    cluster.etcd().stop().await?;
    leads_on_alone(&cluster, leader, TTL).await?;
    leader.kill_agent().await?;
    has_ended(&cluster).await?;
    nobody_takes_over(&cluster).await?;
    cluster.etcd().start_again().await?;
    let (_, report) = load.end(&cluster, "agent killed while etcd is away", fault).await?;
    report.ensure_complete()?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn without_the_word_of_a_dead_replica_the_leader_ends_itself_and_nobody_leads_until_etcd_is_back() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let (leader, load) = all_listed_under_load(&cluster).await?;

    let fault = Instant::now();
    let dead = cluster.others(leader.name())[0];
    cluster.etcd().stop().await?;
    dead.kill_everything().await?;
    has_ended(&cluster).await?;
    println!("nobody writes {:.1} s after the fault", fault.elapsed().as_secs_f64());
    nobody_takes_over(&cluster).await?;
    cluster.etcd().start_again().await?;
    cluster.settled_with(2).await?;
    load.goes_on().await?;
    dead.start().await?;

    let (_, report) = load.end(&cluster, "etcd away, one is dead", fault).await?;
    report.ensure_complete()?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn when_etcd_is_back_without_the_old_leader_a_known_replica_is_elected() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let (former, load) = all_listed_under_load(&cluster).await?;
    let fault = Instant::now();
    cluster.etcd().stop().await?;
    load.goes_on().await?;
    former.kill_everything().await?;
    nobody_writes(&cluster).await?;
    let back = Instant::now();
    cluster.etcd().start_again().await?;
    let next = cluster.next_leader(former.name()).await?;
    println!(
        "{next:?} leads {:.1} s after etcd is back",
        back.elapsed().as_secs_f64()
    );
    ensure!(back.elapsed() < Duration::from_secs(25), "it took {:?}", back.elapsed());
    former.start().await.context("the former leader")?;
    let (_, report) = load.end(&cluster, "leader dead while etcd was away", fault).await?;
    report.ensure_lost_only_within(ON_THEIR_WAY)?;
    cluster.pass();
    Ok(())
}

/// A cluster on hosts of its own; this test is on the clients'.
async fn on_a_network() -> Result<(Arc<Network>, Cluster)> {
    let network = Arc::new(Network::new(3, 1)?);
    network.enter(network.client())?;
    let cluster = Cluster::builder().on(&network).start().await?;
    Ok((network, cluster))
}

#[tokio::test]
async fn a_leader_that_alone_loses_etcd_leads_on_and_its_clients_write_on() -> Result<()> {
    let (network, cluster) = on_a_network().await?;
    let (leader, load) = all_listed_under_load(&cluster).await?;
    let postmaster = leader.postmaster_pid()?;
    let fault = Instant::now();
    network.cut(leader.ip(), &[cluster.etcd().ip(0)])?;
    leads_on_alone(&cluster, leader, LONG_ENOUGH).await?;
    let wrote_on = load
        .goes_on()
        .await
        .context("the clients of a leader that alone has lost etcd");
    network.heal()?;
    let name = "etcd cut off from the leader alone";
    load.end_undisturbed(&cluster, name, fault, leader, postmaster).await?;
    wrote_on?;
    cluster.pass();
    Ok(())
}

/// Whoever has vouched for a leader that says itself that it has ended is free to lead.
#[tokio::test]
async fn a_leader_that_loses_etcd_and_a_voucher_is_followed_within_a_lease_and_an_election() -> Result<()> {
    let (network, cluster) = on_a_network().await?;
    let (former, load) = all_listed_under_load(&cluster).await?;
    let dead = cluster.others(former.name())[0];
    let heir = cluster.others(former.name())[1];
    let fault = Instant::now();
    dead.kill_everything().await?;
    network.cut(former.ip(), &[cluster.etcd().ip(0)])?;
    let next = cluster.next_leader(former.name()).await?;
    let took = fault.elapsed();
    println!("{next:?} leads {:.1} s after the fault", took.as_secs_f64());
    network.heal()?;
    dead.start().await?;
    let (_, report) = load.end(&cluster, "leader without etcd and one voucher", fault).await?;
    report.ensure_lost_only_within(ON_THEIR_WAY)?;
    ensure!(next.name() == heir.name());
    let said = std::fs::read_to_string(heir.log_file())?;
    // On a busy machine the key may have expired by then.
    let asked = ["on behalf of its holder", "its key is gone already"];
    ensure!(
        asked.iter().any(|sign| said.contains(sign)),
        "{heir:?} was not asked to delete the key"
    );
    // A ttl of five seconds, and what an election and a promotion take on a busy machine.
    ensure!(took < Duration::from_secs(8), "it took {took:?}");
    cluster.pass();
    Ok(())
}

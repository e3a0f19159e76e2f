//! A cluster that follows another one: how it is made, who leads it, and how the two change places.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use pgherd_testkit::config::PREFIX;
use pgherd_testkit::{Cluster, Member, Sql, SqlFailure, eventually};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);
const SETTLED_MAX: Duration = Duration::from_secs(90);
const SLOT: &str = "of_the_other";
/// More than any test's `ttl`.
const LEASE_IS_OVER: Duration = Duration::from_secs(30);

/// A cluster of one that is followed, and one of two that is configured to follow it.
async fn pair() -> Result<(Cluster, Cluster)> {
    let kept = json!({"slots": {SLOT: {"type": "physical"}}});
    let source = Cluster::builder().members(1).dcs(kept).start().await?;
    let leader = source.settled().await?;
    let slot = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{SLOT}'");
    eventually("the leader has the slot for the other cluster", SOON, async || {
        let found = leader.sql(&slot).await?;
        ensure!(found == "1", "{found} slots");
        Ok(())
    })
    .await?;
    leader.client().await?.rows("CREATE TABLE told (n int)", SOON).await?;
    let follower = Cluster::builder()
        .members(2)
        .dcs(json!({"standby_cluster": section(leader, Some(SLOT))}))
        .prepare()
        .await?;
    for member in follower.members() {
        member.start().await?;
    }
    follower.start_proxy().await?;
    Ok((source, follower))
}

fn section(leader: &Member, slot: Option<&str>) -> Value {
    let address = leader.postgres();
    let mut section = json!({"host": address.ip().to_string(), "port": address.port()});
    if let Some(slot) = slot {
        section["primary_slot_name"] = json!(slot);
    }
    section
}

async fn record(cluster: &Cluster, member: &str) -> Result<Value> {
    let entry = cluster.etcd().entry(&format!("{PREFIX}members/{member}")).await?;
    Ok(serde_json::from_str(&entry.context("there is no member key")?.value)?)
}

/// Waits until one member leads a standby cluster that streams from `source`, and `up - 1` others stream from it.
async fn standing_by<'a>(cluster: &'a Cluster, source: &Member, up: usize) -> Result<&'a Member> {
    eventually("the standby cluster is well", SETTLED_MAX, async || {
        let name = cluster.lease_holder().await?;
        let leader = cluster.member(&name)?;
        let record = record(cluster, &name).await?;
        ensure!(
            record["role"] == "standby_leader" && record["state"] == "running",
            "{name} says {record}"
        );
        streams_from(leader, source).await?;
        let mut following = 0;
        for other in cluster.others(&name) {
            following += usize::from(streams_from(other, leader).await.is_ok());
        }
        ensure!(following + 1 == up, "{following} members follow {name}");
        Ok(leader)
    })
    .await
}

async fn streams_from(member: &Member, upstream: &Member) -> Result<()> {
    let from = format!(
        "SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming' AND sender_host = '{}'",
        upstream.postgres().ip()
    );
    ensure!(
        member.sql(&from).await? == "1",
        "{member:?} does not stream from {upstream:?}"
    );
    Ok(())
}

/// Writes a number and waits until all of `readers` have it.
async fn tell(leader: &Member, number: u32, readers: &[Member]) -> Result<()> {
    let insert = format!("INSERT INTO told VALUES ({number})");
    leader.client().await?.rows(&insert, SOON).await?;
    let asked = format!("SELECT count(*) FROM told WHERE n = {number}");
    for reader in readers {
        eventually("what was written has come", SOON, async || {
            ensure!(reader.sql(&asked).await? == "1", "{reader:?} does not have {number}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn codes(member: &Member, paths: [&str; 5]) -> Result<[u16; 5]> {
    let mut codes = [0; 5];
    for (code, path) in codes.iter_mut().zip(paths) {
        *code = member.get(path).await?.status;
    }
    Ok(codes)
}

const PATHS: [&str; 5] = ["/standby_leader", "/primary", "/replica", "/leader", "/read-only"];

async fn configure(member: &Member, change: Value) -> Result<()> {
    let answer = member.ask("PATCH", "/config", Some(&change)).await?;
    ensure!(answer.status == 200, "{answer:?}");
    Ok(())
}

async fn started_at(member: &Member) -> Result<String> {
    Ok(member.sql("SELECT pg_postmaster_start_time()").await?)
}

/// Whether a write through the write port is refused with the word that this is a standby cluster.
async fn refuses_writers(cluster: &Cluster) -> Result<()> {
    eventually("writers are told", SOON, async || {
        match Sql::connect(cluster.write_address(), Duration::from_secs(5)).await {
            Err(SqlFailure::Told { message, .. }) if message.contains("standby cluster") => Ok(()),
            Err(other) => bail!("{other}"),
            Ok(_) => bail!("a session was let in"),
        }
    })
    .await
}

#[tokio::test]
async fn a_standby_cluster_is_made_switched_over_and_takes_over_from_the_cluster_that_it_followed() -> Result<()> {
    let (source, follower) = pair().await?;
    let primary = source.settled().await?;
    let leader = standing_by(&follower, primary, 2).await?;
    tell(primary, 1, follower.members()).await?;
    let other = *follower.others(leader.name()).first().context("two members")?;
    ensure!(codes(leader, PATHS).await? == [200, 503, 503, 200, 200], "{leader:?}");
    ensure!(codes(other, PATHS).await? == [503, 503, 200, 503, 200], "{other:?}");
    let slot = format!("SELECT active FROM pg_replication_slots WHERE slot_name = '{SLOT}'");
    ensure!(primary.sql(&slot).await? == "t", "the slot that was named is not used");
    refuses_writers(&follower).await?;

    // The lead changes hands, and nothing is restarted for it.
    let (one, two) = (started_at(leader).await?, started_at(other).await?);
    let args = ["--leader", leader.name(), "--force"];
    follower.pgherd("switchover", &args).await?.success()?;
    let second = standing_by(&follower, primary, 2).await?;
    ensure!(second.name() == other.name(), "{second:?} leads");
    tell(primary, 2, follower.members()).await?;
    ensure!(
        (started_at(leader).await?, started_at(other).await?) == (one, two),
        "a server was restarted"
    );

    // The leader of the standby cluster is lost, and comes back.
    second.kill_everything().await?;
    let third = standing_by(&follower, primary, 1).await?;
    ensure!(third.name() == leader.name(), "{third:?} leads");
    second.start().await?;
    let third = standing_by(&follower, primary, 2).await?;
    tell(primary, 3, follower.members()).await?;

    // The two change places: first nobody takes writes, and nothing is copied.
    configure(primary, json!({"standby_cluster": section(third, None)})).await?;
    standing_by(&source, third, 1).await?;
    refuses_writers(&source).await?;
    ensure!(source.primaries().await.is_empty() && follower.primaries().await.is_empty());
    configure(third, json!({"standby_cluster": null})).await?;
    let promoted = follower.settled().await?;
    let former = standing_by(&source, promoted, 1).await?;
    tell(promoted, 4, source.members()).await?;
    let asides = std::fs::read_dir(former.data_dir().parent().context("a parent")?)?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().contains("aside"))
        .count();
    ensure!(asides == 0, "the former source was cloned");
    source.pass();
    follower.pass();
    Ok(())
}

#[tokio::test]
#[ignore = "long: waits for leases to end"]
async fn a_standby_cluster_goes_on_without_etcd_and_a_source_that_went_its_own_way_is_copied_anew() -> Result<()> {
    let (source, follower) = pair().await?;
    let primary = source.settled().await?;
    let leader = standing_by(&follower, primary, 2).await?;
    let other = *follower.others(leader.name()).first().context("two members")?;
    let started = (started_at(leader).await?, started_at(other).await?);
    follower.etcd().freeze_member(0).await?;
    eventually("the lease is over", LEASE_IS_OVER, async || {
        let answer = leader.get("/standby_leader").await?;
        ensure!(answer.status == 503, "{answer:?}");
        Ok(())
    })
    .await?;
    tell(primary, 1, follower.members()).await?;
    follower.etcd().thaw_member(0).await?;
    standing_by(&follower, primary, 2).await?;
    let now = (started_at(leader).await?, started_at(other).await?);
    ensure!(now == started, "PostgreSQL was ended");

    // Emptied, it gets back what the members know of the cluster.
    follower.etcd().ctl(&["del", "--prefix", ""]).await?.success()?;
    let leader = standing_by(&follower, primary, 2).await?;
    tell(primary, 5, follower.members()).await?;

    // Promoted while the source goes on: two clusters, each with what the other has not.
    configure(leader, json!({"standby_cluster": null})).await?;
    let promoted = follower.settled().await?;
    for (cluster, number) in [(&source, 2), (&follower, 3)] {
        let leader = cluster.settled().await?;
        tell(leader, number, cluster.members()).await?;
    }
    configure(primary, json!({"standby_cluster": section(promoted, None)})).await?;
    let former = standing_by(&source, promoted, 1).await?;
    tell(promoted, 4, source.members()).await?;
    let lost = former.sql("SELECT count(*) FROM told WHERE n = 2").await?;
    ensure!(lost == "0", "what only the former source had is still there");
    source.pass();
    follower.pass();
    Ok(())
}

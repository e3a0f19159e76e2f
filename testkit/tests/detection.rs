//! Troubles in which no process dies, and disturbances that are no trouble.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pgherd_testkit::process::{self, Pid, Signal};
use pgherd_testkit::{Cluster, Load, Member, Sql, eventually, throughout};
use serde_json::json;

/// Patience with a hung server is ten seconds; then it is ended, recovers, and takes writes.
const SOON: Duration = Duration::from_secs(60);
/// What a leader that replicates asynchronously may take with it into its death: rows on their way to the replicas.
const ON_THEIR_WAY: Duration = Duration::from_secs(1);
/// Each kind of disturbance, twice. `PGHERD_TEST_DISTURBANCES` says how many instead.
const DISTURBANCES: usize = 12;
const FREEZE: Duration = Duration::from_millis(100);
const NETWORK_PAUSE: Duration = Duration::from_secs(1);
const BUSY: Duration = Duration::from_secs(2);
const CONNECTIONS_MAX: usize = 40;

async fn timeline(member: &Member) -> Result<String> {
    Ok(member
        .sql("SELECT left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)")
        .await?)
}

/// A stopped postmaster: the kernel takes connections for it, its sessions go on, and nobody new is answered.
#[tokio::test]
async fn a_postmaster_that_answers_nobody_is_ended_and_started_in_place() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let leader = cluster.settled().await?;
    let (before, hung) = (timeline(leader).await?, leader.postmaster_pid()?);
    let load = Load::start(&cluster).await?;
    let fault = Instant::now();
    process::signal(hung, Signal::STOP)?;
    eventually("another postmaster takes writes", SOON, async || {
        ensure!(leader.postmaster_pid()? != hung, "postmaster {hung} is still there");
        ensure!(leader.is_primary().await?);
        Ok(())
    })
    .await?;
    let (after, report) = load.end(&cluster, "postmaster hung", fault).await?;
    ensure!(after.name() == leader.name(), "{after:?} leads");
    ensure!(timeline(after).await? == before, "another timeline");
    report.ensure_complete()?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_leader_whose_directory_cannot_be_written_gives_way() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let former = cluster.settled().await?;
    let load = Load::start(&cluster).await?;
    let fault = Instant::now();
    let access = |mode| fs::set_permissions(former.data_dir(), fs::Permissions::from_mode(mode));
    access(0o500)?;
    let next = cluster.next_leader(former.name()).await?;
    println!("{next:?} leads after {:.1} s", fault.elapsed().as_secs_f64());
    load.goes_on().await?;
    access(0o700)?;
    let (leader, report) = load.end(&cluster, "leader's directory read-only", fault).await?;
    ensure!(leader.name() != former.name(), "{former:?} took the lead back");
    report.ensure_lost_only_within(ON_THEIR_WAY)?;
    cluster.pass();
    Ok(())
}

/// Nobody else can lead, and reads and sessions still work: to end PostgreSQL would cure nothing.
#[tokio::test]
async fn a_lone_leader_whose_directory_cannot_be_written_goes_on() -> Result<()> {
    let cluster = Cluster::builder().members(1).start().await?;
    let leader = cluster.settled().await?;
    let postmaster = leader.postmaster_pid()?;
    let access = |mode| fs::set_permissions(leader.data_dir(), fs::Permissions::from_mode(mode));
    access(0o500)?;
    eventually("it says that its directory cannot be written", SOON, async || {
        let status = leader.get("/patroni").await?.json()?;
        let reason = status["pgherd"]["reason"].as_str().unwrap_or_default().to_owned();
        ensure!(reason.contains("cannot write"), "{reason}");
        Ok(())
    })
    .await?;
    ensure!(leader.is_primary().await? && leader.postmaster_pid()? == postmaster);
    access(0o700)?;
    cluster.pass();
    Ok(())
}

/// What a busy cluster goes through, and what must move nobody.
#[derive(Clone, Copy, Debug)]
enum Disturbance {
    /// All of the leader stands still for 100 ms.
    Freeze,
    /// etcd cannot be reached for a second.
    NetworkPause,
    EtcdRestarts,
    SlotsExhausted,
    LongCheckpoint,
    CoresBusy,
}

const KINDS: [Disturbance; 6] = [
    Disturbance::Freeze,
    Disturbance::NetworkPause,
    Disturbance::EtcdRestarts,
    Disturbance::SlotsExhausted,
    Disturbance::LongCheckpoint,
    Disturbance::CoresBusy,
];

/// What stays as it is.
#[derive(Debug, PartialEq)]
struct Led {
    by: String,
    since_revision: i64,
    postmaster: Pid,
}

async fn led(cluster: &Cluster) -> Result<Led> {
    let key = format!("{}leader", pgherd_testkit::config::PREFIX);
    let entry = cluster.etcd().entry(&key).await?.context("somebody leads")?;
    Ok(Led {
        postmaster: cluster.member(&entry.value)?.postmaster_pid()?,
        by: entry.value,
        since_revision: entry.create_revision,
    })
}

#[tokio::test]
async fn disturbances_that_are_no_trouble_move_nobody() -> Result<()> {
    let count = std::env::var("PGHERD_TEST_DISTURBANCES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(DISTURBANCES);
    let dcs = json!({"postgresql": {"parameters": {"max_connections": CONNECTIONS_MAX}}});
    let cluster = Cluster::builder().etcd(3).dcs(dcs).start().await?;
    let leader = cluster.settled().await?;
    leader.sql("CREATE TABLE dirt (filler text)").await?;
    let before = led(&cluster).await?;
    for disturbance in KINDS.iter().cycle().take(count) {
        disturb(&cluster, leader, *disturbance)
            .await
            .with_context(|| format!("{disturbance:?}"))?;
        eventually("writes go on", SOON, async || {
            Ok(leader.sql("SELECT pg_logical_emit_message(true, 't', '')").await?)
        })
        .await?;
        let after = led(&cluster).await?;
        ensure!(after == before, "{disturbance:?}: {after:?} after {before:?}");
    }
    println!("{count} disturbances, no failover and no restart");
    cluster.settled().await?;
    cluster.pass();
    Ok(())
}

async fn disturb(cluster: &Cluster, leader: &Member, disturbance: Disturbance) -> Result<()> {
    let etcd = cluster.etcd();
    match disturbance {
        Disturbance::Freeze => {
            let frozen = leader.freeze_everything().await?;
            let stands_still = throughout("it stands still", FREEZE, async || Ok(())).await;
            leader.thaw(&frozen);
            stands_still
        }
        Disturbance::NetworkPause => {
            for index in 0..etcd.size() {
                etcd.freeze_member(index).await?;
            }
            let paused = throughout("nobody is ended", NETWORK_PAUSE, async || {
                leader.postmaster_pid().map(|_| ())
            })
            .await;
            for index in 0..etcd.size() {
                etcd.thaw_member(index).await?;
            }
            paused
        }
        Disturbance::EtcdRestarts => {
            for index in 0..etcd.size() {
                etcd.stop_member(index).await?;
                etcd.start_member(index).await?;
                etcd.wait_ready().await?;
            }
            Ok(())
        }
        Disturbance::SlotsExhausted => exhaust_slots(leader).await,
        Disturbance::LongCheckpoint => {
            leader
                .sql("INSERT INTO dirt SELECT repeat('x', 500) FROM generate_series(1, 60000)")
                .await?;
            leader.sql("CHECKPOINT").await?;
            leader.sql("TRUNCATE dirt").await?;
            Ok(())
        }
        Disturbance::CoresBusy => keep_cores_busy().await,
    }
}

/// Takes every slot, the reserved ones too, and keeps them for longer than a lease.
async fn exhaust_slots(leader: &Member) -> Result<()> {
    let mut taken: Vec<Sql> = Vec::new();
    while let Ok(client) = leader.client().await {
        taken.push(client);
        ensure!(taken.len() <= CONNECTIONS_MAX, "more slots than there are");
    }
    ensure!(taken.len() > CONNECTIONS_MAX / 2, "{} slots only", taken.len());
    let postmaster = leader.postmaster_pid()?;
    throughout("the postmaster stays", Duration::from_secs(6), async || {
        ensure!(leader.postmaster_pid()? == postmaster);
        Ok(())
    })
    .await
}

async fn keep_cores_busy() -> Result<()> {
    let threads = 2 * std::thread::available_parallelism()?.get();
    let work = move || {
        let until = Instant::now() + BUSY;
        let mut number = 1_u64;
        while Instant::now() < until {
            number = std::hint::black_box(number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
        }
    };
    let mut busy = tokio::task::JoinSet::new();
    for _ in 0..threads {
        busy.spawn_blocking(work);
    }
    busy.join_all().await;
    Ok(())
}

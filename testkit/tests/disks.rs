//! Disks that fill up or hang, under a leader and under a replica.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pgherd_testkit::{Cluster, Load, VolumeKind, eventually};
use rustix::process::geteuid;

/// What a leader that replicates asynchronously may take with it: rows on their way to the replicas.
const ON_THEIR_WAY: Duration = Duration::from_secs(1);
/// Patience with the disk, with processes that do not end, and then the length of a lease.
const SOON: Duration = Duration::from_secs(60);

/// Mounting needs root, and a kernel that has what is mounted. Elsewhere these tests show nothing.
fn may_mount() -> bool {
    let possible = geteuid().is_root()
        && ["/dev/loop-control", "/dev/fuse"]
            .iter()
            .all(|device| Path::new(device).exists());
    if !possible {
        println!("skipped: filesystems of one's own need root, loop devices and FUSE");
    }
    possible
}

/// The leader's disk hangs: another leads, and when the disk works again the former leader follows it.
async fn another_leads_while_the_disk_hangs(kind: VolumeKind) -> Result<()> {
    if !may_mount() {
        return Ok(());
    }
    let cluster = Cluster::builder().volumes(kind).start().await?;
    let former = cluster.settled().await?;
    let load = Load::start(&cluster).await?;
    let fault = Instant::now();
    former.volume()?.hang()?;
    let next = cluster.next_leader(former.name()).await?;
    println!("{next:?} leads after {:.1} s", fault.elapsed().as_secs_f64());
    load.goes_on().await?;
    former.volume()?.go_on()?;
    let (leader, report) = load.end(&cluster, "leader's disk hung", fault).await?;
    ensure!(leader.name() != former.name(), "{former:?} took the lead back");
    report.ensure_lost_only_within(ON_THEIR_WAY)?;
    cluster.pass();
    Ok(())
}

/// Whoever writes to a frozen disk cannot even be killed. It will not answer anybody any more either.
#[tokio::test]
async fn a_leader_whose_disk_takes_no_write_and_lets_nobody_die_is_replaced() -> Result<()> {
    another_leads_while_the_disk_hangs(VolumeKind::Disk).await
}

/// Nothing can be read either: what looks at the data directory hangs with it.
#[tokio::test]
async fn a_leader_whose_disk_answers_nothing_is_replaced() -> Result<()> {
    another_leads_while_the_disk_hangs(VolumeKind::Served).await
}

#[tokio::test]
async fn a_leader_whose_disk_is_full_gives_way_and_comes_back_when_there_is_room() -> Result<()> {
    if !may_mount() {
        return Ok(());
    }
    let cluster = Cluster::builder().volumes(VolumeKind::Disk).start().await?;
    let former = cluster.settled().await?;
    let load = Load::start(&cluster).await?;
    let fault = Instant::now();
    former.volume()?.fill()?;
    let next = cluster.next_leader(former.name()).await?;
    println!("{next:?} leads after {:.1} s", fault.elapsed().as_secs_f64());
    load.goes_on().await?;
    former.volume()?.clear()?;
    let (leader, report) = load.end(&cluster, "leader's disk full", fault).await?;
    ensure!(leader.name() != former.name(), "{former:?} took the lead back");
    report.ensure_lost_only_within(ON_THEIR_WAY)?;
    cluster.pass();
    Ok(())
}

/// A replica with a hung disk is no candidate, and nobody waits for it: neither readers nor commits.
#[tokio::test]
async fn a_replica_whose_disk_hangs_is_left_alone_and_costs_the_writers_nothing() -> Result<()> {
    if !may_mount() {
        return Ok(());
    }
    let cluster = Cluster::builder().volumes(VolumeKind::Served).start().await?;
    let leader = cluster.settled().await?;
    let load = Load::start(&cluster).await?;
    let fault = Instant::now();
    let replica = cluster.others(leader.name()).swap_remove(0);
    replica.volume()?.hang()?;
    eventually("the replica is no read target any more", SOON, async || {
        let answer = replica.get("/replica").await?;
        ensure!(answer.status != 200, "it says {}", answer.status);
        Ok(())
    })
    .await?;
    load.goes_on().await?;
    replica.volume()?.go_on()?;
    let (after, report) = load.end(&cluster, "replica's disk hung", fault).await?;
    ensure!(after.name() == leader.name(), "{after:?} leads");
    report.ensure_complete()?;
    cluster.pass();
    Ok(())
}

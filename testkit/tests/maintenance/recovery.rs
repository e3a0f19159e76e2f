//! What a leader whose PostgreSQL dies does, and how a former leader comes back.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pgherd_testkit::{Cluster, Load, Member, program};
use serde_json::json;

use super::{ON_THEIR_WAY, SOON, timeline};

#[tokio::test]
async fn a_dead_leader_restarts_in_place_on_its_timeline_and_gives_the_lead_up_when_it_cannot() -> Result<()> {
    let cluster = Cluster::builder().members(2).start().await?;
    let former = cluster.settled().await?;
    let load = Load::start(&cluster).await?;
    let before = timeline(former).await?;
    let fault = Instant::now();
    former.kill_postmaster()?;
    let (after, report) = load.end(&cluster, "leader's postmaster killed", fault).await?;
    ensure!(after.name() == former.name(), "{after:?} leads");
    ensure!(timeline(after).await? == before, "another timeline");
    let took = fault.elapsed();
    ensure!(took < Duration::from_secs(15), "it took {took:?}");
    report.ensure_complete()?;

    let load = Load::start(&cluster).await?;
    let wal = former.data_dir().join("pg_wal");
    let fault = Instant::now();
    fs::set_permissions(&wal, fs::Permissions::from_mode(0o000))?;
    former.kill_postmaster()?;
    let next = cluster.next_leader(former.name()).await?;
    println!("{next:?} leads after {:.1} s", fault.elapsed().as_secs_f64());
    load.goes_on().await?;
    fs::set_permissions(&wal, fs::Permissions::from_mode(0o700))?;
    let (leader, report) = load.end(&cluster, "leader cannot start again", fault).await?;
    ensure!(leader.name() != former.name(), "{former:?} took the lead back");
    report.ensure_lost_only_within(ON_THEIR_WAY)?;
    cluster.pass();
    Ok(())
}

/// By the setting's older name, which many configurations have.
#[tokio::test]
async fn with_no_time_to_start_a_dead_leader_is_replaced() -> Result<()> {
    let cluster = Cluster::builder()
        .members(2)
        .dcs(json!({"master_start_timeout": 0}))
        .start()
        .await?;
    let former = cluster.settled().await?;
    let load = Load::start(&cluster).await?;
    let fault = Instant::now();
    former.kill_postmaster()?;
    let next = cluster.next_leader(former.name()).await?;
    let took = fault.elapsed();
    println!("{next:?} leads after {:.1} s", took.as_secs_f64());
    ensure!(took < Duration::from_secs(10), "it took {took:?}");
    let (_, report) = load.end(&cluster, "postmaster killed, no time to start", fault).await?;
    report.ensure_lost_only_within(ON_THEIR_WAY)?;
    cluster.pass();
    Ok(())
}

/// Writes to a member's data while nothing else runs on it, as an operator in need would.
async fn write_alone(cluster: &Cluster, member: &Member, sql: &str) -> Result<()> {
    let mut single = cluster.site().command("sh");
    single
        .args(["-c", "echo \"$1\" | \"$2\" --single -D \"$3\" postgres", "sh", sql])
        .arg(program::postgres_bin_dir()?.join("postgres"))
        .arg(member.data_dir());
    cluster.site().run(single, SOON).await?.success()?;
    Ok(())
}

#[tokio::test]
async fn a_former_leader_that_wrote_on_alone_comes_back_without_that_and_with_what_is_new() -> Result<()> {
    let cluster = Cluster::builder().members(2).start().await?;
    let former = cluster.settled().await?;
    let load = Load::start(&cluster).await?;
    let fault = Instant::now();
    former.kill_everything().await?;
    let next = cluster.next_leader(former.name()).await?;
    write_alone(&cluster, former, "CREATE TABLE written_alone (n int)").await?;
    next.sql("CREATE TABLE written_later (n int)").await?;

    let back = Instant::now();
    former.start().await?;
    let leader = cluster.settled().await?;
    let took = back.elapsed();
    println!("it streams {:.1} s after its start", took.as_secs_f64());
    ensure!(took < Duration::from_secs(20), "it took {took:?}");
    ensure!(leader.name() == next.name(), "{leader:?} leads");
    let tables = "SELECT to_regclass('written_alone') IS NULL AND to_regclass('written_later') IS NOT NULL";
    ensure!(former.sql(tables).await? == "t", "it has its own past");
    ensure!(
        former.output().await.contains("and is rewound"),
        "it was copied, and not rewound"
    );
    let (_, report) = load.end(&cluster, "former leader that wrote on alone", fault).await?;
    report.ensure_lost_only_within(ON_THEIR_WAY)?;
    cluster.pass();
    Ok(())
}

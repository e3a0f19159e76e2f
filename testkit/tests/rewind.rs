//! Members whose data holds what the leader's does not: how they come back, and what is left when the leader is lost
//! meanwhile.

use std::fs;
use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use pgherd_testkit::{Cluster, Member, eventually, program};
use serde_json::json;

const SOON: Duration = Duration::from_secs(30);
const SETTLED_MAX: Duration = Duration::from_secs(90);
const ROUNDS: usize = 10;

/// Lets a member that is down write what nobody else has.
fn write_alone(cluster: &Cluster, member: &Member, sql: &str) -> Result<()> {
    let mut command = cluster.site().command(program::postgres_bin_dir()?.join("postgres"));
    command.args(["--single", "-D"]).arg(member.data_dir());
    command.args(["-c", "synchronous_standby_names=", "postgres"]);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().context("a server for one session")?;
    let mut stdin = child.stdin.take().context("it was piped")?;
    stdin.write_all(format!("{sql}\n").as_bytes())?;
    drop(stdin);
    let status = child.wait()?;
    ensure!(status.success(), "it ended with {status}");
    Ok(())
}

/// What was moved aside beside a data directory, and what is there besides.
fn beside(member: &Member) -> Result<Vec<String>> {
    let parent = member.data_dir();
    let parent = parent.parent().context("a parent")?;
    let names = fs::read_dir(parent)?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned());
    Ok(names.filter(|name| name.starts_with("data.")).collect())
}

async fn rows(member: &Member, text: &str) -> Result<String> {
    Ok(member
        .sql(&format!("SELECT count(*) FROM told WHERE t = '{text}'"))
        .await?)
}

#[tokio::test]
#[ignore = "long: two leaders are lost one after the other"]
async fn a_former_leader_that_went_its_own_way_is_rewound_and_one_that_cannot_be_is_copied() -> Result<()> {
    let archive = json!({"archive_mode": "on", "archive_command": "mkdir -p ../archive && cp %p ../archive/%f"});
    let dcs = json!({"postgresql": {"parameters": archive}});
    let cluster = Cluster::builder().members(2).dcs(dcs).start().await?;
    let first = cluster.settled().await?;
    first.client().await?.rows("CREATE TABLE told (t text)", SOON).await?;
    first.kill_everything().await?;
    let second = cluster.next_leader(first.name()).await?;
    write_alone(
        &cluster,
        first,
        "INSERT INTO told SELECT 'alone' FROM generate_series(1, 1000)",
    )?;
    second
        .client()
        .await?
        .rows("INSERT INTO told VALUES ('together')", SOON)
        .await?;
    first.start().await?;
    cluster.settled().await?;
    ensure!(rows(first, "alone").await? == "0" && rows(first, "together").await? == "1");
    ensure!(beside(first)?.is_empty(), "it was copied: {:?}", beside(first)?);
    ensure!(first.output().await.contains("is rewound"), "it does not say so");

    // Without the log since the fork pg_rewind finds no way back.
    second.kill_everything().await?;
    cluster.next_leader(second.name()).await?;
    write_alone(&cluster, second, "INSERT INTO told VALUES ('alone again')")?;
    let history = second.data_dir().join("pg_wal");
    for entry in fs::read_dir(&history)?.flatten() {
        if entry.path().is_file() {
            fs::remove_file(entry.path())?;
        }
    }
    second.start().await?;
    cluster.settled().await?;
    ensure!(rows(second, "alone again").await? == "0");
    let aside = beside(second)?;
    ensure!(aside.len() == 1 && aside[0].contains("aside-"), "{aside:?}");
    cluster.pass();
    Ok(())
}

/// What a member is at when its leader is killed.
#[derive(Clone, Copy, Debug)]
enum At {
    Clone,
    Rewind,
}

impl At {
    /// How often a member has said so, in all its lives.
    fn times_said(self, member: &Member) -> Result<usize> {
        let says = match self {
            Self::Clone => "has no data and is cloned",
            Self::Rewind => "and is rewound",
        };
        Ok(fs::read_to_string(member.log_file())?.matches(says).count())
    }
}

/// Waits until the member says once more that it is at it: that is over within a second.
async fn is_at(member: &Member, at: At, said_before: usize) -> Result<()> {
    eventually(&format!("{member:?} is at {at:?}"), SETTLED_MAX, async || {
        ensure!(at.times_said(member)? > said_before, "it has not begun");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "long: the leader is lost ten times"]
async fn ten_leaders_lost_while_a_member_is_copied_or_rewound_leave_nobody_half_made() -> Result<()> {
    let cluster = Cluster::builder().members(3).start().await?;
    let leader = cluster.settled().await?;
    let filled = "CREATE TABLE told AS SELECT repeat('x', 500) AS t FROM generate_series(1, 200000)";
    leader.client().await?.rows(filled, SETTLED_MAX).await?;
    for round in 0..ROUNDS {
        let at = if round % 2 == 0 { At::Clone } else { At::Rewind };
        let leader = cluster.settled().await?;
        let hurt = match at {
            At::Clone => {
                let replica = *cluster.others(leader.name()).first().context("three members")?;
                replica.kill_everything().await?;
                replica.wipe().await?;
                replica
            }
            At::Rewind => {
                leader.kill_everything().await?;
                cluster.next_leader(leader.name()).await?;
                write_alone(&cluster, leader, "UPDATE told SET t = t || 'y'")?;
                leader
            }
        };
        let said_before = at.times_said(hurt)?;
        hurt.start().await?;
        is_at(hurt, at, said_before).await?;
        let holder = cluster.lease_holder().await?;
        let lost = cluster.member(&holder)?;
        if lost.name() == hurt.name() {
            bail!("{hurt:?} leads with half of its data");
        }
        lost.kill_everything().await?;
        cluster.next_leader(lost.name()).await?;
        lost.start().await?;
        cluster
            .settled()
            .await
            .with_context(|| format!("round {round}, {at:?}"))?;
        let counted = "SELECT count(*) FROM told";
        for member in cluster.members() {
            eventually("everything is there", SOON, async || {
                let count = member.sql(counted).await?;
                ensure!(count == "200000", "{member:?} has {count}");
                Ok(())
            })
            .await?;
            let half = beside(member)?
                .into_iter()
                .filter(|name| !name.contains("aside-"))
                .collect::<Vec<_>>();
            ensure!(half.is_empty(), "{member:?} has {half:?}");
            let copies = beside(member)?.len();
            ensure!(copies <= 2, "{member:?} keeps {copies} copies");
        }
    }
    cluster.pass();
    Ok(())
}

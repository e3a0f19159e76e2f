//! Programs that stream the log through the write port: they go on while the leader leads, end with its leadership, and come
//! back to the next leader by themselves.

use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::config::REPLICATION_PASSWORD;
use pgherd_testkit::process::Daemon;
use pgherd_testkit::program::postgres_client;
use pgherd_testkit::{Cluster, Member, SqlFailure, client, eventually};
use serde_json::json;

const SOON: Duration = Duration::from_secs(30);
/// The programs wait for five seconds before they try again.
const BACK_MAX: Duration = Duration::from_secs(60);
/// With two replicas to draw from, it is all but certain that some of so many take their log from another than their files.
const BACKUPS: usize = 6;
const SEGMENT_BYTES: usize = 16 << 20;
const SLOT: &str = "streams";
/// SQLSTATE `duplicate_object`.
const EXISTS: &str = "42710";
const LOG: &str = "received";
const ROWS_FILE: &str = "rows.out";
const STREAMS: &str = "SELECT string_agg(application_name, ' ' ORDER BY application_name) FROM pg_stat_replication \
                       WHERE application_name LIKE 'stream-%'";
const BOTH: &str = "stream-logical stream-physical";

fn program(cluster: &Cluster, program: &str, name: &str) -> Command {
    let address: SocketAddr = cluster.write_address();
    let mut command = client::libpq(cluster.site(), postgres_client(program), address);
    command.env("PGAPPNAME", name);
    command
}

/// Both at work, until they are dropped with their site.
fn start(cluster: &Cluster) -> Result<[Daemon; 2]> {
    fs::create_dir(cluster.site().dir().join(LOG))?;
    let mut physical = program(cluster, "pg_receivewal", "stream-physical");
    physical
        .env("PGUSER", "replicator")
        .env("PGPASSWORD", REPLICATION_PASSWORD);
    physical.env_remove("PGDATABASE").args(["-v", "-D", LOG]);
    let mut logical = program(cluster, "pg_recvlogical", "stream-logical");
    logical.args([
        "-v", "-d", "postgres", "--slot", SLOT, "--start", "-F", "1", "-f", ROWS_FILE,
    ]);
    let site = cluster.site();
    Ok([
        site.start("pg_receivewal", physical)?,
        site.start("pg_recvlogical", logical)?,
    ])
}

/// The operator's part: a slot that is not a permanent one is gone with its leader.
async fn make_slot(leader: &Member) -> Result<()> {
    let make = format!("SELECT pg_create_logical_replication_slot('{SLOT}', 'test_decoding')");
    eventually("there is a slot", SOON, async || {
        match leader.client().await?.rows(&make, SOON).await {
            Err(SqlFailure::Told { code, .. }) if code == EXISTS => Ok(()),
            made => Ok(made.map(|_| ())?),
        }
    })
    .await
}

/// Waits until both streams come from `leader`, writes, and waits until what was written has come by both.
async fn stream_from(cluster: &Cluster, leader: &Member, text: &str) -> Result<()> {
    eventually("both streams come from the leader", BACK_MAX, async || {
        let streams = leader.sql(STREAMS).await?;
        ensure!(streams == BOTH, "{leader:?} has these: {streams:?}");
        Ok(())
    })
    .await?;
    let session = leader.client().await?;
    session
        .rows(&format!("INSERT INTO streamed VALUES ('{text}')"), SOON)
        .await?;
    // A page that is not full is sent as well.
    let position = session.value("SELECT pg_current_wal_flush_lsn()", SOON).await?;
    let file = session
        .value(&format!("SELECT pg_walfile_name('{position}')"), SOON)
        .await?;
    let (_, offset) = position.split_once('/').context("a position has two halves")?;
    let offset = usize::from_str_radix(offset, 16)? % SEGMENT_BYTES;
    let dir = cluster.site().dir();
    eventually("what was written has come", SOON, async || {
        let rows = fs::read_to_string(dir.join(ROWS_FILE))?;
        let expected = format!("table public.streamed: INSERT: t[text]:'{text}'");
        ensure!(rows.lines().any(|line| line == expected), "no row {text:?} in {rows}");
        let own = fs::read(leader.data_dir().join("pg_wal").join(&file))?;
        let received = dir.join(LOG);
        let received = fs::read(received.join(format!("{file}.partial"))).or_else(|_| fs::read(received.join(&file)));
        let received = received.with_context(|| format!("{file} has not come"))?;
        ensure!(
            received.get(..offset) == own.get(..offset),
            "{file} is another one up to {offset}"
        );
        Ok(())
    })
    .await
}

#[tokio::test]
async fn streams_of_the_log_end_with_their_leader_and_come_back_to_the_next() -> Result<()> {
    let parameters = json!({"wal_level": "logical"});
    let builder = Cluster::builder().dcs(json!({"postgresql": {"parameters": parameters}}));
    let cluster = builder.start().await?;
    let first = cluster.settled().await?;
    first
        .client()
        .await?
        .rows("CREATE TABLE streamed (t text)", SOON)
        .await?;
    make_slot(first).await?;
    let mut streams = start(&cluster)?;
    stream_from(&cluster, first, "from the first").await?;

    let args = ["--leader", first.name(), "--force"];
    cluster.pgherd("switchover", &args).await?.success()?;
    let second = cluster.next_leader(first.name()).await?;
    make_slot(second).await?;
    stream_from(&cluster, second, "from the second").await?;
    ensure!(
        first.sql(STREAMS).await?.is_empty(),
        "streams of the former leader go on"
    );

    // Its sockets stay open: nothing but the proxy ends them.
    second.freeze_everything().await?;
    let third = cluster.next_leader(second.name()).await?;
    make_slot(third).await?;
    stream_from(&cluster, third, "from the third").await?;
    for stream in &mut streams {
        ensure!(stream.ended()?.is_none(), "a program has given up: {}", stream.output());
    }
    cluster.pass();
    Ok(())
}

/// The log of meanwhile comes by a second connection, which may lead to another replica than the files.
#[tokio::test]
async fn a_backup_through_the_read_port_is_whole_wherever_its_log_comes_from() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let leader = cluster.settled().await?;
    leader
        .client()
        .await?
        .rows(
            "CREATE TABLE written AS SELECT n FROM generate_series(1, 50000) n",
            SOON,
        )
        .await?;
    for turn in 0..BACKUPS {
        let dir = format!("backup-{turn}");
        let mut command = client::libpq(cluster.site(), postgres_client("pg_basebackup"), cluster.read_address());
        command
            .env("PGUSER", "replicator")
            .env("PGPASSWORD", REPLICATION_PASSWORD);
        command.env_remove("PGDATABASE");
        command.args(["-D", &dir, "-X", "stream", "-c", "fast"]);
        cluster.site().run(command, BACK_MAX).await?.success()?;
        let mut command = cluster.site().client_command(postgres_client("pg_verifybackup"));
        command.args(["-q", &dir]);
        cluster.site().run(command, BACK_MAX).await?.success()?;
        fs::remove_dir_all(cluster.site().dir().join(&dir))?;
    }
    cluster.pass();
    Ok(())
}

//! Programs that speak the replication protocol.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::Member;
use pgherd_testkit::config::REPLICATION_PASSWORD;
use pgherd_testkit::program::postgres_client;

use super::{Field, RUN_MAX};

const MIB: u64 = 1 << 20;
/// From this version on a replica decodes, too.
const DECODES_ON_REPLICAS: u32 = 160_000;
const ROWS: u32 = 500;

/// As the user whose streams have nothing to do with a database.
fn replication(field: &Field, program: &str, address: SocketAddr) -> Command {
    let mut command = field.libpq(postgres_client(program), address);
    command
        .env("PGUSER", "replicator")
        .env("PGPASSWORD", REPLICATION_PASSWORD);
    command.env_remove("PGDATABASE");
    command
}

/// With the log of meanwhile, by a second connection; verified file by file.
pub(super) async fn basebackup(field: &Field) -> Result<()> {
    for (port, address) in field.ports() {
        let dir = format!("backup-{port}");
        let mut command = replication(field, "pg_basebackup", address);
        command.args(["-D", &dir, "-X", "stream", "-c", "fast"]);
        field
            .run(command)
            .await
            .with_context(|| format!("on the {port} port"))?;
        let mut command = field.cluster.site().client_command(postgres_client("pg_verifybackup"));
        command.args(["-q", &dir]);
        field
            .run(command)
            .await
            .with_context(|| format!("of the {port} port"))?;
    }
    // As archives, compressed on the server's side, which is one long COPY.
    let mut command = replication(field, "pg_basebackup", field.write());
    command.args([
        "-D",
        "backup-tar",
        "-Ft",
        "--compress=server-gzip",
        "-X",
        "fetch",
        "-c",
        "fast",
    ]);
    field.run(command).await.context("as archives")?;
    let archive = fs::metadata(field.cluster.site().dir().join("backup-tar/base.tar.gz"))?;
    ensure!(archive.len() > MIB, "{} bytes", archive.len());
    Ok(())
}

/// What is received is, byte by byte, what the leader wrote.
pub(super) async fn receivewal(field: &Field) -> Result<()> {
    let leader = field.cluster.primary().await?;
    let sql = leader.client().await?;
    let end = sql
        .value("SELECT pg_current_wal_flush_lsn() + 1048576", RUN_MAX)
        .await?;
    let mut command = Vec::new();
    for (port, address) in field.ports() {
        fs::create_dir(field.cluster.site().dir().join(format!("wal-{port}")))?;
        let mut receive = replication(field, "pg_receivewal", address);
        receive.args(["-D", &format!("wal-{port}"), "--no-loop", "--endpos", &end]);
        command.push(receive);
    }
    let [write, read] = command.try_into().ok().context("two ports")?;
    let site = field.cluster.site();
    let received = async { tokio::try_join!(site.run(write, RUN_MAX), site.run(read, RUN_MAX)) };
    let writing = async {
        let write = "SELECT pg_logical_emit_message(false, 'receivewal', repeat('w', 10000)); CHECKPOINT";
        loop {
            sql.rows(write, RUN_MAX).await?;
            tokio::task::yield_now().await;
        }
    };
    let (write, read) = tokio::select! {
        received = received => received?,
        failed = writing => return failed,
    };
    write.success().context("on the write port")?;
    read.success().context("on the read port")?;
    for (port, _) in field.ports() {
        let received = site.dir().join(format!("wal-{port}"));
        same_log(leader, &received, &end).context(format!("on the {port} port"))?;
    }
    Ok(())
}

/// Compares each file that was received with the leader's, the last one up to `end`.
fn same_log(leader: &Member, received: &Path, end: &str) -> Result<()> {
    let (_, offset) = end.split_once('/').context("a position has two halves")?;
    let offset = usize::try_from(u64::from_str_radix(offset, 16)? % (16 * MIB))?;
    let mut files = 0;
    for entry in fs::read_dir(received)? {
        let file = entry?.path();
        let name = file.file_name().context("a name")?.to_string_lossy().into_owned();
        let (name, length) = match name.strip_suffix(".partial") {
            Some(name) => (name, offset),
            None => (name.as_str(), usize::try_from(16 * MIB)?),
        };
        let own =
            fs::read(leader.data_dir().join("pg_wal").join(name)).with_context(|| format!("{name} of {leader:?}"))?;
        let copy = fs::read(&file)?;
        ensure!(
            copy.get(..length) == own.get(..length),
            "{name} is another one up to {length}"
        );
        files += 1;
    }
    ensure!(files > 0, "nothing was received");
    Ok(())
}

/// Each row comes once and in its order; a replica that cannot decode says so in its own words.
pub(super) async fn recvlogical(field: &Field) -> Result<()> {
    let leader = field.cluster.primary().await?;
    let sql = leader.client().await?;
    sql.rows("CREATE TABLE decoded (n int PRIMARY KEY, t text)", RUN_MAX)
        .await?;
    let logical = |address, args: &[&str]| {
        let mut command = field.libpq(postgres_client("pg_recvlogical"), address);
        command.args(["-d", "postgres", "--slot", "matrix"]).args(args);
        command
    };
    field
        .run(logical(field.write(), &["--create-slot", "-P", "test_decoding"]))
        .await?;
    let insert = format!("INSERT INTO decoded SELECT n, repeat('d', 3000) FROM generate_series(1, {ROWS}) n");
    sql.rows(&insert, RUN_MAX).await?;
    let end = sql.value("SELECT pg_current_wal_insert_lsn()", RUN_MAX).await?;
    sql.rows("CHECKPOINT", RUN_MAX).await?; // Something behind it.
    let start = ["--start", "--no-loop", "--endpos", &end, "-f", "decoded.out"];
    field.run(logical(field.write(), &start)).await?;
    let came = fs::read_to_string(field.cluster.site().dir().join("decoded.out"))?;
    let rows: Vec<&str> = came
        .lines()
        .filter(|line| line.starts_with("table public.decoded: INSERT:"))
        .collect();
    ensure!(rows.len() == ROWS as usize, "{} rows of {ROWS}", rows.len());
    for (n, row) in (1..).zip(rows) {
        let expected = format!(
            "table public.decoded: INSERT: n[integer]:{n} t[text]:'{}'",
            "d".repeat(3000)
        );
        ensure!(row == expected, "{row}");
    }
    field.run(logical(field.write(), &["--drop-slot"])).await?;

    let version: u32 = sql.value("SHOW server_version_num", RUN_MAX).await?.parse()?;
    if version < DECODES_ON_REPLICAS {
        let create = logical(field.read(), &["--create-slot", "-P", "test_decoding"]);
        let outcome = field.cluster.site().run(create, RUN_MAX).await?;
        let expected = "logical decoding cannot be used while in recovery";
        ensure!(
            outcome.code == Some(1) && outcome.stderr.contains(expected),
            "{outcome:?}"
        );
    }
    Ok(())
}

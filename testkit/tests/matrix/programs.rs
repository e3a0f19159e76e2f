//! psql and pgbench.

use std::fs;
use std::net::SocketAddr;
use std::process::Command;

use anyhow::{Context, Result, anyhow, ensure};
use pgherd_testkit::client::{self, fixture};
use pgherd_testkit::process::{self, Signal};
use pgherd_testkit::program::{self, postgres_client};
use pgherd_testkit::{Outcome, eventually};

use super::{Field, RUN_MAX, SOON, Tls};

/// More than any buffer on the way.
const LINES: u32 = 40_000;
/// From this version on a server understands TLS that nobody has asked for first.
const BEGINS_DIRECTLY: u32 = 170_000;
const LARGE_BYTES: usize = 1 << 20;

pub(super) async fn psql(field: &Field) -> Result<()> {
    writes(field).await?;
    for (port, address) in field.ports() {
        let reads = async {
            tells(field, address).await?;
            copies_out(field, address).await?;
            is_told(field, address, "SELECT 1/0", "ERROR:  22012: division by zero").await?;
            is_told(
                field,
                address,
                "SELECT a FROM nowhere",
                "ERROR:  42P01: relation \"nowhere\"",
            )
            .await?;
            ctrl_c_cancels(field, port, field.libpq(postgres_client("psql"), address)).await
        };
        reads.await.with_context(|| format!("on the {port} port"))?;
    }
    let create = "CREATE TABLE not_here (n int)";
    is_told(
        field,
        field.read(),
        create,
        "ERROR:  25006: cannot execute CREATE TABLE",
    )
    .await
}

async fn psql_script(field: &Field, address: SocketAddr, script: &str) -> Result<Outcome> {
    let mut command = field.libpq(postgres_client("psql"), address);
    command.args(["-AtX", "-v", "VERBOSITY=verbose", "-c", script]);
    field.cluster.site().run(command, RUN_MAX).await
}

/// Transactions, prepared statements, COPY and a large object both ways, notifications, an error in the middle.
async fn writes(field: &Field) -> Result<()> {
    let site = field.cluster.site();
    let lines: String = (0..LINES)
        .map(|n| format!("{n}\t{}\n", n.to_string().repeat(20)))
        .collect();
    site.write_file("psql.in", &lines)?;
    let large: Vec<u8> = (0_u32..).flat_map(u32::to_le_bytes).take(LARGE_BYTES).collect();
    fs::write(site.dir().join("large.in"), &large)?;
    let mut command = field.libpq(postgres_client("psql"), field.write());
    command
        .args(["-AtXq", "-v", "ON_ERROR_STOP=1", "-f"])
        .arg(fixture("drivers").join("psql.sql"));
    let outcome = site.run(command, RUN_MAX).await?;
    let said = outcome.clone().success()?;
    let mut said = said.lines();
    for expected in ["2", "a b", "7: seven", "8: eight"] {
        ensure!(said.next() == Some(expected), "{expected:?} is missing in {outcome:?}");
    }
    let heard = "Asynchronous notification \"psql\" with payload \"heard\" received";
    ensure!(said.any(|line| line.starts_with(heard)), "{outcome:?}");
    ensure!(
        outcome
            .stderr
            .contains("23505: duplicate key value violates unique constraint"),
        "{outcome:?}"
    );
    ensure!(
        outcome.stderr.contains("DETAIL:  Key (n)=(1) already exists."),
        "{outcome:?}"
    );
    ensure!(
        fs::read_to_string(site.dir().join("psql.out"))? == lines,
        "COPY brought back something else"
    );
    ensure!(
        fs::read(site.dir().join("large.out"))? == large,
        "another large object came back"
    );
    Ok(())
}

/// What a client tells of itself reaches the server, and TLS ends where it should.
async fn tells(field: &Field, address: SocketAddr) -> Result<()> {
    let mut command = field.libpq(postgres_client("psql"), address);
    command.env("PGOPTIONS", "-c statement_timeout=61s -c my.setting=a\\ b");
    let name = "SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()";
    let tls = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    command.args([
        "-AtX",
        "-c",
        "SHOW statement_timeout",
        "-c",
        "SHOW my.setting",
        "-c",
        name,
        "-c",
        tls,
    ]);
    let said = field.run(command).await?;
    let tls = if field.tls == Tls::Server { "t" } else { "f" };
    ensure!(said == format!("61s\na b\ntestkit-client\n{tls}\n"), "{said}");
    Ok(())
}

async fn copies_out(field: &Field, address: SocketAddr) -> Result<()> {
    let copy = format!("COPY (SELECT n, repeat('w', 200) FROM generate_series(1, {LINES}) n) TO STDOUT");
    let said = psql_script(field, address, &copy).await?.success()?;
    let expected: String = (1..=LINES).map(|n| format!("{n}\t{}\n", "w".repeat(200))).collect();
    ensure!(
        said == expected,
        "COPY sent {} bytes, not {}",
        said.len(),
        expected.len()
    );
    Ok(())
}

/// An error is the server's own.
async fn is_told(field: &Field, address: SocketAddr, script: &str, expected: &str) -> Result<()> {
    let outcome = psql_script(field, address, script).await?;
    ensure!(
        outcome.code == Some(1) && outcome.stderr.starts_with(expected),
        "{outcome:?}"
    );
    Ok(())
}

async fn ctrl_c_cancels(field: &Field, name: &str, mut command: Command) -> Result<()> {
    // Its own comment tells it from other clients' statements.
    let statement = format!("SELECT pg_sleep(60) /* psql {name} */");
    command.args(["-X", "-v", "VERBOSITY=verbose", "-c", &statement]);
    let mut psql = field.cluster.site().start(&format!("psql-{name}"), command)?;
    let running = format!("SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query = '{statement}'");
    let count = async || -> Result<u32> {
        let mut count = 0;
        for member in field.cluster.members() {
            count += member.sql(&running).await?.parse::<u32>()?;
        }
        Ok(count)
    };
    eventually("the statement runs", SOON, async || {
        ensure!(count().await? == 1);
        Ok(())
    })
    .await?;
    process::signal(psql.pid(), Signal::INT)?;
    psql.end(SOON).await?;
    let said = psql.output();
    ensure!(
        said.contains("ERROR:  57014: canceling statement due to user request"),
        "{said}"
    );
    ensure!(count().await? == 0, "the statement still runs");
    Ok(())
}

/// A newer psql, which says its cancels inside TLS, and where the other side understands it, begins with TLS directly.
pub(super) async fn newer_psql(field: &Field) -> Result<()> {
    let Some(psql) = program::newer_psql() else {
        client::skip(&anyhow!("there is no psql 17 (scripts/postgresql-trixie.sh)"));
        return Ok(());
    };
    let version = field.cluster.primary().await?.sql("SHOW server_version_num").await?;
    let directly = match field.tls {
        Tls::Nowhere => false,
        Tls::Proxy => true,
        Tls::Server => version.parse::<u32>()? >= BEGINS_DIRECTLY,
    };
    for (port, address) in field.ports() {
        let command = || {
            let mut command = field.libpq(&psql, address);
            if directly {
                command.env("PGSSLNEGOTIATION", "direct");
            }
            command
        };
        let mut asking = command();
        asking.args(["-AtX", "-c", "SELECT pg_is_in_recovery()", "-c", "\\conninfo"]);
        let said = field.run(asking).await?;
        let expected = if port == "write" { "f" } else { "t" };
        ensure!(said.lines().next() == Some(expected), "on the {port} port: {said}");
        ensure!(said.contains("SSL connection") == (field.tls != Tls::Nowhere), "{said}");
        let name = format!("newer-{port}");
        ctrl_c_cancels(field, &name, command()).await.context(name)?;
    }
    Ok(())
}

/// In every mode, also with a connection per transaction, and several statements on their way at once.
pub(super) async fn pgbench(field: &Field) -> Result<()> {
    run_pgbench(field, field.write(), &["-i", "-q"]).await?;
    for mode in ["simple", "extended", "prepared"] {
        for connect in [&["-t", "100"][..], &["-t", "10", "-C"]] {
            let common = [&["-n", "-c", "4", "-j", "2", "-M", mode], connect].concat();
            let said = run_pgbench(field, field.write(), &common).await?;
            ensure!(said.contains("number of failed transactions: 0"), "{said}");
            run_pgbench(field, field.read(), &[&common, &["-S"][..]].concat()).await?;
        }
    }
    let statements = "SELECT repeat('p', 9000);\n".repeat(30);
    let script = format!("\\startpipeline\n{statements}\\endpipeline\n");
    let script = field.cluster.site().write_file("pipeline.pgbench", &script)?;
    let script = script.display().to_string();
    for mode in ["extended", "prepared"] {
        for (_, address) in field.ports() {
            run_pgbench(
                field,
                address,
                &["-n", "-c", "4", "-t", "20", "-M", mode, "-f", &script],
            )
            .await?;
        }
    }
    Ok(())
}

async fn run_pgbench(field: &Field, address: SocketAddr, args: &[&str]) -> Result<String> {
    let mut command = field.libpq(postgres_client("pgbench"), address);
    command.args(args);
    let said = field.run(command).await;
    said.with_context(|| format!("pgbench {args:?} on {address}"))
}

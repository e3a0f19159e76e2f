//! pg_dump and pg_restore: from either port, by several connections at once, and what is restored is what was dumped.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::program::postgres_client;
use pgherd_testkit::{Sql, eventually};

use super::{Field, SOON};

const CONTENT: &str = "\
    CREATE TABLE content (n int PRIMARY KEY, t text, b bytea); \
    INSERT INTO content SELECT n, repeat(md5(n::text), 20), decode(md5(n::text), 'hex') FROM generate_series(1, 10000) n; \
    INSERT INTO content SELECT 0, NULL, string_agg(sha512(n::text::bytea), '') FROM generate_series(1, 20000) n; \
    CREATE TABLE more AS SELECT * FROM content; \
    CREATE INDEX ON content (t); \
    CREATE VIEW seen AS SELECT n FROM content; \
    CREATE SEQUENCE counted START 77; \
    SELECT lo_from_bytea(0, b) FROM content WHERE n = 0";
/// All of it, in one line.
const DIGEST: &str = "\
    SELECT (SELECT md5(string_agg(md5(c::text), '' ORDER BY n)) FROM content c), \
           (SELECT md5(string_agg(md5(m::text), '' ORDER BY n)) FROM more m), \
           (SELECT md5(string_agg(lo_get(oid), '' ORDER BY oid)) FROM pg_largeobject_metadata), \
           (SELECT count(*) FROM seen), nextval('counted') >= 77";

pub(super) async fn dump_and_restore(field: &Field) -> Result<()> {
    database(field, "source").await?;
    psql(field, field.write(), "source", CONTENT).await?;
    let expected = psql(field, field.write(), "source", DIGEST).await?;
    caught_up(field).await?;
    for (port, address) in field.ports() {
        let target = format!("restored_{port}");
        database(field, &target).await?;
        let dump = ["-Fd", "-j", "2", "-f", &target, "source"];
        run(field, "pg_dump", address, &dump).await?;
        let restore = ["-d", &target, "-j", "2", "-e", &target];
        run(field, "pg_restore", field.write(), &restore).await?;
        same(field, &target, &expected).await?;
    }
    // One file from the replica, by one connection, and a script.
    database(field, "restored_whole").await?;
    run(field, "pg_dump", field.read(), &["-Fc", "-f", "whole", "source"]).await?;
    run(
        field,
        "pg_restore",
        field.write(),
        &["-d", "restored_whole", "-1", "whole"],
    )
    .await?;
    same(field, "restored_whole", &expected).await?;
    database(field, "restored_script").await?;
    run(field, "pg_dump", field.write(), &["-f", "script.sql", "source"]).await?;
    let script = [
        "-qX",
        "-v",
        "ON_ERROR_STOP=1",
        "-d",
        "restored_script",
        "-f",
        "script.sql",
    ];
    run(field, "psql", field.write(), &script).await?;
    same(field, "restored_script", &expected).await
}

async fn same(field: &Field, database: &str, expected: &str) -> Result<()> {
    let restored = psql(field, field.write(), database, DIGEST).await?;
    ensure!(restored == expected, "{database} has {restored}, the source {expected}");
    Ok(())
}

/// A database of its own: what other clients do in the usual one goes on meanwhile.
async fn database(field: &Field, name: &str) -> Result<()> {
    run(field, "createdb", field.write(), &[name]).await?;
    Ok(())
}

/// Waits until the replica has what the leader has now.
async fn caught_up(field: &Field) -> Result<()> {
    let leader = field.cluster.primary().await?;
    let position = leader.sql("SELECT pg_current_wal_insert_lsn()").await?;
    for replica in field.cluster.others(leader.name()) {
        let question = format!("SELECT pg_last_wal_replay_lsn() >= '{position}'::pg_lsn");
        eventually("the replica has the content", SOON, async || {
            let session: Sql = replica.client().await?;
            ensure!(session.value(&question, SOON).await? == "t", "it is behind {position}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn psql(field: &Field, address: SocketAddr, database: &str, script: &str) -> Result<String> {
    run(
        field,
        "psql",
        address,
        &["-qAtX", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", script],
    )
    .await
}

async fn run(field: &Field, program: &str, address: SocketAddr, args: &[&str]) -> Result<String> {
    let mut command = field.libpq(postgres_client(program), address);
    command.args(args);
    let said = field.run(command).await;
    said.with_context(|| format!("{program} {args:?} on {address}"))
}

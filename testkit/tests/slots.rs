//! Replication slots: who keeps which, how they move with the leader's, and what a failover leaves of them. And members that
//! stream from another than the leader, or from nobody.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::config::PREFIX;
use pgherd_testkit::program::tests_cache;
use pgherd_testkit::{Cluster, Member, eventually};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
/// What a consumer has read comes with its slot, or is read again; and what it has not read is never passed over.
const CONSUME: &str = "SELECT coalesce(string_agg(substring(data FROM 'row-[0-9]+'), ' '), '') \
                       FROM pg_logical_slot_get_changes('perm_log', NULL, NULL) WHERE data LIKE '%row-%'";
const DECODED: &str = "wal_level";

fn logical_slot() -> Value {
    json!({"type": "logical", "database": "postgres", "plugin": "test_decoding"})
}

/// The names of a member's slots.
async fn slots_of(member: &Member) -> Result<BTreeSet<String>> {
    let sql = "SELECT coalesce(string_agg(slot_name, ' '), '') FROM pg_replication_slots WHERE NOT temporary";
    let names = member.sql(sql).await?;
    Ok(names.split_whitespace().map(str::to_owned).collect())
}

async fn has_slots(member: &Member, expected: &[&str]) -> Result<()> {
    let expected: BTreeSet<String> = expected.iter().map(|&name| name.to_owned()).collect();
    eventually(&format!("{member:?} has the slots {expected:?}"), SOON, async || {
        let found = slots_of(member).await?;
        ensure!(found == expected, "it has {found:?}");
        Ok(())
    })
    .await
}

async fn streams_from(replica: &Member, source: &Member) -> Result<()> {
    let what = format!("{replica:?} streams from {source:?}");
    eventually(&what, SOON, async || {
        let sql = "SELECT sender_host FROM pg_stat_wal_receiver WHERE status = 'streaming'";
        let host = replica.sql(sql).await?;
        ensure!(host == source.postgres().ip().to_string(), "from {host}");
        Ok(())
    })
    .await
}

async fn status(cluster: &Cluster) -> Result<Value> {
    let entry = cluster.etcd().entry(&format!("{PREFIX}status")).await?;
    Ok(serde_json::from_str(&entry.context("there is no status")?.value)?)
}

async fn write(leader: &Member, row: usize) -> Result<()> {
    let session = leader.client().await?;
    session
        .rows("CREATE TABLE IF NOT EXISTS decoded (t text)", SOON)
        .await?;
    session
        .rows(&format!("INSERT INTO decoded VALUES ('row-{row}')"), SOON)
        .await?;
    Ok(())
}

/// Writes a row, has the consumer read it on the leader, and waits until the copies have come as far.
async fn consume(leader: &Member, row: usize, copies: &[&Member]) -> Result<()> {
    write(leader, row).await?;
    let read = leader.client().await?.value(CONSUME, SOON).await?;
    ensure!(
        read == format!("row-{row}"),
        "the consumer reads {read:?} for row {row}"
    );
    let position = "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = 'perm_log'";
    let on_leader = leader.sql(position).await?;
    for copy in copies {
        let come = format!(
            "SELECT confirmed_flush_lsn >= '{on_leader}' FROM pg_replication_slots WHERE slot_name = 'perm_log'"
        );
        eventually(
            &format!("the copy on {copy:?} has come to {on_leader}"),
            SOON,
            async || {
                ensure!(copy.sql(&come).await? == "t", "it is at {}", copy.sql(position).await?);
                Ok(())
            },
        )
        .await?;
    }
    Ok(())
}

/// The spare slot of `name` on `member` moves on.
async fn moves_on(leader: &Member, member: &Member, name: &str) -> Result<()> {
    let position = leader.sql("SELECT pg_current_wal_flush_lsn()").await?;
    let sql = format!("SELECT restart_lsn >= '{position}' FROM pg_replication_slots WHERE slot_name = '{name}'");
    eventually(
        &format!("slot {name} on {member:?} has come to {position}"),
        SOON,
        async || {
            ensure!(member.sql(&sql).await? == "t", "it has not");
            Ok(())
        },
    )
    .await
}

async fn status_tells(cluster: &Cluster) -> Result<()> {
    eventually("the status tells of the slots", SOON, async || {
        let status = status(cluster).await?;
        let slots = status["slots"].as_object().context("no slots")?;
        let names: Vec<&str> = slots.keys().map(String::as_str).collect();
        ensure!(names == ["m1", "m2", "m3", "m4", "perm_log", "perm_phys"], "{status}");
        ensure!(status["retain_slots"] == json!(["m1", "m2", "m3", "m4"]), "{status}");
        Ok(())
    })
    .await
}

/// By the leader's word alone.
async fn move_without_etcd(cluster: &Cluster, m1: &Member, m2: &Member, m3: &Member) -> Result<()> {
    cluster.etcd().stop().await?;
    eventually("the leader leads by the word of the others", SOON, async || {
        let body = m1.get("/patroni").await?.json()?;
        ensure!(body["failsafe_mode_is_active"] == true, "{body}");
        Ok(())
    })
    .await?;
    consume(m1, 2, &[m2, m3]).await?;
    moves_on(m1, m2, "m4").await?;
    cluster.etcd().start_again().await?;
    eventually("the leader leads by its lease again", SOON, async || {
        let body = m1.get("/patroni").await?.json()?;
        ensure!(body.get("failsafe_mode_is_active").is_none(), "{body}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn slots_are_kept_on_every_member_that_may_lead_and_move_with_the_leaders() -> Result<()> {
    let dcs = json!({
        "slots": {"perm_phys": {"type": "physical"}, "perm_log": logical_slot()},
        "ignore_slots": [{"name": "mine", "plugin": "test_decoding"}],
        "postgresql": {"parameters": {DECODED: "logical"}},
    });
    let cluster = Cluster::builder()
        .members(4)
        .dcs(dcs)
        .config_of("m3", json!({"tags": {"replicatefrom": "m2"}}))
        .config_of("m4", json!({"tags": {"nofailover": true}}))
        .prepare()
        .await?;
    let [m1, m2, m3, m4] = cluster.members() else {
        anyhow::bail!("four members")
    };
    m1.start().await?;
    cluster.start_proxy().await?;
    cluster.settled_with(1).await?;
    for member in [m2, m3, m4] {
        member.start().await?;
    }
    streams_from(m2, m1).await?;
    streams_from(m4, m1).await?;
    streams_from(m3, m2).await?;
    has_slots(m1, &["m2", "m3", "m4", "perm_log", "perm_phys"]).await?;
    has_slots(m2, &["m1", "m3", "m4", "perm_log", "perm_phys"]).await?;
    has_slots(m3, &["m1", "m2", "m4", "perm_log", "perm_phys"]).await?;
    has_slots(m4, &[]).await?;
    status_tells(&cluster).await?;
    consume(m1, 1, &[m2, m3]).await?;
    moves_on(m1, m2, "m1").await?;
    moves_on(m1, m3, "m1").await?;

    move_without_etcd(&cluster, m1, m2, m3).await?;
    for name in ["mine", "stray"] {
        let make = format!("SELECT pg_create_logical_replication_slot('{name}', 'test_decoding')");
        m1.client().await?.rows(&make, SOON).await?;
    }
    consume(m1, 3, &[m2, m3]).await?;
    m4.stop().await?;
    write(m1, 4).await?;
    let arguments = ["--leader", "m1", "--candidate", "m2", "--force"];
    cluster.pgherd("switchover", &arguments).await?.success()?;
    let second = cluster.next_leader("m1").await?;
    ensure!(second.name() == "m2", "{second:?} leads");
    write(m2, 5).await?;
    let read = m2.client().await?.value(CONSUME, SOON).await?;
    ensure!(read == "row-4 row-5", "the consumer reads {read:?} from the new leader");
    has_slots(m1, &["m2", "m3", "m4", "mine", "perm_log", "perm_phys"]).await?;
    has_slots(m2, &["m1", "m3", "m4", "perm_log", "perm_phys"]).await?;
    streams_from(m3, m2).await?;
    let pinned =
        "SELECT count(*) FROM pg_replication_slots WHERE slot_type = 'physical' AND NOT active AND xmin IS NOT NULL";
    eventually("no unused slot of the former leader keeps rows", SOON, async || {
        ensure!(m1.sql(pinned).await? == "0", "some do");
        Ok(())
    })
    .await?;
    cluster.pass();
    Ok(())
}

/// In a member's own words.
async fn says(cluster: &Cluster, member: &Member, field: &str, expected: &Value) -> Result<()> {
    eventually(&format!("{member:?} says {field}: {expected}"), SOON, async || {
        let record = cluster.record(member).await?;
        ensure!(record[field] == *expected, "{record}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "long: scripts/test.sh --long"]
async fn one_member_takes_its_log_from_the_archive_and_another_applies_it_late() -> Result<()> {
    let builder = Cluster::builder().dcs(json!({
        "slots": {"perm_log": logical_slot()},
        "postgresql": {"parameters": {DECODED: "logical"}},
    }));
    let cluster = builder
        .config_of("m2", json!({"tags": {"nostream": true, "nofailover": true}}))
        .config_of(
            "m3",
            json!({"postgresql": {"parameters": {"recovery_min_apply_delay": "1h"}}}),
        )
        .prepare()
        .await?;
    let [m1, m2, m3] = cluster.members() else {
        anyhow::bail!("three members")
    };
    let archive = cluster.site().make_dir("archive")?;
    let parameters = json!({
        "archive_mode": "on",
        "archive_command": format!("cp %p {}/%f", archive.display()),
    });
    m1.alter_config(json!({"postgresql": {"parameters": parameters}}))?;
    let restore = format!("cp {}/%f %p", archive.display());
    m2.alter_config(json!({
        "tags": {"nostream": true, "nofailover": true},
        "postgresql": {"parameters": {"restore_command": restore}},
    }))?;
    m1.start().await?;
    cluster.start_proxy().await?;
    cluster.settled_with(1).await?;
    has_slots(m1, &["perm_log"]).await?;
    m2.start().await?;
    m3.start().await?;
    says(&cluster, m2, "replication_state", &json!("in archive recovery")).await?;
    says(&cluster, m3, "replication_state", &json!("streaming")).await?;
    has_slots(m1, &["m3", "perm_log"]).await?;
    has_slots(m2, &[]).await?;
    has_slots(m3, &["m1", "perm_log"]).await?;
    write(m1, 1).await?;
    m1.client().await?.rows("SELECT pg_switch_wal()", SOON).await?;
    eventually("the row comes through the archive", SOON, async || {
        ensure!(m2.sql("SELECT count(*) FROM decoded").await? == "1", "not yet");
        Ok(())
    })
    .await?;
    ensure!(
        m2.sql("SELECT count(*) FROM pg_stat_wal_receiver").await? == "0",
        "it streams"
    );
    let status = status(&cluster).await?;
    ensure!(
        status["slots"].get("m2").is_none() && status["slots"].get("m3").is_some(),
        "{status}"
    );

    // It has what was written, and shows none of it.
    let written = m1.sql("SELECT pg_current_wal_flush_lsn()").await?;
    let received = format!("SELECT pg_last_wal_receive_lsn() >= '{written}' AND to_regclass('decoded') IS NULL");
    eventually("the row is received and not applied", SOON, async || {
        ensure!(m3.sql(&received).await? == "t", "not yet, or applied already");
        Ok(())
    })
    .await?;
    // Promoted, it has everything at once.
    m1.stop().await?;
    let leader = cluster.next_leader("m1").await?;
    ensure!(leader.name() == "m3", "{leader:?} leads");
    ensure!(
        m3.sql("SELECT count(*) FROM decoded").await? == "1",
        "an acknowledged row is lost"
    );
    cluster.pass();
    Ok(())
}

/// Waits until PostgreSQL has copied both slots. It waits itself until their consumers have come past where it began.
async fn copied(leader: &Member, replica: &Member) -> Result<()> {
    let synced = "SELECT count(*) FROM pg_replication_slots WHERE synced AND NOT temporary AND failover";
    eventually(&format!("{replica:?} has copies of both slots"), 2 * SOON, async || {
        leader.sql("SELECT pg_log_standby_snapshot()").await?;
        for slot in ["app", "perm_log"] {
            let consume = format!("SELECT count(*) FROM pg_logical_slot_get_changes('{slot}', NULL, NULL)");
            leader.sql(&consume).await?;
        }
        let count = replica.sql(synced).await?;
        ensure!(count == "2", "{count} of them");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "long: scripts/test.sh --long"]
async fn postgresql_17_copies_failover_slots_and_a_candidate_without_them_is_refused() -> Result<()> {
    let bin_dir = tests_cache()?.join("postgresql-17/usr/lib/postgresql/17/bin");
    ensure!(
        bin_dir.join("postgres").is_file(),
        "fetch PostgreSQL 17 with scripts/postgresql-trixie.sh"
    );
    let parameters = json!({DECODED: "logical", "sync_replication_slots": "on"});
    let cluster = Cluster::builder()
        .dcs(json!({
            "pgherd": {"failover_slots": "require"},
            "slots": {"perm_log": logical_slot()},
            "postgresql": {"parameters": parameters},
        }))
        .member_config(json!({"postgresql": {"bin_dir": bin_dir}}))
        .config_of(
            "m3",
            json!({"postgresql": {"parameters": {"sync_replication_slots": "off"}}}),
        )
        .prepare()
        .await?;
    let [m1, m2, m3] = cluster.members() else {
        anyhow::bail!("three members")
    };
    m1.start().await?;
    cluster.start_proxy().await?;
    cluster.settled_with(1).await?;
    let make = "SELECT pg_create_logical_replication_slot('app', 'test_decoding', false, false, true)";
    m1.client().await?.rows(make, SOON).await?;
    m2.start().await?;
    m3.start().await?;
    cluster.settled().await?;
    copied(m1, m2).await?;
    eventually("only the member without them is passed over", SOON, async || {
        let (has, lacks) = (cluster.record(m2).await?, cluster.record(m3).await?);
        ensure!(has["tags"].get("nofailover").is_none(), "{has}");
        ensure!(lacks["tags"]["nofailover"] == true, "{lacks}");
        Ok(())
    })
    .await?;
    let arguments = ["--leader", "m1", "--candidate", "m3", "--force"];
    let refused = cluster.pgherd("switchover", &arguments).await?;
    ensure!(
        refused.success().is_err(),
        "a switchover to the member without the slots went through"
    );

    write(m1, 1).await?;
    m1.stop().await?;
    let leader = cluster.next_leader("m1").await?;
    ensure!(leader.name() == "m2", "{leader:?} leads");
    write(m2, 2).await?;
    let read = m2.client().await?.value(CONSUME, SOON).await?;
    ensure!(read == "row-1 row-2", "the consumer reads {read:?}");
    ensure!(slots_of(m2).await?.contains("app"), "it was dropped");

    // What the former leader has of these names is in the way of the copies.
    m1.start().await?;
    copied(m2, m1).await?;
    cluster.pass();
    Ok(())
}

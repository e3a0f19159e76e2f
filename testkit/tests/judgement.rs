//! Where a member has to judge: whose data counts, what is not its own, what must not be said, when to give up.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use pgherd_testkit::config::REPLICATION_PASSWORD;
use pgherd_testkit::process::{self, Pid, Signal};
use pgherd_testkit::sql::SUPERUSER_PASSWORD;
use pgherd_testkit::{Cluster, Load, Member, Sql, eventually};
use serde_json::json;

const SOON: Duration = Duration::from_secs(30);
/// What a leader that replicates asynchronously may take with it into its death: rows on their way to the replicas.
const ON_THEIR_WAY: Duration = Duration::from_secs(1);
/// How much longer the old leader's log must be than that of the others, once they have written on.
const LONGER_BYTES: i64 = 4 << 20;
const ROWS: &str = "1000";

#[tokio::test]
async fn what_was_acknowledged_last_is_not_given_up_for_a_longer_old_log() -> Result<()> {
    an_old_leader_with_a_longer_log_comes_back(Seen::ByItsAgent).await
}

/// The later timeline came between two looks of the agent, and its leader was gone at the next one.
#[tokio::test]
async fn a_timeline_that_came_between_two_looks_is_not_given_up_for_a_longer_old_log() -> Result<()> {
    an_old_leader_with_a_longer_log_comes_back(Seen::ByNobody).await
}

/// Whether the third member's agent has looked while its PostgreSQL received the second leader's timeline.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    ByItsAgent,
    ByNobody,
}

/// The end of the first leader's log never leaves it, and is longer than all that is written after its death. What was
/// acknowledged is on the later timeline all the same.
async fn an_old_leader_with_a_longer_log_comes_back(seen: Seen) -> Result<()> {
    // The tail is in `status`, too: the others count as far behind.
    let dcs = json!({"maximum_lag_on_failover": 1_i64 << 30});
    let cluster = Cluster::builder().dcs(dcs).start().await?;
    let former = cluster.settled().await?;

    let end_of_tail = write_a_tail(former).await?;
    former.kill_everything().await?;
    if seen == Seen::ByNobody {
        hold_whoever_turns_to_another(&cluster, former).await?;
    }
    let second = cluster.next_leader(former.name()).await?;
    let third = cluster
        .others(former.name())
        .into_iter()
        .find(|member| member.name() != second.name())
        .context("three members")?;
    write_on(&cluster, third, &end_of_tail).await?;
    if seen == Seen::ByItsAgent {
        eventually("the third member's agent knows the timeline", SOON, async || {
            let status = third.get("/patroni").await?.json()?;
            ensure!(status["timeline"] == 2, "{status}");
            Ok(())
        })
        .await?;
    }

    second.kill_everything().await?;
    meet(third, former, &end_of_tail).await?;
    let next = cluster.next_leader(second.name()).await?;
    ensure!(
        next.name() == third.name(),
        "{} leads, {} has what was acknowledged last",
        next.name(),
        third.name()
    );
    ensure!(
        rows_of(third, "acknowledged").await? == ROWS,
        "acknowledged rows are lost"
    );

    let leader = cluster.settled_with(2).await?;
    ensure!(leader.name() == third.name(), "{} took the lead", leader.name());
    eventually("the old leader has what the new one has", SOON, async || {
        ensure!(rows_of(former, "acknowledged").await? == ROWS);
        ensure!(former.sql("SELECT to_regclass('tail') IS NULL").await? == "t");
        Ok(())
    })
    .await?;
    second.start().await?;
    let leader = cluster.settled().await?;
    ensure!(leader.name() == third.name(), "{} took the lead", leader.name());
    ensure!(rows_of(leader, "acknowledged").await? == ROWS);
    cluster.pass();
    Ok(())
}

/// Stops the agent that has told its PostgreSQL to follow another leader than `former`, before anything has come.
async fn hold_whoever_turns_to_another(cluster: &Cluster, former: &Member) -> Result<()> {
    let mut others = Vec::new();
    for member in cluster.others(former.name()) {
        others.push((member.agent_pid().await?, member.client().await?));
    }
    let former_host = format!("host={} ", former.postgres().ip());
    let deadline = Instant::now() + SOON;
    // Milliseconds count here, so this looks without a pause.
    while Instant::now() < deadline {
        for (agent, session) in &others {
            let upstream = session.value("SHOW primary_conninfo", SOON).await?;
            if upstream.contains("host=") && !upstream.contains(&former_host) {
                return process::signal(*agent, Signal::STOP);
            }
        }
    }
    bail!("nobody has turned to another leader within {SOON:?}")
}

/// Writes rows through the write port, and waits until the third member has them.
async fn write_on(cluster: &Cluster, third: &Member, end_of_tail: &str) -> Result<()> {
    Sql::connect(cluster.write_address(), SOON)
        .await?
        .rows(
            "CREATE TABLE acknowledged AS SELECT generate_series(1, 1000) AS n",
            SOON,
        )
        .await?;
    eventually("the third member has the rows, and not the tail", SOON, async || {
        ensure!(rows_of(third, "acknowledged").await? == ROWS);
        ensure!(third.sql("SELECT to_regclass('tail') IS NULL").await? == "t");
        Ok(())
    })
    .await?;
    let longer = format!("SELECT pg_wal_lsn_diff('{end_of_tail}', pg_last_wal_receive_lsn())");
    let longer: i64 = third.sql(&longer).await?.parse()?;
    ensure!(
        longer > LONGER_BYTES,
        "the tail is to be longer than what came after it: {longer} bytes"
    );
    Ok(())
}

async fn rows_of(member: &Member, table: &str) -> Result<String> {
    Ok(member.sql(&format!("SELECT count(*) FROM {table}")).await?)
}

/// Writes what no replica gets, and returns where it ends.
async fn write_a_tail(leader: &Member) -> Result<String> {
    freeze_senders(leader).await?;
    leader
        .client()
        .await?
        .rows(
            "CREATE TABLE tail AS SELECT n, repeat('tail', 50) AS filler FROM generate_series(1, 60000) AS n",
            SOON,
        )
        .await?;
    Ok(leader.sql("SELECT pg_current_wal_lsn()").await?)
}

/// Starts the old leader, and holds the other member's agent until PostgreSQL has replayed the tail: else that one bids
/// before, and the two never meet.
async fn meet(third: &Member, former: &Member, end_of_tail: &str) -> Result<()> {
    let agent = third.freeze_agent().await?;
    former.start().await?;
    let is_back = eventually("the old leader's PostgreSQL is up", SOON, async || {
        ensure!(
            former.sql("SELECT pg_is_in_recovery()").await? == "t",
            "it takes writes"
        );
        let end = "SELECT greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())";
        let whole = format!("SELECT pg_wal_lsn_diff(({end}), '{end_of_tail}') >= 0");
        ensure!(former.sql(&whole).await? == "t", "it has not replayed its tail");
        Ok(())
    });
    is_back.await?;
    third.thaw(&[agent]);
    Ok(())
}

/// From here on nothing of what is written on this leader gets to a replica.
async fn freeze_senders(leader: &Member) -> Result<()> {
    let senders = leader
        .client()
        .await?
        .rows("SELECT pid FROM pg_stat_replication", SOON)
        .await?;
    ensure!(senders.len() == 2, "{} replicas stream", senders.len());
    for row in senders {
        let pid = row.get(0).context("a number")?.parse()?;
        process::signal(Pid::from_raw(pid).context("a process")?, Signal::STOP)?;
    }
    Ok(())
}

#[tokio::test]
async fn no_password_reaches_the_servers_log() -> Result<()> {
    let loud = json!({"postgresql": {"parameters": {
        "log_statement": "all", "log_min_duration_statement": 0,
        "shared_preload_libraries": "pg_stat_statements", "pg_stat_statements.track": "all",
    }}});
    let cluster = Cluster::builder().dcs(loud).start().await?;
    let former = cluster.settled().await?;
    former.sql("CREATE EXTENSION pg_stat_statements").await?;
    let statements = former
        .sql("SELECT string_agg(query, E'\\n') FROM pg_stat_statements")
        .await?;
    ensure!(statements.contains("CREATE EXTENSION"), "{statements}");
    for password in [SUPERUSER_PASSWORD, REPLICATION_PASSWORD] {
        ensure!(!statements.contains(password), "{password} is in pg_stat_statements");
    }
    let request = json!({"leader": former.name(), "candidate": cluster.others(former.name())[0].name()});
    let answer = former.ask("POST", "/switchover", Some(&request)).await?;
    ensure!(answer.status == 200, "{answer:?}");
    cluster.settled().await?;

    for member in cluster.members() {
        let marker = format!("SELECT 'written by {}'", member.name());
        member.sql(&marker).await?;
        eventually("the log has the statement", SOON, async || {
            ensure!(log_of(member).await?.contains(&marker));
            Ok(())
        })
        .await?;
        let log = log_of(member).await?;
        for password in [SUPERUSER_PASSWORD, REPLICATION_PASSWORD] {
            let line = log.lines().find(|line| line.contains(password));
            ensure!(line.is_none(), "{} wrote {line:?}", member.name());
        }
    }
    cluster.pass();
    Ok(())
}

/// What the member's processes have written, PostgreSQL among them, and what its log collector has, if there is one.
async fn log_of(member: &Member) -> Result<String> {
    let mut text = member.output().await;
    let collected = fs::read_dir(member.data_dir().join("log"));
    for file in collected.into_iter().flatten() {
        text.push_str(&String::from_utf8_lossy(&fs::read(file?.path())?));
    }
    Ok(text)
}

#[tokio::test]
async fn a_switchover_in_pause_is_carried_out() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let former = cluster.settled().await?;
    let candidate = cluster.others(former.name())[1];
    let load = Load::start(&cluster).await?;
    set_pause(&cluster, former, json!(true)).await?;

    let fault = Instant::now();
    let request = json!({"leader": former.name(), "candidate": candidate.name()});
    let answer = former.ask("POST", "/switchover", Some(&request)).await?;
    let expected = format!("Successfully switched over to \"{}\"", candidate.name());
    ensure!(answer.status == 200 && answer.body == expected, "{answer:?}");

    cluster.next_leader(former.name()).await?;
    load.goes_on().await?;
    // The others follow whoever took over, pause or not.
    let (leader, report) = load.end(&cluster, "switchover in pause", fault).await?;
    ensure!(leader.name() == candidate.name(), "{} leads", leader.name());
    report.ensure_complete()?;

    set_pause(&cluster, leader, json!(null)).await?;
    let after = cluster.settled().await?;
    ensure!(after.name() == candidate.name(), "{} leads", after.name());
    cluster.pass();
    Ok(())
}

/// Changes it by one member's REST interface, and waits until all know.
async fn set_pause(cluster: &Cluster, by: &Member, pause: serde_json::Value) -> Result<()> {
    let on = pause == json!(true);
    let answer = by.ask("PATCH", "/config", Some(&json!({"pause": pause}))).await?;
    ensure!(answer.status == 200, "{answer:?}");
    for member in cluster.members() {
        let what = format!("{} knows whether there is a pause", member.name());
        eventually(&what, SOON, async || {
            let status = member.get("/patroni").await?.json()?;
            ensure!((status["pause"] == true) == on, "{status}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_leader_whose_postmaster_cannot_start_gives_way() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let former = cluster.settled().await?;
    let load = Load::start(&cluster).await?;

    let fault = Instant::now();
    // Included by postgresql.conf, and the operator's: only who broke it can mend it.
    let file = former.data_dir().join("postgresql.base.conf");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    fs::write(&file, format!("{text}\nnonsense\n"))?;
    former.kill_postmaster()?;
    let next = cluster.next_leader(former.name()).await?;
    load.goes_on().await?;
    fs::write(&file, text)?;

    let (leader, report) = load.end(&cluster, "postmaster that cannot start", fault).await?;
    ensure!(leader.name() == next.name(), "{} took the lead back", leader.name());
    report.ensure_lost_only_within(ON_THEIR_WAY)?;
    cluster.pass();
    Ok(())
}

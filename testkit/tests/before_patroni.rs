//! The proxy before a cluster that is Patroni's alone: whatever becomes of the leader, writes go to whoever leads, what
//! rested on the former leader ends, and reads go on.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pgherd_testkit::mixed::Tool;
use pgherd_testkit::process::{self, Pid, Signal};
use pgherd_testkit::{
    Cluster, HolderWatch, Landing, Ledger, LedgerReport, Member, Mixed, Sql, SqlFailure, eventually, sql,
};
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

const SOON: Duration = Duration::from_secs(30);
/// Longer than Patroni's shortest ttl, an election, and a busy machine.
const OVER_MAX: Duration = Duration::from_secs(90);
/// How long after the end of its leader's holding a session is still seen, on a machine that has other work.
const STALE_MAX: Duration = Duration::from_secs(5);
/// What a leader that replicates asynchronously may take with it into its death: rows on their way to the replicas.
const ON_THEIR_WAY: Duration = Duration::from_secs(1);
const READ_PACE: Duration = Duration::from_millis(25);
const WRITERS: u32 = 3;
const ROWS: usize = 50;
const IDLE: usize = 6;
/// Keeps a backend busy without a wait in which it would notice that its postmaster is gone.
const BURN: &str = "CREATE FUNCTION burn(seconds float) RETURNS int LANGUAGE plpgsql AS $$ \
                    DECLARE until timestamptz := clock_timestamp() + seconds * interval '1 s'; \
                    BEGIN WHILE clock_timestamp() < until LOOP END LOOP; RETURN 1; END $$; \
                    CREATE TABLE slow (n int)";

/// Three members of Patroni's with its shortest times, and the proxy; writers, a reader, and idle sessions at work.
struct Scene {
    mixed: Mixed,
    holders: HolderWatch,
    landing: Landing,
    ledger: Ledger,
    reads: JoinSet<Result<Infallible>>,
    idle: Vec<Sql>,
}

/// Comes to the read port anew each time, and is served each time. Ends when it is not.
async fn come_and_read(address: SocketAddr) -> Result<Infallible> {
    let mut pace = interval(READ_PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        pace.tick().await;
        sql::value(address, "SELECT 1", SOON)
            .await
            .context("a client came to the read port in vain")?;
    }
}

impl Scene {
    async fn start() -> Result<Self> {
        let builder = Cluster::builder().dcs(json!({"ttl": 20, "loop_wait": 1, "retry_timeout": 3}));
        let mixed = Mixed::builder(builder, &["m1", "m2", "m3"], "m1").start().await?;
        let cluster = mixed.cluster();
        let holders = HolderWatch::start(cluster).await?;
        let landing = Landing::start(cluster.write_address(), WRITERS).await?;
        let ledger = Ledger::start(cluster, WRITERS).await?;
        let mut reads = JoinSet::new();
        reads.spawn(come_and_read(cluster.read_address()));
        let mut idle = Vec::new();
        for _ in 0..IDLE {
            let session = Sql::connect(cluster.write_address(), SOON).await?;
            session.value("SELECT 1", SOON).await?;
            idle.push(session);
        }
        Ok(Self {
            mixed,
            holders,
            landing,
            ledger,
            reads,
            idle,
        })
    }

    fn cluster(&self) -> &Cluster {
        self.mixed.cluster()
    }

    /// Waits until every idle session has ended, and holds that against the end of `former`'s time with the key. Answers
    /// with how they ended.
    async fn stale_sessions_end(&self, former: &Member) -> Result<Vec<SqlFailure>> {
        let mut ends = Vec::new();
        let mut last = None;
        for session in &self.idle {
            let how = eventually("the idle session ends", OVER_MAX, async || {
                session.ended().cloned().context("it is open")
            });
            ends.push(how.await?);
            last = last.max(session.ended_at());
        }
        let last = last.context("there are idle sessions")?;
        self.is_in_time(former, "the idle sessions", last).await?;
        Ok(ends)
    }

    /// Holds the end of `what` against that of `former`'s time with the key.
    async fn is_in_time(&self, former: &Member, what: &str, seen: Instant) -> Result<()> {
        let over = eventually("the former leader's key is seen to be gone", OVER_MAX, async || {
            self.holders.end_of(former.name())
        });
        let after = seen.saturating_duration_since(over.await?);
        println!("{what} of {former:?} were over {after:?} after its time with the key");
        ensure!(
            after < STALE_MAX,
            "{what} went on for {after:?} after the end of {former:?}'s time"
        );
        Ok(())
    }

    /// Waits until writes go on and all is well, and judges.
    async fn end(mut self, name: &str, fault: Instant) -> Result<LedgerReport> {
        self.landing.goes_on().await?;
        self.ledger.wait_for_rows(Instant::now(), ROWS, OVER_MAX).await?;
        let leader = self.mixed.settled().await?;
        self.landing.goes_on().await?;
        self.landing.finish(self.mixed.cluster(), &self.holders).await?;
        let report = self.ledger.finish(name, fault, leader).await?;
        ensure!(!report.errors.contains_key("25006"), "{report}");
        // Replicas were there all the time, and now nobody needs the leader for reading.
        ensure!(report.read_errors.is_empty(), "reads failed: {report}");
        if let Some(failed) = self.reads.try_join_next() {
            failed??;
        }
        let read = self.mixed.cluster().read_address();
        for _ in 0..ROWS {
            let recovers = sql::value(read, "SELECT pg_is_in_recovery()", SOON).await?;
            ensure!(recovers == "t", "a reader was sent to the leader");
        }
        self.mixed.pass();
        Ok(report)
    }
}

#[tokio::test]
async fn a_switchover_by_patronictl_routes_nothing_wrongly() -> Result<()> {
    let scene = Scene::start().await?;
    let former = scene.mixed.settled().await?;
    let candidate = scene.cluster().others(former.name())[0];
    let fault = Instant::now();
    scene.mixed.switch_over(Tool::Patronictl, former, candidate).await?;
    let ends = scene.stale_sessions_end(former).await?;
    // Its own server, or the proxy, says the same.
    ensure!(ends.iter().all(|end| end.code() == "57P01"), "{ends:?}");
    let next = scene.cluster().next_leader(former.name()).await?;
    ensure!(next.name() == candidate.name(), "{next:?} leads");
    let report = scene.end("patronictl switchover before the proxy", fault).await?;
    report.ensure_complete()
}

/// The backends of the dead postmaster that are at work go on, and what they do must be nobody's.
#[tokio::test]
async fn a_leader_whose_patroni_and_postmaster_are_killed_keeps_no_session() -> Result<()> {
    let scene = Scene::start().await?;
    let cluster = scene.cluster();
    let former = scene.mixed.settled().await?;
    let busy = Sql::connect(cluster.write_address(), SOON).await?;
    busy.rows(BURN, SOON).await?;
    let working = busy.rows("INSERT INTO slow SELECT burn(120)", 2 * OVER_MAX);
    tokio::pin!(working);
    let fault = Instant::now();
    let killing = async {
        let running = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'INSERT INTO slow%'";
        eventually("the statement runs", SOON, async || {
            ensure!(former.sql(running).await? == "1");
            Ok(())
        })
        .await?;
        process::signal(scene.mixed.patroni().pid(former).await?, Signal::KILL)?;
        former.kill_postmaster()?;
        anyhow::Ok(())
    };
    tokio::select! {
        killed = killing => killed?,
        done = &mut working => anyhow::bail!("the statement is over before its time: {done:?}"),
    }
    let told = working.await;
    scene.is_in_time(former, "the session at work", Instant::now()).await?;
    ensure!(told.is_err(), "it was acknowledged");
    scene.stale_sessions_end(former).await?;
    let next = cluster.next_leader(former.name()).await?;
    scene.mixed.kill_everything(former).await?; // What is at work for nobody any more.
    scene.mixed.start_member(former).await?;
    ensure!(next.sql("SELECT count(*) FROM slow").await? == "0");
    let report = scene
        .end("Patroni and postmaster killed before the proxy", fault)
        .await?;
    report.ensure_lost_only_within(ON_THEIR_WAY)
}

/// As when a hypervisor stops a host: its sockets stay open, and nothing on it says anything.
#[tokio::test]
async fn a_leader_that_is_frozen_keeps_no_session() -> Result<()> {
    let scene = Scene::start().await?;
    let cluster = scene.cluster();
    let former = scene.mixed.settled().await?;
    let fault = Instant::now();
    let mut frozen: Vec<Pid> = vec![scene.mixed.patroni().pid(former).await?];
    process::signal(frozen[0], Signal::STOP)?;
    for process in former.postgres_processes() {
        let _ = process::signal(process.pid, Signal::STOP); // One that has just ended is as good.
        frozen.push(process.pid);
    }
    let ends = scene.stale_sessions_end(former).await?;
    ensure!(ends.iter().all(|end| end.code() == "57P01"), "{ends:?}");
    cluster.next_leader(former.name()).await?;
    scene.landing.goes_on().await?;
    former.thaw(&frozen);
    let report = scene
        .end("everything of Patroni's leader frozen before the proxy", fault)
        .await?;
    report.ensure_lost_only_within(ON_THEIR_WAY)
}

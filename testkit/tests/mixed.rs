//! Patroni's members and ours in one cluster, and others' tools before our agents.
//!
//! Both majorities are tried: two members of Patroni's and one of ours, and the other way round. Whatever one kind does,
//! the other has to follow. Both hold in synchronous mode too.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pgherd_testkit::config::{PREFIX, SCOPE};
use pgherd_testkit::mixed::Tool;
use pgherd_testkit::process::{self, Pid, Signal};
use pgherd_testkit::{
    Cluster, ClusterBuilder, HaProxy, Ledger, Load, Member, Mixed, MixedBuilder, Sql, eventually, sql, throughout,
};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);
/// More than a few cycles: what has not happened by then does not happen.
const LONG_ENOUGH: Duration = Duration::from_secs(5);
/// What a leader that replicates asynchronously may take with it into its death: rows on their way to the replicas.
const ON_THEIR_WAY: Duration = Duration::from_secs(1);
/// Clients that have written on.
const ROWS: usize = 100;
/// More connections than HAProxy has servers that it might try in turn.
const TURNS: usize = 4;
/// What Patroni writes while a leader's checkpoint after its promotion is not there.
const REWIND_WAITS: &str = "Waiting for checkpoint on";
const REWIND_ENDED: &str = "pg_rewind exit code";
/// What pg_rewind itself says when it had something to do, and has done it.
const REWOUND: &str = "pg_rewind: Done!";

/// How commits are kept.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Asynchronous,
    Synchronous,
}

fn cluster(mode: Mode) -> ClusterBuilder {
    Cluster::builder().dcs(json!({"synchronous_mode": mode == Mode::Synchronous}))
}

/// With every replica synchronous, so that each may take over by a switchover.
fn all_synchronous() -> ClusterBuilder {
    cluster(Mode::Synchronous).dcs(json!({"synchronous_node_count": 2}))
}

/// Patroni's least, which Patroni would take anyway, so that all that can lead count by the same times.
fn patronis_least(cluster: ClusterBuilder) -> ClusterBuilder {
    cluster.dcs(json!({"ttl": 20, "loop_wait": 1, "retry_timeout": 3}))
}

#[tokio::test]
#[ignore = "a minute and a half; make test runs the other half of modes and majorities, make test-all this one"]
async fn two_of_patronis_and_one_of_ours_switch_over_in_every_direction() -> Result<()> {
    let mode = Mode::Asynchronous;
    switchovers(Mixed::builder(patronis_least(cluster(mode)), &["m1", "m2"], "m1"), mode).await
}

/// Ours makes the cluster, with times that Patroni does not take.
#[tokio::test]
async fn one_of_patronis_and_two_of_ours_switch_over_in_every_direction() -> Result<()> {
    let mode = Mode::Asynchronous;
    switchovers(Mixed::builder(cluster(mode), &["m1"], "m2"), mode).await
}

#[tokio::test]
#[ignore = "a minute and a half; make test switches over among one of Patroni's and two of ours, make test-all among these too"]
async fn two_of_patronis_and_one_of_ours_switch_over_synchronously() -> Result<()> {
    switchovers(
        Mixed::builder(patronis_least(all_synchronous()), &["m1", "m2"], "m1"),
        Mode::Synchronous,
    )
    .await
}

#[tokio::test]
#[ignore = "a minute and a half; make test runs the other half of modes and majorities, make test-all this one"]
async fn one_of_patronis_and_two_of_ours_switch_over_synchronously() -> Result<()> {
    switchovers(Mixed::builder(all_synchronous(), &["m1"], "m2"), Mode::Synchronous).await
}

/// To the other kind and back, by each tool in each direction; by the stop of a leader of either kind; and in pause.
async fn switchovers(builder: MixedBuilder, mode: Mode) -> Result<()> {
    let mixed = builder.start().await?;
    let load = Load::start(mixed.cluster()).await?;
    let fault = Instant::now();
    for tool in [Tool::Patronictl, Tool::Pgherd, Tool::Pgherd, Tool::Patronictl] {
        switchover(&mixed, mode, tool).await?;
        load.goes_on().await?;
    }

    for is_patronis in [true, false] {
        if mixed.is_patronis(mixed.settled().await?) != is_patronis {
            switchover(&mixed, mode, Tool::Pgherd).await?;
        }
        clean_stop(&mixed, mode).await?;
        load.goes_on().await?;
    }

    let said = mixed.patroni().ctl(&["pause"]).await?.success()?;
    ensure!(said.contains("Success: cluster management is paused"), "{said}");
    mixed.cluster().pause_is_seen(true).await?;
    switchover(&mixed, mode, Tool::Patronictl).await?;
    let said = mixed.cluster().pgherd("resume", &["--wait"]).await?.success()?;
    ensure!(said.contains("Success: cluster management is resumed"), "{said}");
    mixed.cluster().pause_is_seen(false).await?;

    our_commands_on_patronis_members(&mixed).await?;
    let (_, report) = load.end(mixed.cluster(), "mixed switchovers", fault).await?;
    report.ensure_complete()?;
    mixed.pass();
    Ok(())
}

/// What needs no leader to move: the versions of all, and a replica of Patroni's that reads its configuration again, and that
/// is restarted.
async fn our_commands_on_patronis_members(mixed: &Mixed) -> Result<()> {
    let cluster = mixed.cluster();
    let leader = mixed.settled().await?;
    let versions = cluster.pgherd("version", &[SCOPE]).await?.success()?;
    for member in cluster.members() {
        let line = format!("{}: Patroni 4.1.", member.name());
        ensure!(versions.contains(&line), "{versions}");
    }
    let replicas = cluster.others(leader.name());
    let Some(replica) = replicas.iter().find(|replica| mixed.is_patronis(replica)) else {
        return Ok(());
    };
    for (command, expected) in [
        ("reload", "Reload request received for member "),
        ("restart", "Success: restart on member "),
    ] {
        let said = cluster
            .pgherd(command, &[SCOPE, replica.name(), "--force"])
            .await?
            .success()?;
        ensure!(said.contains(&format!("{expected}{}", replica.name())), "{said}");
    }
    mixed.settled().await?;
    Ok(())
}

/// One, to a member of the other kind than the leader's.
async fn switchover(mixed: &Mixed, mode: Mode, tool: Tool) -> Result<()> {
    let leader = mixed.settled().await?;
    if mode == Mode::Synchronous {
        mixed.synchronous(leader, 2).await?;
    }
    let candidates = mixed.other_kind(leader);
    let candidate = *candidates.last().context("there are both kinds")?;
    let direction = format!("{tool:?}: {leader:?} to {candidate:?}");
    let timeline = mixed.timeline(leader).await?;
    let began = Instant::now();
    mixed
        .switch_over(tool, leader, candidate)
        .await
        .context(direction.clone())?;
    let after = mixed.settled().await.context(direction.clone())?;
    println!(
        "{direction}: all well again after {:.1} s",
        began.elapsed().as_secs_f64()
    );
    ensure!(after.name() == candidate.name(), "{direction}: {after:?} leads");
    let began = mixed.timeline(after).await?;
    ensure!(
        began == timeline + 1,
        "{direction}: from timeline {timeline} to {began}"
    );
    Ok(())
}

/// A leader that is stopped in good order hands over; started again, it follows.
async fn clean_stop(mixed: &Mixed, mode: Mode) -> Result<()> {
    let leader = mixed.settled().await?;
    if mode == Mode::Synchronous {
        mixed.synchronous(leader, 2).await?;
    }
    let timeline = mixed.timeline(leader).await?;
    let began = Instant::now();
    mixed.stop_member(leader).await?;
    let next = mixed.cluster().next_leader(leader.name()).await?;
    println!(
        "stop of {leader:?}: {next:?} leads after {:.1} s",
        began.elapsed().as_secs_f64()
    );
    mixed.start_member(leader).await?;
    let after = mixed.settled().await.with_context(|| format!("stop of {leader:?}"))?;
    ensure!(after.name() == next.name(), "{after:?} took the lead from {next:?}");
    let began = mixed.timeline(after).await?;
    ensure!(
        began == timeline + 1,
        "stop of {leader:?}: from timeline {timeline} to {began}"
    );
    Ok(())
}

#[tokio::test]
#[ignore = "a minute and a half; make test runs the other half of modes and majorities, make test-all this one"]
async fn our_leader_among_two_of_patronis_dies_and_then_the_next_one() -> Result<()> {
    let mode = Mode::Asynchronous;
    deaths(Mixed::builder(patronis_least(cluster(mode)), &["m1", "m2"], "m3"), mode).await
}

#[tokio::test]
async fn patronis_leader_among_two_of_ours_dies_and_then_the_next_one() -> Result<()> {
    let mode = Mode::Asynchronous;
    deaths(Mixed::builder(patronis_least(cluster(mode)), &["m1"], "m1"), mode).await
}

#[tokio::test]
async fn our_leader_among_two_of_patronis_dies_and_no_synchronous_commit_with_it() -> Result<()> {
    let mode = Mode::Synchronous;
    deaths(Mixed::builder(patronis_least(cluster(mode)), &["m1", "m2"], "m3"), mode).await
}

#[tokio::test]
#[ignore = "a minute and a half; make test runs the other half of modes and majorities, make test-all this one"]
async fn patronis_leader_among_two_of_ours_dies_and_no_synchronous_commit_with_it() -> Result<()> {
    let mode = Mode::Synchronous;
    deaths(Mixed::builder(patronis_least(cluster(mode)), &["m1"], "m1"), mode).await
}

/// The first leader is the only one of its kind, so that the lead goes to the other kind; then whoever took over dies.
async fn deaths(builder: MixedBuilder, mode: Mode) -> Result<()> {
    let mixed = builder.start().await?;
    let first = mixed.settled().await?;
    ensure!(
        mixed.other_kind(first).len() == 2,
        "{first:?} is not the only one of its kind"
    );
    let second = death(&mixed, first, mode).await?;
    ensure!(mixed.is_patronis(first) != mixed.is_patronis(second));
    death(&mixed, second, mode).await?;
    mixed.pass();
    Ok(())
}

/// Kills everything of `former`, and starts it again when another has taken over. Where commits wait for nobody, the
/// former leader's log has an end of its own, which must be gone when it is back.
async fn death<'a>(mixed: &'a Mixed, former: &Member, mode: Mode) -> Result<&'a Member> {
    let cluster = mixed.cluster();
    let kind = if mixed.is_patronis(former) { "Patroni's" } else { "our" };
    let name = format!("everything of {kind} leader killed in a mixed cluster");
    let timeline = mixed.timeline(former).await?;
    if mode == Mode::Synchronous {
        mixed.synchronous(former, 1).await?;
    }
    let load = Load::start(cluster).await?;

    let mut checkpointers = Vec::new();
    if mode == Mode::Asynchronous {
        checkpointers = hold_checkpoints(&cluster.others(former.name())).await?;
        write_a_tail(former).await?;
    }
    let fault = Instant::now();
    mixed.kill_everything(former).await?;
    let next = cluster.next_leader(former.name()).await?;
    load.goes_on().await?;
    mixed.start_member(former).await?;
    if mode == Mode::Asynchronous && mixed.is_patronis(former) {
        waits_for_the_checkpoint(mixed, former, next).await?;
    }
    for checkpointer in checkpointers {
        process::signal(checkpointer, Signal::CONT)?;
    }

    let leader = mixed.settled().await.with_context(|| name.clone())?;
    ensure!(leader.name() == next.name(), "{leader:?} took the lead from {next:?}");
    let (_, report) = load.end(cluster, &name, fault).await?;
    match mode {
        Mode::Asynchronous => report.ensure_lost_only_within(ON_THEIR_WAY)?,
        Mode::Synchronous => report.ensure_complete()?,
    }
    let began = mixed.timeline(leader).await?;
    ensure!(began == timeline + 1, "{name}: from timeline {timeline} to {began}");
    if mode == Mode::Asynchronous {
        let gone = former.sql("SELECT to_regclass('tail') IS NULL").await?;
        ensure!(gone == "t", "{former:?} streams and has what its leader never had");
        if mixed.is_patronis(former) {
            let said = mixed.patroni().output(former).await;
            ensure!(said.contains(REWOUND), "Patroni did not rewind {former:?}");
        }
    }
    Ok(next)
}

/// Lets nobody make a checkpoint, not even after a promotion: until then a rewind would take the new leader's timeline
/// for the old one.
async fn hold_checkpoints(members: &[&Member]) -> Result<Vec<Pid>> {
    let mut held = Vec::new();
    for member in members {
        let pid = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'";
        let pid = Pid::from_raw(member.sql(pid).await?.parse()?).context("a process")?;
        process::signal(pid, Signal::STOP)?;
        held.push(pid);
    }
    Ok(held)
}

/// `leader` says in its key that its checkpoint is not done, and the Patroni of `former` does not rewind to it yet.
async fn waits_for_the_checkpoint(mixed: &Mixed, former: &Member, leader: &Member) -> Result<()> {
    let waits = eventually("Patroni waits for the leader's checkpoint", SOON, async || {
        ensure!(
            has_no_checkpoint(mixed.cluster(), leader).await?,
            "{leader:?} has made one"
        );
        let said = mixed.patroni().output(former).await;
        ensure!(
            !said.contains(REWIND_ENDED),
            "it rewinds before {leader:?} has made a checkpoint"
        );
        ensure!(said.contains(REWIND_WAITS), "it does not say so");
        Ok(())
    });
    waits.await
}

/// Whether the member's key tells others not to rewind to it yet.
async fn has_no_checkpoint(cluster: &Cluster, member: &Member) -> Result<bool> {
    let key = format!("{PREFIX}members/{}", member.name());
    let entry = cluster.etcd().entry(&key).await?.context("no key")?;
    let record: Value = serde_json::from_str(&entry.value)?;
    Ok(record["checkpoint_after_promote"] == false)
}

/// A Patroni member that rewinds to a leader whose control file still tells the old timeline finds nothing to do, starts
/// with what the leader never had, and stays down for good.
#[tokio::test]
async fn a_leader_whose_agent_was_killed_still_says_that_it_has_no_checkpoint() -> Result<()> {
    let cluster = Cluster::builder().members(2).start().await?;
    let former = cluster.settled().await?;
    let leader = cluster.others(former.name())[0];
    let checkpointers = hold_checkpoints(&[leader]).await?;
    let args = ["--leader", former.name(), "--candidate", leader.name(), "--force"];
    cluster.pgherd("switchover", &args).await?.success()?;
    eventually("the new leader says that it has no checkpoint", SOON, async || {
        ensure!(leader.is_primary().await?, "it takes no writes");
        ensure!(has_no_checkpoint(&cluster, leader).await?, "it does not");
        Ok(())
    })
    .await?;

    let agent = leader.agent_pid().await?;
    leader.kill_agent().await?;
    eventually("there is another agent", SOON, async || {
        ensure!(leader.agent_pid().await? != agent);
        Ok(())
    })
    .await?;
    throughout("it says so", LONG_ENOUGH, async || {
        ensure!(has_no_checkpoint(&cluster, leader).await?, "it says that it has one");
        Ok(())
    })
    .await?;
    for checkpointer in checkpointers {
        process::signal(checkpointer, Signal::CONT)?;
    }
    eventually("the leader has a checkpoint and says so", SOON, async || {
        ensure!(!has_no_checkpoint(&cluster, leader).await?);
        Ok(())
    })
    .await?;
    cluster.pass();
    Ok(())
}

/// Writes what no replica gets to see: their senders do not run any more.
async fn write_a_tail(leader: &Member) -> Result<()> {
    let session = leader.client().await?;
    let senders = session.rows("SELECT pid FROM pg_stat_replication", SOON).await?;
    ensure!(senders.len() == 2, "{} replicas stream", senders.len());
    for row in senders {
        let pid = row.get(0).context("a number")?.parse()?;
        process::signal(Pid::from_raw(pid).context("a process")?, Signal::STOP)?;
    }
    session.rows("CREATE TABLE tail (n int)", SOON).await?;
    Ok(())
}

#[tokio::test]
async fn haproxy_finds_leader_and_replicas_by_our_agents_answers() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let site = cluster.site();
    let haproxy = HaProxy::start(site, site.addresses().proxy(1), cluster.members().iter())?;
    let former = cluster.settled().await?;
    routed(&haproxy, former).await?;
    let ledger = Ledger::start_on(haproxy.write_address(), haproxy.read_address(), 4).await?;

    let fault = Instant::now();
    let candidate = cluster.others(former.name())[0];
    let args = ["--leader", former.name(), "--candidate", candidate.name(), "--force"];
    cluster.pgherd("switchover", &args).await?.success()?;
    routed(&haproxy, candidate).await.context("after a switchover")?;
    ledger.wait_for_rows(Instant::now(), ROWS, SOON).await?;
    cluster.settled().await?;
    let report = ledger.finish("switchover behind HAProxy", fault, candidate).await?;
    report.ensure_complete()?;

    let ledger = Ledger::start_on(haproxy.write_address(), haproxy.read_address(), 4).await?;
    let fault = Instant::now();
    candidate.kill_everything().await?;
    let next = cluster.next_leader(candidate.name()).await?;
    routed(&haproxy, next).await.context("after a death")?;
    ledger.wait_for_rows(Instant::now(), ROWS, SOON).await?;
    candidate.start().await?;
    let leader = cluster.settled().await?;
    ensure!(leader.name() == next.name(), "{leader:?} took the lead from {next:?}");
    routed(&haproxy, leader).await.context("after a return")?;
    let report = ledger
        .finish("everything of the leader killed behind HAProxy", fault, leader)
        .await?;
    report.ensure_lost_only_within(ON_THEIR_WAY)?;
    cluster.pass();
    Ok(())
}

/// Writes go to `leader`, and reads, turn by turn, to others only.
async fn routed(haproxy: &HaProxy, leader: &Member) -> Result<()> {
    let address = leader.postgres().ip().to_string();
    let server = "SELECT host(inet_server_addr())";
    let routed = eventually("HAProxy routes by role", SOON, async || {
        for _ in 0..TURNS {
            let write = Sql::connect(haproxy.write_address(), SOON).await?;
            let behind = write.value(server, SOON).await?;
            ensure!(behind == address, "writes go to {behind}, {leader:?} leads");
            let recovers = write.value("SELECT pg_is_in_recovery()", SOON).await?;
            ensure!(recovers == "f", "{leader:?} takes no writes");
            let behind = sql::value(haproxy.read_address(), server, SOON).await?;
            ensure!(behind != address, "reads go to {leader:?}, the leader");
        }
        Ok(())
    });
    routed.await
}

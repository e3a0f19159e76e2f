//! Who leads next in priority mode: by an election, by a switchover, by an order; and an agent or a server that is killed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pgherd_testkit::{Cluster, Member, Promotions, SyncLoad, SyncRecord, eventually};
use serde_json::{Value, json};

use super::{IN_TIME, LONG_ENOUGH, SOON, chosen, die_one_by_one, ordered, stays_a_standby, voters, with};

/// What has had a ttl to happen, and an election.
const AN_ELECTION: Duration = Duration::from_secs(6);

#[tokio::test]
async fn a_dead_leader_takes_no_acknowledged_row_with_it_nor_one_whose_standby_has_died() -> Result<()> {
    let cluster = with(json!(true)).start().await?;
    let rounds = async {
        leader_dies(&cluster).await?;
        let (leader, listed, spare) = chosen(&cluster).await?;
        let name = "the synchronous standby and then the leader killed";
        die_one_by_one(&cluster, [leader, listed, spare], spare.name(), name).await?;
        chosen(&cluster).await
    };
    cluster.in_step(rounds).await?;
    cluster.pass();
    Ok(())
}

async fn leader_dies(cluster: &Cluster) -> Result<()> {
    let (former, listed, _) = chosen(cluster).await?;
    let load = SyncLoad::start(cluster).await?;
    let before = cluster.sync_revision().await?;
    let promotions = Promotions::watch(&cluster.others(former.name())).await?;

    let fault = Instant::now();
    former.kill_everything().await?;
    let next = cluster.next_leader(former.name()).await?;
    ensure!(next.name() == listed.name(), "{next:?} leads, {listed:?} was listed");
    load.goes_on().await?;
    let history = cluster.sync_history(before).await?;
    ensure!(
        history.first() == Some(&SyncRecord::of(next.name(), 0, &[])),
        "the new leader takes the record over before it is promoted: {history:?}"
    );
    let seen = promotions.seen();
    ensure!(!seen.is_empty(), "nobody was seen to be promoted");
    ensure!(
        seen.iter().all(|(_, names)| !names.is_empty()),
        "commits waited for nobody after the promotion: {seen:?}"
    );
    former.start().await?;
    let name = "everything of the leader killed, priority mode";
    load.end(cluster, 3, name, fault).await?;
    Ok(())
}

/// Leader and listed standby die at once; nobody is there who could change the record before.
async fn the_listed_die(cluster: &Cluster) -> Result<(&Member, &Member, &Member)> {
    let (former, listed, spare) = chosen(cluster).await?;
    former.freeze_agent().await?;
    listed.kill_everything().await?;
    former.kill_everything().await?;
    Ok((former, listed, spare))
}

#[tokio::test]
async fn only_a_listed_standby_leads_until_the_operator_says_otherwise() -> Result<()> {
    let cluster = with(json!(true)).start().await?;
    let (former, listed, spare) = the_listed_die(&cluster).await?;
    stays_a_standby(spare, LONG_ENOUGH).await?;
    former.start().await?;
    let leader = cluster.settled_with(2).await?;
    ensure!(leader.name() == former.name(), "{leader:?} leads");
    listed.start().await?;

    let (former, listed, spare) = the_listed_die(&cluster).await?;
    stays_a_standby(spare, AN_ELECTION).await?;
    ordered(spare, "/failover", &json!({"candidate": spare.name()})).await?;
    promoted_instead(&cluster, spare, [former, listed]).await?;
    chosen(&cluster).await?;

    let (former, listed, spare) = the_listed_die(&cluster).await?;
    stays_a_standby(spare, AN_ELECTION).await?;
    cluster.configure(&json!({"synchronous_mode": false})).await?;
    promoted_instead(&cluster, spare, [former, listed]).await?;
    ensure!(cluster.sync_record().await?.is_none(), "/sync is still there");
    cluster.pass();
    Ok(())
}

async fn promoted_instead(cluster: &Cluster, member: &Member, dead: [&Member; 2]) -> Result<()> {
    let next = cluster.next_leader(dead[0].name()).await?;
    ensure!(next.name() == member.name(), "{next:?} leads");
    for dead in dead {
        dead.start().await?;
    }
    let leader = cluster.settled().await?;
    ensure!(leader.name() == member.name(), "{leader:?} leads");
    Ok(())
}

#[tokio::test]
async fn a_switchover_goes_to_a_listed_member_only_and_loses_nothing_in_either_mode() -> Result<()> {
    let cluster = with(json!(true)).start().await?;
    let (former, listed, spare) = chosen(&cluster).await?;
    let request = json!({"leader": former.name(), "candidate": spare.name()});
    let refused = former.ask("POST", "/switchover", Some(&request)).await?;
    ensure!(
        refused.status == 412,
        "a switchover to a member that is not listed: {refused:?}"
    );
    ensure!(cluster.lease_holder().await? == former.name());
    let round = hand_over(&cluster, former, Some(listed), "planned switchover, priority mode");
    cluster.in_step(round).await?;
    let (former, listed, _) = chosen(&cluster).await?;
    let round = hand_over(&cluster, former, None, "planned switchover, nobody named");
    let next = cluster.in_step(round).await?;
    ensure!(next.name() == listed.name(), "{next:?} leads, {listed:?} was listed");

    chosen(&cluster).await?;
    cluster.configure(&json!({"synchronous_mode": "quorum"})).await?;
    let (former, _, candidate) = voters(&cluster).await?;
    let round = hand_over(&cluster, former, Some(candidate), "planned switchover, quorum mode");
    cluster.in_step(round).await?;
    voters(&cluster).await?;
    cluster.pass();
    Ok(())
}

/// A switchover under load: to `candidate`, or to whom the leader chooses.
async fn hand_over<'a>(
    cluster: &'a Cluster,
    former: &Member,
    candidate: Option<&Member>,
    name: &str,
) -> Result<&'a Member> {
    let load = SyncLoad::start(cluster).await?;
    let promotions = Promotions::watch(&cluster.others(former.name())).await?;
    let fault = Instant::now();
    let mut request = json!({"leader": former.name()});
    if let Some(candidate) = candidate {
        request["candidate"] = Value::from(candidate.name());
    }
    ordered(former, "/switchover", &request).await?;
    let next = cluster.next_leader(former.name()).await?;
    ensure!(
        candidate.is_none_or(|candidate| candidate.name() == next.name()),
        "{next:?} leads, {candidate:?} was named"
    );
    load.goes_on().await?;
    let seen = promotions.seen();
    let waits = |(member, names): &(String, String)| member == next.name() && !names.is_empty();
    ensure!(
        !seen.is_empty() && seen.iter().all(waits),
        "commits waited for nobody after the promotion: {seen:?}"
    );
    let (leader, _) = load.end(cluster, 3, name, fault).await?;
    ensure!(leader.name() == next.name(), "{leader:?} leads");
    Ok(leader)
}

/// The leader stops in order, and the candidate confirms that it has everything.
#[tokio::test]
async fn an_operator_may_fail_over_to_a_member_that_is_not_listed_and_nothing_is_lost() -> Result<()> {
    let cluster = with(json!(true)).start().await?;
    let (former, _, spare) = chosen(&cluster).await?;
    let load = SyncLoad::start(&cluster).await?;
    let fault = Instant::now();
    ordered(former, "/failover", &json!({"candidate": spare.name()})).await?;
    let name = "manual failover to an asynchronous member";
    let (leader, report) = load.end(&cluster, 3, name, fault).await?;
    ensure!(leader.name() == spare.name(), "{leader:?} leads");
    ensure!(report.write_gap < IN_TIME, "{report}");
    chosen(&cluster).await?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn an_agent_or_a_server_that_is_killed_leaves_record_and_setting_in_step() -> Result<()> {
    let cluster = with(json!(true)).start().await?;
    let rounds = async {
        agent_dies(&cluster).await?;
        chosen(&cluster).await?;
        server_dies(&cluster).await?;
        chosen(&cluster).await
    };
    cluster.in_step(rounds).await?;
    cluster.pass();
    Ok(())
}

/// The agent of the leader dies, and there is another.
async fn agent_is_another(leader: &Member) -> Result<()> {
    let agent = leader.agent_pid().await?;
    leader.kill_agent().await?;
    eventually("there is another agent", SOON, async || {
        ensure!(leader.agent_pid().await? != agent);
        Ok(())
    })
    .await
}

async fn agent_dies(cluster: &Cluster) -> Result<()> {
    let (leader, listed, spare) = chosen(cluster).await?;
    let load = SyncLoad::start(cluster).await?;
    let fault = Instant::now();
    for wanted in [2, 1, 2, 1] {
        cluster.configure(&json!({"synchronous_node_count": wanted})).await?;
        agent_is_another(leader).await?;
        eventually("the set is as wanted", IN_TIME, async || {
            let record = cluster.sync_record().await?.context("there is no /sync")?;
            ensure!(record.standbys.len() == wanted, "{record:?}");
            Ok(())
        })
        .await?;
    }
    // The agent dies, and with it the standby that it has to give up.
    let record = cluster.sync_record().await?.context("there is no /sync")?;
    let (dies, stays) = if record.lists(listed.name()) {
        (listed, spare)
    } else {
        (spare, listed)
    };
    dies.kill_everything().await?;
    agent_is_another(leader).await?;
    let record = SyncRecord::of(leader.name(), 0, &[stays.name()]);
    cluster.sync_settles(&record, stays.name(), IN_TIME).await?;
    dies.start().await?;
    let name = "agent killed in synchronous mode";
    let (after, report) = load.end(cluster, 3, name, fault).await?;
    ensure!(after.name() == leader.name(), "{after:?} leads");
    ensure!(report.errors.is_empty(), "writers noticed: {report}");
    Ok(())
}

async fn server_dies(cluster: &Cluster) -> Result<()> {
    let leader = cluster.settled().await?;
    let load = SyncLoad::start(cluster).await?;
    let before = cluster.sync_revision().await?;
    let fault = Instant::now();
    leader.kill_postmaster()?;
    load.goes_on().await?;
    let name = "postmaster killed in synchronous mode";
    let (after, _) = load.end(cluster, 3, name, fault).await?;
    ensure!(after.name() == leader.name(), "{after:?} leads");
    let history = cluster.sync_history(before).await?;
    let stays = |record: &SyncRecord| record.leader.as_deref() == Some(leader.name());
    ensure!(history.iter().all(stays), "{history:?}");
    Ok(())
}

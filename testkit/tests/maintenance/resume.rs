//! How a pause ends, where the leader's agent is not there to see it.

use anyhow::Result;
use pgherd_testkit::{Cluster, eventually, throughout};
use serde_json::json;

use super::{ON_THEIR_WAY, Paused, SOON, TTL};
use super::{goes_on, has_another_agent, key_is_gone, nobody_leads, paused_under_load};

/// In a pause nobody fences. Whoever led may still write, even where nobody can tell any more who that was.
#[tokio::test]
async fn for_one_ttl_after_a_pause_nobody_bids_and_not_an_agent_either_that_began_in_it() -> Result<()> {
    let cluster = Cluster::builder().dcs(json!({"failsafe_mode": false})).start().await?;
    let Paused {
        leader: former,
        load,
        since,
        ..
    } = paused_under_load(&cluster).await?;
    former.kill_everything().await?;
    eventually("the key expires", SOON, async || key_is_gone(&cluster).await).await?;
    let anew = cluster.others(former.name())[0];
    let agent = anew.agent_pid().await?;
    anew.kill_agent().await?;
    has_another_agent(anew, agent).await?;
    nobody_leads(&cluster).await?;
    cluster.configure(&json!({"pause": null})).await?;
    throughout("nobody bids while the old primary may run", TTL * 4 / 5, async || {
        nobody_leads(&cluster).await
    })
    .await?;
    cluster.next_leader(former.name()).await?;
    former.start().await?;
    let (_, report) = load
        .end(&cluster, "leader dead in pause, its key expired", since)
        .await?;
    report.ensure_lost_only_within(ON_THEIR_WAY)?;
    cluster.pass();
    Ok(())
}

/// Its agent is started again within two seconds of being able to.
#[tokio::test]
async fn a_leader_whose_agent_is_away_when_the_pause_ends_leads_on_when_it_is_back() -> Result<()> {
    let cluster = Cluster::builder().members(2).start().await?;
    let Paused {
        leader,
        postmaster,
        load,
        since,
    } = paused_under_load(&cluster).await?;
    leader.hold_agent_down().await?;
    eventually("the key expires", SOON, async || key_is_gone(&cluster).await).await?;
    goes_on(&cluster, leader, postmaster).await?;
    cluster.configure(&json!({"pause": null})).await?;
    leader.release_agent().await?;
    load.end_undisturbed(&cluster, "agent away when the pause ended", since, leader, postmaster)
        .await?;
    cluster.pass();
    Ok(())
}

//! The watchdog: one that a test reads from a file, and one that is not there.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::{Cluster, Member, eventually, throughout};
use serde_json::{Value, json};

use super::{A_WHILE, SOON, led_by_the_first, nobody_leads};

/// What a watchdog for tests was told: `V` and a number sets its timeout, `1` is a ping, a last `V` switches it off.
fn told(cluster: &Cluster, member: &Member) -> Result<String> {
    let file = device(cluster, member);
    std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))
}

fn device(cluster: &Cluster, member: &Member) -> PathBuf {
    cluster.site().dir().join(format!("{}.watchdog", member.name()))
}

/// Two members, each with such a watchdog, which fires after half of this ttl.
async fn watched(ttl: u64) -> Result<Cluster> {
    let cluster = Cluster::builder()
        .members(2)
        .dcs(json!({"ttl": ttl, "loop_wait": 1, "retry_timeout": 3}))
        .prepare()
        .await?;
    // The site's directory is known only now, and the file must be there before the members are.
    for member in cluster.members() {
        cluster.site().write_file(&format!("{}.watchdog", member.name()), "")?;
        let device: Value = device(&cluster, member).display().to_string().into();
        member.alter_config(json!({"watchdog": {"mode": "required", "driver": "testing", "device": device}}))?;
        member.start().await?;
    }
    cluster.start_proxy().await?;
    cluster.settled().await?;
    Ok(cluster)
}

#[tokio::test]
async fn a_watchdog_is_pinged_while_leading_set_anew_with_the_ttl_and_switched_off_in_pause() -> Result<()> {
    let cluster = watched(10).await?;
    let leader = cluster.settled().await?;
    let replica = cluster.others(leader.name())[0];
    let seen = told(&cluster, leader)?;
    ensure!(seen.starts_with("V5\n1"), "{seen}");
    let seen = told(&cluster, replica)?;
    ensure!(!seen.contains('1'), "a replica pings: {seen}");

    // From twenty seconds on it is five seconds less.
    cluster.configure(&json!({"ttl": 20})).await?;
    eventually("it is set anew", SOON, async || {
        let told = told(&cluster, leader)?;
        ensure!(told.contains("1V15\n1"), "{told}");
        Ok(())
    })
    .await?;
    cluster.pause().await?;
    eventually("it is switched off", SOON, async || {
        let told = told(&cluster, leader)?;
        ensure!(told.ends_with("1V"), "{told}");
        Ok(())
    })
    .await?;
    let off = told(&cluster, leader)?;
    throughout("it stays off", A_WHILE, async || {
        let told = told(&cluster, leader)?;
        ensure!(told == off, "{told}");
        Ok(())
    })
    .await?;
    cluster.resume().await?;
    eventually("it is pinged again", SOON, async || {
        let told = told(&cluster, leader)?;
        ensure!(told.starts_with(&format!("{off}V15\n1")), "{told}");
        Ok(())
    })
    .await?;
    leader.stop().await?;
    let last = told(&cluster, leader)?;
    ensure!(last.ends_with("1V"), "not switched off by a clean stop: {last}");
    let next = cluster.next_leader(leader.name()).await?;
    let seen = told(&cluster, next)?;
    ensure!(seen.contains("V15\n1"), "{seen}");
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_watchdog_of_a_frozen_member_is_not_pinged_and_would_fire() -> Result<()> {
    let cluster = watched(10).await?;
    let leader = cluster.settled().await?;
    let frozen = leader.freeze_keeper_and_agent().await?;
    let last = told(&cluster, leader)?;
    let next = cluster.next_leader(leader.name()).await?;
    let seen = told(&cluster, leader)?;
    ensure!(
        !last.ends_with('V') && seen == last,
        "pinged or switched off: {last}, {seen}"
    );
    let left = leader.postgres_processes();
    ensure!(left.is_empty(), "{next:?} leads, {leader:?} has {left:?}");
    leader.thaw(&frozen);
    cluster.settled().await?;
    let last = told(&cluster, leader)?;
    ensure!(last.ends_with('V'), "a replica's watchdog is on: {last}");
    cluster.pass();
    Ok(())
}

/// No machine has a device of this name.
#[tokio::test]
async fn without_a_device_a_member_leads_unless_it_requires_one() -> Result<()> {
    let modes = [("m1", "automatic"), ("m2", "off"), ("m3", "required")];
    let builder = modes.iter().fold(Cluster::builder(), |builder, (name, mode)| {
        builder.config_of(
            name,
            json!({"watchdog": {"mode": mode, "device": "/dev/watchdog-of-nobody"}}),
        )
    });
    let cluster = led_by_the_first(builder).await?;
    let (automatic, off, required) = (cluster.member("m1")?, cluster.member("m2")?, cluster.member("m3")?);
    let said = automatic.output().await;
    ensure!(said.contains("/dev/watchdog-of-nobody is not used"), "{said}");

    automatic.stop().await?;
    let next = cluster.next_leader(automatic.name()).await?;
    ensure!(next.name() == off.name(), "{next:?} leads");
    let said = off.output().await;
    ensure!(!said.contains("/dev/watchdog-of-nobody"), "{said}");
    let status = required.get("/patroni").await?.json()?;
    ensure!(status["watchdog_failed"] == true, "{status}");
    let request = json!({"candidate": required.name()});
    let refused = off.ask("POST", "/failover", Some(&request)).await?;
    let expected = "failover is not possible: no good candidates have been found";
    ensure!(
        refused.status == 412 && refused.body.starts_with(expected),
        "{refused:?}"
    );

    off.stop().await?;
    throughout("nobody leads", A_WHILE, async || nobody_leads(&cluster).await).await?;
    off.start().await?;
    let after = cluster.settled_with(2).await?;
    ensure!(after.name() == off.name(), "{after:?} leads");
    cluster.pass();
    Ok(())
}

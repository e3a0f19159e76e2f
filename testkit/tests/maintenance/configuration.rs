//! What changes in a running cluster: parameters and authentication, by the cluster's configuration or a member's own file;
//! what waits for a restart; passwords and certificates in files; a role's own parameters at a promotion.

use std::fs;

use anyhow::{Context, Result, ensure};
use pgherd_cluster::http::{AccessConfig, Ask, Endpoint, ask_at};
use pgherd_testkit::certificates::Authority;
use pgherd_testkit::process::{self, Signal};
use pgherd_testkit::{Cluster, Member, Sql, eventually};
use serde_json::{Value, json};

use super::SOON;

const READ_ONLY: &str = "SHOW default_transaction_read_only";
const HBA: [&str; 3] = [
    "local all all trust",
    "host replication replicator 127.0.0.0/8 scram-sha-256",
    "host all all 127.0.0.0/8 scram-sha-256",
];

async fn reload(member: &Member) -> Result<()> {
    process::signal(member.keeper_pid().await?, Signal::HUP)
}

async fn shows(member: &Member, parameter: &str, expected: &str) -> Result<()> {
    eventually(&format!("{parameter} is {expected}"), SOON, async || {
        let value = member.sql(&format!("SHOW {parameter}")).await?;
        ensure!(value == expected, "{member:?} has {value}");
        Ok(())
    })
    .await
}

/// Parameters and authentication of the whole cluster, in force on every member without a word to any.
async fn the_cluster_is_configured(cluster: &Cluster) -> Result<()> {
    let hba: Vec<&str> = HBA.into_iter().chain(["host all nobody 192.0.2.0/24 reject"]).collect();
    let parameters = json!({"work_mem": "5MB", "max_connections": 60});
    cluster
        .configure(&json!({"postgresql": {"parameters": parameters, "pg_hba": hba}}))
        .await?;
    for member in cluster.members() {
        shows(member, "work_mem", "5MB").await?;
        eventually("its authentication is the cluster's", SOON, async || {
            let rules = member.sql("SELECT count(*) FROM pg_hba_file_rules WHERE 'nobody' = ANY (user_name)");
            ensure!(rules.await? == "1");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// What needs a restart is told by name and value, in the key and by REST, and is done when one was made.
async fn a_restart_is_pending_until_it_is_made(cluster: &Cluster) -> Result<()> {
    let expected = json!({"max_connections": {"old_value": "50", "new_value": "60"}});
    for member in cluster.members() {
        eventually("a restart is pending", SOON, async || {
            let record = cluster.record(member).await?;
            ensure!(
                record["pending_restart"] == true && record["pending_restart_reason"] == expected,
                "{record}"
            );
            let status = member.get("/patroni").await?.json()?;
            ensure!(status["pending_restart_reason"] == expected, "{status}");
            let metrics = member.get("/metrics").await?.body;
            ensure!(metrics.contains("patroni_pending_restart{") && metrics.contains("} 1"));
            Ok(())
        })
        .await?;
        shows(member, "max_connections", "50").await?;
    }
    // A standby may not have fewer than its leader, so the leader goes first.
    let leader = cluster.settled().await?;
    let replica = *cluster.others(leader.name()).first().context("a replica")?;
    for member in [leader, replica] {
        // Just after its leader was restarted a replica may be busy comparing histories.
        eventually("it is restarted", SOON, async || {
            let conditions = json!({"restart_pending": true});
            let answer = member.ask("POST", "/restart", Some(&conditions)).await?;
            ensure!(answer.status == 200, "{answer:?}");
            Ok(())
        })
        .await?;
        shows(member, "max_connections", "60").await?;
        eventually("no restart is pending", SOON, async || {
            let record = cluster.record(member).await?;
            ensure!(record.get("pending_restart").is_none(), "{record}");
            Ok(())
        })
        .await?;
    }
    cluster.settled().await?;
    Ok(())
}

/// A member's own file counts once the member is told, and one that is wrong changes nothing.
async fn a_member_is_configured(cluster: &Cluster, member: &Member, more: &Value) -> Result<()> {
    let mut over = more.clone(); // With its nulls, which are to take keys of the file away.
    let own = json!({"tags": {"colour": "blue"}, "postgresql": {"parameters": {"work_mem": "7MB"}}});
    pgherd_testkit::config::merge(&mut over, own);
    member.alter_config(over)?;
    shows(member, "work_mem", "5MB").await?;
    reload(member).await?;
    shows(member, "work_mem", "7MB").await?;
    eventually("its tags are the new ones", SOON, async || {
        let record = cluster.record(member).await?;
        ensure!(record["tags"]["colour"] == "blue", "{record}");
        Ok(())
    })
    .await?;
    member.alter_config(json!({"postgresql": {"listen": "nowhere:x", "parameters": {"work_mem": "9MB"}}}))?;
    reload(member).await?;
    eventually("the mistake is told", SOON, async || {
        let said = fs::read_to_string(member.log_file())?;
        ensure!(said.contains("postgresql.listen: \"nowhere:x\"") && said.contains("nothing was changed"));
        Ok(())
    })
    .await?;
    shows(member, "work_mem", "7MB").await
}

/// The file holds another password: the leader gives it to the role, and who streams goes on by it, without a restart.
async fn a_password_changes(cluster: &Cluster, file: &str) -> Result<()> {
    let leader = cluster.settled().await?;
    let verifier = "SELECT rolpassword FROM pg_authid WHERE rolname = 'replicator'";
    let before = leader.sql(verifier).await?;
    cluster.site().write_file(file, "another-secret\n")?;
    eventually("the role has another password", SOON, async || {
        ensure!(leader.sql(verifier).await? != before);
        Ok(())
    })
    .await?;
    leader
        .sql("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_replication")
        .await?;
    cluster.settled().await?;
    for member in cluster.members() {
        let said = fs::read_to_string(member.log_file())?;
        ensure!(!said.contains("another-secret"), "{member:?} has logged a password");
    }
    Ok(())
}

/// The REST interfaces speak TLS from now on: with each other, and with who believes their CA.
async fn rest_speaks_tls(cluster: &Cluster, more: &Value) -> Result<()> {
    let site = cluster.site();
    let authority = Authority::new(site)?;
    for member in cluster.members() {
        let own = authority.issue(site, &format!("{}-rest", member.name()), &[member.ip()])?;
        let mut over = more.clone();
        let tls = json!({
            "restapi": {"certfile": own.certificate, "keyfile": own.key},
            "ctl": {"cacert": authority.file()},
        });
        pgherd_testkit::config::merge(&mut over, tls);
        member.alter_config(over)?;
        reload(member).await?;
    }
    let config = AccessConfig {
        cacert: Some(authority.file().to_owned()),
        ..AccessConfig::default()
    };
    let access = config.load()?;
    for member in cluster.members() {
        eventually("it says so, and answers", SOON, async || {
            let record = cluster.record(member).await?;
            let url = record["api_url"].as_str().context("a URL")?;
            ensure!(url.starts_with("https://"), "{url}");
            let endpoint = Endpoint::of(url).context("an endpoint")?;
            let answer = ask_at(&endpoint, Ask::get("/liveness"), SOON, &access).await?;
            ensure!(answer.status == 200, "{answer:?}");
            ensure!(member.get("/liveness").await.is_err(), "it answers in plaintext too");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// An agent that resumes beside a running leader writes its configuration as a leader's.
async fn another_agent_leaves_the_leader_writable(cluster: &Cluster, leader: &Member) -> Result<()> {
    let agent = leader.agent_pid().await?;
    leader.kill_agent().await?;
    eventually("another agent runs", SOON, async || {
        ensure!(leader.agent_pid().await? != agent);
        Ok(())
    })
    .await?;
    cluster
        .configure(&json!({"postgresql": {"parameters": {"maintenance_work_mem": "33MB"}}}))
        .await?;
    shows(leader, "maintenance_work_mem", "33MB").await?;
    ensure!(leader.sql(READ_ONLY).await? == "off");
    let session = Sql::connect(cluster.write_address(), SOON).await?;
    session.rows("CREATE TABLE resumed (i int)", SOON).await?;
    Ok(())
}

#[tokio::test]
async fn configuration_and_secrets_change_in_a_running_cluster_and_a_new_leader_takes_writes_at_once() -> Result<()> {
    let by_role = json!({"replica": {"default_transaction_read_only": "on"}});
    let builder = Cluster::builder()
        .members(2)
        .dcs(json!({"postgresql": {"pg_hba": HBA}, "pgherd": {"parameters": by_role}}))
        .member_config(json!({"postgresql": {"pg_hba": null}}));
    let cluster = builder.start().await?;
    let leader = cluster.settled().await?;
    let replica = *cluster.others(leader.name()).first().context("a replica")?;
    the_cluster_is_configured(&cluster).await?;
    a_restart_is_pending_until_it_is_made(&cluster).await?;

    let file = cluster
        .site()
        .write_file("replication.password", pgherd_testkit::config::REPLICATION_PASSWORD)?;
    let secrets = json!({"postgresql": {
        "authentication": {"replication": {"password": null, "password_file": file}},
        "pg_hba": null,
    }});
    for member in [leader, replica] {
        a_member_is_configured(&cluster, member, &secrets).await?;
        member.alter_config(secrets.clone())?;
        reload(member).await?;
    }
    a_password_changes(&cluster, "replication.password").await?;
    another_agent_leaves_the_leader_writable(&cluster, leader).await?;
    rest_speaks_tls(&cluster, &secrets).await?;

    ensure!(leader.sql(READ_ONLY).await? == "off");
    shows(replica, "default_transaction_read_only", "on").await?;
    leader.stop().await?;
    eventually("the write port leads to who takes writes", SOON, async || {
        let session = Sql::connect(cluster.write_address(), SOON).await?;
        session.rows("CREATE TABLE IF NOT EXISTS t (i int)", SOON).await?;
        Ok(())
    })
    .await?;
    ensure!(replica.sql(READ_ONLY).await? == "off");
    let said = fs::read_to_string(leader.log_file())?;
    ensure!(
        !said.contains("no other member confirmed"),
        "they did not hear each other by TLS"
    );
    cluster.pass();
    Ok(())
}

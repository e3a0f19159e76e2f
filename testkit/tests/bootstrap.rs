//! From nothing to a cluster: what is in etcd, what is in force, what REST answers, and how a replica is made again.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::config::{PREFIX, REPLICATION_PASSWORD, SCOPE};
use pgherd_testkit::sql::SUPERUSER_PASSWORD;
use pgherd_testkit::{Cluster, Member, client, eventually};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(20);

#[tokio::test]
async fn three_members_from_nothing_are_one_leader_and_two_replicas_in_patronis_layout() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let leader = cluster.settled().await?;
    eventually("the keys are as Patroni's", SOON, async || {
        keys_are_patronis(&cluster, leader).await
    })
    .await?;
    settings_are_in_force(&cluster, leader).await?;
    cluster.pass();
    Ok(())
}

/// Keys, values and leases as in a cluster of Patroni's.
async fn keys_are_patronis(cluster: &Cluster, leader: &Member) -> Result<()> {
    let entries = cluster.etcd().entries(PREFIX).await?;
    let entries: BTreeMap<&str, _> = entries
        .iter()
        .map(|entry| (&entry.key[PREFIX.len()..], entry))
        .collect();
    let entry = |key: &str| {
        entries
            .get(key)
            .copied()
            .with_context(|| format!("no key {key} in {:?}", entries.keys()))
    };

    let system_id = leader.sql("SELECT system_identifier FROM pg_control_system()").await?;
    ensure!(
        entry("initialize")?.value == system_id && entry("initialize")?.lease == 0,
        "{:?}",
        entry("initialize")?
    );
    ensure!(entry("leader")?.value == leader.name(), "{:?}", entry("leader")?);
    let own = entry(&format!("members/{}", leader.name()))?;
    ensure!(
        entry("leader")?.lease != 0 && entry("leader")?.lease == own.lease,
        "one lease for both: {own:?}"
    );

    for member in cluster.members() {
        let entry = entry(&format!("members/{}", member.name()))?;
        ensure!(entry.lease != 0, "no lease: {entry:?}");
        let record: Value = serde_json::from_str(&entry.value)?;
        let is_leader = member.name() == leader.name();
        let expected = json!({
            "conn_url": format!("postgres://{}/postgres", member.postgres()),
            "api_url": format!("http://{}/patroni", member.rest()),
            "state": "running",
            "role": if is_leader { "primary" } else { "replica" },
            "timeline": 1,
        });
        for (key, value) in expected.as_object().into_iter().flatten() {
            ensure!(record.get(key) == Some(value), "{key} is not {value} in {record}");
        }
        ensure!(
            record["version"]
                .as_str()
                .is_some_and(|version| version.starts_with("4.")),
            "{record}"
        );
        ensure!(record["xlog_location"].is_u64(), "{record}");
        ensure!(is_leader || record["replication_state"] == "streaming", "{record}");
        ensure!(!entry.value.contains(": "), "not compact: {}", entry.value);
    }

    let config: Value = serde_json::from_str(&entry("config")?.value)?;
    ensure!(
        config["ttl"] == 5 && config["postgresql"]["parameters"]["max_connections"] == 50,
        "{config}"
    );
    let status: Value = serde_json::from_str(&entry("status")?.value)?;
    ensure!(
        status["optime"].is_u64() && status["slots"][leader.name()].is_u64(),
        "{status}"
    );
    Ok(())
}

/// What the YAML says of PostgreSQL holds on every member.
async fn settings_are_in_force(cluster: &Cluster, leader: &Member) -> Result<()> {
    leader
        .sql("CREATE TABLE kept AS SELECT generate_series(1, 1000) AS n")
        .await?;
    for member in cluster.members() {
        for (question, answer) in [
            ("SHOW server_encoding", "UTF8"),
            ("SHOW data_checksums", "on"),
            ("SHOW shared_buffers", "16MB"),
            ("SHOW max_connections", "50"),
            ("SHOW wal_log_hints", "on"),
            ("SHOW hot_standby", "on"),
            ("SHOW cluster_name", "testkit"),
            ("SELECT count(*) FROM pg_hba_file_rules", "3"),
            (
                "SELECT string_agg(auth_method, ' ' ORDER BY line_number) FROM pg_hba_file_rules",
                "trust scram-sha-256 scram-sha-256",
            ),
        ] {
            let seen = member.sql(question).await?;
            ensure!(seen == answer, "{}: {question}: {seen}, not {answer}", member.name());
        }
        let arrived = eventually("the table has arrived", SOON, async || {
            Ok(member.sql("SELECT count(*) FROM kept").await?)
        });
        ensure!(arrived.await? == "1000");
    }
    Ok(())
}

#[tokio::test]
async fn a_wiped_replica_is_cloned_again_with_its_tablespaces_and_its_wal_directory() -> Result<()> {
    // The first method fails, so that the second is what makes the copies.
    let methods = json!({"postgresql": {
        "create_replica_methods": ["nothing", "basebackup"], "nothing": {"command": "/bin/false"},
    }});
    let cluster = Cluster::builder().member_config(methods).prepare().await?;
    let wal = cluster.site().make_dir("wal")?;
    let space = cluster.site().make_dir("space")?;
    for member in cluster.members() {
        let own = json!({"postgresql": {"basebackup": [{"waldir": wal.join(member.name())}, "verbose"]}});
        member.alter_config(own)?;
        member.start().await?;
    }
    cluster.start_proxy().await?;
    let leader = cluster.settled().await?;
    let replica = cluster.others(leader.name())[0];
    replica.stop().await?;
    replica.wipe().await?;
    let session = leader.client().await?;
    for sql in [
        format!("CREATE TABLESPACE apart LOCATION '{}'", space.display()),
        "CREATE TABLE kept TABLESPACE apart AS SELECT generate_series(1, 10000) AS n".to_owned(),
    ] {
        session.rows(&sql, SOON).await?;
    }
    replica.start().await?;
    let after = cluster.settled().await?;
    ensure!(
        after.name() == leader.name(),
        "the leader changed while a replica was made"
    );
    ensure!(replica.sql("SELECT count(*) FROM kept").await? == "10000");
    // The leader's own directories were taken, on the same machine, and so was that of the WAL by the first copy.
    let apart = replica
        .sql("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'apart'")
        .await?;
    ensure!(apart.starts_with(&format!("{}.pgherd-", space.display())), "{apart}");
    let target = std::fs::read_link(replica.data_dir().join("pg_wal"))?;
    let first = wal.join(replica.name());
    ensure!(
        first.exists()
            && target
                .display()
                .to_string()
                .starts_with(&format!("{}.pgherd-", first.display())),
        "{}",
        target.display()
    );
    let output = replica.output().await;
    ensure!(
        output.contains("making a replica by nothing: false ended with exit status: 1"),
        "{output}"
    );
    ensure!(output.contains("the data directory was made by basebackup"), "{output}");
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_cluster_that_says_nothing_of_timing_gets_ours() -> Result<()> {
    let none = json!({"ttl": null, "loop_wait": null, "retry_timeout": null});
    let cluster = Cluster::builder().members(1).dcs(none).start().await?;
    let config = cluster.members()[0].get("/config").await?.json()?;
    let timing = [&config["ttl"], &config["loop_wait"], &config["retry_timeout"]];
    ensure!(timing == [&json!(5), &json!(1), &json!(2)], "{config}");
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn no_log_has_a_secret_of_the_configuration_however_talkative_it_is() -> Result<()> {
    let rest = json!({"username": "admin", "password": "rest-secret"});
    let cluster = Cluster::builder()
        .members(2)
        .etcd_password("etcd-secret")
        .member_config(json!({"log": {"level": "trace"}, "restapi": {"authentication": rest}}))
        .proxy_config(json!({"log": {"level": "trace"}}))
        .start()
        .await?;
    let leader = cluster.settled().await?;
    let refused = leader.ask("POST", "/reload", Some(&json!({}))).await?;
    ensure!(refused.status == 401, "{refused:?}");
    // Members' commands and members among each other present it.
    cluster.pgherd("reload", &[SCOPE, "--force"]).await?;
    let basic = "YWRtaW46cmVzdC1zZWNyZXQ="; // admin:rest-secret
    let secrets = [
        "etcd-secret",
        "rest-secret",
        basic,
        SUPERUSER_PASSWORD,
        REPLICATION_PASSWORD,
    ];
    let logs = cluster.site().dir().join("log");
    for entry in std::fs::read_dir(logs)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("etcd") {
            continue;
        }
        let log = String::from_utf8_lossy(&std::fs::read(&path)?).into_owned();
        let told = log
            .lines()
            .find(|line| secrets.iter().any(|secret| line.contains(secret)));
        ensure!(told.is_none(), "a secret is in {}: {told:?}", path.display());
        ensure!(
            log.contains("TRACE") || log.contains("DEBUG"),
            "{name} is not talkative"
        );
    }
    cluster.pass();
    Ok(())
}

/// Paths with the status on a leader and on a streaming replica; the same for GET, OPTIONS and HEAD.
const EVERY_METHOD: &[(&str, u16, u16)] = &[
    ("/", 200, 503),
    ("/leader", 200, 503),
    ("/primary", 200, 503),
    ("/master", 200, 503),
    ("/read-write", 200, 503),
    ("/standby-leader", 503, 503),
    ("/standby_leader", 503, 503),
    ("/replica", 503, 200),
    ("/replica?lag=16MB", 503, 200),
    ("/replica?tag_my_tag=abc", 503, 200),
    ("/replica?tag_my_tag=other", 503, 503),
    ("/read-only", 200, 200),
    ("/health", 200, 200),
    ("/health?tag_x=y", 503, 503),
    ("/primary?tag_x=y", 200, 503),
    ("/sync", 503, 503),
    ("/synchronous", 503, 503),
    ("/quorum", 503, 503),
    ("/async", 503, 200),
    ("/asynchronous", 503, 200),
    ("/read-only-sync", 200, 503),
    ("/read-only-quorum", 200, 503),
    ("/nosuch", 503, 503),
];

/// Paths that GET answers with 200 on every member, and OPTIONS and HEAD with 503.
const GET_ONLY: &[&str] = &[
    "/patroni",
    "/cluster",
    "/history",
    "/config",
    "/metrics",
    "/liveness",
    "/readiness",
];

#[tokio::test]
async fn rest_answers_health_checks_as_patroni_does() -> Result<()> {
    let tagged = json!({"tags": {"my_tag": "abc"}});
    let cluster = Cluster::builder().members(2).member_config(tagged).start().await?;
    let leader = cluster.settled().await?;
    let replica = cluster.others(leader.name())[0];
    eventually("the status matrix is Patroni's", SOON, async || {
        for (path, on_leader, on_replica) in EVERY_METHOD {
            for method in ["GET", "OPTIONS", "HEAD"] {
                expect(leader, method, path, *on_leader).await?;
                expect(replica, method, path, *on_replica).await?;
            }
        }
        for path in GET_ONLY {
            for member in [leader, replica] {
                expect(member, "GET", path, 200).await?;
                expect(member, "OPTIONS", path, 503).await?;
                expect(member, "HEAD", path, 503).await?;
            }
        }
        Ok(())
    })
    .await?;
    bodies_say_what_patronis_say(leader, replica).await?;
    cluster.pass();
    Ok(())
}

async fn expect(member: &Member, method: &str, path: &str, status: u16) -> Result<()> {
    let answer = member.ask(method, path, None).await?;
    ensure!(
        answer.status == status,
        "{method} {path} on {}: {}, not {status}",
        member.name(),
        answer.status
    );
    ensure!(
        method == "GET" || answer.body.is_empty(),
        "{method} {path}: a body: {}",
        answer.body
    );
    Ok(())
}

async fn bodies_say_what_patronis_say(leader: &Member, replica: &Member) -> Result<()> {
    let body = leader.get("/patroni").await?.json()?;
    ensure!(
        body["state"] == "running" && body["role"] == "primary" && body["timeline"] == 1,
        "{body}"
    );
    ensure!(
        body["xlog"]["location"].is_u64() && body["server_version"].is_u64(),
        "{body}"
    );
    ensure!(body["replication"][0]["application_name"] == replica.name(), "{body}");
    ensure!(
        body["patroni"]["scope"] == "testkit" && body["patroni"]["name"] == leader.name(),
        "{body}"
    );
    let body = replica.get("/").await?.json()?;
    ensure!(
        body["role"] == "replica" && body["replication_state"] == "streaming",
        "{body}"
    );
    ensure!(
        body["xlog"]["received_location"].is_u64() && body["xlog"]["paused"] == false,
        "{body}"
    );
    ensure!(body["tags"]["my_tag"] == "abc", "{body}");
    let body = replica.get("/cluster").await?.json()?;
    let roles: Vec<_> = body["members"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|member| member["role"].as_str())
        .collect();
    ensure!(
        roles.contains(&Some("leader")) && roles.contains(&Some("replica")),
        "{body}"
    );
    Ok(())
}

#[tokio::test]
async fn the_lists_of_pgherd_and_of_patronictl_show_the_members() -> Result<()> {
    let cluster = Cluster::builder().members(2).start().await?;
    let leader = cluster.settled().await?;
    let replica = cluster.others(leader.name())[0];
    let shown = eventually("the replica streams in the list", SOON, async || {
        let shown = cluster.pgherd("list", &[]).await?.success()?;
        ensure!(shown.contains("streaming"), "{shown}");
        Ok(shown)
    });
    check_list(&shown.await?, leader, replica)?;
    match client::patronictl(cluster.site()).await {
        Ok(patronictl) => {
            let config = client::patronictl_config(cluster.site(), &cluster.etcd().hosts())?;
            let mut command = cluster.site().client_command(patronictl);
            command.arg("-c").arg(config).arg("list");
            check_list(&cluster.site().run(command, SOON).await?.success()?, leader, replica)?;
        }
        Err(reason) => client::skip(&reason.context("patronictl")),
    }
    cluster.pass();
    Ok(())
}

fn check_list(shown: &str, leader: &Member, replica: &Member) -> Result<()> {
    let line_of = |name: &str| shown.lines().find(|line| line.contains(name)).unwrap_or_default();
    ensure!(
        line_of(leader.name()).contains("Leader") && line_of(leader.name()).contains("running"),
        "{shown}"
    );
    ensure!(
        line_of(replica.name()).contains("Replica") && line_of(replica.name()).contains("streaming"),
        "{shown}"
    );
    Ok(())
}

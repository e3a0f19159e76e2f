//! Proxies that know the cluster without its store: from members' agents, ours and Patroni's, and from hosts asked by SQL.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::address::STATS_PORT;
use pgherd_testkit::certificates::Authority;
use pgherd_testkit::process::{self, Daemon, Signal};
use pgherd_testkit::sql::{SUPERUSER, SUPERUSER_PASSWORD};
use pgherd_testkit::{Cluster, Member, Mixed, Sql, eventually, http, program};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);
/// Patroni's lease, an election, and some polls.
const LEASE_AND_ELECTION: Duration = Duration::from_secs(90);
const SQL_MAX: Duration = Duration::from_secs(5);
const COMMAND_MAX: Duration = Duration::from_secs(40);
const STOP_MAX: Duration = Duration::from_secs(40);

/// What the proxy's configuration says instead of etcd.
fn agents(members: &[&Member]) -> Value {
    let urls: Vec<String> = members
        .iter()
        .map(|member| format!("http://{}", member.rest()))
        .collect();
    json!({"etcd3": null, "proxy": {"source": "agents", "urls": urls}})
}

/// A running cluster whose proxy was told of its first member only.
async fn behind_agents() -> Result<Cluster> {
    let cluster = Cluster::builder().prepare().await?;
    for member in cluster.members() {
        member.start().await?;
    }
    let first = cluster.members().first().context("there are members")?;
    cluster.write_proxy_config(agents(&[first]))?;
    cluster.start_proxy().await?;
    cluster.settled().await?;
    Ok(cluster)
}

/// What the proxy's page is made of.
async fn state(cluster: &Cluster) -> Result<Value> {
    http::get(cluster.stats_address(), "/stats.json").await?.json()
}

/// Once a replica is known to stream it gets readers, and not the leader in its place.
async fn readers_go_to_a_replica(cluster: &Cluster) -> Result<()> {
    eventually("readers go to a replica", SOON, async || {
        let reader = Sql::connect(cluster.read_address(), SQL_MAX).await?;
        let in_recovery = reader.value("SELECT pg_is_in_recovery()", SQL_MAX).await?;
        ensure!(in_recovery == "t", "the leader has the reader");
        Ok(())
    })
    .await
}

async fn ends(session: &Sql, why: &str) -> Result<()> {
    let what = format!("the session ends, since {why}");
    eventually(&what, SOON, async || {
        ensure!(session.ended().is_some(), "it goes on");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_proxy_that_knows_one_of_our_agents_follows_the_leader_wherever_it_goes() -> Result<()> {
    let cluster = behind_agents().await?;
    // The one that the proxy was told of leads, so that all it knows next was learnt.
    let first = cluster.members().first().context("there are members")?;
    let leader = cluster.settled().await?;
    if leader.name() != first.name() {
        let args = ["--leader", leader.name(), "--candidate", first.name(), "--force"];
        cluster.pgherd("switchover", &args).await?.success()?;
        cluster.settled().await?;
    }
    let session = Sql::connect(cluster.write_address(), SQL_MAX).await?;
    first.kill_everything().await?;
    ends(&session, "its server is gone").await?;
    let second = cluster.next_leader(first.name()).await?;

    // A leader that hangs with its host says nothing, and TCP does not either.
    let session = Sql::connect(cluster.write_address(), SQL_MAX).await?;
    session.value("SELECT 1", SQL_MAX).await?;
    first.start().await?;
    cluster.settled().await?;
    let frozen = second.freeze_everything().await?;
    let ended = ends(&session, "its leader says nothing").await;
    let third = cluster.next_leader(second.name()).await;
    second.thaw(&frozen);
    ended?;
    third?;
    cluster.settled().await?;
    cluster.stop_proxy().await?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_proxy_that_knows_agents_outlives_the_store_with_its_leader() -> Result<()> {
    let cluster = behind_agents().await?;
    let leader = cluster.settled().await?;
    eventually("the failsafe list names all members", SOON, async || {
        let list = cluster.failsafe_list().await?;
        ensure!(list.as_object().is_some_and(|list| list.len() == 3), "{list}");
        Ok(())
    })
    .await?;
    let session = Sql::connect(cluster.write_address(), SQL_MAX).await?;
    cluster.etcd().stop().await?;
    // Agents say that they have lost the store; the leader goes on by the others' word, and says so.
    let fresh = eventually("the page is told of the loss and writes go on", SOON, async || {
        ensure!(state(&cluster).await?["writable"] == true, "the page says otherwise");
        Sql::connect(cluster.write_address(), SQL_MAX)
            .await
            .context("the write port")
    })
    .await?;
    ensure!(fresh.value("SELECT pg_is_in_recovery()", SQL_MAX).await? == "f");
    ensure!(
        session.value("SELECT pg_is_in_recovery()", SQL_MAX).await? == "f",
        "{leader:?}"
    );
    cluster.etcd().start_again().await?;
    cluster.settled().await?;
    cluster.pass();
    Ok(())
}

#[tokio::test]
async fn a_proxy_asks_patronis_agents_and_follows_their_leader() -> Result<()> {
    let timing = json!({"ttl": 20, "loop_wait": 1, "retry_timeout": 3});
    let mixed = Mixed::builder(Cluster::builder().dcs(timing), &["m1", "m2", "m3"], "m1")
        .start()
        .await?;
    let cluster = mixed.cluster();
    cluster.stop_proxy().await?;
    let leader = cluster.member("m1")?;
    cluster.write_proxy_config(agents(&[leader]))?;
    cluster.start_proxy().await?;
    cluster.settled().await?;
    let session = Sql::connect(cluster.write_address(), SQL_MAX).await?;
    // Its PostgreSQL lives and answers: only its agent says no longer that it leads.
    mixed.patroni().freeze(leader).await?;
    eventually(
        "the session of a leader that nobody vouches for ends",
        SOON,
        async || {
            ensure!(session.ended().is_some(), "it goes on");
            Ok(())
        },
    )
    .await?;
    ensure!(leader.is_primary().await?, "it was to be up");
    mixed.patroni().thaw(leader).await?;
    cluster.settled().await?;

    let session = Sql::connect(cluster.write_address(), SQL_MAX).await?;
    let leader = cluster.primary().await?;
    mixed.kill_everything(leader).await?;
    ends(&session, "its server is gone").await?;
    let next = eventually(
        "another leader takes writes through the proxy",
        LEASE_AND_ELECTION,
        async || {
            let server = cluster.server_behind_write_port().await?;
            ensure!(server.name() != leader.name(), "it is the former one");
            Ok(server)
        },
    )
    .await?;
    readers_go_to_a_replica(cluster).await?;
    ensure!(next.name() != leader.name());
    cluster.pass();
    Ok(())
}

/// A running cluster whose proxy asks its servers by SQL, as somebody without privileges whom they let in by TLS only.
async fn behind_hosts() -> Result<Cluster> {
    let hba = [
        "local all all trust",
        "hostssl postgres prober 127.0.0.0/8 scram-sha-256",
        "hostnossl all prober 127.0.0.0/8 reject",
        "host replication replicator 127.0.0.0/8 scram-sha-256",
        "host all all 127.0.0.0/8 scram-sha-256",
    ];
    let cluster = Cluster::builder().prepare().await?;
    let site = cluster.site();
    let authority = Authority::new(site)?;
    for member in cluster.members() {
        let own = authority.issue(site, member.name(), &[member.ip()])?;
        let parameters = json!({"ssl": "on", "ssl_cert_file": own.certificate, "ssl_key_file": own.key});
        member.alter_config(json!({"postgresql": {"pg_hba": hba, "parameters": parameters}}))?;
        member.start().await?;
    }
    eventually("somebody takes writes and knows the prober", LEASE_AND_ELECTION, async || {
        let leader = cluster.primary().await?;
        let role = "DO $$ BEGIN CREATE ROLE prober LOGIN PASSWORD 'by TLS'; EXCEPTION WHEN duplicate_object THEN NULL; END $$";
        leader.sql(role).await?;
        Ok(())
    })
    .await?;
    let password = site.write_file("probe-password", "by TLS")?;
    let hosts: Vec<String> = cluster
        .members()
        .iter()
        .map(|member| member.postgres().to_string())
        .collect();
    cluster.write_proxy_config(json!({"etcd3": null, "proxy": {
        "source": "static",
        "hosts": hosts,
        "probe": {"username": "prober", "password_file": password},
    }}))?;
    cluster.start_proxy().await?;
    Ok(cluster)
}

#[tokio::test]
async fn a_proxy_asks_hosts_by_sql_and_follows_the_one_that_takes_writes() -> Result<()> {
    let cluster = behind_hosts().await?;
    let leader = cluster.settled().await?;
    readers_go_to_a_replica(&cluster).await?;
    let session = Sql::connect(cluster.write_address(), SQL_MAX).await?;
    leader.kill_everything().await?;
    ends(&session, "its server is gone").await?;
    let next = cluster.next_leader(leader.name()).await?;

    // Two that take writes at once: nobody can tell which one is right.
    let replica = cluster
        .others(next.name())
        .into_iter()
        .find(|member| member.name() != leader.name())
        .context("there is a third")?;
    let session = Sql::connect(cluster.write_address(), SQL_MAX).await?;
    let agents = [next.freeze_agent().await?, replica.freeze_agent().await?];
    replica.sql("SELECT pg_promote()").await?;
    let refused = async {
        ends(&session, "two take writes").await?;
        eventually("the page says that nobody leads", SOON, async || {
            let state = state(&cluster).await?;
            ensure!(state["writable"] == false, "{}", state["verdict"]);
            Ok(())
        })
        .await
    };
    let refused = refused.await;
    for agent in agents {
        process::signal(agent, Signal::CONT)?;
    }
    refused?;
    cluster.pass();
    Ok(())
}

/// The example beside the images, with the addresses and paths of this test.
fn sidecar_file(cluster: &Cluster, socket_dir: &str) -> Result<String> {
    let example = program::workspace().join("docker").join("sidecar.yml");
    let mut text = std::fs::read_to_string(example)?;
    for (index, member) in cluster.members().iter().enumerate() {
        text = text.replace(
            &format!("http://10.0.0.{}:8008", index + 1),
            &format!("http://{}", member.rest()),
        );
    }
    let ip = cluster.stats_address().ip();
    Ok(text
        .replace("/run/pgherd", socket_dir)
        .replace("127.0.0.1:8080", &format!("{ip}:{STATS_PORT}"))
        .replace("scope: main", &format!("scope: {}", pgherd_testkit::config::SCOPE)))
}

fn start_sidecar(cluster: &Cluster, file: &Path) -> Result<Daemon> {
    let site = cluster.site();
    let mut command = site.command(site.reachable(&program::pgherd()?)?);
    command.arg("proxy").arg("--config").arg(file);
    site.start("sidecar", command)
}

/// What psql prints that connects to a directory, as libpq names a unix socket.
async fn psql(cluster: &Cluster, socket_dir: &str, text: &str) -> Result<String> {
    let site = cluster.site();
    let mut command = site.command(program::postgres_bin_dir()?.join("psql"));
    command
        .env("PGPASSWORD", SUPERUSER_PASSWORD)
        .env("PGCONNECT_TIMEOUT", "20");
    command.args([
        "-X", "-A", "-t", "-h", socket_dir, "-p", "5432", "-U", SUPERUSER, "-d", "postgres", "-c", text,
    ]);
    site.run(command, COMMAND_MAX).await?.success()
}

/// A sidecar that was killed leaves its socket behind, the next one replaces it, and takes it away when it is stopped.
async fn replaced_after_a_kill(cluster: &Cluster, mut killed: Daemon, file: &Path, socket_dir: &str) -> Result<()> {
    let socket = Path::new(socket_dir).join(".s.PGSQL.5432");
    process::signal(killed.pid(), Signal::KILL)?;
    killed.end(STOP_MAX).await?;
    ensure!(socket.exists(), "a kill leaves it");
    let mut next = start_sidecar(cluster, file)?;
    eventually("the next one serves", SOON, async || {
        psql(cluster, socket_dir, "SELECT 1").await.context("a session")
    })
    .await?;
    process::signal(next.pid(), Signal::TERM)?;
    let status = next.end(STOP_MAX).await?;
    ensure!(status.success() && !socket.exists(), "{status}");
    Ok(())
}

#[tokio::test]
async fn the_example_of_a_sidecar_waits_for_its_cluster_says_so_and_serves_it_through_its_socket() -> Result<()> {
    let cluster = Cluster::builder().prepare().await?;
    let dir = cluster.site().make_dir("sidecar")?;
    let socket_dir = dir.to_str().context("a plain name")?;
    let text = sidecar_file(&cluster, socket_dir)?;
    let file = cluster.site().write_file("sidecar.yml", &text)?;
    let sidecar = start_sidecar(&cluster, &file)?;
    eventually("the page says what is waited for", SOON, async || {
        let state = state(&cluster).await?;
        ensure!(state["verdict"]["word"] == "STARTING", "{}", state["verdict"]);
        let error = state["view"]["store_error"].as_str().unwrap_or_default();
        ensure!(error.contains("no agent answers"), "{}", state["view"]);
        Ok(())
    })
    .await?;
    let health = http::get(cluster.stats_address(), "/healthz").await?;
    ensure!(health.status == 200, "{health:?}");
    let refused = psql(&cluster, socket_dir, "SELECT 1")
        .await
        .err()
        .context("there is no cluster")?;
    let refused = format!("{refused:#}");
    let waited_for = "nothing is known of the cluster yet: no member's agent has answered since this proxy started";
    ensure!(refused.contains(waited_for), "{refused}");
    let log = sidecar.output();
    ensure!(
        log.contains("nothing is known of the cluster for") && log.contains("no agent answers"),
        "{log}"
    );

    for member in cluster.members() {
        member.start().await?;
    }
    eventually("a write goes through the socket", LEASE_AND_ELECTION, async || {
        let made = psql(&cluster, socket_dir, "CREATE TABLE IF NOT EXISTS sidecar (n int)").await;
        made.context("a write")
    })
    .await?;
    let leader = eventually("one member leads, and two follow it", LEASE_AND_ELECTION, async || {
        let leader = cluster.primary().await?;
        let followers = cluster.followers(leader).await;
        ensure!(followers == 2, "{followers} follow {leader:?}");
        Ok(leader)
    })
    .await?;
    leader.kill_everything().await?;
    eventually("writes go on at another", LEASE_AND_ELECTION, async || {
        psql(&cluster, socket_dir, "INSERT INTO sidecar VALUES (1)")
            .await
            .context("a write")
    })
    .await?;
    eventually("an idle sidecar says so", SOON, async || {
        let state = state(&cluster).await?;
        ensure!(
            state["verdict"]["word"] == "IDLE" && state["writable"] == true,
            "{}",
            state["verdict"]
        );
        Ok(())
    })
    .await?;

    replaced_after_a_kill(&cluster, sidecar, &file, socket_dir).await?;
    cluster.pass();
    Ok(())
}

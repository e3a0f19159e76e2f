//! The operator's commands: patronictl as it comes from PyPI, and ours under both of our names, each against our agents.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::client::{self, skip};
use pgherd_testkit::config::SCOPE;
use pgherd_testkit::sql::{SUPERUSER, SUPERUSER_PASSWORD};
use pgherd_testkit::{Cluster, Member, Outcome, eventually, program};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(30);
const RUN_MAX: Duration = Duration::from_secs(60);
const NEVER: &str = "2040-01-01T00:00:00+00:00";

/// A `patronictl`: by whose code.
struct Ctl<'a> {
    cluster: &'a Cluster,
    program: PathBuf,
    config: PathBuf,
}

impl<'a> Ctl<'a> {
    /// Patroni's, where it can be had.
    async fn of_patroni(cluster: &'a Cluster) -> Result<Self> {
        Self::new(cluster, client::patronictl(cluster.site()).await?)
    }

    /// Ours, called by that name.
    fn of_pgherd(cluster: &'a Cluster) -> Result<Self> {
        let dir = cluster.site().dir().join("called");
        std::fs::create_dir_all(&dir)?;
        let program = dir.join("patronictl");
        std::os::unix::fs::symlink(cluster.site().reachable(&program::pgherd()?)?, &program)?;
        Self::new(cluster, program)
    }

    fn new(cluster: &'a Cluster, program: PathBuf) -> Result<Self> {
        let config = client::patronictl_config(cluster.site(), &cluster.etcd().hosts())?;
        Ok(Self {
            cluster,
            program,
            config,
        })
    }

    async fn run(&self, words: &[&str]) -> Result<Outcome> {
        let mut command: Command = self.cluster.site().client_command(&self.program);
        command.env("PGPASSWORD", SUPERUSER_PASSWORD);
        command.arg("-c").arg(&self.config).args(words);
        self.cluster.site().run(command, RUN_MAX).await
    }

    /// Runs it, and finds `expected` in what it says.
    async fn says(&self, words: &[&str], expected: &str) -> Result<String> {
        let said = self.run(words).await?.success().with_context(|| format!("{words:?}"))?;
        ensure!(
            said.contains(expected),
            "{words:?} says nothing of {expected:?}:\n{said}"
        );
        Ok(said)
    }

    /// Runs it, and hears an error.
    async fn refuses(&self, words: &[&str], expected: &str) -> Result<()> {
        let outcome = self.run(words).await?;
        let said = format!("{}{}", outcome.stdout, outcome.stderr);
        ensure!(
            outcome.code == Some(1) && said.contains(expected),
            "{words:?}: {outcome:?}"
        );
        Ok(())
    }
}

async fn streams(cluster: &Cluster) -> Result<(&Member, &Member)> {
    let leader = cluster.settled().await?;
    let replica = *cluster.others(leader.name()).first().context("there are two")?;
    eventually("the replica's key says that it streams", SOON, async || {
        let record = cluster.record(replica).await?;
        ensure!(record["replication_state"] == "streaming", "{record}");
        Ok(())
    })
    .await?;
    Ok((leader, replica))
}

#[tokio::test]
async fn patronictls_commands_work_on_our_members_by_patronis_code_and_by_ours() -> Result<()> {
    let cluster = Cluster::builder().members(2).start().await?;
    streams(&cluster).await?;
    let ours = Ctl::of_pgherd(&cluster)?;
    match Ctl::of_patroni(&cluster).await {
        Ok(patronis) => {
            same_output(&patronis, &ours).await?;
            all_commands(&cluster, &patronis).await?;
            same_output(&patronis, &ours).await?;
        }
        Err(reason) => skip(&reason.context("patronictl")),
    }
    all_commands(&cluster, &ours).await?;
    truthful_exit_codes(&cluster, &ours).await?;
    what_patronictl_has_not(&cluster).await?;
    cluster.pass();
    Ok(())
}

/// To the byte, once nothing moves.
async fn same_output(patronis: &Ctl<'_>, ours: &Ctl<'_>) -> Result<()> {
    for words in [
        ["list"].as_slice(),
        &["list", "-e", "-f", "tsv"],
        &["list", "-f", "json"],
        &["list", "-f", "yaml"],
        &["topology"],
        &["history"],
        &["history", "-f", "json"],
        &["show-config"],
        &["dsn"],
        &["dsn", "-r", "replica"],
        &["list", "nosuchcluster"],
    ] {
        eventually("both print the same", SOON, async || {
            let (theirs, ours) = (patronis.run(words).await?.success()?, ours.run(words).await?.success()?);
            ensure!(theirs == ours, "{words:?}:\n{theirs}\n{ours}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// Each once, by patronictl's words.
async fn all_commands(cluster: &Cluster, ctl: &Ctl<'_>) -> Result<()> {
    let (leader, replica) = streams(cluster).await?;
    configuration(cluster, ctl, leader).await?;
    maintenance(cluster, ctl, replica).await?;

    let (name, scope) = (replica.name(), SCOPE);
    ctl.says(
        &["reload", scope, "--force"],
        &format!("Reload request received for member {name}"),
    )
    .await?;
    let before = replica.postmaster_pid()?;
    let restarted = format!("Success: restart on member {name}");
    ctl.says(&["restart", scope, name, "--force"], &restarted).await?;
    ensure!(replica.postmaster_pid()? != before, "it was not restarted");
    streams(cluster).await?;
    let at = ["restart", scope, name, "--scheduled", NEVER, "--force"];
    ctl.says(&at, &format!("Success: restart scheduled on member {name}"))
        .await?;
    eventually("the schedule is seen", SOON, async || {
        let flushed = format!("Success: flush scheduled restart for member {name}");
        ctl.says(&["flush", scope, name, "restart", "--force"], &flushed).await
    })
    .await?;

    let switchover = ["switchover", "--leader", leader.name(), "--candidate", name, "--force"];
    ctl.says(
        &[&switchover[..], &["--scheduled", NEVER]].concat(),
        "Switchover scheduled",
    )
    .await?;
    ctl.says(&["list"], " Switchover scheduled at: 2040").await?;
    ctl.says(
        &["flush", scope, "switchover", "--force"],
        "scheduled switchover deleted",
    )
    .await?;
    ctl.says(&switchover, &format!("Successfully switched over to \"{name}\""))
        .await?;
    ensure!(streams(cluster).await?.0.name() == name);
    let failover = ["failover", "--candidate", leader.name(), "--force"];
    ctl.says(&failover, &format!("Successfully failed over to \"{}\"", leader.name()))
        .await?;
    ensure!(streams(cluster).await?.0.name() == leader.name());

    let query = [
        "query",
        "-U",
        SUPERUSER,
        "-d",
        "postgres",
        "-c",
        "select 1 as a, 2 as b",
    ];
    ctl.says(&query, "a\tb\n1\t2\n").await?;
    ctl.says(&["version", scope], &format!("{name}: Patroni 4.1.4 PostgreSQL "))
        .await?;
    Ok(())
}

async fn configuration(cluster: &Cluster, ctl: &Ctl<'_>, leader: &Member) -> Result<()> {
    let now = leader.sql("SHOW log_min_duration_statement").await?;
    let value = if now == "777ms" { "888" } else { "777" };
    let pair = format!("log_min_duration_statement={value}");
    let line = format!("+    log_min_duration_statement: {value}");
    ctl.says(&["edit-config", "-p", &pair, "--force"], &line).await?;
    eventually("it is in force", SOON, async || {
        let shown = leader.sql("SHOW log_min_duration_statement").await?;
        ensure!(shown == format!("{value}ms"), "{shown}");
        Ok(())
    })
    .await?;
    ctl.says(&["show-config"], &format!("log_min_duration_statement: {value}"))
        .await?;
    ctl.says(&["edit-config", "-p", &pair, "--force"], "Not changed")
        .await?;
    ensure!(cluster.settled().await?.name() == leader.name());
    Ok(())
}

/// In a pause a member is cloned anew when that is asked for, and is started.
async fn maintenance(cluster: &Cluster, ctl: &Ctl<'_>, replica: &Member) -> Result<()> {
    ctl.says(&["pause"], "Success: cluster management is paused").await?;
    cluster.pause_is_seen(true).await?;
    ctl.says(&["list"], " Maintenance mode: on").await?;
    ctl.refuses(&["pause"], "Cluster is already paused").await?;
    let scheduled = ["switchover", "--force", "--scheduled", NEVER];
    ctl.refuses(&scheduled, "Can't schedule switchover in the paused state")
        .await?;
    let before = replica.postmaster_pid()?;
    let reinit = ["reinit", SCOPE, replica.name(), "--force", "--from-leader", "--wait"];
    let said = ctl
        .says(&reinit, &format!("Success: reinitialize for member {}", replica.name()))
        .await?;
    ensure!(said.contains("Reinitialize is completed on"), "{said}");
    eventually("it streams in the pause", SOON, async || {
        ensure!(replica.postmaster_pid()? != before, "it was not cloned");
        let status = replica.get("/patroni").await?.json()?;
        ensure!(status["replication_state"] == "streaming", "{status}");
        Ok(())
    })
    .await?;
    ctl.says(&["resume"], "Success: cluster management is resumed").await?;
    cluster.pause_is_seen(false).await?;
    streams(cluster).await?;
    Ok(())
}

/// Where patronictl says that something failed and ends with 0.
async fn truthful_exit_codes(cluster: &Cluster, ours: &Ctl<'_>) -> Result<()> {
    let (leader, replica) = streams(cluster).await?;
    let (leads, follows) = (leader.name(), replica.name());
    ours.refuses(&["switchover", "--leader", follows, "--force"], "is not the leader")
        .await?;
    ours.refuses(
        &["reinit", SCOPE, leads, "--force"],
        "No replica among provided members",
    )
    .await?;
    ours.refuses(&["restart", SCOPE, "m9", "--force"], "m9 is not a member of cluster")
        .await?;
    let query = ["query", "-U", SUPERUSER, "-d", "postgres", "-c", "select nonsense"];
    ours.refuses(&query, "ERROR, SQLSTATE: 42703").await?;
    let wrong = ours.run(&["switchover", "--nonsense"]).await?;
    ensure!(wrong.code == Some(2), "{wrong:?}");

    for (command, words, instead) in [
        ("switchover", ["--leader", leads].as_slice(), "say --force"),
        ("restart", &[SCOPE], "say --force"),
        ("remove", &[SCOPE], "say --confirm NAME"),
        ("edit-config", &[], "say -s KEY=VALUE"),
    ] {
        let asked = cluster.pgherd(command, words).await?;
        ensure!(asked.code == Some(64) && asked.stderr.contains(instead), "{asked:?}");
    }
    ensure!(streams(cluster).await?.0.name() == leads);
    Ok(())
}

async fn what_patronictl_has_not(cluster: &Cluster) -> Result<()> {
    let (leader, replica) = streams(cluster).await?;
    leader
        .sql("CREATE TABLE IF NOT EXISTS filled AS SELECT generate_series(1, 10000)")
        .await?;
    let forecast = cluster.pgherd("switchover", &["--dry-run"]).await?.success()?;
    for expected in [
        replica.name(),
        "checkpoint: ",
        "archiver: off",
        "Writes would stand still for ",
    ] {
        ensure!(forecast.contains(expected), "{expected}: {forecast}");
    }
    ensure!(
        streams(cluster).await?.0.name() == leader.name(),
        "a forecast changes nothing"
    );

    // The replica first, then the lead moves, then the former leader.
    let postmasters = [leader.postmaster_pid()?, replica.postmaster_pid()?];
    let rolled = cluster
        .pgherd("restart", &[SCOPE, "--rolling", "--force"])
        .await?
        .success()?;
    let order = [
        format!("Success: restart on member {}", replica.name()),
        format!("Successfully switched over to \"{}\"", replica.name()),
        "Writes stood still for ".to_owned(),
        format!("Success: restart on member {}", leader.name()),
    ];
    let places: Vec<Option<usize>> = order.iter().map(|line| rolled.find(line)).collect();
    ensure!(
        places.iter().all(Option::is_some) && places.is_sorted(),
        "{places:?}: {rolled}"
    );
    let (after, former) = streams(cluster).await?;
    ensure!(after.name() == replica.name(), "{after:?} leads");
    let still = [
        former.postmaster_pid()? == postmasters[0],
        after.postmaster_pid()? == postmasters[1],
    ];
    ensure!(
        still == [false, false],
        "not restarted: {still:?} of {former:?} and {after:?}"
    );

    let reinit = cluster
        .pgherd("reinit", &[SCOPE, former.name(), "--force", "--wait"])
        .await?
        .success()?;
    ensure!(reinit.contains("Reinitialize is completed on"), "{reinit}");
    streams(cluster).await?;

    // Another cluster's keys, whose data nobody touches.
    cluster
        .etcd()
        .ctl(&["put", "/service/gone/config", "{}"])
        .await?
        .success()?;
    cluster
        .pgherd("remove", &["gone", "--confirm", "gone"])
        .await?
        .success()?;
    ensure!(cluster.etcd().entries("/service/gone/").await?.is_empty());
    let rows: Value = serde_json::from_str(&cluster.pgherd("list", &["-f", "json"]).await?.success()?)?;
    ensure!(rows.as_array().is_some_and(|rows| rows.len() == 2), "{rows}");
    Ok(())
}

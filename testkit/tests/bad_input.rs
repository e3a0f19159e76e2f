//! What a user sees who got something wrong: which key, which value, what to do; an exit code; and nothing deleted.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::address::{ETCD_CLIENT_PORT, WRITE_PORT, at};
use pgherd_testkit::config::{self, MemberPlace, PREFIX};
use pgherd_testkit::postgres::initdb;
use pgherd_testkit::process::{self, Signal};
use pgherd_testkit::{Etcd, Outcome, Postgres, Site, eventually, program, yaml};
use serde_json::{Value, json};

const CONFIGURATION: i32 = 64;
const UNAVAILABLE: i32 = 69;
const RUN_MAX: Duration = Duration::from_secs(30);

/// One member's configuration, with what the test gets wrong. Nobody listens where it says that etcd is.
struct Lone {
    site: Arc<Site>,
    config: Value,
}

impl Lone {
    fn new() -> Result<Self> {
        let site = Arc::new(Site::new()?);
        let nobody = vec![at(site.addresses().nobody(), ETCD_CLIENT_PORT).to_string()];
        let dir = site.make_dir("m1")?;
        let bin_dir = program::postgres_bin_dir()?;
        let place = MemberPlace {
            name: "m1",
            ip: site.addresses().member(0),
            dir: &dir,
            bin_dir: &bin_dir,
        };
        let config = config::member(&place, config::etcd3(&nobody, None), config::dcs());
        Ok(Self { site, config })
    }

    fn with(mut self, wrong: Value) -> Self {
        config::merge(&mut self.config, wrong);
        self
    }

    fn use_etcd(&mut self, etcd: &Etcd) {
        self.config["etcd3"] = config::etcd3(&etcd.hosts(), etcd.credentials());
    }

    fn data_dir(&self) -> PathBuf {
        self.site.dir().join("m1/data")
    }

    fn command(&self, subcommand: &str) -> Result<std::process::Command> {
        let file = self.site.write_file("m1.yml", &yaml::write(&self.config))?;
        let mut command = self.site.command(self.site.reachable(&program::pgherd()?)?);
        command.args(subcommand.split(' ')).arg(file);
        Ok(command)
    }

    /// Runs `pgherd SUBCOMMAND FILE` to its end.
    async fn run(&self, subcommand: &str) -> Result<Outcome> {
        self.site.run(self.command(subcommand)?, RUN_MAX).await
    }

    /// Runs it, and expects `code`, and on standard error one line with all of `words` that does not panic.
    async fn refused(&self, subcommand: &str, code: i32, words: &[&str]) -> Result<()> {
        let outcome = self.run(subcommand).await?;
        ensure!(
            outcome.code == Some(code),
            "exit code {:?}, not {code}: {}",
            outcome.code,
            outcome.stderr
        );
        let line = outcome
            .stderr
            .lines()
            .find(|line| words.iter().all(|word| line.contains(word)));
        ensure!(line.is_some(), "no line has all of {words:?}:\n{}", outcome.stderr);
        ensure!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
        Ok(())
    }

    fn pass(&self) {
        self.site.pass();
    }
}

/// The names, sizes and inodes of all files below.
fn contents(dir: &Path) -> Result<Vec<(PathBuf, u64, u64)>> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir)? {
            let (path, metadata) = entry.and_then(|entry| Ok((entry.path(), entry.metadata()?)))?;
            if metadata.is_dir() {
                dirs.push(path.clone());
            }
            found.push((path, metadata.len(), metadata.ino()));
        }
    }
    found.sort();
    Ok(found)
}

#[tokio::test]
async fn an_unknown_key_of_patronis_is_a_warning_with_the_nearest_name() -> Result<()> {
    let lone = Lone::new()?.with(json!({"postgresql": {"data_dri": "/x"}}));
    let outcome = lone.run("check --file-only").await?;
    ensure!(outcome.code == Some(0), "{outcome:?}");
    let told = [outcome.stdout, outcome.stderr].concat();
    ensure!(
        told.contains("postgresql.data_dri") && told.contains("data_dir?"),
        "{told}"
    );
    lone.pass();
    Ok(())
}

#[tokio::test]
async fn an_unknown_key_of_ours_is_refused_with_the_nearest_name() -> Result<()> {
    let lone = Lone::new()?.with(json!({"proxy": {"lisners": [], "listeners": []}}));
    lone.refused("agent", CONFIGURATION, &["proxy.lisners", "listeners?"])
        .await?;
    lone.pass();
    Ok(())
}

#[tokio::test]
async fn a_value_of_the_wrong_type_is_named() -> Result<()> {
    for (wrong, words) in [
        (
            json!({"bootstrap": {"dcs": {"ttl": "soon"}}}),
            &["bootstrap.dcs.ttl", "soon"][..],
        ),
        (
            json!({"postgresql": {"parameters": "fast"}}),
            &["postgresql.parameters", "fast"],
        ),
        (
            json!({"postgresql": {"listen": "127.0.0.1:port"}}),
            &["postgresql.listen", "127.0.0.1:port"],
        ),
        (json!({"name": ["m1"]}), &["name"]),
    ] {
        let lone = Lone::new()?.with(wrong);
        lone.refused("agent", CONFIGURATION, words).await?;
        lone.pass();
    }
    Ok(())
}

#[tokio::test]
async fn times_that_cannot_work_together_are_refused() -> Result<()> {
    let wrong = json!({"bootstrap": {"dcs": {"ttl": 5, "loop_wait": 5, "retry_timeout": 10}}});
    let lone = Lone::new()?.with(wrong);
    lone.refused("agent", CONFIGURATION, &["ttl", "loop_wait", "retry_timeout", "25"])
        .await?;
    lone.pass();
    Ok(())
}

#[tokio::test]
async fn a_file_that_is_no_yaml_is_told_with_the_line() -> Result<()> {
    let lone = Lone::new()?;
    let file = lone
        .site
        .write_file("broken.yml", "scope: a\nname: [m1\nrestapi: {}\n")?;
    for (file, words) in [
        (file, &["broken.yml", "line"][..]),
        (PathBuf::from("/nowhere/m1.yml"), &["/nowhere/m1.yml"]),
    ] {
        let mut command = lone.site.command(lone.site.reachable(&program::pgherd()?)?);
        command.arg("agent").arg(file);
        let outcome = lone.site.run(command, RUN_MAX).await?;
        ensure!(outcome.code == Some(CONFIGURATION), "{outcome:?}");
        ensure!(
            words.iter().all(|word| outcome.stderr.contains(word)),
            "not all of {words:?}: {}",
            outcome.stderr
        );
    }
    lone.pass();
    Ok(())
}

#[tokio::test]
async fn a_taken_port_is_named_with_who_holds_it() -> Result<()> {
    let lone = Lone::new()?;
    let holder = Postgres::start(&lone.site, "other", lone.site.addresses().member(0)).await?;
    let (address, pid) = (
        holder.address().to_string(),
        holder.pid().await?.as_raw_nonzero().to_string(),
    );
    lone.refused("agent", UNAVAILABLE, &["postgresql.listen", &address, &pid, "postgres"])
        .await?;
    ensure!(!lone.data_dir().exists(), "a data directory was made");
    lone.pass();
    Ok(())
}

#[tokio::test]
async fn a_taken_port_of_the_proxy_is_named() -> Result<()> {
    let mut lone = Lone::new()?;
    let ip = lone.site.addresses().proxy(0);
    lone.config = config::proxy(ip, lone.config["etcd3"].clone());
    let taken = TcpListener::bind(at(ip, WRITE_PORT))?;
    lone.refused(
        "proxy",
        UNAVAILABLE,
        &["proxy.listeners[0].address", &taken.local_addr()?.to_string()],
    )
    .await?;
    lone.pass();
    Ok(())
}

#[tokio::test]
async fn the_data_directory_of_another_cluster_is_left_alone() -> Result<()> {
    let mut lone = Lone::new()?;
    let etcd = Etcd::start(&lone.site, 1).await?;
    lone.use_etcd(&etcd);
    etcd.ctl(&["put", &format!("{PREFIX}initialize"), "7000000000000000001"])
        .await?
        .success()?;
    let data_dir = initdb(&lone.site, "m1").await?;
    let mut controldata = lone.site.command(program::postgres_bin_dir()?.join("pg_controldata"));
    controldata.arg(&data_dir);
    let controldata = lone.site.run(controldata, RUN_MAX).await?.success()?;
    let system_id = controldata
        .lines()
        .find_map(|line| line.strip_prefix("Database system identifier:"));
    let system_id = system_id.context("pg_controldata tells it")?.trim();
    let before = contents(&data_dir)?;

    lone.refused(
        "agent",
        CONFIGURATION,
        &[system_id, "7000000000000000001", &data_dir.display().to_string()],
    )
    .await?;
    ensure!(contents(&data_dir)? == before, "the data directory was changed");
    ensure!(
        etcd.entry(&format!("{PREFIX}leader")).await?.is_none(),
        "it took the lead"
    );
    lone.pass();
    Ok(())
}

#[tokio::test]
async fn a_directory_with_foreign_files_is_left_alone() -> Result<()> {
    let lone = Lone::new()?;
    lone.site.make_dir("m1/data")?;
    lone.site.write_file("m1/data/precious.txt", "mine")?;
    let before = contents(&lone.data_dir())?;
    let words = ["postgresql.data_dir", "precious.txt", "PG_VERSION"];
    lone.refused("agent", UNAVAILABLE, &words).await?;
    ensure!(contents(&lone.data_dir())? == before, "the directory was changed");
    lone.pass();
    Ok(())
}

#[tokio::test]
async fn a_data_directory_that_others_may_enter_is_refused_with_the_command_that_mends_it() -> Result<()> {
    let lone = Lone::new()?;
    initdb(&lone.site, "m1").await?;
    fs::set_permissions(lone.data_dir(), fs::Permissions::from_mode(0o777))?;
    lone.refused("agent", UNAVAILABLE, &["postgresql.data_dir", "0777", "chmod"])
        .await?;
    lone.pass();
    Ok(())
}

#[tokio::test]
async fn a_data_directory_of_another_user_is_refused_with_the_command_that_mends_it() -> Result<()> {
    let lone = Lone::new()?;
    initdb(&lone.site, "m1").await?;
    let daemon = 1;
    if chown(lone.data_dir(), Some(daemon), None).is_err() {
        println!("skipped: only root can give a directory away");
    } else {
        lone.refused("agent", UNAVAILABLE, &["postgresql.data_dir", "chown"])
            .await?;
    }
    lone.pass();
    Ok(())
}

#[tokio::test]
async fn missing_programs_are_named_with_the_package() -> Result<()> {
    let lone = Lone::new()?.with(json!({"postgresql": {"bin_dir": "/nowhere/bin"}}));
    lone.refused("agent", UNAVAILABLE, &["postgresql.bin_dir", "/nowhere/bin"])
        .await?;
    lone.pass();
    Ok(())
}

#[tokio::test]
async fn a_wrong_password_for_etcd_is_said_and_not_shown() -> Result<()> {
    let mut lone = Lone::new()?;
    let mut etcd = Etcd::start(&lone.site, 1).await?;
    etcd.enable_auth("right-one").await?;
    lone.config["etcd3"] = config::etcd3(&etcd.hosts(), Some(("root", "wrong-one")));
    lone.refused("agent", CONFIGURATION, &["etcd3", "password", "root"])
        .await?;
    ensure!(
        !lone.run("agent").await?.stderr.contains("wrong-one"),
        "the password is in the message"
    );
    lone.pass();
    Ok(())
}

#[tokio::test]
async fn an_unreachable_etcd_is_waited_for_aloud() -> Result<()> {
    let lone = Lone::new()?;
    let mut agent = lone.site.start("m1", lone.command("agent")?)?;
    eventually("it says again and again how many members answer", RUN_MAX, async || {
        let output = agent.output();
        let said = output.lines().filter(|line| line.contains("0 of 1")).count();
        let ended = agent.ended()?;
        ensure!(
            said >= 3 && ended.is_none(),
            "said {said} times, ended {ended:?}: {output}"
        );
        Ok(())
    })
    .await?;
    process::signal(agent.pid(), Signal::TERM)?;
    let status = agent.end(RUN_MAX).await?;
    ensure!(status.success(), "it was stopped and ended with {status}");
    ensure!(
        !lone.data_dir().exists(),
        "it made a data directory without knowing of the cluster"
    );
    lone.pass();
    Ok(())
}

#[tokio::test]
async fn another_store_than_etcd_is_refused() -> Result<()> {
    for store in ["consul", "zookeeper", "kubernetes"] {
        let lone = Lone::new()?.with(json!({"etcd3": null, store: {"host": "127.0.0.1"}}));
        lone.refused("agent", CONFIGURATION, &[store, "etcd3"]).await?;
        lone.pass();
    }
    Ok(())
}

#[tokio::test]
async fn postgresql_is_not_started_as_root() -> Result<()> {
    let lone = Lone::new()?;
    let mut as_root = lone.site.client_command(program::pgherd()?);
    if fs::metadata(lone.site.dir())?.uid() == fs::metadata("/proc/self")?.uid() {
        println!("skipped: the tests do not run as root");
    } else {
        as_root
            .arg("agent")
            .arg(lone.site.write_file("m1.yml", &yaml::write(&lone.config))?);
        let outcome = lone.site.run(as_root, RUN_MAX).await?;
        ensure!(
            outcome.code == Some(CONFIGURATION) && outcome.stderr.contains("root"),
            "{outcome:?}"
        );
    }
    lone.pass();
    Ok(())
}

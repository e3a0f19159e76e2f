//! Patroni itself, as it comes from PyPI: members of a cluster that are its own, and `patronictl`.
//!
//! A Patroni member is started on the very configuration file that a member of ours would be started on.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tokio::sync::Mutex;

use crate::client::patronictl_config;
use crate::etcd::Etcd;
use crate::member::Member;
use crate::process::{self, Daemon, Pid, Signal};
use crate::program;
use crate::site::{Outcome, Site};

const STOP_MAX: Duration = Duration::from_secs(60);
const KILL_MAX: Duration = Duration::from_secs(10);
const COMMAND_MAX: Duration = Duration::from_secs(60);

/// The environment variable that names the Python environment.
const ENVIRONMENT_ENV: &str = "PGHERD_TEST_PYTHON";

/// Where `scripts/deps.sh tests` makes the Python environment.
fn environment_dir() -> Result<PathBuf> {
    match std::env::var_os(ENVIRONMENT_ENV) {
        Some(named) => Ok(PathBuf::from(named)),
        None => Ok(program::tests_cache()?.join("python")),
    }
}

/// Patroni's programs, and those of a cluster's members that they run.
pub struct Patroni {
    site: Arc<Site>,
    bin_dir: PathBuf,
    patronictl_config: PathBuf,
    daemons: Mutex<BTreeMap<String, Daemon>>,
}

impl Patroni {
    /// Finds the programs.
    ///
    /// # Errors
    /// When `scripts/deps.sh tests` has not installed them.
    pub fn new(site: &Arc<Site>, etcd: &Etcd) -> Result<Self> {
        let bin_dir = environment_dir()?.join("bin");
        ensure!(
            bin_dir.join("patroni").is_file(),
            "there is no Patroni in {} (scripts/deps.sh tests)",
            bin_dir.display()
        );
        Ok(Self {
            site: Arc::clone(site),
            bin_dir,
            patronictl_config: patronictl_config(site, &etcd.hosts())?,
            daemons: Mutex::default(),
        })
    }

    /// Starts Patroni as `member`. Does not wait for anything that it does.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn start(&self, member: &Member) -> Result<()> {
        let mut command = self.site.command(self.bin_dir.join("patroni"));
        command.arg(member.config_file());
        let daemon = self.site.start(member.name(), command)?;
        self.daemons.lock().await.insert(member.name().to_owned(), daemon);
        Ok(())
    }

    async fn take(&self, member: &Member) -> Result<Daemon> {
        let taken = self.daemons.lock().await.remove(member.name());
        taken.with_context(|| format!("no Patroni runs as {}", member.name()))
    }

    /// The process of `member`'s Patroni, which is not PostgreSQL's parent.
    ///
    /// # Errors
    /// When none runs.
    pub async fn pid(&self, member: &Member) -> Result<Pid> {
        let daemons = self.daemons.lock().await;
        let daemon = daemons.get(member.name());
        Ok(daemon
            .with_context(|| format!("no Patroni runs as {}", member.name()))?
            .pid())
    }

    /// Stops `member` with SIGTERM, and waits until nothing of it is left.
    ///
    /// # Errors
    /// When it does not run or does not end.
    pub async fn stop(&self, member: &Member) -> Result<()> {
        let mut daemon = self.take(member).await?;
        process::signal(daemon.pid(), Signal::TERM)?;
        daemon.end(STOP_MAX).await?;
        member.wait_until_gone(KILL_MAX).await
    }

    /// Stops the Patroni of `member` with SIGTERM, and waits for its end: in a pause PostgreSQL goes on.
    ///
    /// # Errors
    /// When it does not run or does not end.
    pub async fn stop_keeping_postgres(&self, member: &Member) -> Result<()> {
        let mut daemon = self.take(member).await?;
        process::signal(daemon.pid(), Signal::TERM)?;
        daemon.end(STOP_MAX).await?;
        Ok(())
    }

    /// Stops the Patroni of `member` with SIGSTOP: PostgreSQL goes on.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn freeze(&self, member: &Member) -> Result<()> {
        self.signal(member, Signal::STOP).await
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn thaw(&self, member: &Member) -> Result<()> {
        self.signal(member, Signal::CONT).await
    }

    async fn signal(&self, member: &Member, signal: Signal) -> Result<()> {
        let daemons = self.daemons.lock().await;
        let daemon = daemons.get(member.name());
        let daemon = daemon.with_context(|| format!("no Patroni runs as {}", member.name()))?;
        process::signal(daemon.pid(), signal)
    }

    /// Ends everything of `member` with SIGKILL: Patroni and PostgreSQL.
    ///
    /// # Errors
    /// When it does not run or something does not end.
    pub async fn kill_everything(&self, member: &Member) -> Result<()> {
        let mut daemon = self.take(member).await?;
        let mut family: Vec<Pid> = process::descendants(daemon.pid())
            .iter()
            .map(|process| process.pid)
            .collect();
        family.push(daemon.pid());
        process::kill_all(KILL_MAX, || {
            let mut left: Vec<Pid> = family.iter().copied().filter(|pid| process::is_alive(*pid)).collect();
            left.extend(member.postgres_processes().iter().map(|process| process.pid));
            left
        })?;
        daemon.end(KILL_MAX).await?;
        Ok(())
    }

    /// What the Patroni of `member` has written since its last start.
    pub async fn output(&self, member: &Member) -> String {
        let daemons = self.daemons.lock().await;
        daemons.get(member.name()).map(Daemon::output).unwrap_or_default()
    }

    /// Runs `patronictl ARGS`.
    ///
    /// # Errors
    /// When it does not end within a minute.
    pub async fn ctl(&self, args: &[&str]) -> Result<Outcome> {
        let mut command = self.site.client_command(self.bin_dir.join("patronictl"));
        command.arg("-c").arg(&self.patronictl_config).args(args);
        self.site.run(command, COMMAND_MAX).await
    }

    /// The rows of `patronictl list`, by member.
    ///
    /// # Errors
    /// When it fails or shows something else than rows.
    pub async fn list(&self) -> Result<BTreeMap<String, Value>> {
        let text = self.ctl(&["list", "-f", "json"]).await?.success()?;
        let rows: Vec<Value> = serde_json::from_str(&text).with_context(|| format!("patronictl list: {text}"))?;
        let named = rows.into_iter().map(|row| {
            let name = row["Member"].as_str().context("a row without a member")?.to_owned();
            Ok((name, row))
        });
        named.collect()
    }
}

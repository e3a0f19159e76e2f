//! One member of a cluster: its processes, its faults, and what it answers.

use std::fmt;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tokio::sync::Mutex;

use crate::address::{POSTGRES_PORT, REST_PORT, at};
use crate::http::{self, Answer};
use crate::process::{self, Daemon, Pid, Process, Signal};
use crate::site::Site;
use crate::sql::{Sql, SqlFailure, value};
use crate::volume::Volume;
use crate::wait::eventually;
use crate::{program, yaml};

/// The agent proper is the keeper's child with this in its environment.
const AGENT_ENV: &str = "PGHERD_KEEPER_LINK";
/// The sentinel is the keeper's child with this in its environment.
const SENTINEL_ENV: &str = "PGHERD_SENTINEL";
/// Where a member's own filesystem is mounted, below its directory.
pub(crate) const VOLUME: &str = "volume";
const DATA: &str = "data";
/// How long one question to PostgreSQL may take.
const SQL_MAX: Duration = Duration::from_secs(2);
const STOP_MAX: Duration = Duration::from_secs(60);
const KILL_MAX: Duration = Duration::from_secs(10);

/// A member.
pub struct Member {
    site: Arc<Site>,
    name: String,
    index: u8,
    dir: PathBuf,
    config: Value,
    volume: Option<Volume>,
    daemon: Mutex<Option<Daemon>>,
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Member {
    pub(crate) fn new(
        site: &Arc<Site>,
        name: String,
        index: u8,
        dir: PathBuf,
        mut config: Value,
        volume: Option<Volume>,
    ) -> Result<Self> {
        if volume.is_some() {
            let data_dir = dir.join(VOLUME).join(DATA);
            crate::config::merge(&mut config, serde_json::json!({"postgresql": {"data_dir": data_dir}}));
        }
        let member = Self {
            site: Arc::clone(site),
            name,
            index,
            dir,
            config,
            volume,
            daemon: Mutex::new(None),
        };
        member.write_config(&yaml::write(&member.config))?;
        Ok(member)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address.
    #[must_use]
    pub fn ip(&self) -> Ipv4Addr {
        self.site.addresses().member(self.index)
    }

    /// Where its PostgreSQL listens.
    #[must_use]
    pub fn postgres(&self) -> SocketAddr {
        at(self.ip(), POSTGRES_PORT)
    }

    /// Where its REST interface listens.
    #[must_use]
    pub fn rest(&self) -> SocketAddr {
        at(self.ip(), REST_PORT)
    }

    /// Its data directory.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        let of_volume = self.volume.as_ref().map(|_| self.dir.join(VOLUME));
        of_volume.as_ref().unwrap_or(&self.dir).join(DATA)
    }

    /// The filesystem of its own that its data directory is on, where the cluster was made so.
    ///
    /// # Errors
    /// When it has none.
    pub fn volume(&self) -> Result<&Volume> {
        self.volume.as_ref().context("a cluster with volumes")
    }

    /// Its configuration file.
    #[must_use]
    pub fn config_file(&self) -> PathBuf {
        self.site.dir().join(format!("{}.yml", self.name))
    }

    /// Where its processes write to.
    #[must_use]
    pub fn log_file(&self) -> PathBuf {
        self.site.log_file(&self.name)
    }

    fn write_config(&self, text: &str) -> Result<()> {
        self.site.write_file(&format!("{}.yml", self.name), text)?;
        Ok(())
    }

    /// Writes its configuration anew: what it was to begin with, and `over` over it. Its processes are not told.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn alter_config(&self, over: Value) -> Result<()> {
        let mut config = self.config.clone();
        crate::config::merge(&mut config, over);
        self.write_config(&yaml::write(&config))
    }

    /// Starts `pgherd agent`. Does not wait for anything that it does.
    ///
    /// # Errors
    /// When the binary is not built.
    pub async fn start(&self) -> Result<()> {
        let mut command = self.site.command_at(self.ip(), self.program()?)?;
        command.arg("agent").arg("--config").arg(self.config_file());
        *self.daemon.lock().await = Some(self.site.start(&self.name, command)?);
        Ok(())
    }

    /// The binary that this member runs: on a network each host has its own.
    fn program(&self) -> Result<PathBuf> {
        let built = self.site.reachable(&program::pgherd()?)?;
        if self.site.network().is_none() {
            return Ok(built);
        }
        let own = self.own_binary();
        if !own.exists() {
            fs::copy(&built, &own).with_context(|| format!("copying {}", built.display()))?;
        }
        fs::set_permissions(&own, fs::Permissions::from_mode(0o755))?;
        Ok(own)
    }

    fn own_binary(&self) -> PathBuf {
        self.dir.join("pgherd")
    }

    /// Stops it with SIGTERM to the keeper, and waits until nothing of the member is left.
    ///
    /// # Errors
    /// When it has not ended within a minute, or not with exit code 0.
    pub async fn stop(&self) -> Result<()> {
        let mut daemon = self
            .daemon
            .lock()
            .await
            .take()
            .with_context(|| format!("{} does not run", self.name))?;
        process::signal(daemon.pid(), Signal::TERM)?;
        let status = daemon.end(STOP_MAX).await?;
        ensure!(status.success(), "{} was stopped and ended with {status}", self.name);
        self.wait_until_gone(KILL_MAX).await
    }

    /// Waits until it has ended by itself, and says how.
    ///
    /// # Errors
    /// When it still runs after `limit`.
    pub async fn wait_ended(&self, limit: Duration) -> Result<std::process::ExitStatus> {
        let mut daemon = self.daemon.lock().await;
        let running = daemon.as_mut().with_context(|| format!("{} does not run", self.name))?;
        let status = running.end(limit).await?;
        *daemon = None;
        Ok(status)
    }

    /// Waits until no PostgreSQL process of this member is left.
    ///
    /// # Errors
    /// When one is left after `limit`.
    pub async fn wait_until_gone(&self, limit: Duration) -> Result<()> {
        let what = format!("PostgreSQL of {} has ended", self.name);
        let gone = eventually(&what, limit, async || {
            let left = self.postgres_processes();
            ensure!(left.is_empty(), "{left:?}");
            Ok(())
        });
        gone.await
    }

    /// What its processes have written since the last start.
    pub async fn output(&self) -> String {
        self.daemon
            .lock()
            .await
            .as_ref()
            .map(Daemon::output)
            .unwrap_or_default()
    }

    /// Asks its REST interface.
    ///
    /// # Errors
    /// When there is no HTTP answer.
    pub async fn get(&self, path: &str) -> Result<Answer> {
        http::get(self.rest(), path).await
    }

    /// Sends a request with a body to its REST interface.
    ///
    /// # Errors
    /// When there is no HTTP answer.
    pub async fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Answer> {
        http::ask(self.rest(), method, path, body).await
    }

    /// Connects to its PostgreSQL as the superuser, past any proxy.
    ///
    /// # Errors
    /// When it cannot be done within two seconds.
    pub async fn client(&self) -> Result<Sql, SqlFailure> {
        Sql::connect(self.postgres(), SQL_MAX).await
    }

    /// Connects to its PostgreSQL, asks once, and returns the first column of the first row.
    ///
    /// # Errors
    /// When it does not answer within a few seconds.
    pub async fn sql(&self, text: &str) -> Result<String, SqlFailure> {
        value(self.postgres(), text, SQL_MAX).await
    }

    /// Whether its PostgreSQL says that it takes writes.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn is_primary(&self) -> Result<bool, SqlFailure> {
        Ok(self.sql("SELECT pg_is_in_recovery()").await? == "f")
    }
}

/// Processes and faults.
impl Member {
    /// The keeper: the process that was started.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn keeper_pid(&self) -> Result<Pid> {
        let daemon = self.daemon.lock().await;
        Ok(daemon
            .as_ref()
            .with_context(|| format!("{} does not run", self.name))?
            .pid())
    }

    /// The agent proper.
    ///
    /// # Errors
    /// When there is none at the moment.
    pub async fn agent_pid(&self) -> Result<Pid> {
        self.child_with(AGENT_ENV).await
    }

    /// The sentinel.
    ///
    /// # Errors
    /// When there is none at the moment.
    pub async fn sentinel_pid(&self) -> Result<Pid> {
        self.child_with(SENTINEL_ENV).await
    }

    /// The keeper's child that runs the keeper's program and has `variable` in its environment.
    async fn child_with(&self, variable: &str) -> Result<Pid> {
        let keeper = self.keeper_pid().await?;
        let program = process::program(keeper).context("the keeper's program cannot be read")?;
        let same = process::children(keeper).into_iter().map(|child| child.pid);
        let mut same = same.filter(|pid| process::program(*pid).as_ref() == Some(&program));
        let found = same.find(|pid| process::environment(*pid, variable).is_some());
        found.with_context(|| format!("{} has no child with {variable}", self.name))
    }

    /// The postmaster: the first line of `postmaster.pid`, if that process runs in the data directory.
    ///
    /// # Errors
    /// When there is none.
    pub fn postmaster_pid(&self) -> Result<Pid> {
        let file = self.data_dir().join("postmaster.pid");
        let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        let pid = text
            .lines()
            .next()
            .and_then(|line| line.trim().parse().ok())
            .and_then(Pid::from_raw);
        let pid = pid.with_context(|| format!("no number in {}", file.display()))?;
        ensure!(
            process::is_alive(pid) && self.is_postgres(pid),
            "the postmaster that {} names is gone",
            file.display()
        );
        Ok(pid)
    }

    /// All of its PostgreSQL processes: postmaster, backends and helpers.
    #[must_use]
    pub fn postgres_processes(&self) -> Vec<Process> {
        let mut processes = process::table();
        processes.retain(|process| !process.is_zombie && self.is_postgres(process.pid));
        processes
    }

    fn is_postgres(&self, pid: Pid) -> bool {
        process::working_directory(pid).is_some_and(|cwd| cwd == self.data_dir())
    }

    /// The postmaster's children.
    ///
    /// # Errors
    /// When there is no postmaster.
    pub fn backends(&self) -> Result<Vec<Process>> {
        Ok(process::children(self.postmaster_pid()?))
    }

    /// Ends the postmaster with SIGKILL, and nothing else.
    ///
    /// # Errors
    /// When there is none.
    pub fn kill_postmaster(&self) -> Result<()> {
        process::signal(self.postmaster_pid()?, Signal::KILL)
    }

    /// Ends the agent with SIGKILL; the keeper may start it again.
    ///
    /// # Errors
    /// When there is none.
    pub async fn kill_agent(&self) -> Result<()> {
        process::signal(self.agent_pid().await?, Signal::KILL)
    }

    /// Stops the agent's process with SIGSTOP.
    ///
    /// # Errors
    /// When there is none.
    pub async fn freeze_agent(&self) -> Result<Pid> {
        let agent = self.agent_pid().await?;
        process::signal(agent, Signal::STOP)?;
        Ok(agent)
    }

    /// Ends the keeper with SIGKILL, and nothing else.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn kill_keeper(&self) -> Result<()> {
        let mut daemon = self
            .daemon
            .lock()
            .await
            .take()
            .with_context(|| format!("{} does not run", self.name))?;
        process::signal(daemon.pid(), Signal::KILL)?;
        daemon.end(KILL_MAX).await?;
        Ok(())
    }

    /// Stops the keeper's process with SIGSTOP.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn freeze_keeper(&self) -> Result<()> {
        process::signal(self.keeper_pid().await?, Signal::STOP)
    }

    /// Stops all of this member's processes with SIGSTOP, as a hypervisor stops a guest, and returns them.
    ///
    /// # Errors
    /// When the member does not run.
    pub async fn freeze_everything(&self) -> Result<Vec<Pid>> {
        let keeper = self.keeper_pid().await?;
        let mut frozen: Vec<Pid> = Vec::new();
        loop {
            // What was running may have started more.
            let family = process::descendants(keeper)
                .into_iter()
                .map(|process| process.pid)
                .chain([keeper]);
            let running: Vec<Pid> = family.filter(|pid| !frozen.contains(pid)).collect();
            if running.is_empty() {
                return Ok(frozen);
            }
            for pid in running {
                let _ = process::signal(pid, Signal::STOP); // One that has just ended is as good.
                frozen.push(pid);
            }
        }
    }

    /// Lets frozen processes go on, those that nobody has ended meanwhile.
    pub fn thaw(&self, frozen: &[Pid]) {
        for pid in frozen.iter().filter(|pid| process::is_alive(**pid)) {
            let _ = process::signal(*pid, Signal::CONT); // One that has just ended needs none.
        }
    }

    /// Ends everything of this member with SIGKILL: keeper, agent, sentinel and PostgreSQL.
    ///
    /// # Errors
    /// When something does not end.
    pub async fn kill_everything(&self) -> Result<()> {
        let Some(mut daemon) = self.daemon.lock().await.take() else {
            return Ok(());
        };
        let keeper = daemon.pid();
        let mut family = process::descendants(keeper);
        family.extend(process::look(keeper));
        process::kill_all(KILL_MAX, || {
            let mut left: Vec<Pid> = family
                .iter()
                .map(|process| process.pid)
                .filter(|pid| process::is_alive(*pid))
                .collect();
            left.extend(self.postgres_processes().iter().map(|process| process.pid));
            left
        })?;
        daemon.end(KILL_MAX).await?;
        Ok(())
    }

    /// Ends the agent with SIGKILL, after a change of its configuration with which no other can be started.
    ///
    /// # Errors
    /// When there is no agent.
    pub async fn hold_agent_down(&self) -> Result<()> {
        self.write_config("scope: [this file is broken on purpose\n")?;
        self.kill_agent().await
    }

    /// Mends what [`Member::hold_agent_down`] broke. Where the keeper has given up meanwhile, the member is started.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn release_agent(&self) -> Result<()> {
        self.write_config(&yaml::write(&self.config))?;
        let mut daemon = self.daemon.lock().await;
        let has_ended = match daemon.as_mut() {
            Some(daemon) => daemon.ended()?.is_some(),
            None => true,
        };
        drop(daemon);
        if has_ended { self.start().await } else { Ok(()) }
    }

    /// Takes the right to run it away from this member's own binary, and then ends the agent with SIGKILL. Only a member on
    /// a network has a binary of its own.
    ///
    /// # Errors
    /// When there is no such binary, or no agent.
    pub async fn forbid_agent(&self) -> Result<()> {
        fs::set_permissions(self.own_binary(), fs::Permissions::from_mode(0o644)).context("the member's own binary")?;
        self.kill_agent().await
    }

    /// Takes back what [`Member::forbid_agent`] did. Where the keeper has given up meanwhile, the member is started.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn allow_agent(&self) -> Result<()> {
        fs::set_permissions(self.own_binary(), fs::Permissions::from_mode(0o755)).context("the member's own binary")?;
        self.release_agent().await
    }

    /// Takes the data directory of a stopped member away.
    ///
    /// # Errors
    /// When the member runs.
    pub async fn wipe(&self) -> Result<()> {
        ensure!(self.daemon.lock().await.is_none(), "{} runs", self.name);
        remove(&self.data_dir())
    }
}

fn remove(dir: &Path) -> Result<()> {
    fs::remove_dir_all(dir).with_context(|| format!("removing {}", dir.display()))
}

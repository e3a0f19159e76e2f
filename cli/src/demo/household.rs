//! The demo's processes: started, watched, started again, ended.

use std::fmt;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};

use super::descendants;
use super::files::Layout;
use super::machine::{Site, Tools};
use super::plan::Plan;
use crate::failure::Failure;

/// One of the demo's processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Etcd,
    Member(String),
    Proxy,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Etcd => f.write_str("etcd"),
            Self::Member(name) => f.write_str(name),
            Self::Proxy => f.write_str("proxy"),
        }
    }
}

/// What became of a process.
#[derive(Debug)]
pub(crate) enum Turn {
    /// It ended, unasked.
    Ended(Who, ExitStatus),
    /// It is time to start it again.
    Due(Who),
}

/// Patience before a process that ended is started again, as a service manager has it.
const RESTART_DELAY: Duration = Duration::from_secs(1);
/// How long members and proxy may take to end in good order.
const STOP_MAX: Duration = Duration::from_secs(20);
/// How long a tree may take to be gone after SIGKILL.
const KILL_MAX: Duration = Duration::from_secs(5);
/// How much of a log is shown when its writer cannot be started.
const TAIL_BYTES: i64 = 2000;
const TAIL_LINES: usize = 8;

/// All processes of the demo.
pub(crate) struct Household {
    site: Site,
    layout: Layout,
    plan: Plan,
    etcd: PathBuf,
    pgherd: PathBuf,
    running: Vec<(Who, u32)>,
    tasks: JoinSet<Turn>,
}

impl Household {
    /// Writes all files; nothing runs yet.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub(crate) fn new(site: Site, layout: Layout, plan: Plan, tools: &Tools) -> Result<Self, Failure> {
        let failed =
            |error: std::io::Error| Failure::Unavailable(format!("writing to {}: {error}", layout.dir.display()));
        for member in &plan.members {
            site.make_dir(&layout.member_dir(&member.name)).map_err(failed)?;
            site.write(&layout.member_file(&member.name), &layout.member_yaml(&plan, member))
                .map_err(failed)?;
        }
        site.write(&layout.proxy_file(), &layout.proxy_yaml(&plan))
            .map_err(failed)?;
        let pgherd = site.reachable(&tools.pgherd).map_err(failed)?;
        Ok(Self {
            site,
            layout,
            plan,
            etcd: tools.etcd.clone(),
            pgherd,
            running: Vec::new(),
            tasks: JoinSet::new(),
        })
    }

    /// Everybody, in the order of starting.
    pub(crate) fn everybody(&self) -> Vec<Who> {
        let members = self.plan.members.iter().map(|member| Who::Member(member.name.clone()));
        [Who::Etcd].into_iter().chain(members).chain([Who::Proxy]).collect()
    }

    /// Starts one process.
    ///
    /// # Errors
    /// When the system refuses.
    pub(crate) fn start(&mut self, who: &Who) -> Result<(), Failure> {
        let mut command = self.command(who);
        let log = self.layout.log_file(&who.to_string());
        let failed = |error: std::io::Error| Failure::Unavailable(format!("starting {who}: {error}"));
        let out = self.site.log(&log).map_err(failed)?;
        command
            .stdin(Stdio::null())
            .stdout(out.try_clone().map_err(failed)?)
            .stderr(out);
        // A group of its own, so that Ctrl-C in this terminal is ours alone.
        command.current_dir(&self.layout.dir).process_group(0);
        if let Some(user) = self.site.user() {
            command.uid(user.uid).gid(user.gid);
        }
        let mut child = Command::from(command).kill_on_drop(true).spawn().map_err(failed)?;
        let pid = child.id().unwrap_or_default();
        self.running.push((who.clone(), pid));
        let who = who.clone();
        self.tasks.spawn(async move {
            // An error here means that the child is already gone, which is all that matters.
            let status = child.wait().await.unwrap_or_else(|_| ExitStatus::from_raw(0));
            Turn::Ended(who, status)
        });
        Ok(())
    }

    fn command(&self, who: &Who) -> std::process::Command {
        let mut command = match who {
            Who::Etcd => {
                let client = format!("http://127.0.0.1:{}", self.plan.etcd_client);
                let peer = format!("http://127.0.0.1:{}", self.plan.etcd_peer);
                let mut command = std::process::Command::new(&self.etcd);
                command
                    .args(["--name", "demo", "--data-dir"])
                    .arg(self.layout.dir.join("etcd"));
                command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
                command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
                command.args(["--initial-cluster", &format!("demo={peer}"), "--logger", "zap"]);
                command
            }
            Who::Member(name) => self.own("agent", &self.layout.member_file(name)),
            Who::Proxy => self.own("proxy", &self.layout.proxy_file()),
        };
        // What is set for another PostgreSQL or another Patroni must not leak in here.
        command.env_clear();
        for name in ["PATH", "LANG", "LC_ALL", "TZ", crate::logging::LEVEL_VARIABLE] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command.env("HOME", &self.layout.dir);
        command
    }

    fn own(&self, role: &str, file: &Path) -> std::process::Command {
        let mut command = std::process::Command::new(&self.pgherd);
        command.arg(role).arg("--config").arg(file);
        command
    }

    /// The next thing that becomes of any process. Pending while nothing does. Cancel safe.
    pub(crate) async fn turn(&mut self) -> Turn {
        loop {
            match self.tasks.join_next().await {
                Some(Ok(turn)) => {
                    if let Turn::Ended(who, _) = &turn {
                        self.running.retain(|(running, _)| running != who);
                    }
                    return turn;
                }
                Some(Err(_)) => {} // Cancelled, or panicked: neither has a process any more.
                None => return std::future::pending().await,
            }
        }
    }

    /// Starts `who` again a little later; [`Household::turn`] tells when.
    pub(crate) fn start_later(&mut self, who: Who) {
        self.tasks.spawn(async move {
            sleep(RESTART_DELAY).await;
            Turn::Due(who)
        });
    }

    /// Whether every process runs.
    pub(crate) fn all_running(&self) -> bool {
        self.running.len() == self.everybody().len()
    }

    /// The last lines that `who` logged.
    pub(crate) fn log_tail(&self, who: &Who) -> String {
        tail(&self.layout.log_file(&who.to_string())).unwrap_or_default()
    }

    /// Ends everything, in good order as far as that goes within its time or until `hurry`, and removes the directory.
    ///
    /// # Errors
    /// When something is left behind.
    pub(crate) async fn end(mut self, hurry: impl Future<Output = ()>) -> Result<(), Failure> {
        let own = std::process::id();
        let etcd = self.pids(|who| *who == Who::Etcd);
        signal(&self.pids(|who| *who != Who::Etcd), Signal::TERM);
        tokio::select! {
            () = self.wait_until_only(&etcd, Instant::now() + STOP_MAX) => {}
            () = hurry => {}
        }
        // Members need etcd to hand over, so it goes last; whoever is left now is not given more time.
        descendants::end(own, &etcd, KILL_MAX).await;
        signal(&etcd, Signal::TERM);
        self.wait_until_only(&[], Instant::now() + KILL_MAX).await;
        let left = descendants::end(own, &[], KILL_MAX).await;
        self.tasks.shutdown().await;
        self.site.remove()?;
        if left > 0 {
            return Err(Failure::Unavailable(format!(
                "{left} processes of the demo could not be ended; look for them with ps"
            )));
        }
        Ok(())
    }

    /// Buries what members that were killed whole left behind.
    pub(crate) fn bury_adopted(&self) {
        descendants::bury(std::process::id(), &self.pids(|_| true));
    }

    fn pids(&self, of: impl Fn(&Who) -> bool) -> Vec<u32> {
        self.running
            .iter()
            .filter(|(who, _)| of(who))
            .map(|(_, pid)| *pid)
            .collect()
    }

    async fn wait_until_only(&mut self, left: &[u32], deadline: Instant) {
        while self.running.iter().any(|(_, pid)| !left.contains(pid)) {
            if timeout_at(deadline, self.turn()).await.is_err() {
                return;
            }
        }
    }
}

fn signal(pids: &[u32], signal: Signal) {
    for pid in pids {
        if let Some(pid) = i32::try_from(*pid).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, signal); // It may have ended by itself just now.
        }
    }
}

fn tail(file: &Path) -> std::io::Result<String> {
    let mut log = std::fs::File::open(file)?;
    let length = i64::try_from(log.metadata()?.len()).unwrap_or(i64::MAX);
    log.seek(SeekFrom::End(-length.min(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    log.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines
        .iter()
        .skip(lines.len().saturating_sub(TAIL_LINES))
        .map(|line| format!("    {line}\n"))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_of_a_log_is_shown() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let lines: String = (0..1000).map(|number| format!("line {number}\n")).collect();
        std::fs::write(file.path(), lines).expect("written");
        let tail = tail(file.path()).expect("readable");
        assert!(
            tail.starts_with("    line 992\n") && tail.ends_with("    line 999\n"),
            "{tail}"
        );
    }
}

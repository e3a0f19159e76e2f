//! Processes: what `/proc` tells of them, signals, and the end of whole families.
//!
//! A test process is made a child subreaper, so that whatever outlives its parent becomes its child, can be found, and is
//! reaped. A container's first process does not always do that, and a zombie postmaster keeps its data directory locked.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
pub use rustix::process::{Pid, Signal};
use rustix::process::{PidfdFlags, WaitOptions, getpid, kill_process, pidfd_open, set_child_subreaper, waitpid};

use crate::wait::eventually;

/// One line of the process table.
#[derive(Clone)]
pub struct Process {
    /// Its number.
    pub pid: Pid,
    /// Its parent's number, 0 for none.
    pub parent: i32,
    /// Its program's name, cut by the kernel at 15 bytes.
    pub name: String,
    /// Whether it has ended and only waits to be reaped.
    pub is_zombie: bool,
    /// When it was started, in clock ticks since boot.
    pub started: u64,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.pid.as_raw_nonzero())
    }
}

/// All processes, in no order.
#[must_use]
pub fn table() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let numbers = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter_map(Pid::from_raw).filter_map(look).collect()
}

/// One process, if there is one of that number.
#[must_use]
pub fn look(pid: Pid) -> Option<Process> {
    let stat = fs::read_to_string(proc_path(pid, "stat")).ok()?;
    // The name stands in parentheses and may contain some itself (proc_pid_stat(5)).
    let (head, rest) = stat.rsplit_once(')')?;
    let name = head.split_once('(')?.1.to_owned();
    let mut fields = rest.split_ascii_whitespace();
    let is_zombie = matches!(fields.next()?, "Z" | "X" | "x");
    let parent = fields.next()?.parse().ok()?;
    let started = fields.nth(17)?.parse().ok()?;
    Some(Process {
        pid,
        parent,
        name,
        is_zombie,
        started,
    })
}

/// Whether the process exists and has not ended.
#[must_use]
pub fn is_alive(pid: Pid) -> bool {
    look(pid).is_some_and(|process| !process.is_zombie)
}

/// The living children of a process.
#[must_use]
pub fn children(of: Pid) -> Vec<Process> {
    let mut table = table();
    table.retain(|process| process.parent == of.as_raw_nonzero().get() && !process.is_zombie);
    table
}

/// All that descends from a process, without itself, the living only.
#[must_use]
pub fn descendants(of: Pid) -> Vec<Process> {
    let table = table();
    let mut found: Vec<Process> = Vec::new();
    let mut parents = vec![of.as_raw_nonzero().get()];
    while let Some(parent) = parents.pop() {
        for process in table.iter().filter(|process| process.parent == parent) {
            parents.push(process.pid.as_raw_nonzero().get());
            found.push(process.clone());
        }
    }
    found.retain(|process| !process.is_zombie);
    found
}

/// The directory in which a process runs; nothing when it cannot be asked.
#[must_use]
pub fn working_directory(pid: Pid) -> Option<PathBuf> {
    fs::read_link(proc_path(pid, "cwd")).ok()
}

/// The file that a process runs; nothing when it cannot be asked.
#[must_use]
pub fn program(pid: Pid) -> Option<PathBuf> {
    fs::read_link(proc_path(pid, "exe")).ok()
}

/// The value of a variable in the environment that a process was started with.
#[must_use]
pub fn environment(pid: Pid, name: &str) -> Option<String> {
    let bytes = fs::read(proc_path(pid, "environ")).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    text.split('\0')
        .find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))
        .map(str::to_owned)
}

fn proc_path(pid: Pid, file: &str) -> PathBuf {
    Path::new("/proc").join(pid.as_raw_nonzero().to_string()).join(file)
}

/// Sends a signal.
///
/// # Errors
/// When there is no such process, or it is somebody else's.
pub fn signal(pid: Pid, signal: Signal) -> Result<()> {
    kill_process(pid, signal).with_context(|| format!("sending signal {} to {}", signal.as_raw(), pid.as_raw_nonzero()))
}

/// Ends all that `find` finds with SIGKILL, again and again until it finds nothing.
///
/// # Errors
/// When something is still found after `limit`.
pub fn kill_all(limit: Duration, find: impl Fn() -> Vec<Pid>) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        reap_orphans();
        let found = find();
        if found.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("processes that do not end within {limit:?}: {found:?}");
        }
        // Taken first: a number may belong to another process as soon as its own has ended.
        let ends = end_events(&found);
        for pid in found {
            let _ = kill_process(pid, Signal::KILL); // One that is gone already is as good.
        }
        wait_for_any(&ends);
    }
}

/// For waiting until one of the processes has ended.
pub(crate) fn end_events(of: &[Pid]) -> Vec<OwnedFd> {
    of.iter()
        .filter_map(|pid| pidfd_open(*pid, PidfdFlags::empty()).ok())
        .collect()
}

/// Returns when one of the processes has ended, and soon in any case.
pub(crate) fn wait_for_any(ends: &[OwnedFd]) {
    let mut fds: Vec<PollFd<'_>> = ends.iter().map(|end| PollFd::new(end, PollFlags::IN)).collect();
    let _ = poll(
        &mut fds,
        Some(&Timespec {
            tv_sec: 0,
            tv_nsec: 20_000_000,
        }),
    );
}

/// The processes that this one has started itself: their exit statuses belong to whoever started them.
static STARTED_HERE: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn started_here() -> MutexGuard<'static, BTreeSet<i32>> {
    STARTED_HERE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes this process the parent of every orphan among its descendants.
///
/// # Errors
/// When the kernel refuses.
pub fn adopt_orphans() -> Result<()> {
    set_child_subreaper(Some(getpid())).context("becoming a child subreaper")
}

/// Reaps the children that this process has not started itself.
pub fn reap_orphans() {
    let started_here = started_here();
    let me = getpid().as_raw_nonzero().get();
    for process in table() {
        let number = process.pid.as_raw_nonzero().get();
        if process.is_zombie && process.parent == me && !started_here.contains(&number) {
            let _ = waitpid(Some(process.pid), WaitOptions::NOHANG);
        }
    }
}

/// Starts something with `spawn` such that `reap_orphans` leaves it alone. `number` tells the new process's number.
pub(crate) fn start_own<T>(spawn: impl FnOnce() -> io::Result<T>, number: impl Fn(&T) -> Option<u32>) -> io::Result<T> {
    let mut started_here = started_here();
    let started = spawn()?;
    started_here.extend(number(&started).and_then(|number| i32::try_from(number).ok()));
    Ok(started)
}

/// A process that runs until it is told to end. Its output goes to a file.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: PathBuf,
    log_from: u64,
}

impl Daemon {
    pub(crate) fn start(mut command: Command, log: PathBuf) -> Result<Self> {
        let file = fs::OpenOptions::new().create(true).append(true).open(&log)?;
        let log_from = file.metadata()?.len();
        command
            .stdin(std::process::Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let child = start_own(|| command.spawn(), |child| Some(child.id()))
            .with_context(|| format!("starting {}", command.get_program().display()))?;
        Ok(Self { child, log, log_from })
    }

    /// Its process number.
    ///
    /// # Panics
    /// Never: the kernel gives no number that does not fit.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// What it has written since it was started.
    #[must_use]
    pub fn output(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        let from = usize::try_from(self.log_from).unwrap_or(0).min(bytes.len());
        String::from_utf8_lossy(&bytes[from..]).into_owned()
    }

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it has not ended within `limit`; its last output is quoted.
    pub async fn end(&mut self, limit: Duration) -> Result<ExitStatus> {
        let log = self.log.clone();
        let waited = eventually("the process ends", limit, async || {
            self.child
                .try_wait()?
                .with_context(|| format!("it runs; {}", last_lines(&log, 3)))
        });
        waited.await
    }
}

/// The last lines of a file, on one line of text each.
#[must_use]
pub fn last_lines(file: &Path, count: usize) -> String {
    let bytes = fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_found_with_its_children() {
        let me = look(getpid()).unwrap();
        assert!(!me.is_zombie && me.started > 0);
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_child(&child);
        assert!(descendants(getpid()).iter().any(|process| process.pid == pid));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_alive(pid));
    }

    #[test]
    fn an_orphan_is_adopted_ended_and_reaped() {
        adopt_orphans().unwrap();
        let shell = start_own(
            || {
                Command::new("sh")
                    .args(["-c", "sleep 61 >/dev/null & echo $!"])
                    .stdout(std::process::Stdio::piped())
                    .spawn()
            },
            |child| Some(child.id()),
        );
        let output = shell.unwrap().wait_with_output();
        let number = String::from_utf8(output.unwrap().stdout).unwrap();
        let orphan = Pid::from_raw(number.trim().parse().unwrap()).unwrap();
        assert!(is_alive(orphan));
        kill_all(Duration::from_secs(5), || {
            if is_alive(orphan) { vec![orphan] } else { Vec::new() }
        })
        .unwrap();
        reap_orphans();
        assert!(look(orphan).is_none());
    }
}

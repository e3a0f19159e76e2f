//! What the kernel tells of a process: what it has used, what it holds, and on which processors it may run.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pgherd_testkit::process::Pid;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// What a process has used since it began, over the threads that it has.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// Nanoseconds on a processor.
    pub(crate) cpu: u64,
    /// Context switches of either kind.
    pub(crate) switches: u64,
}

impl Usage {
    pub(crate) fn of(pid: Pid) -> Result<Self> {
        let mut usage = Self::default();
        for task in tasks(pid)? {
            // One that has just ended has no more to say.
            let Ok(schedstat) = fs::read_to_string(task.join("schedstat")) else {
                continue;
            };
            usage.cpu += schedstat
                .split(' ')
                .next()
                .and_then(|cpu| cpu.parse().ok())
                .unwrap_or(0);
            let status = fs::read_to_string(task.join("status")).unwrap_or_default();
            let switches = status.lines().filter(|line| line.contains("ctxt_switches:"));
            usage.switches += switches.filter_map(last_number).sum::<u64>();
        }
        Ok(usage)
    }

    /// What was used since `earlier`.
    pub(crate) fn since(self, earlier: Self) -> Self {
        Self {
            cpu: self.cpu.saturating_sub(earlier.cpu),
            switches: self.switches.saturating_sub(earlier.switches),
        }
    }
}

/// What a process holds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Holding {
    /// Bytes that are in memory, its own or others' too.
    pub(crate) resident: u64,
    /// Bytes of its own memory, shared ones by its share.
    pub(crate) memory: u64,
    /// Bytes that it has written, and nobody shares.
    pub(crate) own: u64,
    /// Open files.
    pub(crate) files: u64,
}

impl Holding {
    pub(crate) fn of(pid: Pid) -> Result<Self> {
        let directory = directory(pid);
        let rollup = fs::read_to_string(directory.join("smaps_rollup"))?;
        let bytes = |key: &str| {
            let line = rollup.lines().find(|line| line.starts_with(key));
            let kibibytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
            kibibytes
                .map(|kibibytes| kibibytes * 1024)
                .with_context(|| format!("no {key} in smaps_rollup"))
        };
        Ok(Self {
            resident: bytes("Rss:")?,
            memory: bytes("Pss:")?,
            own: bytes("Anonymous:")?,
            files: fs::read_dir(directory.join("fd"))?.count() as u64,
        })
    }
}

/// The kernel's own small objects, of the whole machine, in bytes.
pub(crate) fn kernel_memory() -> Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let line = meminfo.lines().find(|line| line.starts_with("Slab:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    Ok(kibibytes.context("no Slab in /proc/meminfo")? * 1024)
}

/// How many processes have wanted to run of late, on average.
pub(crate) fn load() -> f64 {
    let loadavg = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    loadavg
        .split(' ')
        .next()
        .and_then(|load| load.parse().ok())
        .unwrap_or(0.0)
}

/// Lets this process, and what it starts, open as many files as it may; how many that is.
pub(crate) fn raise_open_files() -> Result<u64> {
    let limits = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limits.maximum,
        ..limits
    };
    setrlimit(Resource::Nofile, raised).context("raising the limit of open files")?;
    Ok(limits.maximum.unwrap_or(u64::MAX))
}

/// Whether all threads of a process are being traced.
pub(crate) fn is_traced(pid: Pid) -> bool {
    tasks(pid).is_ok_and(|tasks| {
        tasks.iter().all(|task| {
            let status = fs::read_to_string(task.join("status")).unwrap_or_default();
            let tracer = status.lines().find(|line| line.starts_with("TracerPid:"));
            tracer.and_then(last_number).is_none_or(|tracer| tracer > 0)
        })
    })
}

fn last_number(line: &str) -> Option<u64> {
    line.split_whitespace().last()?.parse().ok()
}

fn directory(pid: Pid) -> PathBuf {
    Path::new("/proc").join(pid.as_raw_nonzero().to_string())
}

fn tasks(pid: Pid) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory(pid).join("task")).context("it does not run")?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

/// Processes, and the calling thread, on the first processor, until this is dropped.
pub(crate) struct Pinned {
    pids: Vec<Pid>,
    all: CpuSet,
}

impl Pinned {
    pub(crate) fn new(pids: Vec<Pid>) -> Result<Self> {
        let all = sched_getaffinity(None)?;
        let mut first = CpuSet::new();
        let lowest = (0..CpuSet::MAX_CPU).find(|cpu| all.is_set(*cpu)).unwrap_or(0);
        first.set(lowest);
        let pinned = Self { pids, all };
        pinned.put(&first)?;
        Ok(pinned)
    }

    fn put(&self, on: &CpuSet) -> Result<()> {
        sched_setaffinity(None, on)?;
        for pid in &self.pids {
            for task in tasks(*pid)? {
                let number = task.file_name().and_then(|name| name.to_str()?.parse().ok());
                // A thread that has just ended needs no place.
                let _ = number
                    .and_then(Pid::from_raw)
                    .map(|task| sched_setaffinity(Some(task), on));
            }
        }
        Ok(())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.put(&self.all); // What has ended meanwhile needs no place.
    }
}

//! The end of a site: all of its processes, in an order that leaves nothing in the kernel either. A PostgreSQL that is
//! ended by SIGKILL leaves a System V shared memory segment behind, and of those there are only a few thousand.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::process::getpid;

use crate::process::{self, Pid, Process, Signal};
use crate::site::{DIRECTORY_PREFIX, KEEP_ENV, KEPT_FILE, SITE_ENV};
use crate::volume;

const KILL_MAX: Duration = Duration::from_secs(20);
/// An immediate shutdown writes nothing.
const QUIT_MAX: Duration = Duration::from_secs(5);
/// How many directories that were kept on purpose are left; they may lie in memory.
const KEPT_MAX: usize = 6;
/// How deep below a site's directory its data directories lie at most.
const DATA_DIR_DEPTH: usize = 4;

/// Ends everything that was started through the site in `dir`.
///
/// # Errors
/// When something does not end.
pub(crate) fn end_all(dir: &Path) -> Result<()> {
    volume::let_go_under(dir);
    // Who could start PostgreSQL again, or end it by force, goes first.
    process::kill_all(KILL_MAX, || numbers(&family_without_servers(dir)))?;
    quit_servers(dir);
    process::kill_all(KILL_MAX, || numbers(&family(dir)))?;
    release_shared_memory(dir);
    volume::unmount_under(dir);
    Ok(())
}

/// The living processes of the site in `dir`.
pub(crate) fn family(dir: &Path) -> Vec<Process> {
    let mut family = process::table();
    family.retain(|process| !process.is_zombie && belongs(process, dir));
    family
}

/// Whether a process was started through the site in `dir`, or by something that was. PostgreSQL overwrites its
/// environment, but works in its data directory.
pub(crate) fn belongs(process: &Process, dir: &Path) -> bool {
    let marked = process::environment(process.pid, SITE_ENV).is_some_and(|value| Path::new(&value) == dir);
    marked || process::working_directory(process.pid).is_some_and(|cwd| cwd.starts_with(dir) && process.pid != getpid())
}

fn is_server(process: &Process) -> bool {
    process::program(process.pid).is_some_and(|program| program.file_name().is_some_and(|name| name == "postgres"))
}

fn family_without_servers(dir: &Path) -> Vec<Process> {
    let mut family = family(dir);
    family.retain(|process| !is_server(process));
    family
}

fn numbers(processes: &[Process]) -> Vec<Pid> {
    processes.iter().map(|process| process.pid).collect()
}

/// Lets PostgreSQL end by itself, at once, as far as it can.
fn quit_servers(dir: &Path) {
    let mut servers = family(dir);
    for server in &servers {
        let _ = process::signal(server.pid, Signal::CONT); // It may be frozen.
    }
    for server in &servers {
        if !servers
            .iter()
            .any(|other| other.pid.as_raw_nonzero().get() == server.parent)
        {
            let _ = process::signal(server.pid, Signal::QUIT); // One that has just ended is as good.
        }
    }
    let deadline = Instant::now() + QUIT_MAX;
    while !servers.is_empty() && Instant::now() < deadline {
        process::wait_for_any(&process::end_events(&numbers(&servers)));
        process::reap_orphans();
        servers = family(dir);
    }
}

/// Removes the segments that ended servers could not remove themselves: `postmaster.pid` names them.
fn release_shared_memory(dir: &Path) {
    for file in postmaster_files(dir, DATA_DIR_DEPTH) {
        let text = fs::read_to_string(file).unwrap_or_default();
        let mut numbers = text.lines().nth(6).unwrap_or_default().split_ascii_whitespace();
        if let (Some(key), Some(id)) = (numbers.next(), numbers.next())
            && is_abandoned(key, id)
        {
            let _ = Command::new("ipcrm").args(["-m", id]).status(); // Without the tool it stays; that is all.
        }
    }
}

/// Whether the segment exists, is the one meant, and no process is attached to it.
fn is_abandoned(key: &str, id: &str) -> bool {
    let segments = fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    segments.lines().any(|line| {
        // key, shmid, perms, size, cpid, lpid, nattch
        let fields: Vec<&str> = line.split_ascii_whitespace().take(7).collect();
        fields.len() == 7 && fields[0] == key && fields[1] == id && fields[6] == "0"
    })
}

fn postmaster_files(dir: &Path, depth: usize) -> Vec<PathBuf> {
    let mut found = vec![dir.join("postmaster.pid")];
    found.retain(|file| file.is_file());
    if depth > 0 && found.is_empty() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.extend(postmaster_files(&entry.path(), depth - 1));
            }
        }
    }
    found
}

/// Ends and removes what is left in `base` of the sites of test processes that were killed themselves. Of the
/// directories that were kept on purpose, the newest stay.
pub(crate) fn sweep(base: &Path) {
    let mut kept = Vec::new();
    for dir in fs::read_dir(base)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
    {
        if owner_lives(&dir) != Some(false) {
            continue;
        }
        let ended = end_all(&dir);
        if dir.join(KEPT_FILE).exists() {
            kept.extend(fs::metadata(&dir).and_then(|metadata| Ok((metadata.modified()?, dir))));
        } else if ended.is_ok() {
            let _ = fs::remove_dir_all(&dir); // Another test process may be at it too.
        }
    }
    kept.sort_unstable();
    let surplus = kept.len().saturating_sub(KEPT_MAX);
    if std::env::var_os(KEEP_ENV).is_none() {
        for (_, dir) in kept.drain(..surplus) {
            let _ = fs::remove_dir_all(&dir);
        }
    }
}

/// Whether the test process that a site's directory is named after still runs; nothing for other directories.
fn owner_lives(dir: &Path) -> Option<bool> {
    let mut parts = dir.file_name()?.to_str()?.strip_prefix(DIRECTORY_PREFIX)?.split('-');
    let owner = Pid::from_raw(parts.next()?.parse().ok()?)?;
    let started: u64 = parts.next()?.parse().ok()?;
    Some(process::look(owner).is_some_and(|owner| owner.started == started && !owner.is_zombie))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Postgres, Site};

    #[tokio::test]
    async fn a_server_leaves_no_shared_memory_whether_it_was_killed_or_not() {
        let site = std::sync::Arc::new(Site::new().unwrap());
        for (name, index) in [("killed", 0), ("running", 1)] {
            let server = Postgres::start(&site, name, site.addresses().member(index))
                .await
                .unwrap();
            if name == "killed" {
                server.end(Signal::KILL).await.unwrap();
            }
        }
        let segments: Vec<Vec<String>> = postmaster_files(site.dir(), DATA_DIR_DEPTH)
            .iter()
            .map(|file| fs::read_to_string(file).unwrap())
            .map(|text| {
                text.lines()
                    .nth(6)
                    .unwrap()
                    .split_ascii_whitespace()
                    .map(str::to_owned)
                    .collect()
            })
            .collect();
        assert_eq!(segments.len(), 2);
        end_all(site.dir()).unwrap();
        let left = fs::read_to_string("/proc/sysvipc/shm").unwrap();
        for segment in segments {
            let id = Some(segment[1].as_str());
            assert!(
                !left.lines().any(|line| line.split_ascii_whitespace().nth(1) == id),
                "{segment:?}"
            );
        }
        site.pass();
    }
}

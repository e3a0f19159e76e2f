//! The tree below a process, and its end. Backends of PostgreSQL lead process groups of their own, so that only the tree
//! finds them all.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use tokio::time::{Instant, MissedTickBehavior, interval};

/// One line of the process table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    pid: u32,
    parent: u32,
    is_dead: bool,
}

/// How soon it is looked again.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Ends everything below `root` but the trees of `spared`, looking again until nothing is left; gives up after `limit`.
/// Returns how many were left.
pub(crate) async fn end(root: u32, spared: &[u32], limit: Duration) -> usize {
    let deadline = Instant::now() + limit;
    let mut tick = interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let found = below(&table(Path::new("/proc")), root, spared);
        let alive: Vec<u32> = found
            .iter()
            .filter(|process| !process.is_dead)
            .map(|process| process.pid)
            .collect();
        for process in &found {
            let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) else {
                continue;
            };
            if !process.is_dead {
                let _ = kill_process(pid, Signal::KILL); // It may have ended by itself just now.
            } else if process.parent == root {
                let _ = waitpid(Some(pid), WaitOptions::NOHANG); // Ours to bury.
            }
        }
        if alive.is_empty() || Instant::now() >= deadline {
            return alive.len();
        }
    }
}

/// Buries the dead that were adopted: children of `root` that nobody else waits for. A dead process that stays in the table
/// is taken for a living one by whoever only asks whether its number is in use, as PostgreSQL does with its lock file.
pub(crate) fn bury(root: u32, waited_for: &[u32]) {
    for process in table(Path::new("/proc")) {
        let adopted = process.parent == root && !waited_for.contains(&process.pid);
        if adopted
            && process.is_dead
            && let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw)
        {
            let _ = waitpid(Some(pid), WaitOptions::NOHANG);
        }
    }
}

fn table(proc: &Path) -> Vec<Process> {
    let entries = fs::read_dir(proc).into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| parse_stat(pid, &fs::read_to_string(proc.join(pid.to_string()).join("stat")).ok()?))
        .collect()
}

/// `pid (name) state parent ...`, where the name may hold anything, brackets and spaces included.
fn parse_stat(pid: u32, stat: &str) -> Option<Process> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    Some(Process {
        pid,
        parent: fields.next()?.parse().ok()?,
        is_dead: matches!(state, "Z" | "X"),
    })
}

fn below(table: &[Process], root: u32, spared: &[u32]) -> Vec<Process> {
    let mut found: Vec<Process> = Vec::new();
    let mut parents = vec![root];
    while let Some(parent) = parents.pop() {
        for process in table
            .iter()
            .filter(|process| process.parent == parent && !spared.contains(&process.pid))
        {
            if !found.contains(process) {
                found.push(*process);
                parents.push(process.pid);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32, parent: u32) -> Process {
        Process {
            pid,
            parent,
            is_dead: false,
        }
    }

    #[test]
    fn a_tree_is_followed_to_its_leaves_and_no_further() {
        let table = [
            process(1, 0),
            process(10, 1),
            process(11, 10),
            process(12, 11),
            process(20, 1),
            process(13, 10),
        ];
        let pids = |spared: &[u32]| {
            let mut pids: Vec<u32> = below(&table, 10, spared).iter().map(|process| process.pid).collect();
            pids.sort_unstable();
            pids
        };
        assert_eq!(pids(&[]), [11, 12, 13]);
        assert_eq!(pids(&[11]), [13]);
    }

    #[test]
    fn names_with_brackets_and_spaces_are_read() {
        assert_eq!(parse_stat(5, "5 (a) b (c) S 1 5 5 0"), Some(process(5, 1)));
        assert_eq!(
            parse_stat(5, "5 (postgres) Z 7 5"),
            Some(Process {
                pid: 5,
                parent: 7,
                is_dead: true
            })
        );
        assert_eq!(parse_stat(5, "garbage"), None);
    }

    #[tokio::test]
    async fn a_tree_is_ended_and_its_root_left_alone() {
        let mut root = std::process::Command::new("sh")
            .args(["-c", "sleep 1000; exit 7"])
            .spawn()
            .expect("a shell");
        let deadline = Instant::now() + Duration::from_secs(30);
        // The shell may not have started its child yet, so it is looked again until the shell has seen it end.
        let status = loop {
            assert!(Instant::now() < deadline, "the tree is still there");
            assert_eq!(end(root.id(), &[], Duration::from_secs(5)).await, 0);
            if let Some(status) = root.try_wait().expect("our child") {
                break status;
            }
        };
        assert_eq!(status.code(), Some(7));
    }
}

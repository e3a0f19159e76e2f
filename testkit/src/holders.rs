//! Who held the leader key from when to when, as its watch in etcd told it.

use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};
use tokio::task::JoinSet;

use crate::cluster::Cluster;
use crate::config::PREFIX;
use crate::process;
use crate::wait::eventually;

const BEGUN_MAX: Duration = Duration::from_secs(30);

/// One member's time with the key. Times are those at which the news came here.
#[derive(Clone, Debug)]
pub struct Holding {
    /// Who.
    pub holder: String,
    /// When the key was seen to be made.
    pub since: Instant,
    /// When it was seen to be gone; nothing while it is there.
    pub until: Option<Instant>,
}

type Seen = Arc<Mutex<Vec<Holding>>>;

/// Watches the leader key until it is dropped.
pub struct HolderWatch {
    seen: Seen,
    _etcdctl: Child,
    _tasks: JoinSet<()>,
}

fn open(seen: &Seen) -> MutexGuard<'_, Vec<Holding>> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HolderWatch {
    /// Starts with who holds it now.
    ///
    /// # Errors
    /// When nobody does, or etcd does not tell.
    pub async fn start(cluster: &Cluster) -> Result<Self> {
        let key = format!("{PREFIX}leader");
        let entry = cluster.etcd().entry(&key).await?.context("there is no leader key")?;
        let mut command = cluster.site().command("etcdctl");
        command
            .env("ETCDCTL_API", "3")
            .arg("--endpoints")
            .arg(cluster.etcd().hosts().join(","));
        command.args(["watch", &key, &format!("--rev={}", entry.create_revision)]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut command = tokio::process::Command::from(command);
        command.kill_on_drop(true);
        let mut etcdctl = process::start_own(|| command.spawn(), Child::id).context("starting etcdctl")?;
        let told = etcdctl.stdout.take().context("what it tells")?;
        let seen = Seen::default();
        let mut tasks = JoinSet::new();
        let book = Arc::clone(&seen);
        tasks.spawn(async move {
            // When it ends, what was seen is all that there is, and a test that waits for more says so.
            let _ = follow(BufReader::new(told).lines(), &book).await;
        });
        eventually("the watch tells who holds the key", BEGUN_MAX, async || {
            ensure!(!open(&seen).is_empty());
            Ok(())
        })
        .await?;
        Ok(Self {
            seen,
            _etcdctl: etcdctl,
            _tasks: tasks,
        })
    }

    /// All holdings so far, in their order.
    #[must_use]
    pub fn holdings(&self) -> Vec<Holding> {
        open(&self.seen).clone()
    }

    /// When the first holding of `holder` was seen to be over.
    ///
    /// # Errors
    /// When it held nothing, or still does.
    pub fn end_of(&self, holder: &str) -> Result<Instant> {
        let seen = open(&self.seen);
        let held = seen.iter().find(|holding| holding.holder == holder);
        let held = held.with_context(|| format!("{holder} held nothing"))?;
        held.until.with_context(|| format!("{holder} holds the key"))
    }
}

/// Events are three lines each: what happened, the key, the value.
async fn follow(mut lines: Lines<BufReader<ChildStdout>>, seen: &Seen) -> Result<()> {
    while let Some(what) = lines.next_line().await? {
        let _key = lines.next_line().await?;
        let holder = lines.next_line().await?.context("an event has a value")?;
        note(&mut open(seen), &what, holder, Instant::now());
    }
    Ok(())
}

fn note(seen: &mut Vec<Holding>, what: &str, holder: String, at: Instant) {
    let held = seen.last_mut().filter(|holding| holding.until.is_none());
    if what == "PUT" && held.as_ref().is_some_and(|holding| holding.holder == holder) {
        return; // Written again, as after a change of its lease.
    }
    if let Some(holding) = held {
        holding.until = Some(at);
    }
    if what == "PUT" {
        seen.push(Holding {
            holder,
            since: at,
            until: None,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_become_holdings() {
        let at = Instant::now();
        let mut seen = Vec::new();
        for (what, holder) in [("PUT", "a"), ("PUT", "a"), ("DELETE", ""), ("PUT", "b"), ("PUT", "a")] {
            note(&mut seen, what, holder.to_owned(), at);
        }
        let seen: Vec<(&str, bool)> = seen
            .iter()
            .map(|holding| (holding.holder.as_str(), holding.until.is_some()))
            .collect();
        assert_eq!(seen, [("a", true), ("b", true), ("a", false)]);
    }
}

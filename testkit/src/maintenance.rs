//! Maintenance: the dynamic configuration changed through a member, the pause that every member has seen, agents that come
//! and go while PostgreSQL stays, and operators who go past them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::config::PREFIX;
use crate::ledger::LedgerReport;
use crate::load::Load;
use crate::member::Member;
use crate::process::{self, Pid, Signal};
use crate::program;
use crate::site::Site;
use crate::wait::eventually;

/// How long every member may take to see a change of the configuration.
const SEEN_MAX: Duration = Duration::from_secs(20);
const STOP_MAX: Duration = Duration::from_secs(30);
const RESTART_MAX: Duration = Duration::from_secs(60);

impl Cluster {
    /// Puts `over` over the dynamic configuration, by the first member that answers.
    ///
    /// # Errors
    /// When none does.
    pub async fn configure(&self, over: &Value) -> Result<()> {
        let mut last = None;
        for member in self.members() {
            match member.ask("PATCH", "/config", Some(over)).await {
                Ok(answer) if answer.status == 200 => return Ok(()),
                other => last = Some(format!("{member:?}: {other:?}")),
            }
        }
        anyhow::bail!("nobody took the configuration {over}; {last:?}")
    }

    /// Pauses the cluster, and waits until every member that has a key says that it has seen that.
    ///
    /// # Errors
    /// When one does not.
    pub async fn pause(&self) -> Result<()> {
        self.configure(&json!({"pause": true})).await?;
        self.pause_is_seen(true).await
    }

    /// Ends the pause, and waits until every member that has a key says that it has seen that.
    ///
    /// # Errors
    /// When one does not.
    pub async fn resume(&self) -> Result<()> {
        self.configure(&json!({"pause": null})).await?;
        self.pause_is_seen(false).await
    }

    /// Waits until every member that has a key says that it has seen a pause, or the end of one: `patronictl pause --wait` gives
    /// up after one period, which on a busy machine is soon over.
    ///
    /// # Errors
    /// When one does not.
    pub async fn pause_is_seen(&self, paused: bool) -> Result<()> {
        let what = format!("every member has seen pause: {paused}");
        let seen = eventually(&what, SEEN_MAX, async || {
            let entries = self.etcd().entries(&format!("{PREFIX}members/")).await?;
            ensure!(!entries.is_empty(), "nobody has a key");
            for entry in entries {
                let record: Value = serde_json::from_str(&entry.value)?;
                ensure!((record["pause"] == true) == paused, "{}: {record}", entry.key);
            }
            Ok(())
        });
        seen.await
    }

    /// What a member's key says of it.
    ///
    /// # Errors
    /// When it has none.
    pub async fn record(&self, member: &Member) -> Result<Value> {
        let entry = self.etcd().entry(&format!("{PREFIX}members/{}", member.name())).await?;
        let entry = entry.with_context(|| format!("{member:?} has no key"))?;
        Ok(serde_json::from_str(&entry.value)?)
    }

    /// The failsafe list: names and where their REST interfaces are.
    ///
    /// # Errors
    /// When there is none.
    pub async fn failsafe_list(&self) -> Result<Value> {
        let entry = self.etcd().entry(&format!("{PREFIX}failsafe")).await?;
        Ok(serde_json::from_str(
            &entry.context("there is no failsafe list")?.value,
        )?)
    }
}

impl Load {
    /// As [`Load::end`], after what PostgreSQL was not to notice: makes sure that `leader` still leads, with this
    /// postmaster, and that no acknowledged row is lost.
    ///
    /// # Errors
    /// When that is not so, and as [`Load::end`].
    pub async fn end_undisturbed(
        self,
        cluster: &Cluster,
        name: &str,
        fault: Instant,
        leader: &Member,
        postmaster: Pid,
    ) -> Result<LedgerReport> {
        let (after, report) = self.end(cluster, name, fault).await?;
        ensure!(after.name() == leader.name(), "{after:?} leads, not {leader:?}");
        leader.ensure_postmaster(postmaster)?;
        report.ensure_complete()?;
        Ok(report)
    }
}

impl Member {
    /// Restarts its PostgreSQL past the agent, with `pg_ctl` and as the user that it runs as. Returns the new postmaster.
    ///
    /// # Errors
    /// When `pg_ctl` fails.
    pub async fn restart_by_hand(&self, site: &Site) -> Result<Pid> {
        let mut restart = site.command(program::postgres_bin_dir()?.join("pg_ctl"));
        restart.args(["restart", "--mode=fast", "--wait", "--pgdata"]);
        restart.arg(self.data_dir());
        // Without a log of its own the server would hold the pipe that is read to its end here.
        restart
            .arg("--log")
            .arg(site.log_file(&format!("{}-by-hand", self.name())));
        site.run(restart, RESTART_MAX).await?.success()?;
        self.postmaster_pid()
    }

    /// Tells the keeper to stop by SIGTERM, and waits for its end. What becomes of PostgreSQL is for the test to say.
    ///
    /// # Errors
    /// When it does not run or does not end.
    pub async fn stop_service(&self) -> Result<()> {
        let keeper = self.keeper_pid().await?;
        process::signal(keeper, Signal::TERM)?;
        let what = format!("the keeper of {self:?} has ended");
        let ended = eventually(&what, STOP_MAX, async || {
            ensure!(
                !process::is_alive(keeper),
                "{}",
                process::last_lines(&self.log_file(), 3)
            );
            Ok(())
        });
        ended.await
    }

    /// Stops keeper and agent with SIGSTOP, the agent last: nothing renews, and nobody but the sentinel fences.
    ///
    /// # Errors
    /// When one of them does not run.
    pub async fn freeze_keeper_and_agent(&self) -> Result<[Pid; 2]> {
        let frozen = [self.keeper_pid().await?, self.agent_pid().await?];
        for pid in frozen {
            process::signal(pid, Signal::STOP)?;
        }
        Ok(frozen)
    }

    /// Whether its postmaster is still this one.
    ///
    /// # Errors
    /// When it has none, or another.
    pub fn ensure_postmaster(&self, expected: Pid) -> Result<()> {
        let pid = self.postmaster_pid()?;
        ensure!(
            pid == expected,
            "the postmaster of {self:?} is {pid:?}, not {expected:?}"
        );
        Ok(())
    }
}

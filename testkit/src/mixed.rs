//! A cluster in which some members are Patroni's and the others ours: what moves its lead, and what is true of it when
//! it is well.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::cluster::{Cluster, ClusterBuilder};
use crate::config::PREFIX;
use crate::member::Member;
use crate::patroni::Patroni;
use crate::wait::eventually;

/// How long the first member takes to make the cluster.
const MADE_MAX: Duration = Duration::from_secs(60);
/// Keys and answers follow the facts by a few cycles.
const AGREED_MAX: Duration = Duration::from_secs(30);
/// The number of a WAL file's name that tells the timeline on which the leader writes.
const TIMELINE: &str = "SELECT ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int";

/// Whom PostgreSQL waits for, in the order and form of `/sync`.
const SYNCHRONOUS: &str = "SELECT string_agg(application_name, ',' ORDER BY application_name COLLATE \"C\") \
                           FROM pg_stat_replication WHERE sync_state = 'sync'";

/// What a mixed cluster is made of.
#[derive(Clone, Debug)]
pub struct MixedBuilder {
    cluster: ClusterBuilder,
    patronis: BTreeSet<String>,
    first: String,
}

impl MixedBuilder {
    /// Starts the first member, lets it make the cluster, then starts the others, and waits until all is well.
    ///
    /// # Errors
    /// When it does not get well.
    pub async fn start(self) -> Result<Mixed> {
        let cluster = self.cluster.prepare().await?;
        let patroni = Patroni::new(cluster.site(), cluster.etcd())?;
        let mixed = Mixed {
            cluster,
            patroni,
            patronis: self.patronis,
        };
        cluster_is_made_by(&mixed, &self.first).await?;
        for member in mixed.cluster.others(&self.first) {
            mixed.start_member(member).await?;
        }
        mixed.cluster.start_proxy().await?;
        mixed.settled().await?;
        Ok(mixed)
    }
}

async fn cluster_is_made_by(mixed: &Mixed, first: &str) -> Result<()> {
    let member = mixed.cluster.member(first)?;
    mixed.start_member(member).await?;
    let what = format!("{first} has made the cluster and leads it");
    let made = eventually(&what, MADE_MAX, async || {
        ensure!(mixed.cluster.lease_holder().await? == first);
        ensure!(member.is_primary().await?, "it takes no writes");
        Ok(())
    });
    made.await
}

/// Who carries out a switchover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// `pgherd switchover`.
    Pgherd,
    /// `patronictl switchover`.
    Patronictl,
}

/// A running mixed cluster. All of it ends when this is dropped.
pub struct Mixed {
    cluster: Cluster,
    patroni: Patroni,
    patronis: BTreeSet<String>,
}

impl Mixed {
    /// A cluster as `cluster` says, in which Patroni runs the members named, and `first` makes it.
    #[must_use]
    pub fn builder(cluster: ClusterBuilder, patronis: &[&str], first: &str) -> MixedBuilder {
        MixedBuilder {
            cluster,
            patronis: patronis.iter().map(|name| (*name).to_owned()).collect(),
            first: first.to_owned(),
        }
    }

    /// The cluster. Its members' processes are started and ended through this instead.
    #[must_use]
    pub const fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Patroni's programs.
    #[must_use]
    pub const fn patroni(&self) -> &Patroni {
        &self.patroni
    }

    /// Whether Patroni runs this member.
    #[must_use]
    pub fn is_patronis(&self, member: &Member) -> bool {
        self.patronis.contains(member.name())
    }

    /// The members that are of the other kind than `member`.
    #[must_use]
    pub fn other_kind(&self, member: &Member) -> Vec<&Member> {
        let mut others = self.cluster.others(member.name());
        others.retain(|other| self.is_patronis(other) != self.is_patronis(member));
        others
    }

    /// Starts a member as what it is.
    ///
    /// # Errors
    /// When its program is not there.
    pub async fn start_member(&self, member: &Member) -> Result<()> {
        if self.is_patronis(member) {
            self.patroni.start(member).await
        } else {
            member.start().await
        }
    }

    /// Stops a member with SIGTERM, and waits until nothing of it is left.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn stop_member(&self, member: &Member) -> Result<()> {
        if self.is_patronis(member) {
            self.patroni.stop(member).await
        } else {
            member.stop().await
        }
    }

    /// Ends everything of a member with SIGKILL: who guards it, and PostgreSQL.
    ///
    /// # Errors
    /// When something does not end.
    pub async fn kill_everything(&self, member: &Member) -> Result<()> {
        if self.is_patronis(member) {
            self.patroni.kill_everything(member).await
        } else {
            member.kill_everything().await
        }
    }

    /// Asks by `tool` that `candidate` takes over from `leader`, and waits for the answer.
    ///
    /// # Errors
    /// When it is refused or fails.
    pub async fn switch_over(&self, tool: Tool, leader: &Member, candidate: &Member) -> Result<()> {
        let args = ["--leader", leader.name(), "--candidate", candidate.name(), "--force"];
        let outcome = match tool {
            Tool::Pgherd => self.cluster.pgherd("switchover", &args).await?,
            Tool::Patronictl => self.patroni.ctl(&[&["switchover"], &args[..]].concat()).await?,
        };
        let said = outcome.success()?;
        ensure!(said.contains("uccessfully switched over"), "{tool:?} said: {said}");
        Ok(())
    }

    /// The timeline on which `leader` writes.
    ///
    /// # Errors
    /// When it does not answer or takes no writes.
    pub async fn timeline(&self, leader: &Member) -> Result<u32> {
        Ok(leader.sql(TIMELINE).await?.parse()?)
    }

    /// Waits until the cluster is well, as [`Cluster::settled`] does, and until keys, REST interfaces and `patronictl`
    /// agree with that. Returns the leader.
    ///
    /// # Errors
    /// When that does not come about.
    pub async fn settled(&self) -> Result<&Member> {
        let leader = self.cluster.settled().await?;
        let agreed = eventually("keys and answers agree with the facts", AGREED_MAX, async || {
            self.look(leader).await
        });
        agreed.await?;
        Ok(leader)
    }

    async fn look(&self, leader: &Member) -> Result<()> {
        let timeline = self.timeline(leader).await?;
        for member in self.cluster.members() {
            let status = member.get("/patroni").await?.json()?;
            let role = if member.name() == leader.name() {
                "primary"
            } else {
                "replica"
            };
            let is_right = status["role"] == role && status["state"] == "running" && status["timeline"] == timeline;
            ensure!(is_right, "{member:?} is no {role} on timeline {timeline}: {status}");
            let pending = &status["pending_restart_reason"];
            ensure!(pending.is_null(), "{member:?} waits for a restart: {pending}");
        }
        self.look_at_history(leader, timeline).await?;
        self.look_at_list(leader, timeline).await
    }

    /// Each timeline that has ended is there, and whoever began the present one is the leader.
    async fn look_at_history(&self, leader: &Member, timeline: u32) -> Result<()> {
        let entry = self.cluster.etcd().entry(&format!("{PREFIX}history")).await?;
        let ended: Vec<Value> = match entry {
            Some(entry) => serde_json::from_str(&entry.value)?,
            None => Vec::new(),
        };
        let numbers: Vec<u64> = ended.iter().filter_map(|ended| ended[0].as_u64()).collect();
        let expected: Vec<u64> = (1..u64::from(timeline)).collect();
        ensure!(numbers == expected, "on timeline {timeline} the history is {ended:?}");
        if let Some(last) = ended.last() {
            ensure!(
                last[4] == leader.name(),
                "the last entry does not name {leader:?}: {last}"
            );
        }
        Ok(())
    }

    async fn look_at_list(&self, leader: &Member, timeline: u32) -> Result<()> {
        let rows = self.patroni.list().await?;
        for member in self.cluster.members() {
            let row = rows
                .get(member.name())
                .with_context(|| format!("patronictl does not list {member:?}: {rows:?}"))?;
            let is_leader = member.name() == leader.name();
            let state = if is_leader { "running" } else { "streaming" };
            let is_right = (row["Role"] == "Leader") == is_leader && row["State"] == state && row["TL"] == timeline;
            ensure!(
                is_right,
                "patronictl lists {member:?} as {row}; {leader:?} leads on {timeline}"
            );
        }
        Ok(())
    }

    /// Waits until `/sync` names `leader` and `count` standbys, for each of which its PostgreSQL waits.
    ///
    /// # Errors
    /// When that does not come about.
    pub async fn synchronous(&self, leader: &Member, count: usize) -> Result<()> {
        let agreed = eventually("/sync and PostgreSQL name the same standbys", AGREED_MAX, async || {
            let entry = self.cluster.etcd().entry(&format!("{PREFIX}sync")).await?;
            let sync: Value = serde_json::from_str(&entry.context("there is no /sync")?.value)?;
            ensure!(sync["leader"] == leader.name(), "{leader:?} leads, and /sync is {sync}");
            let listed = sync["sync_standby"].as_str().context("no standby in /sync")?;
            ensure!(listed.split(',').count() == count, "/sync is {sync}");
            let waited_for = leader.sql(SYNCHRONOUS).await?;
            ensure!(
                waited_for == listed,
                "/sync is {sync}, and PostgreSQL waits for {waited_for:?}"
            );
            Ok(())
        });
        agreed.await
    }

    /// The test has passed: nothing needs to be kept or shown.
    pub fn pass(&self) {
        self.cluster.pass();
    }
}

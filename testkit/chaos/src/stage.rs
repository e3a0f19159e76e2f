//! A cluster on hosts of its own, and one run of a case on it.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgherd_cluster::clock::{Boottime, wall_now};
use pgherd_testkit::{Cluster, Member, Network, eventually};
use serde_json::Value;
use tokio::time::timeout;

use crate::case::{Case, Mode};
use crate::fault::Scene;
use crate::judge::{Evidence, Judgement, judge};
use crate::load::{Load, rows_of};

/// How many members, and how many etcd members, there are.
pub const SIZE: u8 = 3;
/// What the cluster itself is given for getting well.
const SETTLED_MAX: Duration = Duration::from_secs(100);
const SETTLED_AFTER_TROUBLE_MAX: Duration = Duration::from_secs(20);
/// Until PostgreSQL has the standbys that the mode asks for.
const IN_FORCE_MAX: Duration = Duration::from_secs(30);

/// A cluster in one mode.
pub struct Stage {
    cluster: Cluster,
    network: Arc<Network>,
    mode: Mode,
}

/// What one run has shown.
pub struct Shown {
    /// What was felt and lost.
    pub judgement: Judgement,
    /// The errors of the proxy's clients.
    pub errors: std::collections::BTreeMap<String, usize>,
    /// Why the run did not come to its end, if it did not.
    pub trouble: Option<anyhow::Error>,
}

impl Stage {
    /// Starts a cluster with `over` over its first dynamic configuration, and waits until it is well.
    ///
    /// # Errors
    /// When it does not get well: its logs are in `logs` then.
    pub async fn set(network: &Arc<Network>, mode: Mode, over: &Value, logs: &Path) -> Result<Self> {
        network.heal()?;
        let builder = Cluster::builder().members(SIZE).etcd(SIZE).on(network);
        let cluster = builder.dcs(mode.dcs()).dcs(over.clone()).prepare().await?;
        // What is worth keeping is saved from it.
        cluster.pass();
        let stage = Self {
            cluster,
            network: Arc::clone(network),
            mode,
        };
        if let Err(error) = stage.start().await {
            stage.save_logs(&[], logs)?;
            return Err(error.context(format!("starting a cluster; its logs are in {}", logs.display())));
        }
        Ok(stage)
    }

    async fn start(&self) -> Result<()> {
        for member in self.cluster.members() {
            member.start().await?;
        }
        self.cluster.start_proxy().await?;
        self.in_force(cluster_leader(&self.cluster).await?).await
    }

    /// The cluster.
    #[must_use]
    pub const fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Its mode.
    #[must_use]
    pub const fn mode(&self) -> Mode {
        self.mode
    }

    /// Waits until commits wait for whom the mode says.
    async fn in_force(&self, leader: &Member) -> Result<()> {
        let Some(state) = self.mode.sync_state() else {
            return Ok(());
        };
        let what = format!("PostgreSQL has a standby in the state {state:?}");
        eventually(&what, IN_FORCE_MAX, async || {
            let listed = "SELECT string_agg(application_name || ' ' || sync_state, ',') FROM pg_stat_replication";
            let states = leader.sql(listed).await?;
            let wanted = if self.mode == Mode::Quorum {
                usize::from(SIZE) - 1
            } else {
                1
            };
            let named = states.split(',').filter_map(|standby| standby.split_once(' '));
            let found = named.filter(|(_, found)| *found == state).count();
            ensure!(found == wanted, "standbys: {states:?}");
            Ok(())
        })
        .await
    }

    /// Runs a case once. Afterwards the cluster is well, unless there was trouble.
    ///
    /// # Errors
    /// When the clients did not even get to work.
    pub async fn run(&self, case: Case, span: Duration) -> Result<Shown> {
        let leader = cluster_leader(&self.cluster).await?;
        self.in_force(leader).await?;
        let load = Load::start(&self.cluster, &self.network).await?;
        let scene = Scene {
            cluster: &self.cluster,
            network: &self.network,
            leader,
            load: &load,
            span,
        };
        let mut begun = None;
        self.mark(&format!("{case}: {} leads", leader.name()));
        let mut outcome = scene.happen(case, &mut begun).await;
        // Also after trouble: what was lost is worth knowing then more than ever.
        let limit = if outcome.is_ok() {
            SETTLED_MAX
        } else {
            SETTLED_AFTER_TROUBLE_MAX
        };
        let settled = timeout(limit, self.cluster.settled()).await;
        let last_leader = match settled.map_err(anyhow::Error::from).flatten() {
            Ok(leader) => Some(leader),
            Err(error) => {
                outcome = outcome.and(Err(error.context("the cluster did not get well again")));
                None
            }
        };
        if outcome.is_ok() {
            outcome = load.goes_on(Duration::from_secs(20)).await;
        }
        let (entries, end) = load.stop().await;
        let held = match last_leader {
            Some(member) => Some(rows_of(member).await.context("comparing the rows")),
            None => None,
        };
        let held = match held.transpose() {
            Ok(held) => held,
            Err(error) => {
                outcome = outcome.and(Err(error));
                None
            }
        };
        let judgement = judge(&Evidence {
            acks: &entries.acks,
            reads: &entries.reads,
            held: held.as_ref(),
            fault: begun.unwrap_or(end),
            end,
        });
        Ok(Shown {
            judgement,
            errors: entries.errors,
            trouble: outcome.err(),
        })
    }

    /// Writes a line into each log, so that people find the place.
    fn mark(&self, what: &str) {
        let line = format!("==== {what}, {:?} boottime {}\n", wall_now(), Boottime::now());
        for file in self.logs() {
            if let Ok(mut file) = fs::OpenOptions::new().append(true).open(file) {
                let _ = file.write_all(line.as_bytes()); // It is a help, no more.
            }
        }
    }

    fn logs(&self) -> Vec<PathBuf> {
        let dir = self.cluster.site().dir().join("log");
        let files = fs::read_dir(dir).into_iter().flatten().flatten();
        files.map(|entry| entry.path()).collect()
    }

    /// How long each log is now.
    #[must_use]
    pub fn log_lengths(&self) -> Vec<(PathBuf, u64)> {
        let length = |file: PathBuf| {
            let length = fs::metadata(&file).map_or(0, |metadata| metadata.len());
            (file, length)
        };
        self.logs().into_iter().map(length).collect()
    }

    /// Copies what the logs have grown by since then into `dir`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save_logs(&self, since: &[(PathBuf, u64)], dir: &Path) -> Result<()> {
        fs::create_dir_all(dir)?;
        for file in self.logs() {
            let from = since
                .iter()
                .find(|(known, _)| *known == file)
                .map_or(0, |(_, from)| *from);
            let mut log = File::open(&file)?;
            log.seek(SeekFrom::Start(from))?;
            let mut text = Vec::new();
            log.read_to_end(&mut text)?;
            fs::write(dir.join(file.file_name().context("a log has a name")?), text)?;
        }
        Ok(())
    }
}

async fn cluster_leader(cluster: &Cluster) -> Result<&Member> {
    cluster.settled().await.context("the cluster is not well to begin with")
}

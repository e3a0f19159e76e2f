//! Performs one step of a decision. Long work is started as a job; the rest is done here, with deadlines.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::etcd::{Compare, Op, Txn};
use pgherd_cluster::event::phase;
use pgherd_cluster::http::Ask;
use pgherd_cluster::key::Key;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::DynamicConfig;
use pgherd_cluster::timing::LeaseTiming;
use pgherd_cluster::view::Epoch;
use pgherd_keeper::protocol::Refusal;
use serde_json::{Map, Value, json};
use tokio::task::JoinSet;

use super::Cycle;
use crate::decide::{Step, gives_no_deadline, is_writable, upstream_address};
use crate::jobs::{Job, JobError, clear_request, hand_to, release_key, reload_if_changed, withdraw};
use crate::keeper::OrderError;
use crate::lease::{BidGuards, BidLoss};
use crate::observation::{LeaseSeen, Observation, Postgres, Rejoin};
use crate::postgres::place::{Place, stamp, unmark};
use crate::postgres::{DataDir, Upstream};
use crate::sync::SyncStep;

/// What became of a step.
pub(super) enum Acted {
    /// It is done: decide again at once.
    Done,
    /// A job has been started.
    Started,
    /// It is done, but what is seen needs a moment to show it.
    Settling,
    /// It failed: decide again a little later.
    Failed,
    /// The loop ends.
    Leave(Left),
}

/// How the loop ends.
#[derive(Clone, Copy, Debug)]
pub struct Left {
    /// The exit code.
    pub code: u8,
    /// Whether PostgreSQL goes on.
    pub keep_postgres: bool,
}

/// How long a member may take to delete our key for us.
const RELEASE_MAX: Duration = Duration::from_secs(1);

impl Cycle {
    pub(super) async fn act(&mut self, seen: &Observation, step: Step) -> Acted {
        self.note_step(&step);
        self.memory.stepped(&step, Boottime::now());
        if matches!(
            step,
            Step::End | Step::Stop | Step::Clone { .. } | Step::CloneRemote | Step::Rewind { .. }
        ) {
            self.told.order_stop();
        }
        self.listen_as_configured(seen, &step);
        match self.try_act(seen, step.clone()).await {
            Ok(acted) => {
                self.memory.performed(&step);
                acted
            }
            Err(error) => {
                tracing::warn!("{error}");
                Acted::Failed
            }
        }
    }

    /// A server that is about to be started listens where it is configured to; one that runs is reached where it does.
    fn listen_as_configured(&self, seen: &Observation, step: &Step) {
        let starts = matches!(
            step,
            Step::StartPrimary | Step::StartStandby { .. } | Step::StartStandbyLeader
        );
        if starts && seen.postgres == Postgres::Down {
            self.context.live.listen_as_configured();
            self.context.reach_server(self.former_password.clone());
        }
    }

    async fn try_act(&mut self, seen: &Observation, step: Step) -> Result<Acted, JobError> {
        if let Some(job) = self.job_of(seen, &step) {
            self.start(job);
            return Ok(Acted::Started);
        }
        match step {
            Step::ClaimBootstrap => return self.claim_bootstrap(seen).await,
            Step::Initialize => return self.initialize(seen).await.map(|()| Acted::Settling),
            Step::Withdraw => return withdraw(&self.context).await.map(|()| Acted::Settling),
            Step::UndoBootstrap => return self.undo_bootstrap(seen).await,
            Step::Discard => self.discard()?,
            Step::Follow { upstream } => {
                let address = upstream.as_ref().and_then(|name| upstream_address(&seen.view, name));
                self.follow(seen, address.map(Upstream::Member))?;
            }
            Step::FollowRemote => self.follow(seen, seen.standby_cluster.clone().map(Upstream::Remote))?,
            Step::Bid(guards) => return self.bid(guards).await,
            Step::End => return self.end().await,
            Step::Release { epoch } => return self.release(&epoch).await,
            Step::WinAnew { epoch, lease, guards } => {
                self.abandon(&epoch, lease).await?;
                return self.bid(guards).await;
            }
            Step::Forsake { lease } => {
                self.context.lease.forsake(lease).await;
                return Ok(Acted::Settling);
            }
            Step::Abandon { epoch, lease } => return self.abandon(&epoch, lease).await.map(|()| Acted::Settling),
            Step::Sync(step) => return self.synchronize(seen, step).await,
            Step::BeginHandover { .. } | Step::FailHandover(_) => {}
            Step::HandTo { epoch, successor, last } => {
                self.let_go().await;
                hand_to(&self.context, &epoch, successor.as_ref(), last).await?;
                self.note_released(&epoch, successor.as_ref().map(MemberName::as_str));
                return Ok(Acted::Settling);
            }
            Step::ClearRequest => {
                clear_request(&self.context, &seen.view).await?;
                return Ok(Acted::Settling);
            }
            Step::AskRelease { epoch } => self.ask_release(seen, &epoch).await,
            Step::Adopt => self.adopt(seen).await?,
            Step::Rebind { epoch, lease } => {
                self.context.lease.rebind(epoch, lease).await;
                return Ok(Acted::Settling);
            }
            Step::PauseFence => return self.pause_fence().await,
            Step::ResumeFence => return self.resume_fence(seen).await,
            Step::DropJob => self.drop_job().await,
            Step::Leave { code, keep_postgres } => return Ok(Acted::Leave(Left { code, keep_postgres })),
            // Each is a job; one that is none after all lacks the lease that it needs.
            Step::Initdb
            | Step::Clone { .. }
            | Step::Restore
            | Step::CloneRemote
            | Step::Rewind { .. }
            | Step::StartStandbyLeader
            | Step::CheckRemote { .. }
            | Step::StartPrimary
            | Step::StartStandby { .. }
            | Step::CheckRejoin { .. }
            | Step::PrePromote(_)
            | Step::Promote(_)
            | Step::Poll
            | Step::Checkpoint { .. }
            | Step::Stop
            | Step::Confirm { .. } => return Ok(Acted::Failed),
        }
        Ok(Acted::Done)
    }

    fn follow(&mut self, seen: &Observation, upstream: Option<Upstream>) -> Result<(), JobError> {
        reload_if_changed(&self.context, upstream.as_ref(), control_of(seen))?;
        self.known.upstream = upstream;
        Ok(())
    }

    /// Whether the configuration orders that the data which is about to be copied anew is not kept.
    fn removes_diverged(&self, seen: &Observation) -> bool {
        let orders = self.context.divergence();
        let leader = seen.view.epoch();
        let under = |noted: &Option<Epoch>| leader.is_some() && noted.as_ref() == leader;
        let tried = under(&self.memory.rewound_under);
        let diverged = matches!(&self.memory.rejoin, Some((asked, Rejoin::Diverged)) if Some(asked) == leader);
        let ordered = if tried {
            // A rewind that was not let begin has not failed: it may be all that saves what is here.
            orders.remove_on_rewind_failure && under(&self.memory.rewind_refused_under)
        } else {
            orders.remove_on_diverged_timelines
        };
        diverged && ordered
    }

    /// The long work that a step is, if it is any.
    fn job_of(&mut self, seen: &Observation, step: &Step) -> Option<Job> {
        Some(match step {
            Step::Initdb => Job::Initdb,
            Step::Clone { from } => Job::Clone {
                from: Some(from.clone()),
                remove: self.removes_diverged(seen),
            },
            Step::Restore => Job::Clone {
                from: None,
                remove: false,
            },
            Step::PrePromote(epoch) => Job::PrePromote(epoch.clone()),
            Step::Rewind { leader } => {
                self.known.writable = false;
                Job::Rewind(leader.holder.clone())
            }
            Step::CloneRemote => Job::CloneRemote(seen.standby_cluster.clone()?),
            Step::CheckRemote { epoch } => Job::CheckRemote(epoch.clone(), seen.standby_cluster.clone()?),
            Step::StartStandbyLeader => {
                let section = seen.standby_cluster.clone()?;
                self.known.writable = false;
                self.known.upstream = Some(Upstream::Remote(section.clone()));
                Job::StartStandbyLeader(section)
            }
            Step::StartPrimary => {
                let LeaseSeen::Mine(epoch) = &seen.lease else {
                    return None;
                };
                self.known.writable = true;
                Job::StartPrimary(epoch.clone())
            }
            Step::StartStandby { upstream } => {
                self.known.writable = false;
                let address = upstream.as_ref().and_then(|name| upstream_address(&seen.view, name));
                self.known.upstream = address.map(Upstream::Member);
                Job::StartStandby(upstream.clone())
            }
            Step::CheckRejoin { leader } => Job::CheckRejoin(leader.clone()),
            Step::Promote(epoch) => {
                self.known.writable = true;
                Job::Promote(epoch.clone())
            }
            Step::Poll => Job::Poll(self.memory.addresses.clone()),
            Step::Checkpoint { to } => {
                tracing::info!(next_leader = %to, "checkpoint before the stop, while still serving");
                Job::Checkpoint
            }
            Step::Stop => Job::Stop,
            Step::Confirm {
                members,
                checkpoint,
                timeline,
            } => Job::Confirm {
                members: members.clone(),
                checkpoint: *checkpoint,
                timeline: *timeline,
            },
            _ => return None,
        })
    }

    async fn adopt(&mut self, seen: &Observation) -> Result<(), JobError> {
        let standby = matches!(&seen.data, DataDir::Cluster { standby: true, .. });
        let pid = self.context.keeper.adopt(!standby).await?;
        tracing::info!(pid, standby, "took a running PostgreSQL into the keeper's care");
        self.known.writable = !standby;
        Ok(())
    }

    async fn pause_fence(&mut self) -> Result<Acted, JobError> {
        self.context.lease.pause(true).await;
        self.context.keeper.pause().await?;
        Ok(Acted::Settling)
    }

    /// A primary ends the pause by its next deadline; what cannot take writes needs none, and gets none in a standby cluster.
    async fn resume_fence(&mut self, seen: &Observation) -> Result<Acted, JobError> {
        self.context.lease.pause(gives_no_deadline(seen)).await;
        if !seen.fence_paused || is_writable(seen) {
            return Ok(Acted::Settling);
        }
        match self.context.keeper.disarm().await {
            // Something writable runs after all: it is taken for that until it says otherwise.
            Err(OrderError::Refused(Refusal::InstanceLeft)) => self.known.writable = true,
            other => other?,
        }
        Ok(Acted::Settling)
    }

    async fn bid(&mut self, guards: BidGuards) -> Result<Acted, JobError> {
        let context = &self.context;
        let won = context.lease.bid(guards).await;
        match won {
            Ok(epoch) => {
                tracing::info!("{} won the lease as {epoch}", context.config.name);
                context.journal.mark(phase::BID_WON);
                self.remember();
                Ok(Acted::Done)
            }
            Err(BidLoss::Store(error)) => Err(error.into()),
            Err(error) => {
                tracing::info!("the bid was not won: {error}");
                self.memory.poll = None;
                Ok(Acted::Failed)
            }
        }
    }

    /// The lease is lost: everything ends, now, and no deadline is given any more.
    async fn end(&mut self) -> Result<Acted, JobError> {
        self.drop_job().await;
        self.let_go().await;
        self.context.keeper.end().await?;
        self.context.keeper.disarm().await?;
        self.known.writable = false;
        Ok(Acted::Done)
    }

    async fn release(&mut self, epoch: &Epoch) -> Result<Acted, JobError> {
        self.let_go().await;
        let lease = self.context.lease.state().borrow().lease.unwrap_or_default();
        self.context.keeper.disarm().await?;
        release_key(&self.context, epoch, lease, None).await?;
        Ok(Acted::Settling)
    }

    /// Changes what commits wait for, or its record. The record changes only while the leader key is this holding's.
    async fn synchronize(&mut self, seen: &Observation, step: SyncStep) -> Result<Acted, JobError> {
        let key = self.context.key(&Key::Sync);
        let (revision, op) = match step {
            SyncStep::SetNames(names) => {
                tracing::info!(%names, "synchronous_standby_names");
                self.context.set_sync_names(Some(names));
                let floors = if self.known.writable { None } else { control_of(seen) };
                reload_if_changed(&self.context, self.known.upstream.as_ref(), floors)?;
                return Ok(Acted::Settling);
            }
            SyncStep::WriteSync { state, revision } => {
                let value = serde_json::to_string(&state).unwrap_or_default();
                let key = key.clone();
                (revision, Op::Put { key, value, lease: 0 })
            }
            SyncStep::DeleteSync { revision } => (revision, Op::Delete(key.clone())),
        };
        let LeaseSeen::Mine(epoch) = &seen.lease else {
            return Ok(Acted::Failed);
        };
        let txn = Txn::new()
            .when(Compare::CreateRevision(
                self.context.key(&Key::Leader),
                epoch.create_revision,
            ))
            .when(Compare::ModRevision(key, revision))
            .then(op);
        let outcome = self.context.etcd.txn(&txn, self.context.budget()).await?;
        Ok(if outcome.succeeded {
            Acted::Settling
        } else {
            Acted::Failed
        })
    }

    /// Asks every member that can be reached to delete our key, all at once: one that reaches etcd is enough.
    async fn ask_release(&mut self, seen: &Observation, epoch: &Epoch) {
        let Some(lease) = self.context.lease.state().borrow().lease else {
            return;
        };
        self.let_go().await;
        let peers = self.context.peers.clone();
        let mut asking = JoinSet::new();
        for member in seen.view.members.values().filter(|member| member.name != seen.me) {
            let Some(endpoint) = member.record.api_endpoint() else {
                continue;
            };
            let request = Ask {
                method: hyper::Method::POST,
                path: "/api/v1/release".to_owned(),
                json: Some(json!({
                    "name": epoch.holder, "create_revision": epoch.create_revision, "lease": lease,
                })),
                authorization: peers.authorization(),
            };
            let name = member.name.clone();
            let peers = peers.clone();
            asking.spawn(async move { (name, peers.ask(&endpoint, request, RELEASE_MAX).await) });
        }
        for (name, answer) in asking.join_all().await {
            match answer {
                Ok(answer) => tracing::info!(member = %name, status = answer.status, "asked to delete our leader key"),
                Err(error) => tracing::info!(member = %name, %error, "could not ask to delete our leader key"),
            }
        }
    }

    /// Deletes a key that names us and that no deadline rests on. PostgreSQL has ended, or is a standby.
    async fn abandon(&mut self, epoch: &Epoch, lease: i64) -> Result<(), JobError> {
        self.let_go().await;
        release_key(&self.context, epoch, lease, None).await
    }

    /// Gives the holding up, also in what an agent after this one will remember: it must not go on with a key whose deletion
    /// is on its way.
    pub(super) async fn let_go(&mut self) {
        self.context.lease.let_go().await;
        self.remember();
    }

    /// Creates the initialize key, bound to our lease so that a member that dies here does not block the others, and
    /// begins.
    async fn claim_bootstrap(&mut self, seen: &Observation) -> Result<Acted, JobError> {
        let Some(lease) = self.context.lease.state().borrow().lease else {
            return Ok(Acted::Failed);
        };
        let (initialize, leader) = (self.context.key(&Key::Initialize), self.context.key(&Key::Leader));
        let txn = Txn::new()
            .when(Compare::Absent(initialize.clone()))
            .when(Compare::Absent(leader))
            .then(Op::Put {
                key: initialize.clone(),
                value: String::new(),
                lease,
            })
            .then(Op::Get(initialize.clone()))
            .otherwise(Op::Get(initialize));
        let outcome = self.context.etcd.txn(&txn, self.context.budget()).await?;
        // A repeated try finds its own first one: empty, and on our lease.
        if outcome
            .read
            .iter()
            .any(|entry| entry.value.is_empty() && entry.lease == lease)
        {
            let Some(section) = seen.standby_cluster.clone() else {
                let custom = self.context.live().bootstrap.method.is_some();
                self.start(if custom { Job::CustomBootstrap } else { Job::Initdb });
                return Ok(Acted::Started);
            };
            // Written first: whoever finds the copy knows by it what to do with that.
            self.write_first_config(true).await?;
            self.start(Job::CloneRemote(section));
            return Ok(Acted::Started);
        }
        Ok(Acted::Failed)
    }

    /// Writes the system identifier of the data that is here, and the first configuration where there is none.
    async fn initialize(&mut self, seen: &Observation) -> Result<(), JobError> {
        let DataDir::Cluster { control, .. } = &seen.data else {
            return Ok(());
        };
        let key = self.context.key(&Key::Initialize);
        // Either nobody bootstraps, or we do: the empty key is ours when it is on our lease.
        let lease = self.context.lease.state().borrow().lease.unwrap_or_default();
        let put = Op::Put {
            key: key.clone(),
            value: control.system_id.to_string(),
            // Until the cluster is finished it may still come to nothing, and then others must be able to make one.
            lease: if seen.bootstrap_unfinished { lease } else { 0 },
        };
        let fresh = Txn::new().when(Compare::Absent(key.clone())).then(put.clone());
        let ours = Txn::new()
            .when(Compare::Value(key.clone(), String::new()))
            .when(Compare::Lease(key, lease))
            .then(put);
        for txn in [fresh, ours] {
            if self.context.etcd.txn(&txn, self.context.budget()).await?.succeeded {
                break;
            }
        }
        // Data that has taken writes does not become a standby because of what its cluster once began as.
        self.write_first_config(seen.standby_cluster.is_some()).await
    }

    pub(super) async fn write_first_config(&self, follows_another: bool) -> Result<(), JobError> {
        let key = self.context.key(&Key::Config);
        let mut configured = self.context.config.bootstrap.dcs.clone();
        if !follows_another {
            configured.shift_remove("standby_cluster");
        }
        // An etcd that was emptied gets back what it had.
        let remembered = self.known.last_config.as_ref().map(|config| config.document().clone());
        let value = Value::Object(remembered.unwrap_or_else(|| first_config(&configured))).to_string();
        let txn = Txn::new()
            .when(Compare::Absent(key.clone()))
            .then(Op::Put { key, value, lease: 0 });
        self.context.etcd.txn(&txn, self.context.budget()).await?;
        Ok(())
    }
}

impl Cycle {
    /// Takes back what a failed bootstrap has done.
    async fn undo_bootstrap(&mut self, seen: &Observation) -> Result<Acted, JobError> {
        withdraw(&self.context).await?;
        let key = self.context.key(&Key::Config);
        let value = Value::Object(first_config(&self.context.config.bootstrap.dcs)).to_string();
        // One that somebody has changed since is wanted.
        let txn = Txn::new()
            .when(Compare::Value(key.clone(), value))
            .then(Op::Delete(key));
        self.context.etcd.txn(&txn, self.context.budget()).await?;
        let own = self.context.lease.state().borrow().lease.unwrap_or_default();
        match &seen.lease {
            LeaseSeen::Mine(epoch) | LeaseSeen::MineUnproven(epoch) => self.abandon(epoch, own).await?,
            LeaseSeen::Stale { epoch, lease } => self.abandon(epoch, *lease).await?,
            LeaseSeen::Theirs(_) | LeaseSeen::Free | LeaseSeen::Unknown => {}
        }
        self.discard()?;
        Ok(Acted::Settling)
    }

    /// Moves the data directory of a cluster aside that never came to be.
    fn discard(&self) -> Result<(), JobError> {
        let place = Place::of(&self.context.config.postgresql.data_dir)?;
        if let Some(aside) = place.move_aside(&stamp())? {
            tracing::warn!(aside = %aside.display(), "the beginnings of a new cluster were moved aside");
        }
        unmark(place.data_dir())?;
        place.bound_asides();
        Ok(())
    }
}

/// The first dynamic configuration: what is configured, with our times where it names none.
fn first_config(configured: &Map<String, Value>) -> Map<String, Value> {
    let mut config = configured.clone();
    let names_a_time = ["ttl", "loop_wait", "retry_timeout"]
        .iter()
        .any(|name| config.contains_key(*name));
    // A short lease needs the vouches: etcd's own change of leader takes longer than what is left of it.
    if !names_a_time && !config.contains_key("failsafe_mode") {
        config.insert("failsafe_mode".to_owned(), json!(true));
    }
    if !names_a_time {
        let timing = LeaseTiming::DEFAULT;
        let mut ours = Map::new();
        for (name, time) in [
            ("ttl", timing.ttl()),
            ("loop_wait", timing.loop_wait()),
            ("retry_timeout", timing.retry_timeout()),
        ] {
            ours.insert(name.to_owned(), json!(time.as_secs()));
        }
        ours.append(&mut config);
        config = ours;
    }
    if DynamicConfig::new(config.clone()).timing().is_err() {
        tracing::warn!(
            "the times in bootstrap.dcs cannot work together; Patroni's defaults are in force until they are corrected"
        );
    }
    config
}

fn control_of(seen: &Observation) -> Option<&crate::postgres::Control> {
    match &seen.data {
        DataDir::Cluster { control, .. } => Some(control),
        DataDir::Empty | DataDir::Foreign(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_times_are_written_only_where_none_are_configured() {
        let configured = |value: Value| value.as_object().cloned().unwrap_or_default();
        let first = |value: Value| Value::Object(first_config(&configured(value))).to_string();
        assert_eq!(
            first(json!({})),
            r#"{"ttl":5,"loop_wait":1,"retry_timeout":2,"failsafe_mode":true}"#
        );
        assert_eq!(first(json!({"ttl": 30, "x": 1})), r#"{"ttl":30,"x":1}"#);
    }
}

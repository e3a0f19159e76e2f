//! Performs one step of a decision. Long work is started as a job; the rest is done here, with deadlines.

use pgherd_cluster::etcd::{Compare, Op, Txn};
use pgherd_cluster::key::Key;
use pgherd_cluster::record::DynamicConfig;
use pgherd_cluster::timing::LeaseTiming;
use pgherd_cluster::view::Epoch;
use serde_json::{Map, Value, json};

use super::Cycle;
use crate::decide::{Step, upstream_address};
use crate::jobs::{Job, JobError, clear_request, release_key, reload_if_changed};
use crate::lease::{BidError, BidGuards};
use crate::observation::{LeaseSeen, Observation};
use crate::postgres::DataDir;

/// What became of a step.
pub(super) enum Acted {
    /// It is done: decide again at once.
    Done,
    /// A job has been started.
    Started,
    /// It failed: decide again a little later.
    Failed,
    /// The loop ends with this code.
    Leave(u8),
}

impl Cycle {
    pub(super) async fn act(&mut self, seen: &Observation, step: Step) -> Acted {
        match self.try_act(seen, step).await {
            Ok(acted) => acted,
            Err(error) => {
                tracing::warn!("{error}");
                Acted::Failed
            }
        }
    }

    async fn try_act(&mut self, seen: &Observation, step: Step) -> Result<Acted, JobError> {
        match step {
            Step::ClaimBootstrap => return self.claim_bootstrap().await,
            Step::Initialize => self.initialize(seen).await?,
            Step::Initdb => self.start(Job::Initdb),
            Step::Clone { from } => self.start(Job::Clone(from)),
            Step::StartPrimary => {
                let LeaseSeen::Mine(epoch) = &seen.lease else {
                    return Ok(Acted::Failed);
                };
                self.known.writable = true;
                self.start(Job::StartPrimary(epoch.clone()));
            }
            Step::StartStandby { upstream } => {
                self.known.writable = false;
                self.known.upstream = upstream.as_ref().and_then(|name| upstream_address(&seen.view, name));
                self.start(Job::StartStandby(upstream));
            }
            Step::Follow { upstream } => {
                let address = upstream.as_ref().and_then(|name| upstream_address(&seen.view, name));
                reload_if_changed(&self.context, address.as_ref(), control_of(seen))?;
                self.known.upstream = address;
                return Ok(Acted::Done);
            }
            Step::CheckRejoin { leader } => self.start(Job::CheckRejoin(leader)),
            Step::Bid(guards) => return self.bid(guards).await,
            Step::Promote(epoch) => {
                self.known.writable = true;
                self.start(Job::Promote(epoch));
            }
            Step::End => return self.end().await,
            Step::Release { epoch } => return self.release(&epoch).await,
            Step::WinAnew { epoch, lease, guards } => {
                self.abandon(&epoch, lease).await?;
                return self.bid(guards).await;
            }
            Step::Abandon { epoch, lease } => {
                self.abandon(&epoch, lease).await?;
                return Ok(Acted::Failed); // The view needs a moment to show it.
            }
            Step::Poll => self.start(Job::Poll),
            Step::Switchover { candidate } => {
                let LeaseSeen::Mine(epoch) = &seen.lease else {
                    return Ok(Acted::Failed);
                };
                self.start(Job::Switchover {
                    epoch: epoch.clone(),
                    candidate,
                });
            }
            Step::ClearRequest => {
                clear_request(&self.context, &seen.view).await?;
                return Ok(Acted::Failed);
            }
            Step::HandOver => {
                let held = self.context.lease.state().borrow().holding.clone();
                self.start(Job::HandOver(held.map(|held| held.epoch)));
            }
            Step::Stop => self.start(Job::Stop),
            Step::DropJob => {
                self.drop_job().await;
                return Ok(Acted::Done);
            }
            Step::Leave(code) => return Ok(Acted::Leave(code)),
        }
        Ok(Acted::Started)
    }

    async fn bid(&mut self, guards: BidGuards) -> Result<Acted, JobError> {
        let context = &self.context;
        let won = context.lease.bid(guards).await;
        match won {
            Ok(epoch) => {
                tracing::info!("{} won the lease as {epoch}", context.config.name);
                self.remember();
                Ok(Acted::Done)
            }
            Err(error @ (BidError::Lost | BidError::NoLease)) => {
                tracing::info!("the bid was not won: {error}");
                self.memory.poll = None;
                Ok(Acted::Failed)
            }
            Err(BidError::Store(error)) => Err(error.into()),
        }
    }

    /// The lease is lost: everything ends, now, and no deadline is given any more.
    async fn end(&mut self) -> Result<Acted, JobError> {
        self.drop_job().await;
        self.context.lease.let_go().await;
        self.context.keeper.end().await?;
        self.context.keeper.disarm().await?;
        self.known.writable = false;
        Ok(Acted::Done)
    }

    async fn release(&mut self, epoch: &Epoch) -> Result<Acted, JobError> {
        let lease = self.context.lease.state().borrow().lease.unwrap_or_default();
        self.context.lease.let_go().await;
        self.context.keeper.disarm().await?;
        release_key(&self.context, epoch, lease, None).await?;
        Ok(Acted::Failed)
    }

    /// Deletes a key that names us and that no deadline rests on. PostgreSQL has ended, or is a standby.
    async fn abandon(&mut self, epoch: &Epoch, lease: i64) -> Result<(), JobError> {
        self.context.lease.let_go().await;
        release_key(&self.context, epoch, lease, None).await
    }

    /// Creates the initialize key, bound to our lease so that a member that dies here does not block the others, and
    /// begins.
    async fn claim_bootstrap(&mut self) -> Result<Acted, JobError> {
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
            self.start(Job::Initdb);
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
        let put = Op::Put {
            key: key.clone(),
            value: control.system_id.to_string(),
            lease: 0,
        };
        // Either nobody bootstraps, or we do: the empty key is ours when it is on our lease.
        let lease = self.context.lease.state().borrow().lease.unwrap_or_default();
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
        let key = self.context.key(&Key::Config);
        let value = Value::Object(first_config(&self.context.config.bootstrap.dcs)).to_string();
        let txn = Txn::new()
            .when(Compare::Absent(key.clone()))
            .then(Op::Put { key, value, lease: 0 });
        self.context.etcd.txn(&txn, self.context.budget()).await?;
        Ok(())
    }
}

/// The first dynamic configuration: what is configured, with our times where it names none.
fn first_config(configured: &Map<String, Value>) -> Map<String, Value> {
    let mut config = configured.clone();
    let names_a_time = ["ttl", "loop_wait", "retry_timeout"]
        .iter()
        .any(|name| config.contains_key(*name));
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
        assert_eq!(first(json!({})), r#"{"ttl":5,"loop_wait":1,"retry_timeout":2}"#);
        assert_eq!(first(json!({"ttl": 30, "x": 1})), r#"{"ttl":30,"x":1}"#);
    }
}

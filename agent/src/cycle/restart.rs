//! What an operator asks for: orders are taken here, the decisions carry them out.

use jiff::Timestamp;
use pgherd_cluster::clock::{Boottime, wall_now};
use serde_json::Value;
use tokio::sync::oneshot;

use super::Cycle;
use crate::memory::{Restart, RestartStage};
use crate::observation::JobKind;
use crate::restart::{Conditions, Due, NotBegun, Order, Restarted, Scheduled};

/// What is ordered, and who waits for it.
#[derive(Default)]
pub(super) struct Orders {
    waiting: Option<oneshot::Sender<Restarted>>,
    scheduled: Option<Scheduled>,
    reinitialize: Reinitialize,
}

/// A new copy of the leader's data.
#[derive(Default)]
enum Reinitialize {
    /// None was asked for, or it was made.
    #[default]
    Idle,
    /// It is to be made, or being made.
    UnderWay,
    /// It was not made.
    Failed(String),
}

impl Orders {
    pub(super) fn document(&self) -> Option<Value> {
        Some(self.scheduled.as_ref()?.document.clone())
    }

    /// Tells who waits what became of the restart.
    pub(super) fn ended(&mut self, restarted: Restarted) {
        if let Some(reply) = self.waiting.take() {
            let _ = reply.send(restarted); // Who asked may have given up.
        }
    }
}

impl Orders {
    /// The new copy is made, or is not, and why; nothing where none was under way.
    pub(super) fn reinitialize_ended(&mut self, error: Option<&str>) {
        if matches!(self.reinitialize, Reinitialize::UnderWay) {
            self.reinitialize = error.map_or(Reinitialize::Idle, |error| Reinitialize::Failed(error.to_owned()));
        }
    }

    pub(super) fn reinitialize_failed(&self) -> Option<String> {
        match &self.reinitialize {
            Reinitialize::Failed(why) => Some(why.clone()),
            Reinitialize::Idle | Reinitialize::UnderWay => None,
        }
    }
}

impl Cycle {
    pub(super) async fn take_order(&mut self, order: Order) {
        match order {
            Order::Now { conditions, reply } => match self.begin_restart(&conditions).await {
                Ok(()) => self.orders.waiting = Some(reply),
                Err(refusal) => {
                    let _ = reply.send(refusal); // Who asked may have given up.
                }
            },
            Order::At { mut scheduled, reply } => {
                let is_first = self.orders.scheduled.is_none();
                if is_first {
                    tracing::info!(at = %scheduled.at, "a restart is scheduled");
                    let started = self.started();
                    if let (Value::Object(document), Some(started)) = (&mut scheduled.document, started) {
                        document.insert("postmaster_start_time".to_owned(), started.into());
                    }
                    self.orders.scheduled = Some(scheduled);
                }
                let _ = reply.send(is_first);
            }
            Order::TakeBack { reply } => {
                let _ = reply.send(self.orders.scheduled.take().is_some());
            }
            Order::Reinitialize { force, reply } => {
                let _ = reply.send(self.begin_reinitialize(force).await); // Who asked may have given up.
            }
            Order::Reload => self.reload(),
        }
    }

    async fn begin_reinitialize(&mut self, force: bool) -> Result<(), NotBegun> {
        match self.context.view.load().epoch() {
            None => return Err(NotBegun::NoLeader),
            Some(epoch) if epoch.holder == self.context.config.name => return Err(NotBegun::Leads),
            Some(_) => {}
        }
        if self.memory.reinitialize_asked_at.is_some() && !force {
            return Err(NotBegun::Busy("reinitialize".to_owned()));
        }
        match self.known.job {
            Some(job) if job != JobKind::CheckRejoin && !force => return Err(NotBegun::Busy(job.to_string())),
            Some(_) => self.drop_job().await,
            None => {}
        }
        tracing::info!(force, "asked to replace the data by a new copy of the leader's");
        self.memory.restart = None;
        self.memory.backoff_until = None;
        self.memory.reinitialize_asked_at = Some(Boottime::now());
        self.orders.reinitialize = Reinitialize::UnderWay;
        Ok(())
    }

    async fn begin_restart(&mut self, conditions: &Conditions) -> Result<(), Restarted> {
        if let Some(job) = self.known.job {
            return Err(Restarted::Busy(job.to_string()));
        }
        if self.memory.restart.is_some() || self.memory.handover.is_some() {
            return Err(Restarted::Busy("restart or switchover".to_owned()));
        }
        let pending = conditions.pending && !self.pending.found.is_empty();
        let status = self.status.borrow().clone();
        if !conditions.hold(&status, pending) {
            return Err(Restarted::Refused);
        }
        tracing::info!("asked to restart PostgreSQL");
        self.memory.restart = Some(Restart {
            asked_at: Boottime::now(),
            stage: RestartStage::Checkpoint,
        });
        Ok(())
    }

    fn started(&self) -> Option<String> {
        let status = self.status.borrow().clone();
        Some(status.server.as_ref()?.postmaster_start_time.clone())
    }

    /// Begins a restart whose time has come; in a maintenance it waits, and may become too late.
    pub(super) async fn look_at_schedule(&mut self, paused: bool) {
        let Some(scheduled) = &self.orders.scheduled else {
            return;
        };
        let now = Timestamp::try_from(wall_now()).unwrap_or(Timestamp::UNIX_EPOCH);
        let due = scheduled.due(now, self.started().as_deref());
        if due == Due::NotYet || (due == Due::Now && (paused || self.known.job.is_some())) {
            return;
        }
        let Some(scheduled) = self.orders.scheduled.take() else {
            return;
        };
        match due {
            Due::TooLate => {
                tracing::warn!(at = %scheduled.at, "a scheduled restart is not carried out: it is too late")
            }
            Due::Needless => tracing::info!("a scheduled restart is not needed: PostgreSQL was started anew since"),
            Due::NotYet | Due::Now => {
                if let Err(why) = self.begin_restart(&scheduled.conditions).await {
                    tracing::warn!(at = %scheduled.at, ?why, "a scheduled restart is not carried out");
                }
            }
        }
    }
}

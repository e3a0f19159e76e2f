//! What takes several steps, a hand-over or a restart, and how far it has come. Pure.

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::view::Epoch;

use super::Memory;
use crate::jobs::Outcome;
use crate::observation::JobKind;

/// A restart that an operator asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restart {
    /// When it was asked for.
    pub asked_at: Boottime,
    /// How far it has come.
    pub stage: RestartStage,
}

/// How far a restart has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestartStage {
    /// A checkpoint is written while still serving.
    Checkpoint,
    /// PostgreSQL is stopped in order.
    Stop,
    /// PostgreSQL is started in its role.
    Start,
}

/// Giving the lease up in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handover {
    /// The holding to give up.
    pub epoch: Epoch,
    /// Why.
    pub why: Why,
    /// When it began.
    pub began_at: Boottime,
    /// How far it has come.
    pub stage: Stage,
}

/// Why a lease is given up in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// A request: to the named member, or to the best.
    Requested {
        /// Whom it names.
        candidate: Option<MemberName>,
    },
    /// The process was told to stop.
    Stopping,
}

/// How far a hand-over has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The others are asked who can take over.
    Choose,
    /// A checkpoint is written while still serving.
    Checkpoint {
        /// Who takes over.
        to: MemberName,
    },
    /// PostgreSQL is stopped in order.
    Stop {
        /// Who takes over; whoever has everything when nobody is named.
        to: Option<MemberName>,
    },
    /// The others are asked who has received the shutdown checkpoint.
    Confirm {
        /// Who takes over; whoever has everything when nobody is named.
        to: Option<MemberName>,
    },
    /// The key is given up.
    Release {
        /// Who has everything.
        successor: Option<MemberName>,
    },
    /// It is not carried out, and this member leads on.
    Failed(String),
}

impl Memory {
    pub(super) fn stage(&mut self, stage: Stage) {
        if let Some(handover) = &mut self.handover {
            handover.stage = stage;
        }
    }

    pub(super) fn advance_handover(&mut self, kind: JobKind, outcome: &Result<Outcome, String>) {
        let Some(handover) = &self.handover else { return };
        let next = match (kind, &handover.stage, outcome) {
            (JobKind::Poll, Stage::Choose, Err(why)) => Stage::Failed(why.clone()),
            (JobKind::Checkpoint, Stage::Checkpoint { to }, Ok(_)) => Stage::Stop { to: Some(to.clone()) },
            (JobKind::Checkpoint, Stage::Checkpoint { .. }, Err(why)) => Stage::Failed(why.clone()),
            (JobKind::Stop, Stage::Stop { to }, Ok(_)) => Stage::Confirm { to: to.clone() },
            (JobKind::Confirm, Stage::Confirm { .. }, Ok(Outcome::Confirmed(Some(successor)))) => Stage::Release {
                successor: Some(successor.clone()),
            },
            (JobKind::Confirm, Stage::Confirm { to }, _) => match (&handover.why, to) {
                (Why::Stopping, _) => Stage::Release { successor: None },
                (Why::Requested { .. }, Some(to)) => {
                    Stage::Failed(format!("{to} did not confirm the shutdown checkpoint"))
                }
                (Why::Requested { .. }, None) => Stage::Failed("nobody confirmed the shutdown checkpoint".to_owned()),
            },
            _ => return,
        };
        self.stage(next);
    }

    pub(super) fn advance_restart(&mut self, kind: JobKind, now: Boottime) {
        let Some(restart) = &mut self.restart else { return };
        let next = match (kind, restart.stage) {
            // One that failed only makes the stop longer.
            (JobKind::Checkpoint, RestartStage::Checkpoint) => RestartStage::Stop,
            (JobKind::Stop, RestartStage::Checkpoint | RestartStage::Stop) => RestartStage::Start,
            (JobKind::StartPrimary | JobKind::StartStandby, _) => {
                self.restart = None;
                return;
            }
            _ => return,
        };
        (restart.stage, restart.asked_at) = (next, now);
    }
}

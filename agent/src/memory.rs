//! What the decisions remember from cycle to cycle, and how that follows from what is seen, decided and done. Pure.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::{Lsn, MemberName};
use pgherd_cluster::view::Epoch;

use crate::decide::Step;
use crate::jobs::Outcome;
use crate::lease::term_of;
use crate::observation::{JobKind, LeaseSeen, Observation, Poll, Postgres, Rejoin};
use crate::status::WalStatus;
use crate::sync::{Acknowledgements, Sender, SyncNames};

/// Before a failed clone, initdb or start is tried again.
const BACKOFF: Duration = Duration::from_secs(2);

/// A standby that acknowledges nothing for this long, while it is owed something, is lost. A pause of the network of one
/// second is none.
const SILENCE_MAX: Duration = Duration::from_secs(2);

/// What the decisions remember.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Memory {
    /// Since when the leader key has been seen free.
    pub free_since: Option<Boottime>,
    /// Who was last seen to hold it, since this agent began.
    pub last_leader: Option<MemberName>,
    /// Whether the cluster was last seen paused, and when that was last seen to have ended.
    pub paused: bool,
    /// See above.
    pub resumed_at: Option<Boottime>,
    /// How many starts as primary have failed in a row.
    pub start_failures: u32,
    /// Before this, no clone, initdb or start is tried again.
    pub backoff_until: Option<Boottime>,
    /// The last poll of the other members.
    pub poll: Option<Poll>,
    /// Whether our data can follow the leader of an epoch.
    pub rejoin: Option<(Epoch, Rejoin)>,
    /// When that was asked.
    pub rejoin_asked_at: Option<Boottime>,
    /// The epoch under which our primary has been proven to take writes.
    pub proven: Option<Epoch>,
    /// The keeper's name for the holding that was last seen.
    pub lease_term: Option<u64>,
    /// The keeper's name for the holding under which that was.
    pub proven_term: Option<u64>,
    /// The epoch whose first checkpoint is done.
    pub checkpointed: Option<Epoch>,
    /// Giving the lease up in order, while that is under way.
    pub handover: Option<Handover>,
    /// A hand-over was carried out: what follows it goes on in a pause too.
    pub handed_over: bool,
    /// The holding whose key others were asked to delete.
    pub release_asked: Option<Epoch>,
    /// Since when no standby has streamed from our primary.
    pub unprotected_since: Option<Boottime>,
    /// What commits wait for, and how far the primary had flushed when that was first seen in force everywhere.
    pub waiting: Option<(SyncNames, Option<Lsn>)>,
    /// Since when each standby has been owed an acknowledgement.
    pub acknowledgements: Acknowledgements,
    /// Since when this process has been told to stop.
    pub stopping_since: Option<Boottime>,
    /// A fatal finding; the process ends.
    pub fatal: Option<String>,
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
    /// Folds in what is seen, and marks the standbys that have been silent for too long.
    pub fn note(&mut self, seen: &mut Observation, now: Boottime) {
        self.acknowledgements.note(&mut seen.sync.senders, now, SILENCE_MAX);
        let seen = &*seen;
        match &seen.lease {
            LeaseSeen::Free => {
                self.free_since.get_or_insert(now);
            }
            LeaseSeen::Theirs(epoch) | LeaseSeen::Mine(epoch) | LeaseSeen::Stale { epoch, .. } => {
                self.last_leader = Some(epoch.holder.clone());
                self.free_since = None;
                self.forget_election(seen);
            }
            LeaseSeen::MineUnproven(_) | LeaseSeen::Unknown => {
                self.free_since = None;
                self.forget_election(seen);
            }
        }
        self.lease_term = seen.lease_term;
        self.carry_over(seen);
        let paused = seen.is_paused();
        if self.paused && !paused {
            self.resumed_at = Some(now);
        }
        self.paused = paused;
        if let Postgres::Running(_) = seen.postgres
            && seen.job.is_none()
        {
            self.start_failures = 0;
        }
        if seen.stopping {
            self.stopping_since.get_or_insert(now);
        }
        self.note_waiting(seen, now);
        let holds = |handover: &Handover| match &seen.lease {
            LeaseSeen::Mine(epoch) | LeaseSeen::MineUnproven(epoch) => *epoch == handover.epoch,
            // Until its deadline nobody else can hold it; what comes then is seen then.
            LeaseSeen::Unknown => true,
            LeaseSeen::Stale { .. } | LeaseSeen::Theirs(_) | LeaseSeen::Free => false,
        };
        if seen.job.is_none() && self.handover.as_ref().is_some_and(|handover| !holds(handover)) {
            self.handover = None;
        }
    }

    fn note_waiting(&mut self, seen: &Observation, now: Boottime) {
        let Postgres::Running(server) = &seen.postgres else {
            (self.waiting, self.unprotected_since) = (None, None);
            return;
        };
        let WalStatus::Primary { location } = server.wal else {
            (self.waiting, self.unprotected_since) = (None, None);
            return;
        };
        if seen.sync.senders.iter().any(Sender::streams) {
            self.unprotected_since = None;
        } else {
            self.unprotected_since.get_or_insert(now);
        }
        let same = self.waiting.take().filter(|(names, _)| *names == seen.sync.configured);
        let (names, since) = same.unwrap_or_else(|| (seen.sync.configured.clone(), None));
        self.waiting = Some((names, since.or_else(|| seen.sync.taken_over.then_some(location))));
    }

    /// A key that was won anew without a gap in the entitlement changes nothing for a primary that was proven before.
    fn carry_over(&mut self, seen: &Observation) {
        let LeaseSeen::Mine(epoch) = &seen.lease else { return };
        let Some(proven) = &self.proven else { return };
        if proven != epoch && seen.lease_term.is_some() && self.proven_term == seen.lease_term {
            if self.checkpointed.as_ref() == Some(proven) {
                self.checkpointed = Some(epoch.clone());
            }
            self.proven = Some(epoch.clone());
        }
    }

    /// PostgreSQL has been proven to take writes under a holding.
    pub fn prove(&mut self, epoch: Epoch, term: Option<u64>) {
        self.start_failures = 0;
        self.handed_over = false;
        self.proven_term = term.or_else(|| Some(term_of(&epoch)));
        self.proven = Some(epoch);
    }

    /// A poll of an election says nothing to the next one; one that a leader has asked for is kept until it has acted.
    fn forget_election(&mut self, seen: &Observation) {
        if self.handover.is_none() && seen.health.disk_fails_since.is_none() {
            self.poll = None;
        }
    }

    /// A step is about to be performed.
    pub fn stepped(&mut self, step: &Step, now: Boottime) {
        match step {
            Step::BeginHandover { epoch, why } => {
                let stage = match why {
                    Why::Requested { .. } => Stage::Choose,
                    Why::Stopping => Stage::Stop { to: None },
                };
                self.poll = None;
                self.handover = Some(Handover {
                    epoch: epoch.clone(),
                    why: why.clone(),
                    began_at: now,
                    stage,
                });
            }
            Step::FailHandover(why) => self.stage(Stage::Failed(why.clone())),
            Step::Checkpoint { to } => self.stage(Stage::Checkpoint { to: to.clone() }),
            Step::AskRelease { epoch, .. } => self.release_asked = Some(epoch.clone()),
            _ => {}
        }
    }

    /// A step has been performed whole.
    pub fn performed(&mut self, step: &Step) {
        match step {
            // One that failed after the stop is followed by a start in place, in a pause too.
            Step::ClearRequest => self.handed_over |= self.handover.take().is_some(),
            Step::HandTo { .. } => {
                self.handed_over = self
                    .handover
                    .take()
                    .is_some_and(|handover| matches!(handover.why, Why::Requested { .. }));
            }
            Step::End | Step::DropJob => self.handover = None,
            _ => {}
        }
    }

    fn stage(&mut self, stage: Stage) {
        if let Some(handover) = &mut self.handover {
            handover.stage = stage;
        }
    }

    /// A job has ended: with an outcome, or with an error that was logged.
    pub fn job_ended(&mut self, kind: JobKind, outcome: Result<Outcome, String>, now: Boottime) {
        self.advance_handover(kind, &outcome);
        match outcome {
            Ok(Outcome::Proven(epoch)) => {
                let term = self.lease_term;
                self.prove(epoch, term);
            }
            Ok(Outcome::Polled(poll)) => self.poll = Some(poll),
            Ok(Outcome::Rejoin(epoch, verdict)) => {
                self.rejoin = Some((epoch, verdict));
                self.rejoin_asked_at = Some(now);
            }
            Ok(Outcome::Confirmed(_)) => {}
            Ok(Outcome::Done) => self.done(kind),
            Err(_) => self.failed(kind, now),
        }
    }

    fn advance_handover(&mut self, kind: JobKind, outcome: &Result<Outcome, String>) {
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

    fn done(&mut self, kind: JobKind) {
        match kind {
            JobKind::Clone => {
                self.start_failures = 0;
                self.rejoin = None; // What was compared is not there any more.
            }
            JobKind::StartStandby => {
                self.start_failures = 0;
                self.handed_over = false;
            }
            JobKind::Initdb
            | JobKind::StartPrimary
            | JobKind::Promote
            | JobKind::Checkpoint
            | JobKind::Stop
            | JobKind::Confirm
            | JobKind::Poll
            | JobKind::CheckRejoin => {}
        }
    }

    fn failed(&mut self, kind: JobKind, now: Boottime) {
        match kind {
            JobKind::StartPrimary => self.start_failures += 1,
            JobKind::Initdb | JobKind::Clone | JobKind::StartStandby | JobKind::CheckRejoin => {
                self.backoff_until = Some(now + BACKOFF);
            }
            JobKind::Promote | JobKind::Checkpoint | JobKind::Stop | JobKind::Confirm | JobKind::Poll => {}
        }
        // A standby whose start failed on what it has may have what the leader has not.
        if kind == JobKind::StartStandby && matches!(self.rejoin, Some((_, Rejoin::Follows))) {
            self.rejoin = None;
        }
    }

    /// A job has ended by a defect, or was dropped.
    pub fn job_lost(&mut self, now: Boottime) {
        self.handover = None;
        self.backoff_until = Some(now + BACKOFF);
    }
}

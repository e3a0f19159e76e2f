//! The care of slots beside the loop: a round a period, and the long work that a round leaves. The loop waits for neither.

use std::collections::BTreeMap;
use std::sync::Arc;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::{Lsn, MemberName};
use pgherd_cluster::view::Epoch;
use tokio::task::{JoinError, JoinSet};

use super::Cycle;
use super::upkeep::SLACK;
use crate::context::Context;
use crate::memory::{Restart, RestartStage};
use crate::observation::{JobKind, LeaseSeen, Observation};
use crate::postgres::ToolError;
use crate::slots::plan::{Action, Slot, failover_slots, lacking, told};
use crate::slots::{self, Readiness, Report, Round, Seat};

/// What has ended.
pub(super) enum Done {
    /// A look, and what could be done in a moment.
    Round(Result<Round, ToolError>),
    /// Long work.
    Work(Report),
}

/// What is known of our slots, and the care of them under way.
#[derive(Default)]
pub(super) struct SlotCare {
    tasks: JoinSet<Done>,
    looking: bool,
    working: bool,
    looked_at: Option<Boottime>,
    /// What the last round was made for.
    looked_for: Option<(Option<Epoch>, Vec<MemberName>, i64)>,
    seat: Option<Seat>,
    slots: Vec<Slot>,
    readiness: Readiness,
    lacks: Vec<String>,
}

impl SlotCare {
    /// Where the slots are that this leader keeps; nothing while it has not looked at them since it leads.
    pub(super) fn told(&self) -> Option<BTreeMap<String, Lsn>> {
        let seat = self
            .seat
            .as_ref()
            .filter(|seat| seat.leader.as_ref() == Some(&seat.me))?;
        Some(told(seat, &self.slots))
    }

    /// The next piece that ends; nothing while nothing is under way.
    pub(super) async fn ended(&mut self) -> Option<Result<Done, JoinError>> {
        self.tasks.join_next().await
    }

    /// A job begins that starts, stops or promotes PostgreSQL: nothing may hold on to it.
    pub(super) fn make_way(&mut self, context: &Context, kind: JobKind) {
        match kind {
            JobKind::Promote => {
                let unsure = self.seat.as_ref().map(|seat| self.readiness.unsure(seat, &self.slots));
                for slot in unsure.unwrap_or_default() {
                    tracing::warn!(
                        slot,
                        "the copy of this logical slot may not be usable: rows that it needs may have been removed before the \
                         former leader kept them for it"
                    );
                }
            }
            JobKind::StartPrimary
            | JobKind::StartStandby
            | JobKind::Stop
            | JobKind::Initdb
            | JobKind::CustomBootstrap
            | JobKind::Clone
            | JobKind::Rewind => {
                context.slots.set_at_work(false);
            }
            JobKind::PrePromote | JobKind::Checkpoint | JobKind::Confirm | JobKind::Poll | JobKind::CheckRejoin => {
                return;
            }
        }
        self.seat = None;
        self.tasks.abort_all();
        self.tasks.detach_all();
        (self.looking, self.working, self.looked_at) = (false, false, None);
    }
}

impl Cycle {
    /// Begins a round where one is due.
    pub(super) fn look_after_slots(&mut self, seen: &Observation) {
        let now = Boottime::now();
        if !matches!(seen.lease, LeaseSeen::Mine(_)) {
            // Times of an earlier lead would be over at once in the next.
            self.upkeep.slots_seen.clear();
        }
        let Some(mut seat) = slots::seat(&self.context, seen) else {
            return;
        };
        let members = seen.view.members.keys().cloned().collect();
        let about = (seen.view.epoch().cloned(), members, seen.view.config.mod_revision);
        let period = self.context.timing().loop_wait();
        let lately = self.slots.looked_at.is_some_and(|at| now.since(at) + SLACK < period);
        // A member that has just come finds its slot the sooner it is made.
        let same = self.slots.looked_for.as_ref() == Some(&about);
        let busy = seen
            .job
            .is_some_and(|job| job != JobKind::Poll && job != JobKind::CheckRejoin);
        if self.slots.looking || busy || (lately && same) {
            return;
        }
        // A holding that is not proven yet serves nobody; its slots are made with the proof.
        let proven = |epoch: &Epoch| self.memory.proven.as_ref() == Some(epoch);
        if seat.writable && matches!(&seen.lease, LeaseSeen::Mine(epoch) if !proven(epoch)) {
            return;
        }
        if matches!(seen.lease, LeaseSeen::Mine(_)) {
            seat.retained.extend(self.upkeep.slots_seen.keys().cloned());
        }
        (self.slots.looking, self.slots.looked_at) = (true, Some(now));
        self.slots.looked_for = Some(about);
        let context = Arc::clone(&self.context);
        self.slots
            .tasks
            .spawn(async move { Done::Round(slots::round(&context, seat).await) });
    }

    /// Takes in what has ended. Says whether there is something to decide.
    pub(super) fn slots_done(&mut self, done: Result<Done, JoinError>) -> bool {
        match done {
            Ok(Done::Round(Ok(round))) => self.round_done(round),
            Ok(Done::Round(Err(error))) => {
                self.slots.looking = false;
                // A server that is about to stop refuses connections before it is gone.
                if self.known.job.is_none() {
                    self.context
                        .slots
                        .complain("looking after the slots", "", &error.chain());
                }
            }
            Ok(Done::Work(report)) => return self.work_done(report),
            Err(defect) => {
                tracing::error!("the care of slots ended by a defect: {defect}");
                (self.slots.looking, self.slots.working) = (false, false);
            }
        }
        false
    }

    fn round_done(&mut self, round: Round) {
        let seat = round.seat.clone();
        self.slots.looking = false;
        self.slots.slots.clone_from(&round.slots);
        self.known.failover_slots = failover_slots(&round.slots);
        self.note_lacking(&seat);
        if seat.leader.as_ref() == Some(&seat.me) {
            let mut kept = told(&seat, &round.slots);
            kept.insert(seat.me.slot_name(), seat.position);
            self.context.slots.keep(kept);
        } else {
            self.context.slots.keep(BTreeMap::new());
        }
        let unsure = !seat.writable && !self.slots.readiness.unsure(&seat, &round.slots).is_empty();
        self.slots.seat = Some(seat);
        if self.slots.working || (round.rest.is_empty() && !unsure) {
            return;
        }
        self.slots.working = true;
        let moves = |action: &Action| !matches!(action, Action::Copy(_));
        self.context.slots.set_at_work(round.rest.iter().any(moves));
        let (context, readiness) = (Arc::clone(&self.context), self.slots.readiness.clone());
        self.slots
            .tasks
            .spawn(async move { Done::Work(slots::work(&context, round, readiness).await) });
    }

    fn note_lacking(&mut self, seat: &Seat) {
        let leaders = &seat.view.status.pgherd.failover_slots;
        let lacks = if seat.writable {
            Vec::new()
        } else {
            lacking(leaders, &self.known.failover_slots)
        };
        if !lacks.is_empty() && lacks != self.slots.lacks {
            tracing::warn!(
                slots = lacks.join(", "),
                "failover slots of the leader are not here: after a failover to this member their consumers would find none"
            );
        }
        self.slots.lacks = lacks;
    }

    fn work_done(&mut self, report: Report) -> bool {
        self.slots.working = false;
        self.context.slots.set_at_work(false);
        self.slots.readiness = report.readiness;
        let paused = self.context.dynamic().is_paused();
        let idle = self.known.job.is_none() && self.memory.restart.is_none() && self.memory.handover.is_none();
        if report.to_copy.is_empty() || paused || !idle {
            return false;
        }
        tracing::info!(
            slots = report.to_copy.join(", "),
            "restarting the standby, which finds copies of logical slots only when it starts"
        );
        self.memory.restart = Some(Restart {
            asked_at: Boottime::now(),
            stage: RestartStage::Stop,
        });
        true
    }
}

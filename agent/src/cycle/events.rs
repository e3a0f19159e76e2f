//! What the loop tells the journal: what it finds changed, what its reasons are about, and how a change of the leader went.

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::event::{Kind, phase};
use pgherd_cluster::view::{Epoch, View};

use super::Cycle;
use crate::decide::{Reason, Step};
use crate::jobs::Outcome;
use crate::journal::{Draft, Measured, kind_of, wall_ms};
use crate::memory::Why;
use crate::observation::{JobKind, LeaseSeen, Observation, Postgres};

impl Cycle {
    /// Looks what has changed since the last cycle.
    pub(super) fn look_for_news(&mut self, seen: &Observation) {
        let journal = &self.context.journal;
        journal.stopwatch().note(seen, &self.memory, Boottime::now());
        for draft in self.news.note(seen, &self.memory) {
            journal.say(draft);
        }
    }

    /// Makes an event of a reason that is worth one. The log has its words already.
    pub(super) fn tell_reason(&self, reason: &Reason) -> Option<String> {
        let kind = kind_of(reason)?;
        let held = self.context.lease.state().borrow().holding.clone();
        let said = match reason {
            // What an operator's program wrote may hold a secret, and events are shown to everybody.
            Reason::BootstrapFailed(_) => "could not make the cluster; its log says why".to_owned(),
            reason => reason.to_string(),
        };
        let draft = Draft::new(kind, format!("{} {said}", self.context.config.name));
        let ends = matches!(kind, Kind::Leader | Kind::Fence);
        let draft = draft.from(held.filter(|_| ends).map(|held| held.epoch.to_string()));
        let (id, _) = self.context.journal.tell(draft);
        Some(id.to_string())
    }

    /// A step is about to be performed.
    pub(super) fn note_step(&self, step: &Step) {
        let journal = &self.context.journal;
        match step {
            Step::BeginHandover { epoch, why } => {
                journal.mark(phase::ASKED);
                // Whoever asked by REST has been told of already, by this member or another.
                let ended = epoch.to_string();
                let own = journal.latest();
                let own = own
                    .iter()
                    .any(|event| event.kind == Kind::Operator && event.from.as_ref() == Some(&ended));
                if !own && self.context.view().events.end_of(&ended, wall_ms()).is_none() {
                    let (what, to) = match why {
                        Why::Requested { candidate } => ("is asked to hand the lead over", candidate.clone()),
                        Why::Stopping => ("is told to stop, and hands the lead over", None),
                    };
                    let draft = Draft::new(Kind::Operator, format!("{} {what}", epoch.holder));
                    let to = to.map(|to| to.to_string());
                    journal.say(draft.from(Some(ended)).to(to));
                }
            }
            Step::FailHandover(why) => {
                let epoch = self.memory.handover.as_ref().map(|handover| handover.epoch.to_string());
                journal.say(Draft::new(Kind::Refusal, why.clone()).from(epoch));
            }
            Step::Checkpoint { .. } => journal.mark(phase::CHECKPOINT),
            Step::Bid(_) | Step::WinAnew { .. } => journal.stopwatch().note_bid(self.memory.poll.as_ref()),
            Step::Promote(_) => journal.mark(phase::PROMOTE),
            Step::StartPrimary => journal.mark(phase::START),
            _ => {}
        }
    }

    /// A job has ended.
    pub(super) fn note_job(&self, kind: JobKind, outcome: &Result<Outcome, String>) {
        match (kind, outcome) {
            (JobKind::Stop, Ok(_)) => self.context.journal.mark(phase::ENDED),
            (JobKind::Confirm, Ok(Outcome::Confirmed(Some(_)))) => self.context.journal.mark(phase::CONFIRMED),
            _ => {}
        }
    }

    /// The key has been given up in order.
    pub(super) fn note_released(&self, epoch: &Epoch, successor: Option<&str>) {
        let journal = &self.context.journal;
        journal.mark(phase::RELEASED);
        let measured = journal.stopwatch().take(Boottime::now(), wall_ms());
        let (cause, actor) = cause(&self.context.view(), epoch);
        let what = match successor {
            Some(successor) => format!("{} has given the lead up, for {successor}", epoch.holder),
            None => format!("{} has given the lead up", epoch.holder),
        };
        let draft = Draft::new(Kind::Leader, what).because(cause).asked_by(actor);
        let draft = draft.from(Some(epoch.to_string())).to(successor.map(str::to_owned));
        journal.say(draft.with_phases(measured.phases));
    }

    /// Tells of a change of the leader, once this member has taken a write and has said so.
    pub(super) fn conclude_change(&mut self, seen: &Observation) {
        let journal = &self.context.journal;
        let proven = self.memory.proven.clone().filter(|_| seen.job.is_none());
        let Some(epoch) = proven.filter(|epoch| seen.lease == LeaseSeen::Mine(epoch.clone())) else {
            return;
        };
        let mut stopwatch = journal.stopwatch();
        if !stopwatch.has(phase::WRITABLE) {
            return;
        }
        let measured = stopwatch.take(Boottime::now(), wall_ms());
        drop(stopwatch);
        journal.say(self.story(seen, &epoch, measured));
    }

    fn story(&self, seen: &Observation, epoch: &Epoch, measured: Measured) -> Draft {
        let former = measured.former.clone();
        let in_place = measured.in_place && former.as_ref().is_some_and(|former| former.holder == epoch.holder);
        let (what, kind) = if in_place {
            (
                format!("{} takes writes again as {epoch}", epoch.holder),
                Kind::Postgres,
            )
        } else {
            (format!("{} takes writes as {epoch}", epoch.holder), Kind::Leader)
        };
        let has = |name: &str| measured.phases.iter().any(|phase| phase.name == name);
        let (why, actor) = match &former {
            _ if in_place && has(phase::DIED) => (Some("PostgreSQL had died".to_owned()), None),
            _ if in_place => (None, None),
            Some(former) => cause(&self.context.view(), former),
            None => (None, None),
        };
        let timeline = match &seen.postgres {
            Postgres::Running(server) => server.timeline,
            Postgres::Down | Postgres::Ending | Postgres::Silent { .. } => None,
        };
        let mut draft = Draft::new(kind, what)
            .because(why)
            .asked_by(actor)
            .from(former.map(|former| former.to_string()))
            .to(Some(epoch.to_string()))
            .with_all(measured.evidence)
            .with("revision", epoch.create_revision)
            .with("ttl_s", seen.view.timing().ttl().as_secs());
        if let Some(timeline) = timeline {
            draft = draft.with("timeline", timeline.0);
        }
        draft.with_phases(measured.phases)
    }
}

/// Why a holding ended, by what was told of it; who wanted that.
fn cause(view: &View, ended: &Epoch) -> (Option<String>, Option<String>) {
    match view.events.end_of(&ended.to_string(), wall_ms()) {
        Some(event) => (
            Some(format!("{} (event {})", event.what, event.id)),
            event.actor.clone(),
        ),
        None => (Some(format!("the lease of {} ended", ended.holder)), None),
    }
}

//! What the decisions remember from cycle to cycle, and how that follows from what is seen, decided and done. Pure.

mod stages;

use std::collections::BTreeMap;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::http::Endpoint;
use pgherd_cluster::name::{Lsn, MemberName};
use pgherd_cluster::view::Epoch;

pub use self::stages::{Handover, Restart, RestartStage, Stage, Why};
use crate::decide::{Step, synchronous};
use crate::jobs::Outcome;
use crate::lease::term_of;
use crate::observation::{JobKind, LeaseSeen, Observation, Poll, Postgres, Rejoin};
use crate::status::WalStatus;
use crate::sync::{Acknowledgements, SyncNames, SyncStep};

/// How many members are remembered that may be gone.
const ADDRESSES_MAX: usize = 32;

/// Before a failed clone, initdb or start is tried again.
const BACKOFF: Duration = Duration::from_secs(2);

/// A leader that does not let pg_rewind in this often may never do so, and what can be copied need not be rewound.
const REWINDS_PUT_OFF_MAX: u32 = 15;

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
    /// By which holding, if that was seen.
    pub last_epoch: Option<Epoch>,
    /// The revision of the request that stood when this member bid without regard to it, its candidate having had its time.
    pub bid_despite: Option<i64>,
    /// The revision of the request that is due and names another member.
    pub due_for_another: Option<i64>,
    /// Whether the cluster was last seen paused, and when that was last seen to have ended.
    pub paused: bool,
    /// See above.
    pub resumed_at: Option<Boottime>,
    /// How many starts as primary have failed in a row.
    pub start_failures: u32,
    /// Since when our PostgreSQL has been on its way up as primary.
    pub starting_since: Option<Boottime>,
    /// Before this, no clone, initdb or start is tried again.
    pub backoff_until: Option<Boottime>,
    /// Where the other members were last known to answer: their keys end with their leases, as after an outage of etcd.
    pub addresses: BTreeMap<MemberName, Endpoint>,
    /// The last poll of the other members.
    pub poll: Option<Poll>,
    /// Whether our data can follow the leader of an epoch.
    pub rejoin: Option<(Epoch, Rejoin)>,
    /// When that was asked.
    pub rejoin_asked_at: Option<Boottime>,
    /// How often in a row the answer was that our data follows while our standby stood still at this position.
    pub stands_still: Option<(Lsn, u32)>,
    /// Under which holding of a leader this member was last cloned: what a clone did not cure, another does not either.
    pub cloned_under: Option<Epoch>,
    /// Under which holding of a leader our data was last rewound, or was tried to be.
    pub rewound_under: Option<Epoch>,
    /// Under which pg_rewind itself said that it cannot be done.
    pub rewind_refused_under: Option<Epoch>,
    /// How often in a row nobody answered who our data could be rewound to.
    pub rewinds_put_off: u32,
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
    /// Whether the key was last seen to be ours.
    pub leads: bool,
    /// When a key was given up because PostgreSQL did not come up behind it.
    pub gave_way_at: Option<Boottime>,
    /// The holding whose key others were asked to delete.
    pub release_asked: Option<Epoch>,
    /// Since when no standby that may be synchronous has streamed from our primary.
    pub unprotected_since: Option<Boottime>,
    /// What commits wait for.
    pub waiting: Option<Waiting>,
    /// The revision of `/sync` that the last write of it compared. While the view still shows it, that write may have been
    /// done or be on its way.
    pub sync_sent: Option<i64>,
    /// Since when PostgreSQL is to end, or its postmaster has, while others of its processes are left.
    pub ending_since: Option<Boottime>,
    /// When this agent began.
    pub began_at: Option<Boottime>,
    /// Since when nobody knows who holds the leader key.
    pub unknown_since: Option<Boottime>,
    /// Since when each standby has been owed an acknowledgement.
    pub acknowledgements: Acknowledgements,
    /// Since when this process has been told to stop.
    pub stopping_since: Option<Boottime>,
    /// A restart that an operator asked for, while that is under way.
    pub restart: Option<Restart>,
    /// The holding under which the operator's program last allowed a promotion.
    pub pre_promoted: Option<Epoch>,
    /// When it last refused one.
    pub pre_promote_refused_at: Option<Boottime>,
    /// A new cluster that could not be finished, and why; whether another try would fail alike.
    pub bootstrap_failed: Option<(String, bool)>,
    /// Whether this agent knows that the initialize key is not bound to its own lease, or is by its own doing.
    pub withdrawn: bool,
    /// Whether an operator's program has made the cluster's data, and it has not taken writes since.
    pub restored: bool,
    /// How many clones have failed in a row: each is from another member than the one before it.
    pub clone_failures: u32,
    /// When an operator asked for a new copy of the leader's data, while that has not been tried.
    pub reinitialize_asked_at: Option<Boottime>,
    /// A fatal finding; the process ends.
    pub fatal: Option<String>,
}

/// What commits wait for, by the running server's word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The setting.
    pub names: SyncNames,
    /// When every process was first seen to have taken it over.
    pub taken_over_at: Option<Boottime>,
    /// How far the primary had flushed a moment after that.
    pub since: Option<Lsn>,
}

/// One look may catch the server between the signals to its processes; two, this far apart, do not.
const TAKEN_OVER_AFTER: Duration = Duration::from_millis(100);

/// A restart that could not begin for this long is given up: nobody expects it any more.
const RESTART_WAITS_MAX: Duration = Duration::from_secs(60);

impl Memory {
    /// Folds in what is seen, and marks the standbys that have been silent for too long.
    pub fn note(&mut self, seen: &mut Observation, now: Boottime) {
        self.acknowledgements.note(&mut seen.sync.senders, now, SILENCE_MAX);
        let seen = &*seen;
        self.note_addresses(seen);
        let request = seen.view.failover.value.as_ref().filter(|_| seen.request_due);
        let other = request.and_then(|request| request.member.as_deref());
        let other = other.filter(|other| *other != seen.me.as_str());
        self.due_for_another = other.map(|_| seen.view.failover.mod_revision);
        self.note_standstill(seen);
        match &seen.lease {
            LeaseSeen::Free => {
                self.free_since.get_or_insert(now);
            }
            LeaseSeen::Theirs(epoch) | LeaseSeen::Mine(epoch) | LeaseSeen::Stale { epoch, .. } => {
                self.last_leader = Some(epoch.holder.clone());
                self.last_epoch = Some(epoch.clone());
                self.free_since = None;
                self.forget_election(seen);
            }
            LeaseSeen::MineUnproven(_) | LeaseSeen::Unknown => {
                self.free_since = None;
                self.forget_election(seen);
            }
        }
        self.lease_term = seen.lease_term;
        self.leads = matches!(seen.lease, LeaseSeen::Mine(_));
        self.carry_over(seen);
        if seen.lease == LeaseSeen::Unknown {
            self.unknown_since.get_or_insert(now);
        } else {
            self.unknown_since = None;
        }
        let paused = seen.is_paused();
        if self.paused && !paused {
            self.resumed_at = Some(now);
        }
        self.paused = paused;
        if let Postgres::Running(_) = seen.postgres
            && seen.job.is_none()
        {
            self.start_failures = 0;
            self.starting_since = None;
        }
        if matches!(
            seen.lease,
            LeaseSeen::Theirs(_) | LeaseSeen::Free | LeaseSeen::Stale { .. }
        ) {
            self.starting_since = None;
        }
        self.note_ending(seen, now);
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
        self.note_orders(seen, now);
    }

    /// Forgets what an operator asked for and what waits too long.
    fn note_orders(&mut self, seen: &Observation, now: Boottime) {
        // One that has stopped PostgreSQL is not forgotten: in a pause nothing else would start it.
        let waits = |restart: &Restart| {
            let begun = restart.stage == RestartStage::Start;
            !begun && seen.job.is_none() && now.since(restart.asked_at) >= RESTART_WAITS_MAX
        };
        if seen.stopping || self.handover.is_some() || self.restart.as_ref().is_some_and(waits) {
            self.restart = None;
        }
        let too_long = |asked_at: Boottime| seen.job.is_none() && now.since(asked_at) >= RESTART_WAITS_MAX;
        if seen.stopping || self.reinitialize_asked_at.is_some_and(too_long) {
            self.reinitialize_asked_at = None;
        }
    }

    /// The restart of a replica is not one of the leader that it becomes. What it has stopped it starts all the same.
    fn forget_restart(&mut self) {
        self.restart = self.restart.filter(|restart| restart.stage == RestartStage::Start);
    }

    fn note_ending(&mut self, seen: &Observation, now: Boottime) {
        match &seen.postgres {
            Postgres::Ending => {
                self.ending_since.get_or_insert(now);
            }
            // Whoever serves under a deadline of its own has not been ended.
            Postgres::Running(_) if self.leads => self.ending_since = None,
            Postgres::Down => self.ending_since = None,
            Postgres::Running(_) | Postgres::Silent { .. } => {}
        }
    }

    /// A standby that streams, or that still replays what it has, does not stand still.
    fn note_standstill(&mut self, seen: &Observation) {
        let Postgres::Running(server) = &seen.postgres else {
            self.stands_still = None;
            return;
        };
        let position = server.wal.position();
        let before = self.stands_still.filter(|(at, _)| *at == position);
        let streams = server.replication_state.is_some();
        self.stands_still = (!streams).then(|| before.unwrap_or((position, 0)));
    }

    /// Standing still counts only while it waits for more: a replay that is held up moves on by itself.
    fn count_standstill(&mut self, verdict: Rejoin) {
        self.stands_still = self.stands_still.map(|(at, count)| match verdict {
            Rejoin::Waits => (at, count + 1),
            Rejoin::Follows | Rejoin::Diverged => (at, 0),
        });
    }

    fn note_addresses(&mut self, seen: &Observation) {
        for member in seen.view.members.values().filter(|member| member.name != seen.me) {
            if let Some(address) = member.record.api_endpoint() {
                self.addresses.insert(member.name.clone(), address);
            }
        }
        // A cluster has a handful of members; what was replaced by others again and again is forgotten.
        while self.addresses.len() > ADDRESSES_MAX {
            let gone = self
                .addresses
                .keys()
                .find(|name| !seen.view.members.contains_key(*name))
                .cloned();
            let Some(gone) = gone else { break };
            self.addresses.remove(&gone);
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
        if synchronous::protects_any(seen, self, now) {
            self.unprotected_since = None;
        } else {
            self.unprotected_since.get_or_insert(now);
        }
        let fresh = || Waiting {
            names: seen.sync.configured.clone(),
            taken_over_at: None,
            since: None,
        };
        let same = self
            .waiting
            .take()
            .filter(|waiting| waiting.names == seen.sync.configured);
        let mut waiting = same.unwrap_or_else(fresh);
        if seen.sync.taken_over {
            let first = *waiting.taken_over_at.get_or_insert(now);
            if now.since(first) >= TAKEN_OVER_AFTER {
                waiting.since.get_or_insert(location);
            }
        }
        self.waiting = Some(waiting);
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
        self.starting_since = None;
        self.handed_over = false;
        self.restored = false;
        self.proven_term = term.or_else(|| Some(term_of(&epoch)));
        self.proven = Some(epoch);
    }

    /// A poll of an election says nothing to the next one; one that a leader has asked for is kept until it has acted.
    fn forget_election(&mut self, seen: &Observation) {
        let leads = matches!(seen.lease, LeaseSeen::Mine(_));
        // One whose key is stale asks before it wins that anew.
        let stale = matches!(seen.lease, LeaseSeen::Stale { .. });
        let asks =
            stale || leads && (seen.disk_fails_since.is_some() || !matches!(seen.postgres, Postgres::Running(_)));
        if self.handover.is_none() && !asks {
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
            Step::Sync(SyncStep::WriteSync { revision, .. } | SyncStep::DeleteSync { revision }) => {
                self.sync_sent = Some(*revision);
            }
            Step::Clone { .. } | Step::CloneRemote => self.cloned_under.clone_from(&self.last_epoch),
            Step::Rewind { leader } => self.rewound_under = Some(leader.clone()),
            Step::ClaimBootstrap => self.withdrawn = false,
            Step::UndoBootstrap => self.backoff_until = Some(now + BACKOFF),
            Step::Release { .. } => self.gave_way_at = Some(now),
            Step::Adopt => self.ending_since = None,
            // Its lease was in hand: what is ended while it starts is left to somebody else.
            Step::End => {
                self.ending_since.get_or_insert(now);
                if self.leads && self.starting_since.is_some() {
                    self.gave_way_at = Some(now);
                }
            }
            Step::Bid(_) => {
                self.bid_despite = self.due_for_another;
                self.forget_restart();
            }
            Step::Promote(_) => self.forget_restart(),
            Step::StartPrimary => {
                self.starting_since.get_or_insert(now);
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
            Step::Withdraw => self.withdrawn = true,
            // Without the failed cluster there is nothing left to undo; the process ends where another try would fail alike.
            Step::UndoBootstrap => {
                if let Some((why, true)) = self.bootstrap_failed.take() {
                    let what = "the new cluster could not be made, and what there was of it was moved aside";
                    self.fatal = Some(format!("{what}: {why}"));
                }
                self.start_failures = 0;
            }
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

    /// A job has ended: with an outcome, or with an error that was logged.
    pub fn job_ended(&mut self, kind: JobKind, outcome: Result<Outcome, String>, now: Boottime) {
        self.advance_handover(kind, &outcome);
        self.advance_restart(kind, now);
        match outcome {
            Ok(Outcome::Proven(epoch)) => {
                let term = self.lease_term;
                self.prove(epoch, term);
            }
            Ok(Outcome::Polled(poll)) => self.poll = Some(poll),
            Ok(Outcome::Rejoin(epoch, verdict)) => {
                self.count_standstill(verdict);
                self.rejoin = Some((epoch, verdict));
                self.rejoin_asked_at = Some(now);
            }
            Ok(Outcome::Confirmed(_)) => {}
            Ok(Outcome::PrePromoted(epoch, true)) => self.pre_promoted = Some(epoch),
            Ok(Outcome::PrePromoted(_, false)) => self.pre_promote_refused_at = Some(now),
            Ok(Outcome::RewindRefused) => self.rewind_refused_under.clone_from(&self.rewound_under),
            Ok(Outcome::RewindPutOff) => self.rewind_put_off(now),
            Ok(Outcome::BootstrapFailed { why, for_good }) => self.bootstrap_failed = Some((why, for_good)),
            Ok(Outcome::Done) => self.done(kind),
            Err(_) => self.failed(kind, now),
        }
    }

    /// It is tried again under the same leader, for a while.
    fn rewind_put_off(&mut self, now: Boottime) {
        self.backoff_until = Some(now + BACKOFF);
        self.rewinds_put_off += 1;
        if self.rewinds_put_off < REWINDS_PUT_OFF_MAX {
            self.rewound_under = None;
        } else {
            self.rewinds_put_off = 0;
        }
    }

    fn done(&mut self, kind: JobKind) {
        match kind {
            JobKind::Clone | JobKind::Rewind => {
                self.clone_failures = 0;
                self.rewinds_put_off = 0;
                self.start_failures = 0;
                self.stands_still = None;
                self.rejoin = None; // What was compared is not there any more.
                self.reinitialize_tried();
            }
            JobKind::StartStandby => {
                self.start_failures = 0;
                self.handed_over = false;
            }
            JobKind::CustomBootstrap => self.restored = true,
            JobKind::Initdb
            | JobKind::StartPrimary
            | JobKind::PrePromote
            | JobKind::Promote
            | JobKind::Checkpoint
            | JobKind::Stop
            | JobKind::Confirm
            | JobKind::Poll
            | JobKind::CheckRejoin => {}
        }
    }

    /// Whether it was made or not: what was ended for it is started, in a pause too.
    fn reinitialize_tried(&mut self) {
        self.handed_over |= self.reinitialize_asked_at.take().is_some();
    }

    fn failed(&mut self, kind: JobKind, now: Boottime) {
        if kind == JobKind::Clone {
            self.reinitialize_tried();
        }
        match kind {
            JobKind::StartPrimary => self.start_failures += 1,
            JobKind::Clone => {
                self.clone_failures += 1;
                self.backoff_until = Some(now + BACKOFF);
            }
            JobKind::Initdb | JobKind::CustomBootstrap | JobKind::StartStandby | JobKind::CheckRejoin => {
                self.backoff_until = Some(now + BACKOFF);
            }
            // What a rewind has left is copied anew, at once.
            JobKind::Rewind
            | JobKind::PrePromote
            | JobKind::Promote
            | JobKind::Checkpoint
            | JobKind::Stop
            | JobKind::Confirm
            | JobKind::Poll => {}
        }
        // A standby whose start failed on what it has may have what the leader has not.
        if kind == JobKind::StartStandby && self.rejoin.as_ref().is_some_and(|(_, verdict)| verdict.fits()) {
            self.rejoin = None;
        }
    }

    /// A job has ended by a defect, or was dropped.
    pub fn job_lost(&mut self, now: Boottime) {
        self.handover = None;
        self.restart = None;
        self.reinitialize_tried();
        self.backoff_until = Some(now + BACKOFF);
    }
}

#[cfg(test)]
mod tests;

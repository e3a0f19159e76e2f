//! What a cycle does without deciding: publishing, slots, history, configuration. Nothing here may fail a cycle.

use std::collections::BTreeMap;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::event::phase;
use pgherd_cluster::key::Key;
use pgherd_cluster::record::{MemberRecord, Role, Status};
use pgherd_cluster::source::SourceHealth;
use pgherd_cluster::timing::LeaseTiming;

use super::Cycle;

use crate::decide::published_role;
use crate::failsafe;
use crate::lease::{Resumed, Voucher};
use crate::observation::{LeaseSeen, Observation, Postgres};
use crate::record::{api_url, history_of, leader_status, member_record};
use crate::status::WalStatus;
use crate::sync::SyncNames;

/// What was last written, so that it is written again only when it differs.
#[derive(Default)]
pub(super) struct Upkeep {
    record: Option<(MemberRecord, i64, Boottime)>,
    status: Option<(Status, Boottime)>,
    pub(super) slots_seen: BTreeMap<String, Boottime>,
    /// Of the dynamic configuration, and whether the standby says which rows it needs.
    config_revision: Option<(i64, bool)>,
    forgotten: bool,
    /// The revision of the configuration that is kept beside the data.
    pub(super) kept: Option<i64>,
    timing: Option<LeaseTiming>,
    memo: Resumed,
    failsafe: Option<(Option<u64>, Option<Vec<Voucher>>)>,
    failsafe_sent: Option<failsafe::Sent>,
    /// The names that the standbys were made to answer for, and whether every process surely had them by then.
    answered_for: Option<(SyncNames, bool)>,
    /// When that was last tried.
    answer_tried_at: Option<Boottime>,
}

impl Upkeep {
    /// Has PostgreSQL's files written, and read, whether they differ or not.
    pub(super) fn forget_configuration(&mut self) {
        (self.config_revision, self.forgotten) = (None, true);
    }

    /// Has the times of the lease told to whom they concern.
    pub(super) fn forget_timing(&mut self) {
        self.timing = None;
    }

    /// The revision of the dynamic configuration that PostgreSQL's files were written from, and whether the standby said
    /// which rows it needs.
    pub(super) fn config_revision(&self) -> Option<(i64, bool)> {
        self.config_revision
    }

    /// Whether they are to be read in any case.
    pub(super) fn was_forgotten(&self) -> bool {
        self.forgotten
    }

    /// They are written from this revision.
    pub(super) fn configured(&mut self, revision: (i64, bool)) {
        (self.config_revision, self.forgotten) = (Some(revision), false);
    }
}

impl Cycle {
    pub(super) async fn upkeep(&mut self, seen: &Observation) {
        self.remember();
        self.retime(seen).await;
        self.keep_configuration(seen);
        self.reload_configuration(seen);
        self.look_for_pending(seen).await;
        self.change_passwords(seen).await;
        let in_touch = *self.context.view.health().borrow() == SourceHealth::Following;
        if in_touch {
            self.publish_member(seen).await;
        }
        self.look_after_failsafe(seen, in_touch).await;
        let Postgres::Running(server) = &seen.postgres else {
            return;
        };
        self.look_after_slots(seen);
        match (&server.wal, &seen.lease) {
            (WalStatus::Primary { location }, LeaseSeen::Mine(epoch)) if self.memory.proven.as_ref() == Some(epoch) => {
                if self.memory.checkpointed.as_ref() != Some(epoch) && self.checkpoint.is_empty() {
                    self.first_checkpoint(epoch.clone()); // The last try failed; members that rewind wait for it.
                }
                self.make_standbys_answer().await;
                if in_touch && seen.job.is_none() {
                    self.publish_leader(seen, *location).await;
                }
            }
            (WalStatus::Standby { .. }, LeaseSeen::Mine(_))
                if seen.standby_cluster.is_some() && in_touch && seen.job.is_none() =>
            {
                self.publish_leader(seen, server.wal.position()).await;
            }
            _ => {}
        }
    }

    /// Tells the keeper what an agent after this one needs, when it has changed.
    pub(super) fn remember(&mut self) {
        let state = self.context.lease.state().borrow().clone();
        let epoch = state.holding.as_ref().map(|held| held.epoch.clone());
        let proven = epoch.is_some() && self.memory.proven == epoch;
        let memo = Resumed {
            lease: state.lease,
            lease_ttl: state.lease_ttl,
            term: state.holding.as_ref().map(|held| held.term),
            epoch,
            proven,
            armed_until: None,
        };
        if memo != self.upkeep.memo {
            self.context.keeper.remember(memo.to_memo());
            self.upkeep.memo = memo;
        }
    }

    async fn retime(&mut self, seen: &Observation) {
        let timing = seen.view.timing();
        if self.upkeep.timing != Some(timing) && seen.view.config.value.is_some() {
            self.context.lease.retime(timing).await;
            let watchdog = self.context.live().watchdog.settings(timing);
            if let Err(error) = self.context.keeper.watchdog(watchdog).await {
                tracing::warn!("setting up the watchdog: {error}");
            }
            self.upkeep.timing = Some(timing);
        }
    }

    async fn publish_member(&mut self, seen: &Observation) {
        let Some(lease) = self.context.lease.state().borrow().lease else {
            return;
        };
        let scheduled = self.orders.document();
        let record = member_record(&self.context.live(), seen, &self.memory, scheduled, &self.pending.found);
        let now = Boottime::now();
        if let Some((last, last_lease, written_at)) = &self.upkeep.record
            && *last_lease == lease
            && seen.view.members.contains_key(&self.context.config.name)
        {
            let period = self.context.timing().loop_wait();
            // Positions are published once a period; what others act on, at once.
            let only_moved = without_positions(last) == without_positions(&record);
            if *last == record || (only_moved && now.since(*written_at) + SLACK < period) {
                return;
            }
        }
        let key = self.context.key(&Key::Member(self.context.config.name.clone()));
        let Ok(value) = serde_json::to_string(&record) else {
            return;
        };
        match self.context.etcd.put(&key, &value, lease, self.context.budget()).await {
            Ok(()) => {
                if self.context.journal.stopwatch().has(phase::WRITABLE) && record.role == Role::Primary {
                    self.context.journal.mark(phase::ANNOUNCED);
                }
                self.upkeep.record = Some((record, lease, now));
            }
            Err(error) => tracing::warn!("writing our member key: {error}"),
        }
    }

    async fn publish_leader(&mut self, seen: &Observation, position: pgherd_cluster::name::Lsn) {
        let now = Boottime::now();
        let period = self.context.timing().loop_wait();
        let written_lately = self.upkeep.status.as_ref();
        let written_lately = written_lately.is_some_and(|(_, at)| now.since(*at) + SLACK < period);
        if written_lately {
            return;
        }
        let own = &self.context.config.name;
        // Until it has looked, what the leader before it said of them is the best there is.
        let slots = self.slots.told().unwrap_or_else(|| seen.view.status.slots.clone());
        let mut status = leader_status(own, position, slots, &seen.view, &mut self.upkeep.slots_seen, now);
        status.pgherd.failover_slots = self.known.failover_slots.iter().cloned().collect();
        if self.upkeep.status.as_ref().is_none_or(|(last, _)| *last != status) {
            let value = serde_json::to_string(&status).unwrap_or_default();
            if let Err(error) = self
                .context
                .etcd
                .put(&self.context.key(&Key::Status), &value, 0, self.context.budget())
                .await
            {
                tracing::warn!("writing the status key: {error}");
                return;
            }
        }
        self.upkeep.status = Some((status, now));
        self.restore_configuration(seen).await;
        self.publish_history(seen).await;
    }

    /// The leader keeps `/failsafe` in step with the members, and the lease's thread with every list that may stand there.
    async fn look_after_failsafe(&mut self, seen: &Observation, in_touch: bool) {
        let config = seen.view.config.value.clone().unwrap_or_default();
        let LeaseSeen::Mine(epoch) = &seen.lease else {
            (self.upkeep.failsafe, self.upkeep.failsafe_sent) = (None, None);
            return;
        };
        if !config.is_failsafe() {
            self.tell_failsafe(None).await;
            return;
        }
        let (stands, sent) = (failsafe::stands(&seen.view), self.upkeep.failsafe_sent.as_ref());
        let may_stand = failsafe::may_stand(&seen.view, sent);
        if !in_touch {
            return; // What was told last stands.
        }
        let wanted = failsafe::wanted(&seen.view, &seen.me, &api_url(&self.context.live()));
        let by_vouches = self.context.lease.state().borrow().rests_on_vouches();
        // Who is added has not vouched for a deadline that rests on the word of the others, and may bid once he is listed.
        let leads =
            self.memory.proven.as_ref() == Some(epoch) || published_role(seen, &self.memory) == Role::StandbyLeader;
        if wanted == stands || by_vouches || !leads {
            self.tell_failsafe(Some(failsafe::vouchers(&may_stand))).await;
            return;
        }
        // Whatever becomes of the write, either list may stand.
        self.tell_failsafe(Some(failsafe::vouchers(&failsafe::united(&may_stand, &wanted))))
            .await;
        self.upkeep.failsafe_sent = Some(failsafe::Sent {
            compared: seen.view.failsafe_revision,
            list: failsafe::united(&may_stand, &wanted),
        });
        let txn = failsafe::write(&self.context.keys, &seen.view, epoch, &wanted);
        if let Err(error) = self.context.etcd.txn(&txn, self.context.budget()).await {
            tracing::warn!("writing the failsafe key: {error}");
        }
    }

    async fn tell_failsafe(&mut self, list: Option<Vec<Voucher>>) {
        // The thread forgets the list with the holding that it was told for.
        let told = (self.memory.lease_term, list);
        if self.upkeep.failsafe.as_ref() != Some(&told) {
            self.context.lease.failsafe(told.1.clone()).await;
            self.upkeep.failsafe = Some(told);
        }
    }

    /// Commits that wait are let go when a standby that is named says how far it is. One that is new among the names said
    /// so before it was named, and says it again only when something comes, or after `wal_receiver_status_interval`, ten
    /// seconds by default. So something comes.
    async fn make_standbys_answer(&mut self) {
        let Some(waiting) = &self.memory.waiting else { return };
        if waiting.taken_over_at.is_none() || waiting.names == SyncNames::Off {
            return;
        }
        let answered_for = Some((waiting.names.clone(), waiting.since.is_some()));
        if self.upkeep.answered_for == answered_for {
            return;
        }
        let now = Boottime::now();
        let tried = self.upkeep.answer_tried_at;
        if tried.is_some_and(|tried| now.since(tried) < ANSWER_AGAIN) {
            return;
        }
        // Our own connection does not wait for any standby.
        match self.context.sql.prove_writable().await {
            Ok(()) => (self.upkeep.answered_for, self.upkeep.answer_tried_at) = (answered_for, None),
            Err(error) => {
                self.upkeep.answer_tried_at = Some(now);
                tracing::warn!("making the standbys answer: {}", error.chain());
            }
        }
    }

    async fn publish_history(&self, seen: &Observation) {
        let Postgres::Running(server) = &seen.postgres else {
            return;
        };
        // Whose timelines a standby is on is not known here before it is promoted.
        if matches!(server.wal, WalStatus::Standby { .. }) {
            return;
        }
        let Some(timeline) = server.timeline else { return };
        let known = seen.view.history.clone();
        // The first timeline has no history; the key is written only to correct one that says otherwise.
        if known
            .as_ref()
            .map_or(timeline.0 == 1, |history| history.timeline() == timeline)
        {
            return;
        }
        let config = seen.view.config.value.clone().unwrap_or_default();
        let data_dir = &self.context.config.postgresql.data_dir;
        let known = known.unwrap_or_default();
        let keep = config.max_timelines_history();
        let Some(history) = history_of(data_dir, timeline, &self.context.config.name, &known, keep) else {
            return;
        };
        let value = history.to_json().to_string();
        if let Err(error) = self
            .context
            .etcd
            .put(&self.context.key(&Key::History), &value, 0, self.context.budget())
            .await
        {
            tracing::warn!("writing the history key: {error}");
        }
    }
}

/// After a write that failed, before the next.
const ANSWER_AGAIN: Duration = Duration::from_secs(1);

/// A period that is over within this is over: a timer never fires early, but a cycle may begin a moment before it.
pub(super) const SLACK: Duration = Duration::from_millis(100);

fn without_positions(record: &MemberRecord) -> MemberRecord {
    MemberRecord {
        xlog_location: None,
        replay_lsn: None,
        receive_lsn: None,
        ..record.clone()
    }
}

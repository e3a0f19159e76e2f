//! The renewal thread's own work.

use std::sync::Arc;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::etcd::{Budget, Compare, Etcd, Op, StoreError, Txn};
use pgherd_cluster::key::{Key, Keys};
use pgherd_cluster::name::MemberName;
use pgherd_cluster::timing::LeaseTiming;
use pgherd_cluster::view::{Entry, Epoch};
use pgherd_keeper::KeeperLink;
use pgherd_keeper::protocol::Request;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::{BidError, BidGuards, Command, Held, LeaseState, term_of};
use crate::keeper::Arming;

/// A keeper answers within a millisecond; a machine in trouble may take longer.
const KEEPER_SILENCE_MAX: Duration = Duration::from_millis(700);

pub(super) struct Renewer {
    pub(super) etcd: Etcd,
    pub(super) keys: Keys,
    pub(super) name: MemberName,
    pub(super) timing: LeaseTiming,
    pub(super) link: Arc<KeeperLink>,
    /// What the keeper answered to deadlines.
    pub(super) arming: watch::Receiver<Arming>,
    /// A deadline that was sent and that the keeper has neither confirmed nor refused.
    pub(super) unanswered: Option<Boottime>,
    /// The latest deadline that the keeper was given: it never moves one back.
    pub(super) latest_deadline: Boottime,
    pub(super) state: watch::Sender<LeaseState>,
}

/// How long a proof of a lease may be relied on. The lease lives for its own ttl, whatever the configuration says by now.
fn proof_lasts(lease_ttl: Duration, timing: LeaseTiming) -> Duration {
    lease_ttl.min(timing.ttl())
}

/// Whether the leader key may be bound to a lease of `new_ttl` now. A shorter lease must not carry the key while the
/// keeper still has a deadline from the longer one that reaches beyond it.
fn may_move(new_ttl: Duration, now: Boottime, latest_deadline: Boottime) -> bool {
    latest_deadline <= now + new_ttl
}

/// What a renewal found.
enum Renewal {
    /// The lease lives, and the key, if one is held, is ours.
    Proven,
    /// The lease is gone.
    LeaseGone,
    /// The lease lives, but the key is not ours any more.
    KeyGone,
}

impl Renewer {
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut next = Instant::now();
        loop {
            tokio::select! {
                biased;
                () = sleep_until(next) => {
                    let started = Instant::now();
                    let went_well = self.renew().await;
                    // After a failure at once again: another endpoint may answer, and the deadline is running.
                    let pause = if went_well { self.timing.renew_every() } else { Duration::from_millis(100) };
                    next = started + pause.min(self.timing.renew_every());
                    next = next.max(Instant::now());
                }
                command = commands.recv() => match command {
                    None => return,
                    Some(command) => {
                        if self.obey(command).await {
                            next = Instant::now();
                        }
                    }
                },
            }
        }
    }

    /// Carries out a command; says whether a renewal is due at once.
    async fn obey(&mut self, command: Command) -> bool {
        match command {
            Command::Bid { guards, done } => {
                let result = self.bid(guards).await;
                let _ = done.send(result); // Who asked may be gone; the next renewal shows what is held.
                false
            }
            Command::LetGo { done } => {
                self.state.send_modify(|state| state.holding = None);
                self.unanswered = None;
                let _ = done.send(());
                false
            }
            Command::Retime(timing) => {
                self.timing = timing;
                true
            }
        }
    }

    /// One renewal. Says whether etcd answered.
    async fn renew(&mut self) -> bool {
        let asked_at = Boottime::now();
        if self.keeper_is_silent(asked_at) {
            let what = "the keeper does not confirm deadlines: the lease is left to expire".to_owned();
            self.state
                .send_modify(|state| state.trouble = Some(StoreError::Protocol { what }));
            return false;
        }
        match self.ask().await {
            Ok(Renewal::Proven) => {
                self.answered(asked_at);
                self.prove(asked_at).await;
                self.move_if_retimed().await;
                true
            }
            Ok(Renewal::LeaseGone) => {
                self.answered(asked_at);
                self.lose("the lease has expired");
                self.state.send_modify(|state| state.lease = None);
                self.grant().await
            }
            Ok(Renewal::KeyGone) => {
                self.answered(asked_at);
                self.lose("the leader key is not ours any more");
                true
            }
            Err(error) => {
                self.state.send_modify(|state| state.trouble = Some(error));
                false
            }
        }
    }

    /// A keeper that does not confirm deadlines is frozen, and its sentinel ends PostgreSQL. To keep the lease alive would
    /// then only keep others from leading: it is left to expire, which is after that end. When the deadline itself has
    /// passed the holding is over, and a lease is granted anew.
    fn keeper_is_silent(&mut self, now: Boottime) -> bool {
        let Some(deadline) = self.unanswered else {
            return false;
        };
        let term = self.state.borrow().holding.as_ref().map(|held| term_of(&held.epoch));
        let arming = *self.arming.borrow();
        if term.is_some_and(|term| arming.confirms(term, deadline)) {
            self.unanswered = None;
            self.publish_deadline(deadline);
            return false;
        }
        if term.is_some() && now < deadline {
            return true;
        }
        self.unanswered = None;
        if term.is_some() {
            self.lose("the keeper has not confirmed a deadline until it passed");
            self.state.send_modify(|state| state.lease = None);
        }
        false
    }

    fn publish_deadline(&self, deadline: Boottime) {
        self.state.send_modify(|state| {
            if let Some(held) = &mut state.holding {
                held.deadline = Some(deadline);
            }
        });
    }

    fn answered(&self, at: Boottime) {
        self.state.send_modify(|state| {
            state.answered_at = Some(at);
            state.trouble = None;
        });
    }

    async fn ask(&self) -> Result<Renewal, StoreError> {
        let (lease, holding) = {
            let state = self.state.borrow();
            (state.lease, state.holding.clone())
        };
        let Some(lease) = lease else {
            return Ok(Renewal::LeaseGone);
        };
        match self.etcd.keep_alive(lease, self.budget()).await {
            Ok(()) => {}
            Err(StoreError::LeaseGone) => return Ok(Renewal::LeaseGone),
            Err(error) => return Err(error),
        }
        let Some(held) = holding else {
            return Ok(Renewal::Proven);
        };
        let snapshot = self.etcd.read(&self.keys.of(&Key::Leader), self.budget()).await?;
        let ours = snapshot.entries.iter().any(|entry| {
            entry.value == self.name.as_str()
                && entry.lease == lease
                && entry.create_revision == held.epoch.create_revision
        });
        Ok(if ours { Renewal::Proven } else { Renewal::KeyGone })
    }

    /// Two tries fit in before the next renewal would be due; the endpoint changes between them.
    fn budget(&self) -> Budget {
        let attempt = self.timing.renewal_attempt();
        Budget {
            deadline: Instant::now() + attempt * 2,
            attempt,
        }
    }

    /// Gives the keeper the deadline of a proof that was asked for at `asked_at`. It counts once the keeper has confirmed it.
    async fn prove(&mut self, asked_at: Boottime) {
        let deadline = asked_at + proof_lasts(self.state.borrow().lease_ttl, self.timing);
        let term = self.state.borrow().holding.as_ref().map(|held| term_of(&held.epoch));
        let Some(term) = term else { return };
        let arm = Request::Arm {
            term,
            deadline: pgherd_keeper::clock::Boottime::from_nanos(deadline.as_nanos()),
            margin: self.timing.margin(),
        };
        let refusals = self.arming.borrow().refusals;
        if let Err(error) = self.link.send(&arm) {
            tracing::warn!(%error, "the keeper did not take a deadline");
            self.unanswered.get_or_insert(deadline);
            return;
        }
        self.latest_deadline = self.latest_deadline.max(deadline);
        let answered = |arming: &Arming| arming.confirms(term, deadline) || arming.refusals > refusals;
        let answer = timeout(KEEPER_SILENCE_MAX, self.arming.wait_for(answered)).await;
        match answer.map(|arming| arming.map(|arming| *arming)) {
            Ok(Ok(arming)) if arming.confirms(term, deadline) => {
                self.unanswered = None;
                self.publish_deadline(deadline);
            }
            // The term is final, or another one runs: no proof of ours will make this holding good.
            Ok(Ok(arming)) => {
                self.unanswered = None;
                self.lose(&format!("the keeper refuses the deadline ({:?})", arming.refusal));
            }
            // Silent, or gone, which ends this process elsewhere.
            Ok(Err(_)) | Err(_) => {
                self.unanswered.get_or_insert(deadline);
            }
        }
    }

    /// Bids for the leader key, between two renewals: the lease that is renewed here is the one that the key is bound to.
    async fn bid(&mut self, guards: BidGuards) -> Result<Epoch, BidError> {
        let lease = self.state.borrow().lease.ok_or(BidError::NoLease)?;
        // The deadline counts from here: the key lives as long as the lease, which this renews.
        let proven_from = Boottime::now();
        self.etcd.keep_alive(lease, self.budget()).await?;
        let leader = self.keys.of(&Key::Leader);
        let guard = |key: &Key, revision| Compare::ModRevision(self.keys.of(key), revision);
        let txn = Txn::new()
            .when(Compare::Absent(leader.clone()))
            .when(guard(&Key::Sync, guards.sync))
            .when(guard(&Key::Failsafe, guards.failsafe))
            .when(guard(&Key::Failover, guards.failover))
            .when(guard(&Key::Config, guards.config))
            .then(Op::Put {
                key: leader.clone(),
                value: self.name.to_string(),
                lease,
            })
            .then(Op::Get(leader.clone()))
            .otherwise(Op::Get(leader));
        let outcome = self.etcd.txn(&txn, self.budget()).await?;
        // A repeated try finds its own first one: same name, same lease.
        let ours = |entry: &&Entry| entry.value == self.name.as_str() && entry.lease == lease;
        let entry = outcome.read.iter().find(ours).ok_or(BidError::Lost)?;
        let epoch = Epoch {
            holder: self.name.clone(),
            create_revision: entry.create_revision,
        };
        let held = Held {
            epoch: epoch.clone(),
            deadline: None,
        };
        self.state.send_modify(|state| state.holding = Some(held));
        self.prove(proven_from).await;
        let holds = self.state.borrow().holding.is_some();
        if holds { Ok(epoch) } else { Err(BidError::Lost) }
    }

    /// The key is another's, or nobody's: PostgreSQL is ended at once, without waiting for the loop.
    fn lose(&self, why: &str) {
        let had = self.state.borrow().holding.is_some();
        if !had {
            return;
        }
        tracing::warn!("{why}: ending PostgreSQL");
        if let Err(error) = self.link.send(&Request::End) {
            tracing::error!(%error, "the keeper did not take the order; its deadline stands");
        }
        self.state.send_modify(|state| state.holding = None);
    }

    async fn grant(&self) -> bool {
        let ttl = self.timing.ttl();
        match self.etcd.grant(ttl, self.budget()).await {
            Ok(lease) => {
                self.bind(lease, ttl);
                true
            }
            Err(error) => {
                self.state.send_modify(|state| state.trouble = Some(error));
                false
            }
        }
    }

    fn bind(&self, lease: i64, ttl: Duration) {
        self.state.send_modify(|state| {
            state.lease = Some(lease);
            state.lease_ttl = ttl;
        });
    }

    /// A lease cannot be given another time to live: once that is safe, a new one takes over the leader key, under the same
    /// create revision. Until then, and if it fails, the old one stays in use.
    async fn move_if_retimed(&self) {
        let state = self.state.borrow().clone();
        let ttl = self.timing.ttl();
        let Some(old) = state.lease.filter(|_| state.lease_ttl != ttl) else {
            return;
        };
        let Some(held) = state.holding else {
            self.grant().await;
            return;
        };
        if !may_move(ttl, Boottime::now(), self.latest_deadline) {
            return;
        }
        let Ok(new) = self.etcd.grant(ttl, self.budget()).await else {
            return;
        };
        let key = || self.keys.of(&Key::Leader);
        let txn = Txn::new()
            .when(Compare::Value(key(), self.name.to_string()))
            .when(Compare::CreateRevision(key(), held.epoch.create_revision))
            .when(Compare::Lease(key(), old))
            .then(Op::Put {
                key: key(),
                value: self.name.to_string(),
                lease: new,
            });
        match self.etcd.txn(&txn, self.budget()).await {
            Ok(outcome) if outcome.succeeded => self.bind(new, ttl),
            // If only the answer was lost, the next renewal finds the key on another lease and ends the holding: rare, and
            // the safe side.
            Ok(_) | Err(_) => tracing::warn!("the leader key could not be bound to a lease of {} s", ttl.as_secs()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_lasts_no_longer_than_the_lease_that_it_is_of() {
        let timing = LeaseTiming::PATRONI_DEFAULT;
        assert_eq!(proof_lasts(Duration::from_secs(5), timing), Duration::from_secs(5));
        assert_eq!(proof_lasts(Duration::from_secs(60), timing), timing.ttl());
    }

    #[test]
    fn a_shorter_lease_takes_over_only_when_no_longer_deadline_is_out() {
        let at = |seconds| Boottime::default() + Duration::from_secs(seconds);
        let five = Duration::from_secs(5);
        assert!(!may_move(five, at(100), at(130)));
        assert!(!may_move(five, at(124), at(130)));
        assert!(may_move(five, at(125), at(130)));
        assert!(may_move(Duration::from_secs(60), at(100), at(130)));
    }
}

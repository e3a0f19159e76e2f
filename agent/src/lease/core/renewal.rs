//! A renewal is a keepalive and then a linearizable read of the leader key that shows our name, our lease and our create
//! revision: a keepalive alone proves only the lease, to which the member key is bound too. Its deadline counts from
//! before the keepalive was sent, and only once the keeper has confirmed it.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::etcd::{Compare, Op, StoreError, Txn};
use pgherd_cluster::key::Key;
use pgherd_cluster::timing::LeaseTiming;
use pgherd_cluster::view::{Entry, Epoch};

use super::{Answer, Ask, BidGuards, Flow, Held, LeaseCore, Output, Proof, SENT_MAX, term_of};

/// How long a proof of a lease may be relied on. The lease lives for its own ttl, whatever the configuration says by now.
pub(super) fn proof_lasts(lease_ttl: Duration, timing: LeaseTiming) -> Duration {
    lease_ttl.min(timing.ttl())
}

/// Whether the leader key may be bound to a lease of `new_ttl` now. A shorter lease must not carry the key while the
/// keeper still has a deadline from the longer one that reaches beyond it.
pub(super) fn may_move(new_ttl: Duration, now: Boottime, latest_deadline: Boottime) -> bool {
    latest_deadline <= now + new_ttl
}

impl LeaseCore {
    pub(super) fn begin_renewal(&mut self, now: Boottime) {
        if self.keeper_is_silent(now) {
            let what = "the keeper does not confirm deadlines: the lease is left to expire".to_owned();
            self.trouble(now, StoreError::Protocol { what });
            return;
        }
        match self.state.lease {
            None => self.begin_grant(now),
            Some(lease) => self.ask(
                Flow::KeepingAlive {
                    asked_at: now,
                    bid: None,
                },
                Ask::KeepAlive { lease },
            ),
        }
    }

    fn begin_grant(&mut self, now: Boottime) {
        let ttl = self.timing.ttl();
        let rewin = self.state.holding.is_some();
        self.ask(
            Flow::Granting {
                asked_at: now,
                ttl,
                rewin,
            },
            Ask::Grant { ttl },
        );
    }

    /// A keeper that does not confirm deadlines is frozen, and its sentinel ends PostgreSQL. To keep the lease alive would
    /// then only keep others from leading: it is left to expire, which is after that end. When the deadline itself has
    /// passed the holding is over, and a lease is granted anew.
    fn keeper_is_silent(&mut self, now: Boottime) -> bool {
        let Some(deadline) = self.unanswered else { return false };
        if self.state.holding.is_none() {
            self.unanswered = None;
            return false;
        }
        if now < deadline {
            return true;
        }
        self.lose("the keeper has not confirmed a deadline until it passed");
        self.state.lease = None;
        false
    }

    pub(super) fn granted(
        &mut self,
        now: Boottime,
        asked_at: Boottime,
        ttl: Duration,
        rewin: bool,
        answer: Result<Answer, StoreError>,
    ) {
        match answer {
            Ok(Answer::Granted(lease)) => {
                self.in_touch(asked_at);
                self.state.lease = Some(lease);
                self.state.lease_ttl = ttl;
                if rewin && self.rests_on_vouches(now) {
                    self.begin_rewin(asked_at, lease);
                } else {
                    self.next_at = asked_at + self.timing.renew_every();
                }
            }
            Ok(_) => self.trouble(now, unexpected()),
            Err(error) => self.trouble(now, error),
        }
    }

    pub(super) fn kept_alive(
        &mut self,
        now: Boottime,
        asked_at: Boottime,
        bid: Option<BidGuards>,
        answer: Result<Answer, StoreError>,
    ) {
        match (answer, bid) {
            (Ok(_), Some(guards)) => self.send_bid(now, asked_at, guards),
            (Ok(_), None) if self.state.holding.is_some() || self.unclear => {
                self.ask(Flow::Reading { asked_at }, Ask::ReadLeader);
            }
            (Ok(_), None) => {
                self.in_touch(asked_at);
                self.renewed(now, asked_at);
            }
            (Err(StoreError::LeaseGone), bid) => {
                self.in_touch(asked_at);
                self.state.lease = None;
                self.unclear = false; // A key that was bound to it went with it.
                if bid.is_some() {
                    self.end_bid(Err(super::BidLoss::NoLease));
                }
                if !self.rests_on_vouches(now) {
                    self.lose("the lease has expired");
                }
                self.begin_grant(now);
            }
            (Err(error), bid) => {
                if bid.is_some() {
                    self.end_bid(Err(super::BidLoss::Store(error.clone())));
                }
                self.trouble(now, error);
            }
        }
    }

    pub(super) fn key_read(&mut self, now: Boottime, asked_at: Boottime, answer: Result<Answer, StoreError>) {
        let entry = match answer {
            Ok(Answer::Leader(entry)) => entry,
            Ok(_) => return self.trouble(now, unexpected()),
            Err(error) => return self.trouble(now, error),
        };
        self.in_touch(asked_at);
        self.key_revision = entry.as_ref().map_or(0, |entry| entry.mod_revision);
        let ours = entry
            .as_ref()
            .filter(|entry| entry.value == self.name.as_str() && Some(entry.lease) == self.state.lease);
        if self.state.holding.is_none() {
            // Only a bid whose outcome was unknown asks without a holding.
            if let Some(entry) = ours.filter(|_| self.unclear) {
                let epoch = self.epoch(entry.create_revision);
                self.hold(epoch);
                self.prove(asked_at);
            }
            self.unclear = false;
            return self.renewed(now, asked_at);
        }
        let proven = ours.is_some_and(|entry| Some(entry.create_revision) == self.create_revision());
        let won_anew = ours
            .filter(|_| self.rests_on_vouches(now))
            .map(|entry| entry.create_revision);
        if let (Some(create_revision), Some(held)) = (won_anew, &mut self.state.holding) {
            // Ours on our lease, and created by nobody else's hand: a winning anew of which only the answer was lost.
            held.epoch.create_revision = create_revision;
        }
        if (proven || won_anew.is_some()) && self.move_unclear {
            self.undo_move();
        } else if proven || won_anew.is_some() {
            self.prove(asked_at);
            self.renewed(now, asked_at);
            self.move_if_retimed(now);
        } else if let (None, true, Some(lease)) = (&entry, self.rests_on_vouches(now), self.state.lease) {
            self.begin_rewin(asked_at, lease);
        } else {
            self.lose("the leader key is not ours any more");
            self.renewed(now, asked_at);
        }
    }

    /// The next renewal is due one period after this one was asked for.
    pub(super) fn renewed(&mut self, now: Boottime, asked_at: Boottime) {
        self.next_at = (asked_at + self.timing.renew_every()).max(now);
        if self.state.holding.is_none() {
            self.move_if_retimed(now);
        }
    }

    pub(super) fn epoch(&self, create_revision: i64) -> Epoch {
        Epoch {
            holder: self.name.clone(),
            create_revision,
        }
    }

    fn create_revision(&self) -> Option<i64> {
        self.state.holding.as_ref().map(|held| held.epoch.create_revision)
    }

    pub(super) fn hold(&mut self, epoch: Epoch) {
        self.failsafe.forget();
        self.state.holding = Some(Held {
            term: term_of(&epoch),
            epoch,
            deadline: None,
            proof: Proof::Store,
        });
    }

    /// The key was shown to be ours by a question that was asked at `asked_at`.
    pub(super) fn prove(&mut self, asked_at: Boottime) {
        let lasts = proof_lasts(self.state.lease_ttl, self.timing);
        self.give_deadline(asked_at, lasts, Proof::Store);
    }

    /// Gives the keeper a deadline. It counts once the keeper has confirmed it; in pause nobody fences, and it counts at
    /// once.
    pub(super) fn give_deadline(&mut self, asked_at: Boottime, lasts: Duration, proof: Proof) {
        let deadline = asked_at + lasts;
        let Some(held) = &self.state.holding else { return };
        let term = held.term;
        match self.state.paused {
            None => return,
            Some(true) => return self.publish(deadline, proof, asked_at),
            Some(false) => {}
        }
        if self.sent.len() == SENT_MAX {
            return;
        }
        self.sent.push((deadline, proof, asked_at));
        self.unanswered.get_or_insert(deadline);
        self.latest_deadline = self.latest_deadline.max(deadline);
        self.out.push(Output::Arm {
            term,
            deadline,
            margin: self.timing.margin(),
        });
    }

    /// At the end of a pause the keeper gets the deadline that was kept from it; until it confirms, it counts no more.
    pub(super) fn hand_on_deadline(&mut self, now: Boottime) {
        if self.state.paused != Some(false) {
            return;
        }
        let Some(held) = &mut self.state.holding else { return };
        let (kept, proof) = (held.deadline.take(), held.proof);
        if kept.is_some_and(|deadline| now < deadline) {
            let (asked_at, lasts) = self.proof;
            self.give_deadline(asked_at, lasts, proof);
        }
    }

    pub(super) fn armed(&mut self, now: Boottime, term: u64, deadline: Boottime) {
        if self.state.holding.as_ref().is_none_or(|held| held.term != term) {
            return;
        }
        let confirmed = self.sent.iter().filter(|(sent, ..)| *sent <= deadline).max().copied();
        self.sent.retain(|(sent, ..)| *sent > deadline);
        self.unanswered = self.sent.first().map(|(sent, ..)| *sent);
        if let Some((deadline, proof, asked_at)) = confirmed.filter(|(deadline, ..)| now < *deadline) {
            self.publish(deadline, proof, asked_at);
        }
    }

    fn publish(&mut self, deadline: Boottime, proof: Proof, asked_at: Boottime) {
        let Some(held) = &mut self.state.holding else { return };
        if held.deadline.is_none_or(|before| before <= deadline) {
            held.deadline = Some(deadline);
            held.proof = proof;
            self.proof = (asked_at, deadline.since(asked_at));
        }
    }

    /// The term is final, or another one runs: no proof of ours will make this holding good.
    pub(super) fn refused(&mut self, term: u64) {
        if self.state.holding.as_ref().is_some_and(|held| held.term == term) {
            self.lose("the keeper refuses the deadline");
        }
    }

    /// A lease cannot be given another time to live: once that is safe, a new one takes over the leader key, under the
    /// same create revision. Until then, and if it fails, the old one stays in use.
    fn move_if_retimed(&mut self, now: Boottime) {
        let ttl = self.timing.ttl();
        if self.state.lease.is_none() || self.state.lease_ttl == ttl || self.flow != Flow::Idle || !self.timing_known {
            return;
        }
        if self.state.holding.is_none() {
            self.begin_grant(now);
        } else if may_move(ttl, now, self.latest_deadline) {
            self.ask(Flow::GrantingForMove { ttl }, Ask::Grant { ttl });
        }
    }

    pub(super) fn granted_for_move(&mut self, now: Boottime, ttl: Duration, answer: Result<Answer, StoreError>) {
        let (Ok(Answer::Granted(new)), Some(held), Some(old)) = (answer, &self.state.holding, self.state.lease) else {
            return; // The old one stays in use; the next renewal tries again.
        };
        // A deadline that was given meanwhile may reach further.
        if !may_move(ttl, now, self.latest_deadline) {
            return;
        }
        let key = || self.keys.of(&Key::Leader);
        let txn = Txn::new()
            .when(Compare::Value(key(), self.name.to_string()))
            .when(Compare::CreateRevision(key(), held.epoch.create_revision))
            .when(Compare::Lease(key(), old))
            .when(Compare::ModRevision(key(), self.key_revision))
            .then(Op::Put {
                key: key(),
                value: self.name.to_string(),
                lease: new,
            })
            .then(Op::Get(key()))
            .otherwise(Op::Get(key()));
        self.move_unclear = true;
        self.ask(Flow::Moving { new, ttl }, Ask::Txn(txn));
    }

    /// If only the answer was lost and the move was done, the next renewal finds the key on another lease and ends the
    /// holding: rare, and the safe side. If it was not done, it may still be on its way, and the key would go over to a
    /// lease that nobody renews: it is undone before the next proof.
    pub(super) fn moved(&mut self, now: Boottime, new: i64, ttl: Duration, answer: Result<Answer, StoreError>) {
        let Ok(Answer::Txn(outcome)) = answer else { return };
        self.move_unclear = false;
        let on_new = |entry: &Entry| entry.value == self.name.as_str() && entry.lease == new;
        if outcome.read.iter().any(on_new) {
            self.state.lease = Some(new);
            self.state.lease_ttl = ttl;
        }
        self.next_at = now;
    }

    /// Writes the key once more where it is: what compares its revision of before is done no more.
    fn undo_move(&mut self) {
        let (Some(held), Some(lease)) = (&self.state.holding, self.state.lease) else {
            return;
        };
        let key = || self.keys.of(&Key::Leader);
        let txn = Txn::new()
            .when(Compare::Value(key(), self.name.to_string()))
            .when(Compare::CreateRevision(key(), held.epoch.create_revision))
            .when(Compare::Lease(key(), lease))
            .then(Op::Put {
                key: key(),
                value: self.name.to_string(),
                lease,
            })
            .then(Op::Get(key()))
            .otherwise(Op::Get(key()));
        self.ask(Flow::Unmoving { lease }, Ask::Txn(txn));
    }

    pub(super) fn unmoved(&mut self, now: Boottime, lease: i64, answer: Result<Answer, StoreError>) {
        match answer {
            Ok(Answer::Txn(outcome)) => {
                let stays = |entry: &Entry| entry.value == self.name.as_str() && entry.lease == lease;
                self.move_unclear &= !outcome.read.iter().any(stays);
                self.next_at = now;
            }
            Ok(_) => self.trouble(now, unexpected()),
            Err(error) => self.trouble(now, error),
        }
    }
}

pub(super) fn unexpected() -> StoreError {
    StoreError::Protocol {
        what: "an answer to another question".to_owned(),
    }
}

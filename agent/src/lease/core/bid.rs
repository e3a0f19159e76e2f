//! Winning the leader key: by a bid while nobody holds it, anew while vouches carry a holding whose key was lost with its
//! lease, and by binding a key that already names us to our own lease. Nobody takes an unexpired lease of another.

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::etcd::{Compare, Op, StoreError, Txn};
use pgherd_cluster::key::Key;
use pgherd_cluster::view::{Entry, Epoch};

use super::renewal::unexpected;
use super::{Answer, Ask, BidGuards, BidLoss, Flow, LeaseCore, Output};

impl LeaseCore {
    pub(super) fn ask_for_bid(&mut self, now: Boottime, guards: BidGuards) {
        if let Some(vouched) = self.failsafe.vouched(now) {
            return self.end_bid(Err(BidLoss::Vouched(vouched.leader)));
        }
        if self.state.holding.is_some() || self.waiting_bid.is_some() || self.is_bidding() {
            return self.end_bid(Err(BidLoss::Busy));
        }
        self.waiting_bid = Some(guards);
    }

    /// Whether a bid is under way, or its outcome unknown: whoever seeks the key vouches for nobody.
    pub(super) fn is_bidding(&self) -> bool {
        let under_way = matches!(
            self.flow,
            Flow::Bidding { .. }
                | Flow::KeepingAlive { bid: Some(_), .. }
                | Flow::Rebinding { .. }
                | Flow::Rewinning { .. }
        );
        under_way || self.unclear || self.waiting_bid.is_some() || self.waiting_rebind.is_some()
    }

    /// The deadline counts from here: the key lives as long as the lease, which this renews.
    pub(super) fn begin_bid(&mut self, now: Boottime, guards: BidGuards) {
        match self.state.lease {
            None => self.end_bid(Err(BidLoss::NoLease)),
            Some(lease) => self.ask(
                Flow::KeepingAlive {
                    asked_at: now,
                    bid: Some(guards),
                },
                Ask::KeepAlive { lease },
            ),
        }
    }

    pub(super) fn send_bid(&mut self, now: Boottime, asked_at: Boottime, guards: BidGuards) {
        self.in_touch(asked_at);
        let Some(lease) = self.state.lease else {
            return self.end_bid(Err(BidLoss::NoLease));
        };
        let guard = |key: &Key, revision| Compare::ModRevision(self.keys.of(key), revision);
        let txn = self
            .create(lease)
            .when(guard(&Key::Sync, guards.sync))
            .when(guard(&Key::Failsafe, guards.failsafe))
            .when(guard(&Key::Failover, guards.failover))
            .when(guard(&Key::Config, guards.config));
        self.unclear = true;
        self.next_at = now;
        self.ask(Flow::Bidding { asked_at, lease }, Ask::Txn(txn));
    }

    /// Creates the leader key on `lease` if nobody has it, and reads it in any case.
    fn create(&self, lease: i64) -> Txn {
        let leader = self.keys.of(&Key::Leader);
        Txn::new()
            .when(Compare::Absent(leader.clone()))
            .then(Op::Put {
                key: leader.clone(),
                value: self.name.to_string(),
                lease,
            })
            .then(Op::Get(leader.clone()))
            .otherwise(Op::Get(leader))
    }

    pub(super) fn bid_answered(
        &mut self,
        now: Boottime,
        asked_at: Boottime,
        lease: i64,
        answer: Result<Answer, StoreError>,
    ) {
        let outcome = match answer {
            Ok(Answer::Txn(outcome)) => outcome,
            Ok(_) => return self.bid_failed(now, unexpected()),
            Err(error) => return self.bid_failed(now, error),
        };
        self.unclear = false;
        match self.ours(&outcome.read, lease) {
            Some(epoch) => {
                self.hold(epoch.clone());
                self.prove(asked_at);
                self.renewed(now, asked_at);
                self.end_bid(Ok(epoch));
            }
            None => {
                self.renewed(now, asked_at);
                self.end_bid(Err(BidLoss::Lost));
            }
        }
    }

    /// Nothing was written when the lease is gone. After any other error it may have been: the next read tells.
    fn bid_failed(&mut self, now: Boottime, error: StoreError) {
        if error == StoreError::LeaseGone {
            self.unclear = false;
            self.state.lease = None;
        }
        self.end_bid(Err(BidLoss::Store(error.clone())));
        self.trouble(now, error);
    }

    pub(super) fn end_bid(&mut self, result: Result<Epoch, BidLoss>) {
        self.out.push(Output::BidEnded(result));
    }

    /// A repeated try finds its own first one: same name, same lease.
    fn ours(&self, read: &[Entry], lease: i64) -> Option<Epoch> {
        let ours = |entry: &&Entry| entry.value == self.name.as_str() && entry.lease == lease;
        read.iter().find(ours).map(|entry| self.epoch(entry.create_revision))
    }

    /// The key went with its lease while vouches carried the holding: win it anew without a break. The keeper's term stays,
    /// for the entitlement has had no gap.
    pub(super) fn begin_rewin(&mut self, asked_at: Boottime, lease: i64) {
        let txn = self.create(lease);
        self.ask(Flow::Rewinning { asked_at, lease }, Ask::Txn(txn));
    }

    pub(super) fn rewin_answered(
        &mut self,
        now: Boottime,
        asked_at: Boottime,
        lease: i64,
        answer: Result<Answer, StoreError>,
    ) {
        let outcome = match answer {
            Ok(Answer::Txn(outcome)) => outcome,
            Ok(_) => return self.trouble(now, unexpected()),
            // If it was written, the next read shows a key of ours with another create revision, on our lease.
            Err(StoreError::LeaseGone) => {
                self.state.lease = None;
                return self.trouble(now, StoreError::LeaseGone);
            }
            Err(error) => return self.trouble(now, error),
        };
        match self.ours(&outcome.read, lease) {
            Some(epoch) => {
                if let Some(held) = &mut self.state.holding {
                    held.epoch = epoch;
                }
                self.prove(asked_at);
                self.renewed(now, asked_at);
            }
            None => {
                self.lose("the leader key was lost with its lease and is another's now");
                self.renewed(now, asked_at);
            }
        }
    }

    /// The key names us from a holding of another process, and PostgreSQL runs by it, as when an agent takes over from
    /// Patroni's: it goes over to our lease, under its create revision. The next renewal proves it.
    pub(super) fn begin_rebind(&mut self, now: Boottime, epoch: Epoch, old: i64) {
        let (Some(lease), None) = (self.state.lease, &self.state.holding) else {
            return;
        };
        let leader = self.keys.of(&Key::Leader);
        let txn = Txn::new()
            .when(Compare::Value(leader.clone(), self.name.to_string()))
            .when(Compare::CreateRevision(leader.clone(), epoch.create_revision))
            .when(Compare::Lease(leader.clone(), old))
            .then(Op::Put {
                key: leader.clone(),
                value: self.name.to_string(),
                lease,
            })
            .then(Op::Get(leader.clone()))
            .otherwise(Op::Get(leader));
        let asked_at = now;
        self.ask(Flow::Rebinding { asked_at, epoch, lease }, Ask::Txn(txn));
    }

    pub(super) fn rebind_answered(
        &mut self,
        now: Boottime,
        asked_at: Boottime,
        epoch: Epoch,
        lease: i64,
        answer: Result<Answer, StoreError>,
    ) {
        match answer {
            Ok(Answer::Txn(outcome)) => {
                self.in_touch(asked_at);
                if self.ours(&outcome.read, lease).as_ref() == Some(&epoch) {
                    self.hold(epoch);
                }
                self.next_at = now;
            }
            Ok(_) => self.trouble(now, unexpected()),
            Err(error) => self.trouble(now, error),
        }
    }
}

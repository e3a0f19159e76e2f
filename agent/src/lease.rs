//! The lease: a thread of its own that renews it, proves the leader key with each renewal, and hands the proof's deadline
//! to the keeper. It shares nothing with the loop, so that nothing there can make a renewal late.
//!
//! A renewal is a keepalive and then a linearizable read of the leader key that shows our name, our lease and our create
//! revision: a keepalive alone proves only the lease, to which the member key is bound too.

pub mod core;
mod memo;
mod thread;

use std::sync::Arc;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::etcd::{Etcd, StoreError};
use pgherd_cluster::key::Keys;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::source::ViewHandle;
use pgherd_cluster::timing::LeaseTiming;
use pgherd_cluster::view::Epoch;
use tokio::sync::{mpsc, oneshot, watch};

use self::core::LeaseCore;
pub use self::core::{BidLoss, VouchRefusal, Voucher};
pub use self::memo::Resumed;
use self::thread::{Command, Thread};
use crate::keeper::Keeper;
use crate::peers::Peers;
use crate::slots::Board;
use crate::status::Holding;
use crate::vigil::Vigil;

/// What the loop sees of the lease.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LeaseState {
    /// The lease that this member's keys are bound to; nothing while there is none.
    pub lease: Option<i64>,
    /// How long that lease lives without renewal.
    pub lease_ttl: Duration,
    /// The holding of the leader key, with the deadline of its last proof; no deadline before the first proof.
    pub holding: Option<Held>,
    /// Why the last renewal failed, while they do.
    pub trouble: Option<StoreError>,
    /// When etcd last answered.
    pub answered_at: Option<Boottime>,
    /// For whom this member has vouched, and until when it does not bid.
    pub vouched: Option<Vouched>,
    /// Whether deadlines are kept from the keeper, as in maintenance; nothing until the loop has said whether they are.
    /// Until then none is given either.
    pub paused: Option<bool>,
}

/// A vouch that this member has given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vouched {
    /// For whom.
    pub leader: MemberName,
    /// By which of its holdings it asked.
    pub holding: AskedBy,
    /// Until when this member does not bid.
    pub until: Boottime,
}

/// What a leader that asks for a vouch says of its holding. One of Patroni's says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AskedBy {
    /// The create revision of the leader key.
    pub create_revision: Option<i64>,
    /// The lease that the key is bound to.
    pub lease: Option<i64>,
}

/// What a deadline rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Proof {
    /// The lease, and a read of the leader key.
    Store,
    /// The word of every member of the failsafe list that it does not bid.
    Vouches,
}

/// A holding of the leader key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Holder and create revision.
    pub epoch: Epoch,
    /// The keeper's name for it. Stays when the key was lost and won anew without a gap in the entitlement.
    pub term: u64,
    /// Until when it entitles to write; nothing until it has been proven by this process.
    pub deadline: Option<Boottime>,
    /// What that rests on.
    pub proof: Proof,
}

impl LeaseState {
    /// Whether the holding's deadline rests on the word of the other members.
    #[must_use]
    pub fn rests_on_vouches(&self) -> bool {
        self.holding.as_ref().is_some_and(|held| held.proof == Proof::Vouches)
    }

    /// The holding whose deadline lies ahead.
    #[must_use]
    pub fn proven(&self, now: Boottime) -> Option<Holding> {
        let held = self.holding.as_ref()?;
        let deadline = held.deadline.filter(|deadline| now < *deadline)?;
        Some(Holding {
            epoch: held.epoch.clone(),
            deadline,
            by_vouches: held.proof == Proof::Vouches,
        })
    }
}

/// What the thread works with.
pub struct LeaseParts {
    /// The store; the thread makes connections of its own.
    pub etcd: Etcd,
    /// The cluster's keys.
    pub keys: Keys,
    /// The view of the cluster.
    pub view: ViewHandle,
    /// The keeper.
    pub keeper: Keeper,
    /// How other members are asked.
    pub peers: Peers,
    /// What tells whether the loop still decides.
    pub vigil: Vigil,
    /// Where the slots of this leader are, for those that are asked to vouch.
    pub slots: Arc<Board>,
}

/// The loop's handle on the renewal thread.
pub struct Lease {
    commands: mpsc::Sender<Command>,
    state: watch::Receiver<LeaseState>,
}

/// Answers other members that ask this one to vouch.
#[derive(Clone)]
pub struct Vouches(mpsc::Sender<Command>);

impl Vouches {
    /// Of a member whose lease nobody looks after: it vouches for nobody.
    #[cfg(test)]
    pub(crate) fn nobody() -> Self {
        Self(mpsc::channel(1).0)
    }

    /// Answers another member that asks this one not to bid for `lasts`: for how long it will not.
    ///
    /// # Errors
    /// See [`VouchRefusal`]; a thread that is gone counts as one that seeks.
    pub async fn vouch(&self, leader: MemberName, holding: AskedBy, lasts: Duration) -> Result<Duration, VouchRefusal> {
        let (done, answer) = oneshot::channel();
        let command = Command::Vouch {
            leader,
            holding,
            lasts,
            done,
        };
        let sent = self.0.send(command).await;
        sent.map_err(|_| VouchRefusal::Seeks)?;
        answer.await.map_err(|_| VouchRefusal::Seeks)?
    }

    /// Takes a vouch back: its leader has given up this holding, after PostgreSQL had ended. A vouch for a later one stands.
    /// Whose word alone says so names the `lease` that it held; nothing when etcd has confirmed it.
    pub async fn withdraw(&self, holding: Epoch, lease: Option<i64>) {
        let _ = self.0.send(Command::Withdraw { holding, lease }).await;
    }
}

/// The revisions of the keys that a bid's decision used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BidGuards {
    /// `/sync`.
    pub sync: i64,
    /// `/failsafe`.
    pub failsafe: i64,
    /// `/failover`.
    pub failover: i64,
    /// `/config`.
    pub config: i64,
}

impl Lease {
    /// Starts the thread. It ends when the handle is dropped. What an earlier agent of this member held is `resumed`: it
    /// gives no deadline until it has been proven again.
    ///
    /// # Errors
    /// When the thread or its runtime cannot be made.
    pub fn start(name: MemberName, parts: LeaseParts, resumed: &Resumed) -> std::io::Result<Self> {
        let (commands, received) = mpsc::channel(64);
        let core = LeaseCore::new(name, parts.keys.clone(), LeaseTiming::DEFAULT, resumed);
        let (state_tx, state) = watch::channel(core.state().clone());
        let thread = Thread::new(core, parts, state_tx);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new()
            .name("lease".to_owned())
            .spawn(move || runtime.block_on(thread.run(received)))?;
        Ok(Self { commands, state })
    }

    /// The newest state, and changes of it.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<LeaseState> {
        self.state.clone()
    }

    /// Bids for the leader key. On success the key is ours, and the keeper has been sent its deadline.
    ///
    /// # Errors
    /// See [`BidLoss`].
    pub async fn bid(&self, guards: BidGuards) -> Result<Epoch, BidLoss> {
        let (done, answer) = oneshot::channel();
        // A thread that is gone ends the process; without it there is no lease.
        let sent = self.commands.send(Command::Bid { guards, done }).await;
        sent.map_err(|_| BidLoss::NoLease)?;
        answer.await.map_err(|_| BidLoss::NoLease)?
    }

    /// Binds a key that names this member, and by which PostgreSQL runs, to this process's lease. What comes of it shows
    /// in the state.
    pub async fn rebind(&self, epoch: Epoch, lease: i64) {
        let _ = self.commands.send(Command::Rebind { epoch, lease }).await;
    }

    /// What answers other members that ask this one to vouch.
    #[must_use]
    pub fn vouches(&self) -> Vouches {
        Vouches(self.commands.clone())
    }

    /// Tells whose vouches a deadline may rest on: every list that may stand in etcd, united; nothing while the mode is
    /// off.
    pub async fn failsafe(&self, list: Option<Vec<Voucher>>) {
        let _ = self.commands.send(Command::Failsafe(list)).await;
    }

    /// Begins or ends a pause of the fence.
    pub async fn pause(&self, paused: bool) {
        let _ = self.commands.send(Command::Pause(paused)).await;
    }

    /// Resolves when the thread has ended, which it never does by itself.
    pub async fn ended(&self) {
        let mut state = self.state.clone();
        while state.changed().await.is_ok() {}
    }

    /// Stops proving the holding. When this returns, no deadline will be given for it any more.
    pub async fn let_go(&self) {
        let (done, waits) = oneshot::channel();
        if self.commands.send(Command::LetGo { done }).await.is_ok() {
            let _ = waits.await;
        }
    }

    /// Stops renewing the lease that the leader key is bound to, that of the holding when nothing: for a key that is of no
    /// use any more while PostgreSQL cannot be shown to have ended.
    pub async fn forsake(&self, lease: Option<i64>) {
        let _ = self.commands.send(Command::Forsake { lease }).await;
    }

    /// Puts other times in force.
    pub async fn retime(&self, timing: LeaseTiming) {
        let _ = self.commands.send(Command::Retime(timing)).await;
    }
}

/// The keeper's name for a holding: the create revision, whose sign etcd never uses.
#[must_use]
pub fn term_of(epoch: &Epoch) -> u64 {
    epoch.create_revision.unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holding_without_a_proof_entitles_to_nothing() {
        let holder = MemberName::new("n1").expect("a plain name");
        let epoch = Epoch {
            holder,
            create_revision: 9,
        };
        let at = Boottime::from_nanos;
        let mut state = LeaseState {
            holding: Some(Held {
                term: term_of(&epoch),
                epoch,
                deadline: None,
                proof: Proof::Store,
            }),
            ..LeaseState::default()
        };
        assert_eq!(state.proven(at(1)), None);
        if let Some(held) = &mut state.holding {
            held.deadline = Some(at(10));
        }
        assert!(state.proven(at(9)).is_some());
        assert_eq!(state.proven(at(10)), None);
    }
}

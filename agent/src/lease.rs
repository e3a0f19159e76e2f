//! The lease: a thread of its own that renews it, proves the leader key with each renewal, and hands the proof's deadline
//! to the keeper. It shares nothing with the loop, so that nothing there can make a renewal late.
//!
//! A renewal is a keepalive and then a linearizable read of the leader key that shows our name, our lease and our create
//! revision: a keepalive alone proves only the lease, to which the member key is bound too.

mod memo;
mod renewer;

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::etcd::{Etcd, StoreError};
use pgherd_cluster::key::Keys;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::timing::LeaseTiming;
use pgherd_cluster::view::Epoch;
use tokio::sync::{mpsc, oneshot, watch};

pub use self::memo::Resumed;
use self::renewer::Renewer;
use crate::keeper::Keeper;
use crate::status::Holding;

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
}

/// A holding of the leader key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Holder and create revision.
    pub epoch: Epoch,
    /// Until when it entitles to write; nothing until it has been proven by this process.
    pub deadline: Option<Boottime>,
}

impl LeaseState {
    /// The holding whose deadline lies ahead.
    #[must_use]
    pub fn proven(&self, now: Boottime) -> Option<Holding> {
        let held = self.holding.as_ref()?;
        let deadline = held.deadline.filter(|deadline| now < *deadline)?;
        Some(Holding {
            epoch: held.epoch.clone(),
            deadline,
        })
    }
}

enum Command {
    /// Bid for the leader key.
    Bid {
        guards: BidGuards,
        done: oneshot::Sender<Result<Epoch, BidError>>,
    },
    /// Hold no more; answered when no deadline will be given any more.
    LetGo { done: oneshot::Sender<()> },
    /// Other times are in force.
    Retime(LeaseTiming),
}

/// The loop's handle on the renewal thread.
pub struct Lease {
    commands: mpsc::Sender<Command>,
    state: watch::Receiver<LeaseState>,
}

/// A bid was lost, or its outcome is unknown.
#[derive(Debug, thiserror::Error)]
pub enum BidError {
    /// Somebody holds the key, or one of the keys that the decision rested on has changed.
    #[error("the leader key or a key that the bid rests on has changed")]
    Lost,
    /// There is no lease to bind the key to.
    #[error("there is no lease yet")]
    NoLease,
    /// etcd did not answer. If the key was written, it is bound to our lease and will be recognised.
    #[error(transparent)]
    Store(#[from] StoreError),
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
    pub fn start(
        etcd: &Etcd,
        keys: &Keys,
        name: MemberName,
        timing: LeaseTiming,
        keeper: &Keeper,
        resumed: Resumed,
    ) -> std::io::Result<Self> {
        let (commands, received) = mpsc::channel(16);
        let holding = resumed.epoch.map(|epoch| Held { epoch, deadline: None });
        let initial = LeaseState {
            lease: resumed.lease,
            lease_ttl: resumed.lease_ttl,
            holding,
            ..LeaseState::default()
        };
        let (state_tx, state) = watch::channel(initial);
        let renewer = Renewer {
            etcd: etcd.separate(),
            keys: keys.clone(),
            name,
            timing,
            link: keeper.link(),
            arming: keeper.arming(),
            unanswered: None,
            latest_deadline: Boottime::default(),
            state: state_tx,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new()
            .name("lease".to_owned())
            .spawn(move || runtime.block_on(renewer.run(received)))?;
        Ok(Self { commands, state })
    }

    /// The newest state, and changes of it.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<LeaseState> {
        self.state.clone()
    }

    /// Bids for the leader key. On success the key is ours, and the keeper has been given its deadline.
    ///
    /// # Errors
    /// See [`BidError`].
    pub async fn bid(&self, guards: BidGuards) -> Result<Epoch, BidError> {
        let (done, answer) = oneshot::channel();
        // A thread that is gone ends the process; without it there is no lease.
        let sent = self.commands.send(Command::Bid { guards, done }).await;
        sent.map_err(|_| BidError::NoLease)?;
        answer.await.map_err(|_| BidError::NoLease)?
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
            holding: Some(Held { epoch, deadline: None }),
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

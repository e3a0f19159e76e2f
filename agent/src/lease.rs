//! The lease: a thread of its own that renews it, proves the leader key with each renewal, and hands the proof's deadline
//! to the keeper. It shares nothing with the loop, so that nothing there can make a renewal late.
//!
//! A renewal is a keepalive and then a linearizable read of the leader key that shows our name, our lease and our create
//! revision: a keepalive alone proves only the lease, to which the member key is bound too.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::etcd::{Budget, Compare, Etcd, Op, StoreError, Txn};
use pgherd_cluster::key::{Key, Keys};
use pgherd_cluster::name::MemberName;
use pgherd_cluster::timing::LeaseTiming;
use pgherd_cluster::view::{Entry, Epoch};
use pgherd_keeper::KeeperLink;
use pgherd_keeper::protocol::Request;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

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
    /// A bid was won, on a keepalive sent at `proven_from`.
    Hold { epoch: Epoch, proven_from: Boottime },
    /// Hold no more; answered when no deadline will be given any more.
    LetGo { done: oneshot::Sender<()> },
    /// Other times are in force.
    Retime(LeaseTiming),
}

/// What an earlier agent of this member left with the keeper.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resumed {
    /// Its lease.
    pub lease: Option<i64>,
    /// How long that lease lives without renewal.
    pub lease_ttl: Duration,
    /// Its holding of the leader key.
    pub epoch: Option<Epoch>,
    /// Whether PostgreSQL had been proven to take writes under it.
    pub proven: bool,
}

impl Resumed {
    /// The bytes that the keeper remembers.
    #[must_use]
    pub fn to_memo(&self) -> Vec<u8> {
        let epoch = self
            .epoch
            .as_ref()
            .map(|epoch| (epoch.holder.as_str(), epoch.create_revision));
        let ttl = self.lease_ttl.as_secs();
        serde_json::json!({ "lease": self.lease, "ttl": ttl, "epoch": epoch, "proven": self.proven })
            .to_string()
            .into_bytes()
    }

    /// Reads them back; what is not understood is nothing.
    #[must_use]
    pub fn from_memo(memo: &[u8]) -> Self {
        let memo: serde_json::Value = serde_json::from_slice(memo).unwrap_or_default();
        let epoch = || {
            let holder = MemberName::new(memo.get("epoch")?.get(0)?.as_str()?).ok()?;
            Some(Epoch {
                holder,
                create_revision: memo.get("epoch")?.get(1)?.as_i64()?,
            })
        };
        // Without its length a lease proves no deadline, and is not resumed.
        let ttl = memo.get("ttl").and_then(serde_json::Value::as_u64).unwrap_or_default();
        let lease = memo.get("lease").and_then(serde_json::Value::as_i64);
        Self {
            lease: lease.filter(|_| ttl > 0),
            lease_ttl: Duration::from_secs(ttl),
            epoch: epoch(),
            proven: memo
                .get("proven")
                .and_then(serde_json::Value::as_bool)
                .unwrap_or_default(),
        }
    }
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
            leader_key: keys.of(&Key::Leader),
            name,
            timing,
            link: keeper.link(),
            acknowledged: keeper.acknowledged(),
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

    /// Bids for the leader key. On success the key is ours, and the keeper has its deadline.
    ///
    /// # Errors
    /// See [`BidError`].
    pub async fn bid(
        &self,
        etcd: &Etcd,
        keys: &Keys,
        name: &MemberName,
        guards: BidGuards,
        timing: LeaseTiming,
    ) -> Result<Epoch, BidError> {
        let lease = self.state.borrow().lease.ok_or(BidError::NoLease)?;
        let budget = Budget::new(timing.retry_timeout(), etcd.endpoint_count());
        // The deadline counts from here: the key lives as long as the lease, which this renews.
        let proven_from = Boottime::now();
        etcd.keep_alive(lease, budget).await?;
        let leader = keys.of(&Key::Leader);
        let guard = |key: &Key, revision| Compare::ModRevision(keys.of(key), revision);
        let txn = Txn::new()
            .when(Compare::Absent(leader.clone()))
            .when(guard(&Key::Sync, guards.sync))
            .when(guard(&Key::Failsafe, guards.failsafe))
            .when(guard(&Key::Failover, guards.failover))
            .when(guard(&Key::Config, guards.config))
            .then(Op::Put {
                key: leader.clone(),
                value: name.to_string(),
                lease,
            })
            .then(Op::Get(leader.clone()))
            .otherwise(Op::Get(leader));
        let outcome = etcd.txn(&txn, budget).await?;
        // A repeated try finds its own first one: same name, same lease.
        let ours = |entry: &&Entry| entry.value == name.as_str() && entry.lease == lease;
        let entry = outcome.read.iter().find(ours).ok_or(BidError::Lost)?;
        let epoch = Epoch {
            holder: name.clone(),
            create_revision: entry.create_revision,
        };
        let hold = Command::Hold {
            epoch: epoch.clone(),
            proven_from,
        };
        // A closed channel means that the thread is gone, and with it every deadline: nothing becomes writable.
        let _ = self.commands.send(hold).await;
        Ok(epoch)
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

/// A keeper answers within a millisecond; a machine in trouble may take longer.
const KEEPER_SILENCE_MAX: Duration = Duration::from_millis(700);

struct Renewer {
    etcd: Etcd,
    leader_key: String,
    name: MemberName,
    timing: LeaseTiming,
    link: Arc<KeeperLink>,
    acknowledged: Arc<AtomicU64>,
    /// When the oldest deadline was sent that the keeper has not confirmed, and that deadline.
    unanswered: Option<(Boottime, Boottime)>,
    /// The latest deadline that the keeper was given: it never moves one back.
    latest_deadline: Boottime,
    state: watch::Sender<LeaseState>,
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
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
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
            Command::Hold { epoch, proven_from } => {
                self.state
                    .send_modify(|state| state.holding = Some(Held { epoch, deadline: None }));
                self.prove(proven_from);
                false
            }
            Command::LetGo { done } => {
                self.state.send_modify(|state| state.holding = None);
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
            return false;
        }
        match self.ask().await {
            Ok(Renewal::Proven) => {
                self.answered(asked_at);
                self.prove(asked_at);
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
    /// then only keep others from leading: it is left to expire, which is after that end.
    fn keeper_is_silent(&mut self, now: Boottime) -> bool {
        let Some((sent_at, deadline)) = self.unanswered else {
            return false;
        };
        if self.acknowledged.load(Ordering::Acquire) >= deadline.as_nanos() || self.state.borrow().holding.is_none() {
            self.unanswered = None;
            return false;
        }
        let silent = now.since(sent_at) > KEEPER_SILENCE_MAX;
        if silent {
            let what = "the keeper does not confirm deadlines: the lease is left to expire".to_owned();
            self.state
                .send_modify(|state| state.trouble = Some(StoreError::Protocol { what }));
        }
        silent
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
        let snapshot = self.etcd.read(&self.leader_key, self.budget()).await?;
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

    /// Gives the keeper the deadline of a proof that was asked for at `asked_at`.
    fn prove(&mut self, asked_at: Boottime) {
        let deadline = asked_at + proof_lasts(self.state.borrow().lease_ttl, self.timing);
        let term = self.state.borrow().holding.as_ref().map(|held| term_of(&held.epoch));
        let Some(term) = term else { return };
        let arm = Request::Arm {
            term,
            deadline: pgherd_keeper::clock::Boottime::from_nanos(deadline.as_nanos()),
            margin: self.timing.margin(),
        };
        if let Err(error) = self.link.send(&arm) {
            // The keeper then knows an earlier deadline than we do, which is the safe side.
            tracing::warn!(%error, "the keeper did not take a deadline");
            return;
        }
        self.latest_deadline = self.latest_deadline.max(deadline);
        self.unanswered.get_or_insert((Boottime::now(), deadline));
        self.state.send_modify(|state| {
            if let Some(held) = &mut state.holding {
                held.deadline = Some(deadline);
            }
        });
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
        let key = || self.leader_key.clone();
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

/// The keeper's name for a holding: the create revision, whose sign etcd never uses.
#[must_use]
pub fn term_of(epoch: &Epoch) -> u64 {
    epoch.create_revision.unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memo_survives_and_rubbish_is_nothing() {
        let holder = MemberName::new("n1").expect("a plain name");
        let resumed = Resumed {
            lease: Some(77),
            lease_ttl: Duration::from_secs(5),
            epoch: Some(Epoch {
                holder,
                create_revision: 9,
            }),
            proven: true,
        };
        assert_eq!(Resumed::from_memo(&resumed.to_memo()), resumed);
        for memo in [&b""[..], b"x", b"{}", b"[1]", br#"{"lease":"x","epoch":[]}"#] {
            assert_eq!(Resumed::from_memo(memo), Resumed::default());
        }
    }

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

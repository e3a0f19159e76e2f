//! The lease's own rules. Pure: what happened and the time in, what to do out.
//!
//! The thread that owns a [`LeaseCore`] performs what it puts out and tells it what came of that; the simulation does the
//! same over models. One request to etcd is under way at a time, and each is answered, if only by an error when its budget
//! is spent.

mod bid;
mod failsafe;
mod renewal;
#[cfg(test)]
mod tests;

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::etcd::{StoreError, Txn, TxnOutcome};
use pgherd_cluster::key::Keys;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::timing::LeaseTiming;
use pgherd_cluster::view::{Entry, Epoch};

use self::failsafe::Failsafe;
pub use self::failsafe::{KeySeen, VouchRefusal, Voucher};
use super::{BidGuards, Held, LeaseState, Proof, Resumed, Vouched, term_of};

/// After a failed renewal the next try comes this soon: another endpoint may answer, and the deadline is running.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// A request to etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Grant a lease.
    Grant {
        /// How long it is to live without renewal.
        ttl: Duration,
    },
    /// Renew a lease.
    KeepAlive {
        /// Which.
        lease: i64,
    },
    /// Read the leader key, linearizably.
    ReadLeader,
    /// A guarded write that also reads the leader key.
    Txn(Txn),
}

/// What etcd said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The lease.
    Granted(i64),
    /// It lives.
    KeptAlive,
    /// The leader key, if there is one.
    Leader(Option<Entry>),
    /// What the write did.
    Txn(TxnOutcome),
}

/// What has happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// The time that was asked for has come.
    Tick,
    /// An answer to the request with this number.
    Answer {
        /// The number.
        token: u64,
        /// What etcd said, or that it did not.
        answer: Result<Answer, StoreError>,
    },
    /// The keeper confirmed a deadline.
    Armed {
        /// Of this term.
        term: u64,
        /// This one, or a later one that it had already.
        deadline: Boottime,
    },
    /// The keeper refused a deadline.
    Refused {
        /// Of this term.
        term: u64,
    },
    /// The loop asks for a bid.
    Bid(BidGuards),
    /// The loop gives the holding up; PostgreSQL has ended.
    LetGo,
    /// The key is of no use any more, and PostgreSQL cannot be shown to have ended: the lease is left to expire.
    Forsake {
        /// The lease that the key is bound to; that of the holding when nothing.
        lease: Option<i64>,
    },
    /// Other times are in force.
    Retime(LeaseTiming),
    /// Maintenance has begun or ended: in pause no deadline goes to the keeper.
    Pause(bool),
    /// The members whose vouches a deadline may rest on: every list that may stand in etcd, united. Nothing while the
    /// failsafe mode is off.
    Failsafe(Option<Vec<Voucher>>),
    /// The key names us from a holding that is not of this process, and PostgreSQL runs by it: bind it to our lease.
    Rebind {
        /// The holding.
        epoch: Epoch,
        /// The lease that its key is bound to now.
        lease: i64,
    },
    /// A member answered whether it vouches.
    Vouch {
        /// The round of questions.
        round: u64,
        /// Who.
        member: MemberName,
        /// For how long from the question on; nothing for a refusal or silence.
        lasts: Option<Duration>,
    },
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Ask etcd.
    Ask {
        /// The number that the answer is to carry.
        token: u64,
        /// What.
        ask: Ask,
    },
    /// Give the keeper a deadline.
    Arm {
        /// The term.
        term: u64,
        /// When PostgreSQL must have ended.
        deadline: Boottime,
        /// How long before that its end begins.
        margin: Duration,
    },
    /// End PostgreSQL at once.
    End {
        /// Why, for the log.
        why: &'static str,
    },
    /// Ask these members to vouch for us, all at once.
    AskVouches {
        /// The round of questions.
        round: u64,
        /// Our holding.
        epoch: Epoch,
        /// For how long.
        lasts: Duration,
        /// Whom.
        members: Vec<Voucher>,
    },
    /// The bid that was asked for is over.
    BidEnded(Result<Epoch, BidLoss>),
}

/// Why a bid was not won.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BidLoss {
    /// Somebody holds the key, or one of the keys that the decision rested on has changed.
    #[error("the leader key or a key that the bid rests on has changed")]
    Lost,
    /// There is no lease to bind the key to.
    #[error("there is no lease yet")]
    NoLease,
    /// This member has vouched for a leader, and the time is not over.
    #[error("this member has vouched for {0}")]
    Vouched(MemberName),
    /// Another bid, or a renewal of a holding, is under way.
    #[error("this member holds the key or bids for it already")]
    Busy,
    /// etcd did not answer. If the key was written, it is bound to our lease and will be recognised.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What the request under way is for.
#[derive(Clone, Debug, PartialEq)]
enum Flow {
    Idle,
    Granting {
        asked_at: Boottime,
        ttl: Duration,
        rewin: bool,
    },
    KeepingAlive {
        asked_at: Boottime,
        bid: Option<BidGuards>,
    },
    Reading {
        asked_at: Boottime,
    },
    Bidding {
        asked_at: Boottime,
        lease: i64,
    },
    Rewinning {
        asked_at: Boottime,
        lease: i64,
    },
    Rebinding {
        asked_at: Boottime,
        epoch: Epoch,
        lease: i64,
    },
    GrantingForMove {
        ttl: Duration,
    },
    Moving {
        new: i64,
        ttl: Duration,
    },
    Unmoving {
        lease: i64,
    },
}

/// One member's lease and its holding of the leader key.
#[derive(Clone, Debug)]
pub struct LeaseCore {
    name: MemberName,
    keys: Keys,
    timing: LeaseTiming,
    state: LeaseState,
    flow: Flow,
    token: u64,
    next_at: Boottime,
    /// A bid that waits for the request under way.
    waiting_bid: Option<BidGuards>,
    /// A re-binding that waits for the request under way.
    waiting_rebind: Option<(Epoch, i64)>,
    /// A bid whose outcome etcd did not tell: the next read of the key does.
    unclear: bool,
    /// The leader key's revision, as last read.
    key_revision: i64,
    /// A move of the key to another lease whose outcome etcd did not tell.
    move_unclear: bool,
    /// A deadline that was sent and that the keeper has neither confirmed nor refused.
    unanswered: Option<Boottime>,
    /// The latest deadline that the keeper was given: it never moves one back.
    latest_deadline: Boottime,
    /// Whether the times in force are the cluster's: until it is known what those are, no lease gives way to another.
    timing_known: bool,
    /// When the proof was asked for that the deadline in force rests on, and how long it lasts.
    proof: (Boottime, Duration),
    /// The deadlines that wait for the keeper's word, with what they rest on.
    sent: Vec<(Boottime, Proof, Boottime)>,
    failsafe: Failsafe,
    out: Vec<Output>,
}

/// Deadlines that may wait for the keeper's word at a time; a keeper that is silent gets no more.
const SENT_MAX: usize = 4;

impl LeaseCore {
    /// A core that has not begun. What an earlier agent of this member held gives no deadline until it has been proven.
    #[must_use]
    pub fn new(name: MemberName, keys: Keys, timing: LeaseTiming, resumed: &Resumed) -> Self {
        let holding = resumed.epoch.clone().map(|epoch| Held {
            term: resumed.term.unwrap_or_else(|| term_of(&epoch)),
            epoch,
            deadline: None,
            proof: Proof::Store,
        });
        Self {
            name,
            keys,
            timing,
            state: LeaseState {
                lease: resumed.lease,
                lease_ttl: resumed.lease_ttl,
                holding,
                ..LeaseState::default()
            },
            flow: Flow::Idle,
            token: 0,
            next_at: Boottime::default(),
            waiting_bid: None,
            waiting_rebind: None,
            unclear: false,
            move_unclear: false,
            key_revision: 0,
            unanswered: None,
            latest_deadline: resumed.armed_until.unwrap_or_default(),
            timing_known: false,
            proof: (Boottime::default(), Duration::ZERO),
            sent: Vec::new(),
            failsafe: Failsafe::default(),
            out: Vec::new(),
        }
    }

    /// What the loop sees.
    #[must_use]
    pub const fn state(&self) -> &LeaseState {
        &self.state
    }

    /// The times in force.
    #[must_use]
    pub const fn timing(&self) -> LeaseTiming {
        self.timing
    }

    /// When [`Input::Tick`] has something to do, if nothing happens before.
    #[must_use]
    pub fn wake_at(&self) -> Boottime {
        let vouches = self.vouches_due_at();
        let renewal = (self.flow == Flow::Idle).then_some(self.next_at);
        [renewal, vouches]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(self.next_at + self.timing.ttl())
    }

    /// Takes an input; gives what to do, in order.
    #[must_use]
    pub fn handle(&mut self, now: Boottime, input: Input) -> Vec<Output> {
        match input {
            Input::Tick => {}
            Input::Answer { token, answer } => {
                if token == self.token && self.flow != Flow::Idle {
                    self.answered(now, answer);
                }
            }
            Input::Armed { term, deadline } => self.armed(now, term, deadline),
            Input::Refused { term } => self.refused(term),
            Input::Bid(guards) => self.ask_for_bid(now, guards),
            Input::LetGo => self.let_go(),
            Input::Forsake { lease } => self.forsake(now, lease),
            Input::Retime(timing) => {
                self.timing_known = true;
                if self.timing != timing {
                    self.timing = timing;
                    self.next_at = now;
                }
            }
            Input::Pause(paused) => {
                if self.state.paused != Some(paused) {
                    self.state.paused = Some(paused);
                    self.unanswered = None;
                    self.sent.clear();
                    self.next_at = now;
                    self.hand_on_deadline(now);
                }
            }
            Input::Failsafe(list) => {
                // What was asked of the members of one list says nothing of those of another.
                if self.failsafe.list != list {
                    self.failsafe.round = None;
                }
                self.failsafe.list = list;
            }
            Input::Rebind { epoch, lease } => self.waiting_rebind = Some((epoch, lease)),
            Input::Vouch { round, member, lasts } => self.vouched(now, round, &member, lasts),
        }
        self.ask_vouches_if_due(now);
        if self.flow == Flow::Idle {
            self.begin(now);
        }
        self.state.vouched = self.failsafe.vouched(now);
        std::mem::take(&mut self.out)
    }

    fn begin(&mut self, now: Boottime) {
        if let Some(guards) = self.waiting_bid.take() {
            self.begin_bid(now, guards);
        } else if let Some((epoch, lease)) = self.waiting_rebind.take() {
            self.begin_rebind(now, epoch, lease);
        } else if now >= self.next_at {
            self.begin_renewal(now);
        }
    }

    fn ask(&mut self, flow: Flow, ask: Ask) {
        self.token += 1;
        self.flow = flow;
        self.out.push(Output::Ask { token: self.token, ask });
    }

    fn answered(&mut self, now: Boottime, answer: Result<Answer, StoreError>) {
        let flow = std::mem::replace(&mut self.flow, Flow::Idle);
        match flow {
            Flow::Idle => {}
            Flow::Granting { asked_at, ttl, rewin } => self.granted(now, asked_at, ttl, rewin, answer),
            Flow::KeepingAlive { asked_at, bid } => self.kept_alive(now, asked_at, bid, answer),
            Flow::Reading { asked_at } => self.key_read(now, asked_at, answer),
            Flow::Bidding { asked_at, lease } => self.bid_answered(now, asked_at, lease, answer),
            Flow::Rewinning { asked_at, lease } => self.rewin_answered(now, asked_at, lease, answer),
            Flow::Rebinding { asked_at, epoch, lease } => self.rebind_answered(now, asked_at, epoch, lease, answer),
            Flow::GrantingForMove { ttl } => self.granted_for_move(now, ttl, answer),
            Flow::Moving { new, ttl } => self.moved(now, new, ttl, answer),
            Flow::Unmoving { lease } => self.unmoved(now, lease, answer),
        }
    }

    fn let_go(&mut self) {
        self.state.holding = None;
        self.unclear = false;
        self.unanswered = None;
        self.sent.clear();
        self.failsafe.forget();
        // A request that is under way for the holding has nobody to speak for any more; its answer is dropped.
        if !matches!(self.flow, Flow::Granting { rewin: false, .. }) {
            self.flow = Flow::Idle;
        }
        if self.waiting_bid.take().is_some() {
            self.out.push(Output::BidEnded(Err(BidLoss::Lost)));
        }
    }

    /// The key stays where it is, and goes with its lease: no deadline that rests on that lease reaches beyond its end.
    fn forsake(&mut self, now: Boottime, lease: Option<i64>) {
        let is_it = match lease {
            Some(_) => self.state.lease == lease,
            None => self.state.holding.is_some(),
        };
        if !is_it || self.state.paused != Some(false) {
            return;
        }
        self.lose("the holding is of no use any more");
        self.unclear = false;
        self.state.lease = None;
        self.flow = Flow::Idle;
        self.next_at = now;
    }

    /// The key is another's, or nobody's: PostgreSQL is ended at once, without waiting for the loop.
    fn lose(&mut self, why: &'static str) {
        self.unanswered = None;
        self.sent.clear();
        self.failsafe.forget();
        // In maintenance what runs goes on running, with or without the key. While nobody has said whether there is one, no
        // deadline of this process has been given, and the keeper ends by itself what has one of the agent before.
        if self.state.holding.take().is_some() && self.state.paused == Some(false) {
            self.out.push(Output::End { why });
        }
    }

    fn trouble(&mut self, now: Boottime, error: StoreError) {
        self.state.trouble = Some(error);
        self.next_at = now + RETRY_AFTER.min(self.timing.renew_every());
    }

    fn in_touch(&mut self, asked_at: Boottime) {
        self.state.answered_at = Some(asked_at);
        self.state.trouble = None;
    }
}

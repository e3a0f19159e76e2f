//! The thread that performs what [`LeaseCore`](super::core::LeaseCore) decides. It shares nothing with the loop, so that
//! nothing there can make a renewal late.

use std::sync::Arc;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::etcd::{Budget, Etcd, StoreError};
use pgherd_cluster::http::Ask as HttpAsk;
use pgherd_cluster::key::{Key, Keys};
use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::MemberRecord;
use pgherd_cluster::source::{SourceHealth, ViewHandle};
use pgherd_cluster::timing::LeaseTiming;
use pgherd_cluster::view::Epoch;
use pgherd_keeper::KeeperLink;
use pgherd_keeper::protocol::Request;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::core::{Answer, Ask, BidLoss, Input, KeySeen, LeaseCore, Output, VouchRefusal, Voucher};
use super::{AskedBy, BidGuards, LeaseParts, LeaseState};
use crate::keeper::Arming;
use crate::peers::Peers;
use crate::slots::Board;
use crate::vigil::Vigil;

/// What the loop and the REST interface ask of the thread.
pub(super) enum Command {
    /// Bid for the leader key.
    Bid {
        guards: BidGuards,
        done: oneshot::Sender<Result<Epoch, BidLoss>>,
    },
    /// Bind a key that names us to our lease.
    Rebind { epoch: Epoch, lease: i64 },
    /// Hold no more; answered when no deadline will be given any more.
    LetGo { done: oneshot::Sender<()> },
    /// Leave the lease of the leader key to expire.
    Forsake { lease: Option<i64> },
    /// Other times are in force.
    Retime(LeaseTiming),
    /// The fence is paused, or not any more.
    Pause(bool),
    /// Who may vouch.
    Failsafe(Option<Vec<Voucher>>),
    /// Another member asks us to vouch.
    Vouch {
        leader: MemberName,
        holding: AskedBy,
        lasts: Duration,
        done: oneshot::Sender<Result<Duration, VouchRefusal>>,
    },
    /// A leader that we vouched for has given its holding up.
    Withdraw { holding: Epoch, lease: Option<i64> },
}

pub(super) struct Thread {
    core: LeaseCore,
    etcd: Etcd,
    keys: Keys,
    view: ViewHandle,
    link: Arc<KeeperLink>,
    /// What the keeper answered to deadlines.
    arming: watch::Receiver<Arming>,
    refusals_seen: u64,
    last_term: u64,
    state: watch::Sender<LeaseState>,
    bid: Option<oneshot::Sender<Result<Epoch, BidLoss>>>,
    /// How other members are asked.
    peers: Peers,
    vigil: Vigil,
    slots: Arc<Board>,
    /// Requests to etcd and to members; each ends by itself.
    work: JoinSet<Input>,
}

impl Thread {
    pub(super) fn new(core: LeaseCore, parts: LeaseParts, state: watch::Sender<LeaseState>) -> Self {
        Self {
            core,
            etcd: parts.etcd.separate(),
            keys: parts.keys,
            view: parts.view,
            link: parts.keeper.link(),
            arming: parts.keeper.arming(),
            refusals_seen: 0,
            last_term: 0,
            state,
            bid: None,
            peers: parts.peers,
            vigil: parts.vigil,
            slots: parts.slots,
            work: JoinSet::new(),
        }
    }

    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            let until = Instant::now() + self.core.wake_at().since(Boottime::now());
            tokio::select! {
                biased;
                changed = self.arming.changed() => match changed {
                    Ok(()) => self.heed_keeper(),
                    Err(_) => return, // The keeper is gone, and with it this process.
                },
                Some(done) = self.work.join_next() => match done {
                    Ok(input) => self.take(input),
                    Err(defect) => tracing::error!("a request of the lease's thread ended by a defect: {defect}"),
                },
                () = sleep_until(until) => {
                    self.forsake_if_the_loop_hangs();
                    self.take(Input::Tick);
                }
                command = commands.recv() => match command {
                    None => return,
                    Some(command) => self.obey(command),
                },
            }
        }
    }

    /// Each renewal asks first whether there is still somebody who decides.
    fn forsake_if_the_loop_hangs(&mut self) {
        let hangs = self.vigil.loop_hangs(self.core.timing(), Boottime::now());
        if hangs && self.core.state().holding.is_some() {
            tracing::error!(
                "the data directory's disk hangs, and what decides here with it: the lease is left to expire"
            );
            self.take(Input::Forsake { lease: None });
        }
    }

    fn heed_keeper(&mut self) {
        let arming = *self.arming.borrow_and_update();
        if arming.refusals > self.refusals_seen {
            self.refusals_seen = arming.refusals;
            tracing::warn!("the keeper refuses a deadline ({:?})", arming.refusal);
            self.take(Input::Refused { term: self.last_term });
        }
        self.take(Input::Armed {
            term: arming.term,
            deadline: arming.deadline,
        });
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Bid { guards, done } => {
                self.bid = Some(done);
                self.take(Input::Bid(guards));
            }
            Command::Rebind { epoch, lease } => self.take(Input::Rebind { epoch, lease }),
            Command::LetGo { done } => {
                self.take(Input::LetGo);
                let _ = done.send(()); // Who asked may be gone.
            }
            Command::Forsake { lease } => self.take(Input::Forsake { lease }),
            Command::Retime(timing) => self.take(Input::Retime(timing)),
            Command::Pause(paused) => self.take(Input::Pause(paused)),
            Command::Failsafe(list) => self.take(Input::Failsafe(list)),
            Command::Vouch {
                leader,
                holding,
                lasts,
                done,
            } => {
                let seen = key_seen(&self.view);
                let answer = self.core.vouch_for(Boottime::now(), &leader, holding, lasts, &seen);
                self.publish();
                let _ = done.send(answer); // Who asked may be gone; the vouch stands all the same.
            }
            Command::Withdraw { holding, lease } => {
                self.core.withdraw(&holding, lease);
                self.publish();
            }
        }
    }

    fn take(&mut self, input: Input) {
        let outputs = self.core.handle(Boottime::now(), input);
        // The loop must not see a bid's end before the state that it led to.
        self.publish();
        for output in outputs {
            self.perform(output);
        }
    }

    fn publish(&self) {
        self.state.send_if_modified(|state| {
            let changed = state != self.core.state();
            if changed {
                state.clone_from(self.core.state());
            }
            changed
        });
    }

    fn perform(&mut self, output: Output) {
        match output {
            Output::Ask { token, ask } => {
                let (etcd, keys, budget) = (self.etcd.clone(), self.keys.clone(), self.budget());
                self.work.spawn(async move {
                    let answer = put(&etcd, &keys, ask, budget).await;
                    Input::Answer { token, answer }
                });
            }
            Output::Arm { term, deadline, margin } => {
                self.last_term = term;
                let deadline = pgherd_keeper::clock::Boottime::from_nanos(deadline.as_nanos());
                let arm = Request::Arm { term, deadline, margin };
                if let Err(error) = self.link.send(&arm) {
                    tracing::warn!(%error, "the keeper did not take a deadline");
                }
            }
            Output::End { why } => {
                tracing::warn!("{why}: ending PostgreSQL");
                if let Err(error) = self.link.send(&Request::End) {
                    tracing::error!(%error, "the keeper did not take the order; its deadline stands");
                }
            }
            Output::AskVouches {
                round,
                epoch,
                lasts,
                members,
            } => {
                let body = self.vouch_body(&epoch, lasts);
                // Half of what is left, so that a second round fits in.
                let limit = (self.core.timing().ttl() / 4).max(Duration::from_millis(500));
                for member in members {
                    let request = HttpAsk {
                        method: hyper::Method::POST,
                        path: "/failsafe".to_owned(),
                        json: Some(body.clone()),
                        authorization: self.peers.authorization(),
                    };
                    let peers = self.peers.clone();
                    self.work.spawn(async move {
                        let lasts = ask_vouch(&peers, &member, request, lasts, limit).await;
                        Input::Vouch {
                            round,
                            member: member.name,
                            lasts,
                        }
                    });
                }
            }
            Output::BidEnded(result) => {
                if let Some(done) = self.bid.take() {
                    let _ = done.send(result); // Who asked may be gone; the state shows what is held.
                }
            }
        }
    }

    /// Two tries fit in before the next renewal would be due; the endpoint changes between them.
    fn budget(&self) -> Budget {
        let attempt = self.core.timing().renewal_attempt();
        Budget {
            deadline: Instant::now() + attempt * 2,
            attempt,
        }
    }

    /// Patroni's body of this request, with what ours needs beside it.
    fn vouch_body(&self, epoch: &Epoch, lasts: Duration) -> serde_json::Value {
        let view = self.view.load();
        let record = view.members.get(&epoch.holder).map(|member| member.record.clone());
        let record = record.unwrap_or_else(|| MemberRecord::new(String::new(), String::new()));
        // Newer than what the store was last told; a leader that has just begun has not looked yet.
        let mut slots = view.status.slots.clone();
        slots.extend(self.slots.kept());
        serde_json::json!({
            "name": epoch.holder,
            "conn_url": record.conn_url,
            "api_url": record.api_url,
            "slots": slots,
            "pgherd": {
                "create_revision": epoch.create_revision,
                "lease": self.core.state().lease,
                "lasts_ms": millis(lasts),
            },
        })
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn key_seen(view: &ViewHandle) -> KeySeen {
    if *view.health().borrow() != SourceHealth::Following {
        return KeySeen::Unknown;
    }
    view.load().epoch().cloned().map_or(KeySeen::Free, KeySeen::Held)
}

async fn put(etcd: &Etcd, keys: &Keys, ask: Ask, budget: Budget) -> Result<Answer, StoreError> {
    match ask {
        Ask::Grant { ttl } => etcd.grant(ttl, budget).await.map(Answer::Granted),
        Ask::KeepAlive { lease } => etcd.keep_alive(lease, budget).await.map(|()| Answer::KeptAlive),
        Ask::ReadLeader => {
            let snapshot = etcd.read(&keys.of(&Key::Leader), budget).await?;
            Ok(Answer::Leader(snapshot.entries.into_iter().next()))
        }
        Ask::Txn(txn) => etcd.txn(&txn, budget).await.map(Answer::Txn),
    }
}

/// Asks one member. Ours say for how long they agree; Patroni's agree for one ttl by their own clock.
async fn ask_vouch(
    peers: &Peers,
    member: &Voucher,
    request: HttpAsk,
    lasts: Duration,
    limit: Duration,
) -> Option<Duration> {
    let record = MemberRecord::new(String::new(), member.api_url.clone());
    let endpoint = record.api_endpoint()?;
    let answer = peers.ask(&endpoint, request, limit).await.ok()?;
    if answer.status != 200 {
        return None;
    }
    let says = answer
        .json()
        .and_then(|body| body.get("pgherd")?.get("lasts_ms")?.as_u64());
    Some(says.map_or(lasts, Duration::from_millis).min(lasts))
}

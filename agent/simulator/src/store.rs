//! etcd: one line of committed revisions, three nodes that may or may not be able to add to it, and leases.
//!
//! What clients can tell apart is modelled, and nothing below that: a node answers a linearizable question only while it
//! reaches a leader that reaches a majority; a lease ends up to half a second late and never early; a new leader gives
//! every lease its whole time anew.

mod state;

use std::time::Duration;

use pgherd_cluster::etcd::{StoreError, Txn, TxnOutcome};
use pgherd_cluster::view::{Change, Entry};

pub(crate) use self::state::State;
use crate::network::{Network, Site};
use crate::random::Random;
use crate::time::Time;

/// How many nodes there are.
pub(crate) const NODES: usize = 3;
const MAJORITY: usize = NODES / 2 + 1;
/// How late a lease may end.
const LATE_MILLIS: u64 = 450;

/// One revision.
#[derive(Clone, Debug)]
pub(crate) struct Commit {
    pub(crate) revision: i64,
    pub(crate) at: Time,
    pub(crate) changes: Vec<Change>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Node {
    /// How many faults have it down: who asks it is refused.
    down: u32,
    /// How many faults have it frozen: who asks it hears nothing.
    frozen: u32,
    /// How far it is behind with what it tells its watchers.
    lag: Duration,
}

/// A leader that does not get through to a majority.
#[derive(Clone, Copy, Debug)]
struct Trouble {
    elected_at: Time,
}

/// A copy that an operator keeps.
#[derive(Clone, Debug)]
struct Backup {
    taken_at: Time,
    state: State,
}

/// All of etcd.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    state: State,
    log: Vec<Commit>,
    compacted: i64,
    /// How many times it was restored: a watch does not outlive that.
    era: u64,
    backups: Vec<Backup>,
    nodes: [Node; NODES],
    leader: Option<usize>,
    trouble: Option<Trouble>,
    next_lease: i64,
}

impl Store {
    pub(crate) fn new() -> Self {
        Self {
            state: State::new(),
            log: Vec::new(),
            compacted: 0,
            era: 0,
            backups: Vec::new(),
            nodes: [Node::default(); NODES],
            leader: Some(0),
            trouble: None,
            next_lease: 1000,
        }
    }

    fn runs(&self, node: usize) -> bool {
        self.nodes
            .get(node)
            .is_some_and(|node| node.down == 0 && node.frozen == 0)
    }

    fn reaches_majority(&self, node: usize, network: &Network) -> bool {
        let others =
            (0..NODES).filter(|other| self.runs(*other) && network.talks(Site::Etcd(node), Site::Etcd(*other)));
        self.runs(node) && others.count() >= MAJORITY
    }

    /// Whether a question to `node` would be answered now.
    pub(crate) fn serves(&self, node: usize, network: &Network) -> bool {
        let Some(leader) = self.leader else { return false };
        self.runs(node) && self.reaches_majority(leader, network) && network.talks(Site::Etcd(node), Site::Etcd(leader))
    }

    /// Whether any node does.
    pub(crate) fn is_serving(&self, network: &Network) -> bool {
        (0..NODES).any(|node| self.serves(node, network))
    }

    /// Who leads etcd itself.
    #[cfg(test)]
    pub(crate) const fn leader(&self) -> Option<usize> {
        self.leader
    }

    /// Lets time pass: a new leader where the old one is lost, and the end of leases. Says what ended, by revision.
    pub(crate) fn tick(&mut self, now: Time, network: &Network, random: &mut Random) -> bool {
        let healthy = self.leader.is_some_and(|leader| self.reaches_majority(leader, network));
        if healthy {
            self.trouble = None;
            return self.expire(now);
        }
        let trouble = *self.trouble.get_or_insert_with(|| Trouble {
            elected_at: now + random.millis(1000, 3500),
        });
        if now < trouble.elected_at {
            return false;
        }
        let able: Vec<usize> = (0..NODES)
            .filter(|node| self.reaches_majority(*node, network))
            .collect();
        let Some(elected) = able.get(random.index(able.len())) else {
            return false;
        };
        self.leader = Some(*elected);
        self.trouble = None;
        self.state.promote_leases(now, random, LATE_MILLIS);
        true
    }

    fn expire(&mut self, now: Time) -> bool {
        let mut any = false;
        while let Some(changes) = self.state.revoke_expired(now) {
            any = true;
            self.log_changes(now, changes);
        }
        any
    }

    fn log_changes(&mut self, at: Time, changes: Vec<Change>) {
        if !changes.is_empty() {
            let revision = self.state.revision;
            self.log.push(Commit { revision, at, changes });
        }
    }

    /// Carries a transaction out.
    pub(crate) fn commit(&mut self, txn: &Txn, now: Time) -> Result<TxnOutcome, StoreError> {
        let (outcome, changes) = self.state.apply(txn)?;
        self.log_changes(now, changes);
        Ok(outcome)
    }

    /// Grants a lease.
    pub(crate) fn grant(&mut self, ttl: Duration, now: Time, random: &mut Random) -> i64 {
        self.next_lease += 1;
        // etcd grants nothing below its minimum, one and a half election timeouts.
        let ttl = ttl.max(Duration::from_secs(2));
        self.state
            .grant(self.next_lease, ttl, now, random.millis(0, LATE_MILLIS));
        self.next_lease
    }

    /// Renews a lease.
    pub(crate) fn keep_alive(&mut self, lease: i64, now: Time) -> Result<(), StoreError> {
        self.state.keep_alive(lease, now)
    }

    /// What there is now.
    pub(crate) const fn state(&self) -> &State {
        &self.state
    }

    /// One key.
    pub(crate) fn get(&self, key: &str) -> Option<&Entry> {
        self.state.get(key)
    }

    /// What a watch at `node` has to tell that was opened in `era` and has told everything up to `told`.
    pub(crate) fn news(&self, node: usize, era: u64, told: i64, now: Time) -> Result<Vec<Commit>, StoreError> {
        if era != self.era {
            return Err(StoreError::Unreachable {
                what: "the watch was closed by the server".to_owned(),
            });
        }
        if told + 1 < self.compacted {
            return Err(StoreError::Compacted);
        }
        let lag = self.nodes.get(node).map_or(Duration::ZERO, |node| node.lag);
        let new = self.log.iter().rev().take_while(|commit| commit.revision > told);
        let mut news: Vec<Commit> = new.filter(|commit| commit.at + lag <= now).cloned().collect();
        news.reverse();
        Ok(news)
    }

    /// How many times it was restored.
    pub(crate) const fn era(&self) -> u64 {
        self.era
    }

    /// Whether a node is down, so that who asks it is refused at once.
    pub(crate) fn is_refusing(&self, node: usize) -> bool {
        self.nodes.get(node).is_some_and(|node| node.down > 0)
    }

    /// Whether a node runs at all: one that does not keeps its streams silent.
    pub(crate) fn is_up(&self, node: usize) -> bool {
        self.runs(node)
    }

    /// Takes a node down.
    pub(crate) fn stop(&mut self, node: usize) {
        if let Some(node) = self.nodes.get_mut(node) {
            node.down += 1;
        }
    }

    /// Takes one stop of a node back.
    pub(crate) fn resume(&mut self, node: usize) {
        if let Some(node) = self.nodes.get_mut(node) {
            node.down = node.down.saturating_sub(1);
        }
    }

    /// Freezes a node.
    pub(crate) fn freeze(&mut self, node: usize) {
        if let Some(node) = self.nodes.get_mut(node) {
            node.frozen += 1;
        }
    }

    /// Takes one freeze of a node back.
    pub(crate) fn thaw(&mut self, node: usize) {
        if let Some(node) = self.nodes.get_mut(node) {
            node.frozen = node.frozen.saturating_sub(1);
        }
    }

    /// Makes a node tell its watchers late.
    pub(crate) fn set_lag(&mut self, node: usize, lag: Duration) {
        if let Some(node) = self.nodes.get_mut(node) {
            node.lag = lag;
        }
    }

    /// Whether a node tells its watchers late.
    pub(crate) fn lags(&self, node: usize) -> bool {
        self.nodes.get(node).is_some_and(|node| node.lag > Duration::ZERO)
    }

    /// All nodes run and none lags.
    pub(crate) fn heal(&mut self) {
        self.nodes = [Node::default(); NODES];
    }

    /// Forgets old revisions.
    pub(crate) fn compact(&mut self) {
        self.compacted = self.state.revision;
        self.log.clear();
    }

    /// Keeps a copy of everything.
    pub(crate) fn back_up(&mut self, now: Time) {
        let state = self.state.clone();
        self.backups.push(Backup { taken_at: now, state });
    }

    /// Brings a copy back that was taken so long before the last one, or the oldest there is: revisions go backwards, leases
    /// are as they were, with their whole time ahead. No age is the state that there is now.
    pub(crate) fn restore(&mut self, age: Duration, now: Time, random: &mut Random) {
        let last = self.backups.last().map_or(now, |backup| backup.taken_at);
        let old = |backup: &&Backup| backup.taken_at + age <= last;
        let backup = self.backups.iter().rev().find(old).or(self.backups.first());
        if let Some(backup) = backup.filter(|_| age > Duration::ZERO) {
            self.state = backup.state.clone();
        }
        self.state.promote_leases(now, random, LATE_MILLIS);
        self.log.clear();
        self.compacted = self.state.revision;
        self.era += 1;
    }
}

#[cfg(test)]
mod tests;

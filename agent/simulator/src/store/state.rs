//! What has been committed: keys with their revisions, and leases.

use std::collections::BTreeMap;
use std::time::Duration;

use pgherd_cluster::etcd::{Compare, Op, StoreError, Txn, TxnOutcome};
use pgherd_cluster::view::{Change, Entry};

use crate::random::Random;
use crate::time::Time;

#[derive(Clone, Copy, Debug)]
struct Lease {
    ttl: Duration,
    /// Until when it lives for sure.
    expires: Time,
    /// How late its end comes.
    late: Duration,
}

/// Everything at one revision.
#[derive(Clone, Debug)]
pub(crate) struct State {
    pub(crate) revision: i64,
    keys: BTreeMap<String, Entry>,
    leases: BTreeMap<i64, Lease>,
}

impl State {
    pub(super) const fn new() -> Self {
        Self {
            revision: 1,
            keys: BTreeMap::new(),
            leases: BTreeMap::new(),
        }
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Entry> {
        self.keys.get(key)
    }

    pub(crate) fn entries(&self) -> Vec<Entry> {
        self.keys.values().cloned().collect()
    }

    /// Until when a lease lives for sure.
    pub(crate) fn expires(&self, lease: i64) -> Option<Time> {
        self.leases.get(&lease).map(|lease| lease.expires)
    }

    pub(super) fn grant(&mut self, id: i64, ttl: Duration, now: Time, late: Duration) {
        let expires = now + ttl;
        self.leases.insert(id, Lease { ttl, expires, late });
    }

    pub(super) fn keep_alive(&mut self, id: i64, now: Time) -> Result<(), StoreError> {
        let lease = self.leases.get_mut(&id).ok_or(StoreError::LeaseGone)?;
        // One that is over and not yet revoked is not revived.
        if lease.expires <= now {
            return Err(StoreError::LeaseGone);
        }
        lease.expires = now + lease.ttl;
        Ok(())
    }

    pub(super) fn promote_leases(&mut self, now: Time, random: &mut Random, late_millis: u64) {
        for lease in self.leases.values_mut() {
            lease.expires = now + lease.ttl;
            lease.late = random.millis(0, late_millis);
        }
    }

    /// Ends the first lease that is due, with the keys on it.
    pub(super) fn revoke_expired(&mut self, now: Time) -> Option<Vec<Change>> {
        let due = self.leases.iter().find(|(_, lease)| lease.expires + lease.late <= now);
        let id = due.map(|(id, _)| *id)?;
        self.leases.remove(&id);
        let keys: Vec<String> = self
            .keys
            .values()
            .filter(|entry| entry.lease == id)
            .map(|entry| entry.key.clone())
            .collect();
        if !keys.is_empty() {
            self.revision += 1;
        }
        for key in &keys {
            self.keys.remove(key);
        }
        Some(keys.into_iter().map(|key| Change::Delete { key }).collect())
    }

    fn holds(&self, compare: &Compare) -> bool {
        let entry = |key: &String| self.keys.get(key);
        match compare {
            Compare::Absent(key) => entry(key).is_none(),
            Compare::Value(key, value) => entry(key).is_some_and(|entry| entry.value == *value),
            Compare::CreateRevision(key, revision) => entry(key).map_or(0, |entry| entry.create_revision) == *revision,
            Compare::ModRevision(key, revision) => entry(key).map_or(0, |entry| entry.mod_revision) == *revision,
            // Of a key that is not there etcd compares the values of an empty one.
            Compare::Lease(key, lease) => entry(key).map_or(0, |entry| entry.lease) == *lease,
        }
    }

    /// Whether all conditions of a transaction hold.
    pub(crate) fn holds_all(&self, txn: &Txn) -> bool {
        txn.conditions().iter().all(|compare| self.holds(compare))
    }

    pub(super) fn apply(&mut self, txn: &Txn) -> Result<(TxnOutcome, Vec<Change>), StoreError> {
        let succeeded = self.holds_all(txn);
        let ops = if succeeded { txn.then_ops() } else { txn.otherwise_ops() };
        let known = |op: &Op| match op {
            Op::Put { lease, .. } => *lease == 0 || self.leases.contains_key(lease),
            Op::Get(_) | Op::Delete(_) => true,
        };
        // The whole of it is refused, and nothing is written.
        if !ops.iter().all(known) {
            return Err(StoreError::LeaseGone);
        }
        let revision = self.revision + 1;
        let (mut read, mut changes) = (Vec::new(), Vec::new());
        for op in ops {
            match op {
                Op::Put { key, value, lease } => changes.push(Change::Put(self.put(key, value, *lease, revision))),
                Op::Get(key) => read.extend(self.keys.get(key).cloned()),
                Op::Delete(key) => {
                    if self.keys.remove(key).is_some() {
                        changes.push(Change::Delete { key: key.clone() });
                    }
                }
            }
        }
        if !changes.is_empty() {
            self.revision = revision;
        }
        let outcome = TxnOutcome {
            succeeded,
            read,
            revision: self.revision,
        };
        Ok((outcome, changes))
    }

    fn put(&mut self, key: &str, value: &str, lease: i64, revision: i64) -> Entry {
        let before = self.keys.get(key);
        let entry = Entry {
            key: key.to_owned(),
            value: value.to_owned(),
            create_revision: before.map_or(revision, |entry| entry.create_revision),
            mod_revision: revision,
            lease,
        };
        self.keys.insert(key.to_owned(), entry.clone());
        entry
    }
}

//! Guarded writes, in our own words, and their translation.

use etcd_client::{Compare as WireCompare, CompareOp, EventType, KeyValue, PutOptions, TxnOp, TxnOpResponse};

use crate::view::{Change, Entry};

/// A condition on one key. All are equalities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key does not exist.
    Absent(String),
    /// The key's value.
    Value(String, String),
    /// The revision that created the key.
    CreateRevision(String, i64),
    /// The revision of the key's last change; 0 for a key that does not exist.
    ModRevision(String, i64),
    /// The lease that the key is bound to.
    Lease(String, i64),
}

/// One operation of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Write.
    Put {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// The lease to bind it to; 0 for none.
        lease: i64,
    },
    /// Read.
    Get(String),
    /// Delete.
    Delete(String),
}

/// A transaction: if all conditions hold then some operations, else others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    when: Vec<Compare>,
    then: Vec<Op>,
    otherwise: Vec<Op>,
}

impl Txn {
    /// Without conditions and operations.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A write over what was read: nothing is written when the key has changed since. `mod_revision` is 0 for a key that was
    /// not there. Whether it was done is [`TxnOutcome::has_put`].
    #[must_use]
    pub fn put_over(key: String, value: String, mod_revision: i64) -> Self {
        Self::new()
            .when(Compare::ModRevision(key.clone(), mod_revision))
            .otherwise(Op::Get(key.clone()))
            .then(Op::Put { key, value, lease: 0 })
    }

    /// Adds a condition.
    #[must_use]
    pub fn when(mut self, compare: Compare) -> Self {
        self.when.push(compare);
        self
    }

    /// Adds an operation for when all conditions hold.
    #[must_use]
    pub fn then(mut self, op: Op) -> Self {
        self.then.push(op);
        self
    }

    /// Adds an operation for when a condition fails.
    #[must_use]
    pub fn otherwise(mut self, op: Op) -> Self {
        self.otherwise.push(op);
        self
    }

    /// The conditions.
    #[must_use]
    pub fn conditions(&self) -> &[Compare] {
        &self.when
    }

    /// The operations for when all conditions hold.
    #[must_use]
    pub fn then_ops(&self) -> &[Op] {
        &self.then
    }

    /// The operations for when a condition fails.
    #[must_use]
    pub fn otherwise_ops(&self) -> &[Op] {
        &self.otherwise
    }

    pub(super) fn to_wire(&self) -> etcd_client::Txn {
        let ops = |ops: &[Op]| ops.iter().map(wire_op).collect::<Vec<_>>();
        etcd_client::Txn::new()
            .when(self.when.iter().map(wire_compare).collect::<Vec<_>>())
            .and_then(ops(&self.then))
            .or_else(ops(&self.otherwise))
    }
}

/// What a transaction did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TxnOutcome {
    /// Whether all conditions held.
    pub succeeded: bool,
    /// What the reads of the branch that ran found, in order; nothing for absent keys.
    pub read: Vec<Entry>,
    /// The store's revision after it.
    pub revision: i64,
}

impl TxnOutcome {
    /// Whether a [`Txn::put_over`] is in force. One that was sent again after its answer was lost finds its own first try.
    #[must_use]
    pub fn has_put(&self, value: &str) -> bool {
        self.succeeded || self.read.first().is_some_and(|found| found.value == value)
    }
}

fn wire_compare(compare: &Compare) -> WireCompare {
    let equal = CompareOp::Equal;
    match compare {
        Compare::Absent(key) => WireCompare::create_revision(key.as_str(), equal, 0),
        Compare::Value(key, value) => WireCompare::value(key.as_str(), equal, value.as_str()),
        Compare::CreateRevision(key, revision) => WireCompare::create_revision(key.as_str(), equal, *revision),
        Compare::ModRevision(key, revision) => WireCompare::mod_revision(key.as_str(), equal, *revision),
        Compare::Lease(key, lease) => WireCompare::lease(key.as_str(), equal, *lease),
    }
}

fn wire_op(op: &Op) -> TxnOp {
    match op {
        Op::Put { key, value, lease } => {
            let options = (*lease != 0).then(|| PutOptions::new().with_lease(*lease));
            TxnOp::put(key.as_str(), value.as_str(), options)
        }
        Op::Get(key) => TxnOp::get(key.as_str(), None),
        Op::Delete(key) => TxnOp::delete(key.as_str(), None),
    }
}

pub(super) fn outcome_of(response: &etcd_client::TxnResponse) -> TxnOutcome {
    let mut read = Vec::new();
    for op in response.op_responses() {
        if let TxnOpResponse::Get(get) = op {
            read.extend(get.kvs().iter().map(entry_of));
        }
    }
    let revision = response.header().map_or(0, etcd_client::ResponseHeader::revision);
    TxnOutcome {
        succeeded: response.succeeded(),
        read,
        revision,
    }
}

pub(super) fn entry_of(kv: &KeyValue) -> Entry {
    Entry {
        key: String::from_utf8_lossy(kv.key()).into_owned(),
        value: String::from_utf8_lossy(kv.value()).into_owned(),
        create_revision: kv.create_revision(),
        mod_revision: kv.mod_revision(),
        lease: kv.lease(),
    }
}

pub(super) fn change_of(event: &etcd_client::Event) -> Option<Change> {
    let kv = event.kv()?;
    Some(match event.event_type() {
        EventType::Put => Change::Put(entry_of(kv)),
        EventType::Delete => Change::Delete {
            key: String::from_utf8_lossy(kv.key()).into_owned(),
        },
    })
}

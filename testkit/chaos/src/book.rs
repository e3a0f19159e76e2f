//! What clients were told, as they note it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::judge::{Ack, Read};

/// What clients were told.
#[derive(Debug, Default)]
pub struct Entries {
    /// Rows acknowledged.
    pub acks: Vec<Ack>,
    /// Reads answered.
    pub reads: Vec<Read>,
    /// Errors of the clients of the proxy, by side and SQLSTATE.
    pub errors: BTreeMap<String, usize>,
}

/// Where all clients write.
#[derive(Debug, Default)]
pub struct Book(Mutex<Entries>);

impl Book {
    /// Opens it.
    pub fn open(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes an acknowledged row.
    pub fn ack(&self, ack: Ack) {
        self.open().acks.push(ack);
    }

    /// Notes an answered read.
    pub fn read(&self, read: Read) {
        self.open().reads.push(read);
    }

    /// Notes an error.
    pub fn error(&self, side: &str, code: &str) {
        *self.open().errors.entry(format!("{side} {code}")).or_default() += 1;
    }
}

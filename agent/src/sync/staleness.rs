//! When a standby counts as lost although its connection stands.

use std::collections::BTreeMap;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::Lsn;

use super::{Sender, StandbyName};

/// Whether nobody can acknowledge commits under this name: no walsender streams to it, or all that do are stale.
#[must_use]
pub fn is_lost(name: &StandbyName, senders: &[Sender]) -> bool {
    let mut own = senders.iter().filter(|sender| sender.application_name == *name);
    !own.any(Sender::streams)
}

/// Since when each walsender has been owed an acknowledgement. TCP takes many minutes to notice a peer that has vanished,
/// PostgreSQL a minute; commits wait all that time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Acknowledgements {
    waiting: BTreeMap<i32, Owed>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owed {
    flushed: Option<Lsn>,
    since: Boottime,
}

impl Acknowledgements {
    /// Notes what was seen at `now`, and marks the walsenders that owe one for longer than `limit`. A standby that is far
    /// behind but advances owes nothing for long; one to which nothing has been sent owes nothing at all.
    pub fn note(&mut self, senders: &mut [Sender], now: Boottime, limit: Duration) {
        let before = std::mem::take(&mut self.waiting);
        for sender in senders {
            if sender.sent <= sender.flush {
                sender.stale = false;
                continue;
            }
            let fresh = Owed {
                flushed: sender.flush,
                since: now,
            };
            let owed = before
                .get(&sender.pid)
                .copied()
                .filter(|owed| owed.flushed == sender.flush)
                .unwrap_or(fresh);
            sender.stale = now.since(owed.since) > limit;
            self.waiting.insert(sender.pid, owed);
        }
    }
}

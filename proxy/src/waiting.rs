//! Clients that have asked for a session and have none yet, so that people can see who waits, since when and why.
//!
//! A shard per worker, locked when a client begins to wait, is held, and is done.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pgherd_cluster::clock::Boottime;

use crate::client::About;
use crate::route::Why;

/// One client that waits.
#[derive(Clone, Debug)]
pub(crate) struct Waiter {
    pub(crate) about: Arc<About>,
    pub(crate) since: Boottime,
    /// Why nobody can serve it, and until when it is held; nothing while it is being connected or waits for its turn.
    pub(crate) held: Option<Held>,
}

/// Why a client is held.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) why: Why,
    pub(crate) until: Boottime,
}

#[derive(Default)]
struct Shard {
    next: u64,
    waiters: BTreeMap<u64, Waiter>,
}

/// All of them.
pub(crate) struct Waiting {
    shards: Arc<[Mutex<Shard>]>,
}

/// A client's place in the list; dropping it takes the client out.
pub(crate) struct Listed {
    shards: Arc<[Mutex<Shard>]>,
    shard: usize,
    id: u64,
    held_since: Option<Boottime>,
}

/// A panic while the lock was held left a whole entry or none, so the list is good.
fn lock(shards: &[Mutex<Shard>], index: usize) -> Option<MutexGuard<'_, Shard>> {
    let shard = shards.get(index)?;
    Some(shard.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Waiting {
    pub(crate) fn new(shards: usize) -> Self {
        Self {
            shards: (0..shards).map(|_| Mutex::default()).collect(),
        }
    }

    /// Lists a client that waits since `since`.
    pub(crate) fn enter(&self, shard: usize, about: &Arc<About>, since: Boottime) -> Listed {
        let mut id = 0;
        if let Some(mut shard) = lock(&self.shards, shard) {
            id = shard.next;
            shard.next += 1;
            let waiter = Waiter {
                about: Arc::clone(about),
                since,
                held: None,
            };
            shard.waiters.insert(id, waiter);
        }
        Listed {
            shards: Arc::clone(&self.shards),
            shard,
            id,
            held_since: None,
        }
    }

    /// Whoever waits, the longest first.
    pub(crate) fn list(&self) -> Vec<Waiter> {
        let shards = (0..self.shards.len()).filter_map(|index| lock(&self.shards, index));
        let mut found: Vec<Waiter> = shards
            .flat_map(|shard| shard.waiters.values().cloned().collect::<Vec<_>>())
            .collect();
        found.sort_by_key(|waiter| waiter.since);
        found
    }
}

impl Listed {
    /// Notes that the client is held.
    pub(crate) fn hold(&mut self, why: &Why, until: Boottime) {
        self.held_since.get_or_insert_with(Boottime::now);
        if let Some(mut shard) = lock(&self.shards, self.shard)
            && let Some(waiter) = shard.waiters.get_mut(&self.id)
        {
            let why = why.clone();
            waiter.held = Some(Held { why, until });
        }
    }

    /// Since when the client has been held; nothing for one that was not.
    pub(crate) const fn held_since(&self) -> Option<Boottime> {
        self.held_since
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        if let Some(mut shard) = lock(&self.shards, self.shard) {
            shard.waiters.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::Who;
    use crate::peer::Peer;

    #[test]
    fn who_waits_is_listed_the_longest_first_and_gone_when_it_is_done() {
        let waiting = Waiting::new(2);
        let about = Arc::new(About {
            peer: Peer::Unix,
            who: Who::default(),
            application_name: None,
            listener: 0,
            by_tls: false,
            since: Boottime::from_nanos(0),
        });
        let later = waiting.enter(0, &about, Boottime::from_nanos(2));
        let mut earlier = waiting.enter(1, &about, Boottime::from_nanos(1));
        earlier.hold(&Why::NoLeader, Boottime::from_nanos(9));
        let list = waiting.list();
        let since: Vec<Boottime> = list.iter().map(|waiter| waiter.since).collect();
        assert_eq!(since, [Boottime::from_nanos(1), Boottime::from_nanos(2)]);
        assert!(matches!(&list[0].held, Some(held) if held.why == Why::NoLeader) && list[1].held.is_none());
        drop((later, earlier));
        assert!(waiting.list().is_empty());
    }
}

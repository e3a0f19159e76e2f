//! Who may come in: connections counted by user, database and client address, once per connection.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::LimitsConfig;
use crate::counters::Counted;

/// Who a client says that it is, and where it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Who {
    /// Nothing for a message without one, which the server refuses.
    pub(crate) user: Option<String>,
    /// Nothing for physical replication, which is of no database.
    pub(crate) database: Option<String>,
    /// Nothing for one that is on this host and did not come by IP.
    pub(crate) address: Option<IpAddr>,
}

/// A limit that has been reached, and by whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reached {
    pub(crate) of: Of,
    /// Connections that there are.
    pub(crate) open: usize,
    /// Connections that there may be.
    pub(crate) limit: usize,
}

/// What is limited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Of {
    Connections,
    User(String),
    Database(String),
    Address(IpAddr),
}

impl Of {
    /// The key under `limits` in the configuration, and the label in metrics.
    pub(crate) const fn key(&self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::User(_) => "per_user",
            Self::Database(_) => "per_database",
            Self::Address(_) => "per_client_address",
        }
    }
}

/// How many there are of each. What nobody has any more takes no memory.
#[derive(Debug)]
pub(crate) struct Counts<K>(Arc<Mutex<HashMap<K, usize>>>);

impl<K> Default for Counts<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

/// One unit of a [`Counts`], taken out when dropped.
#[derive(Debug)]
pub(crate) struct Place<K: Eq + Hash> {
    counts: Arc<Mutex<HashMap<K, usize>>>,
    key: K,
}

impl<K: Clone + Eq + Hash> Counts<K> {
    /// Counts one more in, unless there are `limit` already: then how many there are. Counted without a limit too, so that a
    /// limit that is set later knows of all.
    pub(crate) fn enter(&self, key: K, limit: Option<usize>) -> Result<Place<K>, usize> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let open = counts.get(&key).copied().unwrap_or_default();
        if limit.is_some_and(|limit| open >= limit) {
            return Err(open);
        }
        counts.insert(key.clone(), open + 1);
        drop(counts);
        Ok(Place {
            counts: Arc::clone(&self.0),
            key,
        })
    }
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        match counts.get_mut(&self.key) {
            Some(open) if *open > 1 => *open -= 1,
            _ => drop(counts.remove(&self.key)),
        }
    }
}

/// The sessions that there are and that are asked for.
#[derive(Debug, Default)]
pub(crate) struct Occupancy {
    users: Counts<String>,
    databases: Counts<String>,
    addresses: Counts<IpAddr>,
}

/// A client's places under all limits, given back when dropped.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// One that is kept for operators, instead of all others.
    pub(crate) reserved: Option<Counted>,
    _address: Option<Place<IpAddr>>,
    _user: Option<Place<String>>,
    _database: Option<Place<String>>,
}

impl Places {
    /// An operator's, under no limit.
    pub(crate) fn reserved(place: Counted) -> Self {
        Self {
            reserved: Some(place),
            ..Self::default()
        }
    }
}

impl Occupancy {
    /// Places for a client, or the first limit that has none left.
    pub(crate) fn enter(&self, who: &Who, limits: &LimitsConfig) -> Result<Places, Reached> {
        Ok(Places {
            reserved: None,
            _address: take(&self.addresses, who.address, limits.per_client_address, Of::Address)?,
            _user: take(&self.users, who.user.clone(), limits.per_user, Of::User)?,
            _database: take(&self.databases, who.database.clone(), limits.per_database, Of::Database)?,
        })
    }
}

fn take<K: Clone + Eq + Hash>(
    counts: &Counts<K>,
    key: Option<K>,
    limit: Option<usize>,
    of: impl Fn(K) -> Of,
) -> Result<Option<Place<K>>, Reached> {
    let Some(key) = key else { return Ok(None) };
    match counts.enter(key.clone(), limit) {
        Ok(place) => Ok(Some(place)),
        Err(open) => Err(Reached {
            of: of(key),
            open,
            limit: limit.unwrap_or_default(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(user: &str, database: &str, host: u8) -> Who {
        Who {
            user: Some(user.to_owned()),
            database: Some(database.to_owned()),
            address: Some(IpAddr::from([127, 0, 0, host])),
        }
    }

    #[test]
    fn each_limit_counts_its_own_and_names_it() {
        let occupancy = Occupancy::default();
        let limits = LimitsConfig {
            per_user: Some(2),
            per_database: Some(3),
            per_client_address: Some(4),
            ..LimitsConfig::default()
        };
        let enter = |who: &Who| occupancy.enter(who, &limits);
        let mut kept = vec![enter(&who("ann", "d", 1)).expect("room")];
        kept.push(enter(&who("ann", "d", 1)).expect("room"));
        let reached = enter(&who("ann", "e", 1)).expect_err("two are ann's");
        let of = Of::User("ann".to_owned());
        assert_eq!(reached, Reached { of, open: 2, limit: 2 });
        kept.push(enter(&who("bob", "d", 1)).expect("room"));
        let reached = enter(&who("bob", "d", 1)).expect_err("three are in d");
        assert_eq!((reached.of.key(), reached.open), ("per_database", 3));
        kept.push(enter(&who("bob", "e", 1)).expect("room"));
        let reached = enter(&who("eve", "f", 1)).expect_err("four are from there");
        assert_eq!((reached.of.key(), reached.open), ("per_client_address", 4));
        kept.push(enter(&who("eve", "f", 2)).expect("from elsewhere"));
        kept.push(enter(&Who::default()).expect("nobody is counted nowhere"));
    }

    #[test]
    fn who_was_refused_or_has_left_takes_no_place() {
        let occupancy = Occupancy::default();
        let mut limits = LimitsConfig::default();
        let first = occupancy.enter(&who("ann", "d", 1), &limits).expect("no limit");
        limits.per_user = Some(1);
        assert!(
            occupancy.enter(&who("ann", "d", 2), &limits).is_err(),
            "counted before the limit"
        );
        drop(first);
        let again = occupancy.enter(&who("ann", "d", 1), &limits).expect("room again");
        drop(again);
        let left = |counts: usize| assert_eq!(counts, 0);
        left(occupancy.users.0.lock().expect("nobody panicked").len());
        left(occupancy.databases.0.lock().expect("nobody panicked").len());
        left(occupancy.addresses.0.lock().expect("nobody panicked").len());
    }
}

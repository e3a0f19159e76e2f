//! What HAProxy keeps and we do not count: highest values, rates, since when something is up. Looked at once a second.

use std::collections::HashMap;

use pgherd_cluster::clock::Boottime;
use pgherd_page::model::State;

/// What was seen of one row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) sessions_max: usize,
    pub(crate) queue_max: usize,
    /// Sessions per second, over the last second.
    pub(crate) rate: u64,
    pub(crate) rate_max: u64,
    /// Since it is up, or down.
    pub(crate) since_seconds: u64,
    /// How long it was down altogether, and how often.
    pub(crate) down_seconds: u64,
    pub(crate) downs: u64,
}

/// One row as it was last time.
#[derive(Clone, Copy, Debug)]
struct Track {
    seen: Seen,
    total: u64,
    up: bool,
    changed: Boottime,
    looked: Boottime,
}

/// A row's listener, and what it is of there.
type Key = (String, Of);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Of {
    Listener,
    Backend,
    Member(String),
}

/// All rows.
#[derive(Debug, Default)]
pub(crate) struct Watched {
    tracks: HashMap<Key, Track>,
}

/// A row as it is now.
struct Now {
    open: usize,
    queue: usize,
    total: u64,
    up: bool,
}

impl Watched {
    /// Looks once. Whoever is no longer there is forgotten.
    pub(crate) fn look(&mut self, state: &State, now: Boottime) {
        let mut found: HashMap<Key, Now> = HashMap::new();
        for listener in &state.listeners {
            let queue = listener.held;
            let of_listener = Now {
                open: listener.connections,
                queue,
                total: listener.accepted_total,
                up: true,
            };
            found.insert((listener.name.clone(), Of::Listener), of_listener);
            let mut any_up = false;
            for member in &state.members {
                let routes = state.routes.iter();
                let route = routes.filter(|route| route.listener == listener.name && route.member == member.name);
                let (open, total) = route.fold((0, 0), |(open, total), route| (open + route.open, total + route.total));
                let wanted = if listener.role == "write" { "write" } else { "read" };
                let up = member.takes == Some(wanted) || (listener.role == "any" && member.takes.is_some());
                any_up |= up;
                let of_member = Of::Member(member.name.clone());
                found.insert(
                    (listener.name.clone(), of_member),
                    Now {
                        open,
                        queue: 0,
                        total,
                        up,
                    },
                );
            }
            let backend = Now {
                open: listener.sessions,
                queue,
                total: listener.sessions_total,
                up: any_up,
            };
            found.insert((listener.name.clone(), Of::Backend), backend);
        }
        self.tracks.retain(|key, _| found.contains_key(key));
        for (key, row) in found {
            self.follow(key, &row, now);
        }
    }

    fn follow(&mut self, key: Key, row: &Now, now: Boottime) {
        let track = self.tracks.entry(key).or_insert(Track {
            seen: Seen::default(),
            total: row.total,
            up: row.up,
            changed: now,
            looked: now,
        });
        let elapsed = now.since(track.looked);
        let seen = &mut track.seen;
        seen.sessions_max = seen.sessions_max.max(row.open);
        seen.queue_max = seen.queue_max.max(row.queue);
        // Rates are of whole seconds, or one event would look like thousands.
        if elapsed.as_millis() >= 900 {
            let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
            seen.rate = row.total.saturating_sub(track.total).saturating_mul(1000) / millis;
            seen.rate_max = seen.rate_max.max(seen.rate);
            if !track.up {
                seen.down_seconds += elapsed.as_secs().max(1);
            }
            track.total = row.total;
            track.looked = now;
        }
        if track.up != row.up {
            seen.downs += u64::from(track.up);
            track.up = row.up;
            track.changed = now;
        }
        seen.since_seconds = now.since(track.changed).as_secs();
    }

    fn of(&self, listener: &str, of: Of) -> Seen {
        let track = self.tracks.get(&(listener.to_owned(), of));
        track.map(|track| track.seen).unwrap_or_default()
    }

    /// A listener's connections.
    pub(crate) fn listener(&self, listener: &str) -> Seen {
        self.of(listener, Of::Listener)
    }

    /// A listener's sessions.
    pub(crate) fn backend(&self, listener: &str) -> Seen {
        self.of(listener, Of::Backend)
    }

    /// A listener's sessions with a member.
    pub(crate) fn route(&self, listener: &str, member: &str) -> Seen {
        self.of(listener, Of::Member(member.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::tests::state;
    use super::*;

    #[test]
    fn highest_values_rates_and_outages_are_kept() {
        let (mut watched, mut state) = (Watched::default(), state());
        let at = |seconds| Boottime::from_nanos(0) + Duration::from_secs(seconds);
        let listener = state.listeners[0].name.clone();
        watched.look(&state, at(100));
        state.listeners[0].connections = 50;
        state.listeners[0].accepted_total += 30;
        watched.look(&state, at(101));
        state.listeners[0].connections = 3;
        state.members[0].takes = None;
        watched.look(&state, at(102));
        let seen = watched.listener(&listener);
        assert_eq!((seen.sessions_max, seen.rate, seen.rate_max), (50, 0, 30));
        watched.look(&state, at(105));
        let down = watched.route(&listener, "n1");
        assert_eq!((down.downs, down.down_seconds, down.since_seconds), (1, 3, 3));
        state.members.remove(0);
        watched.look(&state, at(106));
        assert_eq!(watched.route(&listener, "n1"), Seen::default());
    }
}

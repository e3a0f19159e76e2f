//! What the proxy counts. Bytes are counted by the worker that moves them, in a cell that only it writes; everything else
//! changes at most once per connection.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pgherd_cluster::name::MemberName;

/// A sum that one thread adds to and others read.
#[derive(Debug, Default)]
pub(crate) struct Sum(AtomicU64);

impl Sum {
    /// Adds without an atomic read-modify-write: there is only one writer.
    pub(crate) fn add(&self, count: u64) {
        self.0
            .store(self.0.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Bytes that one worker moved on one route. Aligned so that two workers never write the same cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Moved {
    pub(crate) to_server: Sum,
    pub(crate) to_client: Sum,
}

/// One listener's sessions with one member.
#[derive(Debug)]
pub(crate) struct Route {
    open: AtomicUsize,
    total: AtomicU64,
    moved: Box<[Moved]>,
}

impl Route {
    /// The cell of `worker`.
    pub(crate) fn moved(&self, worker: usize) -> Option<&Moved> {
        self.moved.get(worker)
    }
}

/// A session counted on its route; dropping it counts it out.
pub(crate) struct OpenRoute(pub(crate) Arc<Route>);

impl Drop for OpenRoute {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl OpenRoute {
    /// The server takes the session: from here on it counts as one that there was.
    pub(crate) fn begun(self) -> Self {
        self.0.total.fetch_add(1, Ordering::Relaxed);
        self
    }
}

/// What was counted on one route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RouteCounts {
    pub(crate) listener: usize,
    pub(crate) member: MemberName,
    pub(crate) open: usize,
    pub(crate) total: u64,
    pub(crate) bytes_to_server: u64,
    pub(crate) bytes_to_client: u64,
}

/// All routes that have ever carried a session.
pub(crate) struct Routes {
    workers: usize,
    routes: Mutex<HashMap<(usize, MemberName), Arc<Route>>>,
}

impl Routes {
    pub(crate) fn new(workers: usize) -> Self {
        Self {
            workers,
            routes: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(usize, MemberName), Arc<Route>>> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a session in that has not begun yet.
    #[cfg(test)]
    pub(crate) fn enter(&self, listener: usize, member: &MemberName) -> OpenRoute {
        self.enter_below(listener, member, usize::MAX).expect("there is room")
    }

    /// Sessions of a listener that are open on a member.
    pub(crate) fn open_on(&self, listener: usize, member: &MemberName) -> usize {
        let routes = self.lock();
        let route = routes.get(&(listener, member.clone()));
        route.map_or(0, |route| route.open.load(Ordering::Relaxed))
    }

    /// Counts a session in that has not begun yet, if there are fewer than `limit` on its route.
    pub(crate) fn enter_below(&self, listener: usize, member: &MemberName, limit: usize) -> Option<OpenRoute> {
        let mut routes = self.lock();
        let route = routes.entry((listener, member.clone())).or_insert_with(|| {
            Arc::new(Route {
                open: AtomicUsize::new(0),
                total: AtomicU64::new(0),
                moved: (0..self.workers).map(|_| Moved::default()).collect(),
            })
        });
        // Sessions are counted in under the lock, and out without it.
        if route.open.load(Ordering::Relaxed) >= limit {
            return None;
        }
        route.open.fetch_add(1, Ordering::Relaxed);
        Some(OpenRoute(Arc::clone(route)))
    }

    /// Sessions open on each member, over all listeners.
    pub(crate) fn open_by_member(&self) -> HashMap<MemberName, usize> {
        let mut open = HashMap::new();
        for ((_, member), route) in self.lock().iter() {
            *open.entry(member.clone()).or_default() += route.open.load(Ordering::Relaxed);
        }
        open
    }

    /// Everything counted, in a fixed order.
    pub(crate) fn counts(&self) -> Vec<RouteCounts> {
        let mut counts: Vec<RouteCounts> = self
            .lock()
            .iter()
            .map(|((listener, member), route)| RouteCounts {
                listener: *listener,
                member: member.clone(),
                open: route.open.load(Ordering::Relaxed),
                total: route.total.load(Ordering::Relaxed),
                bytes_to_server: route.moved.iter().map(|moved| moved.to_server.get()).sum(),
                bytes_to_client: route.moved.iter().map(|moved| moved.to_client.get()).sum(),
            })
            .collect();
        counts.sort_by(|a, b| (a.listener, &a.member).cmp(&(b.listener, &b.member)));
        counts
    }
}

/// Counts under pairs of fixed words.
#[derive(Default)]
pub(crate) struct Tally(Mutex<BTreeMap<(&'static str, &'static str), u64>>);

impl Tally {
    pub(crate) fn count(&self, first: &'static str, second: &'static str) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry((first, second)).or_default() += 1;
    }

    pub(crate) fn counts(&self) -> BTreeMap<(&'static str, &'static str), u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A number that goes up and down, with guards that take themselves out.
#[derive(Clone, Debug, Default)]
pub(crate) struct Gauge(Arc<AtomicUsize>);

/// One unit of a [`Gauge`].
#[derive(Debug)]
pub(crate) struct Counted(Gauge);

impl Gauge {
    pub(crate) fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn enter(&self) -> Counted {
        self.0.fetch_add(1, Ordering::Relaxed);
        Counted(self.clone())
    }

    /// A place among at most `limit`.
    pub(crate) fn enter_below(&self, limit: usize) -> Option<Counted> {
        let entered = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| {
            (count < limit).then_some(count + 1)
        });
        entered.ok().map(|_| Counted(self.clone()))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::name;

    #[test]
    fn a_route_is_summed_over_its_workers() {
        let routes = Routes::new(2);
        let open = routes.enter(0, &name("n1")).begun();
        for worker in 0..2 {
            let moved = open.0.moved(worker).expect("two workers");
            moved.to_client.add(5);
        }
        assert!(open.0.moved(2).is_none());
        assert!(routes.enter_below(0, &name("n1"), 1).is_none());
        assert_eq!((routes.open_on(0, &name("n1")), routes.open_on(1, &name("n1"))), (1, 0));
        drop(routes.enter_below(0, &name("n1"), 2));
        drop(routes.enter(1, &name("n1")).begun());
        drop(routes.enter(1, &name("n1")));
        assert_eq!(routes.open_by_member()[&name("n1")], 1);
        let counts = routes.counts();
        assert_eq!((counts[0].open, counts[0].total, counts[0].bytes_to_client), (1, 1, 10));
        assert_eq!((counts[1].open, counts[1].total), (0, 1));
    }

    #[test]
    fn a_gauge_is_bounded_and_gives_places_back() {
        let gauge = Gauge::default();
        let place = gauge.enter_below(1);
        assert!(place.is_some() && gauge.enter_below(1).is_none());
        drop(place);
        assert!(gauge.enter_below(1).is_some());
        assert_eq!(gauge.get(), 0);
    }
}

//! What all parts of one proxy share.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use pgherd_cluster::clock::{Boottime, wall_now};
use pgherd_cluster::source::ViewHandle;
use pgherd_cluster::view::{Epoch, View};
use tokio::sync::watch;

use crate::cancel::Limiter;
use crate::config::{ListenerConfig, ProxyConfig};
use crate::counters::{Counted, Gauge, Routes, Tally};
use crate::events::EventLog;
use crate::route::Evidence;
use crate::sessions::Sessions;
use crate::warrant::{Vouch, Warrant};

/// One listener and what was counted on it.
pub(crate) struct ListenerState {
    pub(crate) config: ListenerConfig,
    /// Its address as configured, with the port that was bound: unique among listeners.
    pub(crate) name: String,
    pub(crate) addresses: Vec<SocketAddr>,
    /// Client connections, held ones included.
    pub(crate) connections: Gauge,
    pub(crate) held: Gauge,
    pub(crate) accepted: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) hold_expired: AtomicU64,
    /// Sessions that the proxy ended.
    pub(crate) ended: AtomicU64,
}

impl ListenerState {
    pub(crate) fn new(config: ListenerConfig, addresses: Vec<SocketAddr>) -> Self {
        let name = match (config.address.strip_suffix(":0"), addresses.first()) {
            (Some(_), Some(address)) => address.to_string(),
            _ => config.address.clone(),
        };
        Self {
            config,
            name,
            addresses,
            connections: Gauge::default(),
            held: Gauge::default(),
            accepted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            hold_expired: AtomicU64::new(0),
            ended: AtomicU64::new(0),
        }
    }
}

/// Adds one. These change once per connection at most.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Since when the leader key is held as it is, as far as this proxy has seen.
#[derive(Clone, Debug)]
pub(crate) struct Leadership {
    pub(crate) epoch: Option<Epoch>,
    pub(crate) since: Boottime,
    pub(crate) since_wall: SystemTime,
    /// The proxy found it so when it first looked: the true beginning lies before.
    pub(crate) from_the_start: bool,
    /// Whether the leader has said that it is writable.
    pub(crate) writable: bool,
    /// Since when it has not, after it had.
    pub(crate) stopped: Option<Boottime>,
}

/// The newest view with the belief in its leader.
pub(crate) struct Seen {
    pub(crate) view: Arc<View>,
    pub(crate) warrant: Warrant,
    pub(crate) now: Boottime,
}

impl Seen {
    pub(crate) fn evidence(&self) -> Evidence<'_> {
        Evidence {
            view: &self.view,
            warrant: self.warrant,
            now: self.now,
        }
    }
}

pub(crate) struct Shared {
    pub(crate) config: ProxyConfig,
    pub(crate) view: ViewHandle,
    /// The last word of the leader's own agent.
    vouch: ArcSwapOption<Vouch>,
    pub(crate) listeners: Vec<ListenerState>,
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) routes: Routes,
    /// Sessions ended, by reason and SQLSTATE.
    pub(crate) ended: Tally,
    /// Cancel requests, by outcome and by whether the key was known.
    pub(crate) cancels: Tally,
    /// Connections that a limit turned away, by limit.
    pub(crate) limited: Tally,
    pub(crate) held: Gauge,
    pub(crate) unknown_cancels: Limiter,
    pub(crate) events: EventLog,
    /// Changes when a lapsed warrant holds again, which no change of the view tells.
    pub(crate) warrant_back: watch::Sender<u64>,
    pub(crate) leadership: Mutex<Leadership>,
    pub(crate) panics: AtomicU64,
    pub(crate) started: Boottime,
}

impl Shared {
    pub(crate) fn new(config: ProxyConfig, view: ViewHandle, listeners: Vec<ListenerState>, workers: usize) -> Self {
        let started = Boottime::now();
        Self {
            config,
            view,
            vouch: ArcSwapOption::empty(),
            listeners,
            sessions: Sessions::new(workers),
            routes: Routes::new(workers),
            ended: Tally::default(),
            cancels: Tally::default(),
            limited: Tally::default(),
            held: Gauge::default(),
            unknown_cancels: Limiter::new(started),
            events: EventLog::new(),
            warrant_back: watch::Sender::new(0),
            leadership: Mutex::new(Leadership {
                epoch: None,
                since: started,
                since_wall: wall_now(),
                from_the_start: true,
                stopped: None,
                writable: false,
            }),
            panics: AtomicU64::new(0),
            started,
        }
    }

    /// What is known now.
    pub(crate) fn seen(&self) -> Seen {
        let (as_of, view) = self.view.evidence();
        let warrant = Warrant::new(&view, as_of).vouched(&view, self.vouch.load().as_deref());
        Seen {
            view,
            warrant,
            now: Boottime::now(),
        }
    }

    /// Takes the word of the leader's own agent. A later word about the same epoch shortens nothing: the first still stands.
    pub(crate) fn vouched(&self, vouch: Vouch) {
        let known = self.vouch.load_full();
        if known.is_none_or(|known| known.epoch != vouch.epoch || known.end < vouch.end) {
            self.vouch.store(Some(Arc::new(vouch)));
        }
    }

    pub(crate) fn leadership(&self) -> Leadership {
        self.leadership.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How long nobody has led, while nobody does.
    pub(crate) fn leaderless_for(&self) -> Option<Duration> {
        let leadership = self.leadership();
        leadership
            .epoch
            .is_none()
            .then(|| Boottime::now().since(leadership.since))
    }

    /// A place among the held clients of a listener, if there is one left.
    pub(crate) fn hold(&self, listener: usize) -> Option<(Counted, Option<Counted>)> {
        let place = self.held.enter_below(self.config.hold.clients)?;
        Some((
            place,
            self.listeners.get(listener).map(|listener| listener.held.enter()),
        ))
    }
}

//! What all parts of one proxy share.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use arc_swap::{ArcSwap, ArcSwapOption};
use pgherd_cluster::clock::{Boottime, wall_now};
use pgherd_cluster::etcd::StoreError;
use pgherd_cluster::event::EventId;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::PgState;
use pgherd_cluster::source::{Proof, SourceHealth, ViewHandle};
use pgherd_cluster::view::{Epoch, Member, View};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::admission::Occupancy;
use crate::cancel::Limiter;
use crate::config::{ListenerConfig, ProxyConfig};
use crate::console::ConsoleState;
use crate::counters::{Counted, Gauge, Routes, Tally};
use crate::entrance::Entrance;
use crate::events::{EventLog, wall_ms};
use crate::experience::Experience;
use crate::gate::{Gate, Gates};
use crate::histogram::{ByMember, Histogram};
use crate::lag::{self, LeaderPositions};
use crate::refusal::{Awaited, Knowledge, Leaderless};
use crate::reload::ReloadCounts;
use crate::route::Evidence;
use crate::sessions::Sessions;
use crate::stats::Board;
use crate::tls::TlsSettings;
use crate::waiting::Waiting;
use crate::warrant::{Vouch, Warrant, Words, with_leader};

/// One listener and what was counted on it.
pub(crate) struct ListenerState {
    /// As last read: a reload changes what newcomers get.
    pub(crate) config: ArcSwap<ListenerConfig>,
    /// A reload has taken its address away. Its sessions go on.
    pub(crate) closed: AtomicBool,
    /// Its address as configured, with the port that was bound: unique among listeners.
    pub(crate) name: String,
    pub(crate) addresses: Vec<SocketAddr>,
    /// Client connections, held ones included.
    pub(crate) connections: Gauge,
    pub(crate) held: Gauge,
    /// Connections that have not said yet what they come for.
    pub(crate) startups: Gate,
    pub(crate) accepted: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) hold_expired: AtomicU64,
    /// Sessions that the proxy ended.
    pub(crate) ended: AtomicU64,
    /// How long clients waited from the end of their startup message until they had a server, whatever for.
    pub(crate) startup_time: Histogram,
    /// How long clients were held that got a session after all, and that did not.
    pub(crate) hold_time: Histogram,
}

impl ListenerState {
    pub(crate) fn new(config: ListenerConfig, addresses: Vec<SocketAddr>) -> Self {
        let name = match (config.address.strip_suffix(":0"), addresses.first()) {
            (Some(_), Some(address)) => address.to_string(),
            _ => config.address.clone(),
        };
        Self {
            config: ArcSwap::from_pointee(config),
            closed: AtomicBool::new(false),
            name,
            addresses,
            connections: Gauge::default(),
            held: Gauge::default(),
            startups: Gate::new(None),
            accepted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            hold_expired: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            startup_time: Histogram::default(),
            hold_time: Histogram::default(),
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        !self.closed.load(Ordering::Relaxed)
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
    pub(crate) words: Arc<Words>,
    pub(crate) silent: Arc<BTreeSet<MemberName>>,
    pub(crate) positions: Arc<LeaderPositions>,
    pub(crate) now: Boottime,
}

impl Seen {
    pub(crate) fn evidence(&self) -> Evidence<'_> {
        Evidence {
            view: &self.view,
            warrant: self.warrant,
            words: &self.words,
            silent: &self.silent,
            positions: &self.positions,
            now: self.now,
        }
    }
}

/// Why clients are sent away: this proxy's own event, and the holding of the leader key whose end it is about.
struct Behind {
    event: EventId,
    ended: Option<Epoch>,
}

/// A view of the store's, and what the word of a leader without a key makes of it.
struct Completed {
    of: Arc<View>,
    epoch: Epoch,
    view: Arc<View>,
}

pub(crate) struct Shared {
    pub(crate) workers: usize,
    /// As last read.
    pub(crate) config: ArcSwap<ProxyConfig>,
    /// As read with it.
    pub(crate) tls: ArcSwap<TlsSettings>,
    /// What the store says. Whoever routes or ends sessions asks [`Shared::seen`].
    pub(crate) view: ViewHandle,
    /// Only who asks leaders' agents changes them.
    words: ArcSwap<Words>,
    /// So that the view is completed once, not for every client.
    completed: ArcSwapOption<Completed>,
    /// Members that have sessions or might get some, and do not answer.
    silent: ArcSwap<BTreeSet<MemberName>>,
    /// How far the leader was, and when.
    positions: ArcSwap<LeaderPositions>,
    /// What this proxy has experienced with members that readers go to. Locked for each reader's connection, never while
    /// bytes move.
    experience: Mutex<Experience>,
    /// Changes when something else than the view does that may end sessions or open routes.
    recheck: watch::Sender<u64>,
    /// Told when a client begins to wait.
    pub(crate) waits: Notify,
    /// In the order in which they were opened; those that a reload has closed stay, for their sessions.
    listeners: ArcSwap<Vec<Arc<ListenerState>>>,
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) routes: Routes,
    /// Sessions ended, by reason and SQLSTATE.
    pub(crate) ended: Tally,
    /// Cancel requests, by outcome and by whether the key was known.
    pub(crate) cancels: Tally,
    /// Connections that a limit turned away, by limit.
    pub(crate) limited: Tally,
    pub(crate) held: Gauge,
    /// From the dial to a member until its first word, of sessions that came to be.
    pub(crate) connect_times: ByMember,
    /// Clients that have asked for a session and have none yet.
    pub(crate) waiting: Waiting,
    /// Client connections, and those beyond the limit.
    pub(crate) admitted: Gauge,
    pub(crate) over_limit: Gauge,
    /// Connections by user, database and client address.
    pub(crate) occupancy: Occupancy,
    pub(crate) entrance: Entrance,
    /// Connections beyond the limit, by where they are from.
    pub(crate) over_limit_from: Entrance,
    /// Sessions by member, and who waits for one.
    pub(crate) places: Gates,
    /// Sessions that a member has not yet said a word to, and who waits to be one.
    pub(crate) startups: Gates,
    /// Places that operators have taken beyond the limits.
    pub(crate) reserved: Gauge,
    pub(crate) unknown_cancels: Limiter,
    pub(crate) events: EventLog,
    /// What happened last to who leads.
    behind: ArcSwapOption<Behind>,
    /// What the page remembers.
    pub(crate) board: Board,
    /// Changes when a route may have opened that no change of the view tells of.
    pub(crate) opened: watch::Sender<u64>,
    pub(crate) leadership: Mutex<Leadership>,
    pub(crate) panics: AtomicU64,
    pub(crate) reloads: Arc<ReloadCounts>,
    pub(crate) started: Boottime,
    /// Cancelled when the proxy begins to stop.
    pub(crate) stopping: CancellationToken,
    pub(crate) console: ConsoleState,
}

impl Shared {
    pub(crate) fn new(config: ProxyConfig, tls: TlsSettings, view: ViewHandle, workers: usize) -> Self {
        let started = Boottime::now();
        let places = Gates::new(config.limits.per_member);
        let startups = Gates::new(config.limits.startups_per_member);
        Self {
            config: ArcSwap::from_pointee(config),
            tls: ArcSwap::from_pointee(tls),
            view,
            words: ArcSwap::default(),
            completed: ArcSwapOption::empty(),
            silent: ArcSwap::default(),
            positions: ArcSwap::default(),
            experience: Mutex::default(),
            recheck: watch::Sender::new(0),
            waits: Notify::new(),
            listeners: ArcSwap::default(),
            sessions: Sessions::new(workers),
            // Each worker's carrier has counters of its own.
            routes: Routes::new(2 * workers),
            workers,
            ended: Tally::default(),
            cancels: Tally::default(),
            limited: Tally::default(),
            held: Gauge::default(),
            connect_times: ByMember::default(),
            waiting: Waiting::new(workers),
            admitted: Gauge::default(),
            over_limit: Gauge::default(),
            occupancy: Occupancy::default(),
            entrance: Entrance::default(),
            over_limit_from: Entrance::default(),
            places,
            startups,
            reserved: Gauge::default(),
            unknown_cancels: Limiter::new(started),
            events: EventLog::new(),
            behind: ArcSwapOption::empty(),
            board: Board::default(),
            opened: watch::Sender::new(0),
            leadership: Mutex::new(Leadership {
                epoch: None,
                since: started,
                since_wall: wall_now(),
                from_the_start: true,
                stopped: None,
                writable: false,
            }),
            panics: AtomicU64::new(0),
            reloads: Arc::default(),
            started,
            stopping: CancellationToken::new(),
            console: ConsoleState::default(),
        }
    }

    /// Takes a new configuration. For one writer.
    pub(crate) fn set_config(&self, config: ProxyConfig) {
        self.places.set_limit(config.limits.per_member);
        self.startups.set_limit(config.limits.startups_per_member);
        for listener in self.listeners().iter() {
            listener.startups.set_limit(config.limits.startups);
        }
        self.config.store(Arc::new(config));
    }

    /// One of the places that are kept for operators, if `user` says that it is one and there is one left.
    pub(crate) fn reserve(&self, user: Option<&str>) -> Option<Counted> {
        let config = self.config.load();
        let is_operator = config
            .limits
            .operators
            .iter()
            .any(|operator| Some(operator.as_str()) == user);
        is_operator.then(|| self.reserved.enter_below(config.limits.reserved))?
    }

    /// What is known now.
    pub(crate) fn seen(&self) -> Seen {
        let (as_of, view) = self.view.evidence();
        let words = self.words.load_full();
        let now = Boottime::now();
        let vouch = words.instead_of_key(&view, now);
        let (view, warrant) = match vouch {
            Some(vouch) => (self.completed(&view, vouch), Warrant::by_word(vouch, as_of)),
            None => {
                let warrant = match self.view.proof() {
                    Proof::Store => Warrant::new(&view, as_of),
                    Proof::Hearsay => Warrant::hearsay(as_of),
                    Proof::Server(good_for) => Warrant::from_server(as_of, good_for),
                };
                let warrant = warrant.vouched(&view, &words);
                (view, warrant)
            }
        };
        Seen {
            view,
            warrant,
            silent: self.silent.load_full(),
            positions: self.positions.load_full(),
            now,
            words,
        }
    }

    fn completed(&self, view: &Arc<View>, vouch: &Vouch) -> Arc<View> {
        let known = self.completed.load();
        if let Some(known) = known.as_deref()
            && Arc::ptr_eq(&known.of, view)
            && known.epoch == *vouch.epoch()
        {
            return Arc::clone(&known.view);
        }
        let completed = Arc::new(with_leader(view, vouch));
        self.completed.store(Some(Arc::new(Completed {
            of: Arc::clone(view),
            epoch: vouch.epoch().clone(),
            view: Arc::clone(&completed),
        })));
        completed
    }

    /// Changes with what leaders' agents say, and with who does not answer.
    pub(crate) fn rechecks(&self) -> watch::Receiver<u64> {
        self.recheck.subscribe()
    }

    /// Takes what `change` makes of the words of leaders' agents. For one writer.
    pub(crate) fn change_words(&self, change: impl FnOnce(&Words) -> Words) {
        let known = self.words.load_full();
        let changed = change(&known);
        if *known != changed {
            self.words.store(Arc::new(changed));
            self.recheck.send_modify(|times| *times += 1);
        }
    }

    pub(crate) fn experience(&self) -> MutexGuard<'_, Experience> {
        self.experience.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes which members are up. A view that nobody has read yet says nothing of that. For one writer.
    pub(crate) fn note_up(&self, seen: &Seen) {
        let members = &seen.view.members;
        if seen.view.revision == 0 {
            return;
        }
        let is_up = |member: &&Member| member.record.state == PgState::Running && !seen.silent.contains(&member.name);
        let up = members.values().filter(is_up).map(|member| member.name.clone());
        let up = up.collect();
        self.experience()
            .note(|member| members.contains_key(member), &up, seen.now);
    }

    /// Notes how far the leader of a new view is. For one writer.
    pub(crate) fn note_position(&self, seen: &Seen) {
        let known = self.positions.load();
        if let Some(position) = lag::leader_position(&seen.view).filter(|position| known.newest() != Some(*position)) {
            let mut positions = LeaderPositions::clone(&known);
            positions.note(position, seen.now);
            self.positions.store(Arc::new(positions));
        }
    }

    /// Takes who does not answer. For one writer.
    pub(crate) fn set_silent(&self, silent: BTreeSet<MemberName>) {
        if **self.silent.load() != silent {
            self.silent.store(Arc::new(silent));
            self.recheck.send_modify(|times| *times += 1);
        }
    }

    /// All listeners that there have been, by number.
    pub(crate) fn listeners(&self) -> Arc<Vec<Arc<ListenerState>>> {
        self.listeners.load_full()
    }

    /// Adds a listener; its number and itself. For one writer.
    pub(crate) fn add_listener(&self, listener: ListenerState) -> (usize, Arc<ListenerState>) {
        let listener = Arc::new(listener);
        listener.startups.set_limit(self.config.load().limits.startups);
        let mut listeners = self.listeners.load().to_vec();
        listeners.push(Arc::clone(&listener));
        let index = listeners.len() - 1;
        self.listeners.store(Arc::new(listeners));
        (index, listener)
    }

    pub(crate) fn leadership(&self) -> Leadership {
        self.leadership.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The leadership is about to be seen to change: gives the event a name that clients can be told before it is recorded.
    pub(crate) fn name_change(&self, ended: Option<&Epoch>) -> EventId {
        let event = self.events.next_id();
        // A leader that comes after nobody ends nothing more.
        let before = self.behind.load();
        let before = || before.as_ref().and_then(|behind| behind.ended.clone());
        self.behind.store(Some(Arc::new(Behind {
            event: event.clone(),
            ended: ended.cloned().or_else(before),
        })));
        event
    }

    /// The event that clients are told who are sent away for what happened to the leader: the cluster's own where a member
    /// has told of it, else this proxy's.
    pub(crate) fn event_behind(&self) -> Option<EventId> {
        let behind = self.behind.load_full()?;
        let view = self.view.load();
        let told = behind
            .ended
            .as_ref()
            .and_then(|ended| view.events.end_of(&ended.to_string(), wall_ms()));
        Some(told.map_or_else(|| behind.event.clone(), |event| event.id.clone()))
    }

    /// What this proxy itself knows of the cluster, for who is told why it cannot be connected.
    pub(crate) fn knowledge(&self) -> Knowledge {
        let leadership = self.leadership();
        let time = Boottime::now().since(leadership.since);
        let leaderless = match (&leadership.epoch, leadership.from_the_start) {
            (Some(_), _) => None,
            (None, false) => Some(Leaderless::For(time)),
            (None, true) => Some(Leaderless::SinceTheStart(time)),
        };
        let refuses = || {
            let health = self.view.health();
            let health = health.borrow();
            matches!(
                &*health,
                SourceHealth::Failing(StoreError::Auth { .. } | StoreError::Denied { .. })
            )
        };
        let awaited = match self.view.proof() {
            Proof::Store if refuses() => Awaited::StoreThatRefuses,
            Proof::Store => Awaited::Store,
            Proof::Hearsay => Awaited::Agents,
            Proof::Server(_) => Awaited::Hosts,
        };
        Knowledge {
            awaited: Some(awaited),
            leaderless,
        }
    }

    /// Whether the leader is asked for its word once somebody needs it, and nobody does.
    pub(crate) fn is_idle(&self) -> bool {
        self.view.proof() == Proof::Hearsay && self.held.get() == 0 && !self.sessions.any_with_epoch()
    }

    /// A place among the held clients of a listener, if there is one left.
    pub(crate) fn hold(&self, listener: &ListenerState) -> Option<(Counted, Counted)> {
        let place = self.held.enter_below(self.config.load().hold.clients)?;
        let held = listener.held.enter();
        self.waits.notify_one();
        Some((place, held))
    }
}

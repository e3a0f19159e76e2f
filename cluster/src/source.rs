//! The task that keeps the newest view, and knows how current it is.
//!
//! A keepalive makes no event, so a silent watch proves nothing: the stream is asked for progress every second, and after
//! every doubt the whole prefix is read again, in a loop, until that succeeds.

mod agents;
mod hosts;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

pub use self::agents::{AgentsSource, view_document};
pub use self::hosts::{HostsConfig, HostsSource, reach_postgres};
use crate::clock::Boottime;
use crate::etcd::{Budget, Etcd, StoreError};
use crate::http::Access;
use crate::key::{Key, Keys};
use crate::name::Scope;
use crate::view::View;

/// How often a watch is asked for progress, and a proxy's view confirmed.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Two answers missing: the stream is dead, whatever TCP believes.
const SILENCE_MAX: Duration = Duration::from_millis(2500);
/// A list or a confirmation that takes longer is given up and tried on the next endpoint.
const CALL_MAX: Duration = Duration::from_millis(1500);
/// How long the watch may lag behind a confirmation before the prefix is read again.
const CATCH_UP_MAX: Duration = Duration::from_millis(200);
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Whether the source is in touch with the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceHealth {
    /// Nothing has been read yet.
    Starting,
    /// The watch is open.
    Following,
    /// The last try failed so.
    Failing(StoreError),
}

/// What stands behind the leader of a view, and so what a warrant may rest on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// The cluster's store: a confirmation is good for a lease, less its margin.
    Store,
    /// What members tell of each other: the leader's own agent has to be asked.
    Hearsay,
    /// The server itself, which was asked whether it takes writes: good for this long from before the question.
    Server(Duration),
}

struct Shared {
    view: ArcSwap<View>,
    proof: Proof,
    access: Access,
    /// Somebody wants to know more than what a quiet source asks for by itself.
    needed: AtomicBool,
    /// Nanoseconds of the [`Boottime`] at which the store was last heard, whatever it said; 0 for never.
    heard_at: AtomicU64,
    /// Nanoseconds of the [`Boottime`] as of which the leader in the view was last known to be right; 0 for never.
    current_as_of: AtomicU64,
    relist: Notify,
    relists: AtomicU64,
}

/// A reader's handle. Reading the view is one atomic load.
#[derive(Clone)]
pub struct ViewHandle {
    shared: Arc<Shared>,
    changes: watch::Receiver<Arc<View>>,
    health: watch::Receiver<SourceHealth>,
}

impl ViewHandle {
    /// The newest view. Hold the guard briefly, never across an await.
    #[must_use]
    pub fn load(&self) -> Guard<Arc<View>> {
        self.shared.view.load()
    }

    /// The newest view, to keep.
    #[must_use]
    pub fn load_full(&self) -> Arc<View> {
        self.shared.view.load_full()
    }

    /// Every change of the view, newest value only.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<View>> {
        self.changes.clone()
    }

    /// Whether the source is in touch with the store, and changes of that.
    #[must_use]
    pub fn health(&self) -> watch::Receiver<SourceHealth> {
        self.health.clone()
    }

    /// When a question was sent whose answer confirmed the leader of the view; nothing before the first.
    #[must_use]
    pub fn current_as_of(&self) -> Option<Boottime> {
        match self.shared.current_as_of.load(Ordering::Acquire) {
            0 => None,
            nanos => Some(Boottime::from_nanos(nanos)),
        }
    }

    /// When the leader was last confirmed, and a view that is no older: read in this order, for the other way round an old
    /// view could be paired with a newer confirmation.
    #[must_use]
    pub fn evidence(&self) -> (Option<Boottime>, Arc<View>) {
        let confirmed = self.current_as_of();
        (confirmed, self.load_full())
    }

    /// What stands behind the leader of the view.
    #[must_use]
    pub fn proof(&self) -> Proof {
        self.shared.proof
    }

    /// How members' agents are reached.
    #[must_use]
    pub fn access(&self) -> &Access {
        &self.shared.access
    }

    /// Says whether anybody needs a view that is quite new. A source that asks for its news asks less often while nobody does.
    pub fn need(&self, needed: bool) {
        if !self.shared.needed.swap(needed, Ordering::Relaxed) && needed && self.shared.proof != Proof::Store {
            self.shared.relist.notify_one();
        }
    }

    /// When the store was last heard, whatever it said; nothing before the first word.
    #[must_use]
    pub fn heard_at(&self) -> Option<Boottime> {
        match self.shared.heard_at.load(Ordering::Acquire) {
            0 => None,
            nanos => Some(Boottime::from_nanos(nanos)),
        }
    }

    /// Asks for a full read now: for a reader that has a reason to doubt.
    pub fn doubt(&self) {
        self.shared.relist.notify_one();
    }

    /// How many times the prefix has been read whole.
    #[must_use]
    pub fn relists(&self) -> u64 {
        self.shared.relists.load(Ordering::Relaxed)
    }
}

/// The writing end of a [`ViewHandle`].
pub struct ViewPublisher {
    shared: Arc<Shared>,
    changes: watch::Sender<Arc<View>>,
    health: watch::Sender<SourceHealth>,
}

/// A publisher with an empty view, and its handle. The store is behind it.
#[must_use]
pub fn channel(scope: Scope) -> (ViewPublisher, ViewHandle) {
    channel_with(scope, Proof::Store, Access::default())
}

/// The same with something else behind it.
#[must_use]
pub fn channel_with(scope: Scope, proof: Proof, access: Access) -> (ViewPublisher, ViewHandle) {
    let view = Arc::new(View::empty(scope));
    let shared = Arc::new(Shared {
        view: ArcSwap::new(Arc::clone(&view)),
        proof,
        access,
        needed: AtomicBool::new(false),
        heard_at: AtomicU64::new(0),
        current_as_of: AtomicU64::new(0),
        relist: Notify::new(),
        relists: AtomicU64::new(0),
    });
    let (changes, changes_rx) = watch::channel(view);
    let (health, health_rx) = watch::channel(SourceHealth::Starting);
    let handle = ViewHandle {
        shared: Arc::clone(&shared),
        changes: changes_rx,
        health: health_rx,
    };
    (
        ViewPublisher {
            shared,
            changes,
            health,
        },
        handle,
    )
}

impl ViewPublisher {
    /// Makes `view` the newest.
    pub fn publish(&self, view: View) {
        let view = Arc::new(view);
        self.shared.view.store(Arc::clone(&view));
        self.changes.send_replace(view);
    }

    /// Records that the leader of the newest view was right at `asked_at`. Never moves back.
    pub fn confirm(&self, asked_at: Boottime) {
        self.shared
            .current_as_of
            .fetch_max(asked_at.as_nanos(), Ordering::AcqRel);
    }

    fn note_heard(&self, at: Boottime) {
        self.shared.heard_at.fetch_max(at.as_nanos(), Ordering::AcqRel);
    }

    /// Says whether the source is in touch with what it asks.
    pub fn report(&self, health: SourceHealth) {
        self.health.send_if_modified(|current| {
            let changed = *current != health;
            *current = health;
            changed
        });
    }
}

/// The longest reason, in characters, that is kept of one who was asked: it may quote what that one said, and log and page
/// show it.
const REASON_MAX: usize = 200;

/// The beginning of a reason that is too long.
fn brief(reason: String) -> String {
    match reason.char_indices().nth(REASON_MAX) {
        Some((end, _)) => format!("{}...", reason.get(..end).unwrap_or_default()),
        None => reason,
    }
}

/// Keeps a view of one cluster from etcd.
pub struct EtcdSource {
    etcd: Etcd,
    keys: Keys,
    scope: Scope,
    publisher: ViewPublisher,
    confirms: bool,
}

impl EtcdSource {
    /// A source for `scope`, and the handle that reads from it. With `confirms`, the leader is confirmed by a linearizable
    /// read each second, as a proxy's warrants need; an agent asks for itself when it matters.
    #[must_use]
    pub fn new(etcd: Etcd, keys: Keys, scope: Scope, confirms: bool) -> (Self, ViewHandle) {
        Self::with_access(etcd, keys, scope, confirms, Access::default())
    }

    /// The same, where members' agents are reached by `access`.
    #[must_use]
    pub fn with_access(etcd: Etcd, keys: Keys, scope: Scope, confirms: bool, access: Access) -> (Self, ViewHandle) {
        let (publisher, handle) = channel_with(scope.clone(), Proof::Store, access);
        (
            Self {
                etcd,
                keys,
                scope,
                publisher,
                confirms,
            },
            handle,
        )
    }

    /// Runs until `stop`. Errors are reported through the handle's health and tried again for ever.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.follow_for_ever() => {}
            () = self.confirm_for_ever(), if self.confirms => {}
        }
    }

    async fn follow_for_ever(&self) {
        let mut backoff = BACKOFF_MIN;
        loop {
            let started = Instant::now();
            let error = match self.follow().await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            if started.elapsed() > BACKOFF_MAX {
                backoff = BACKOFF_MIN; // It worked for a while: this is a new trouble.
            }
            self.publisher.report(SourceHealth::Failing(error));
            self.etcd.rotate();
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// One full read and the watch after it; returns only with the reason why that ended.
    async fn follow(&self) -> Result<std::convert::Infallible, StoreError> {
        let asked_at = Boottime::now();
        let budget = Budget::new(CALL_MAX, self.etcd.endpoint_count());
        let snapshot = self.etcd.list(self.keys.prefix(), budget).await?;
        let revision = snapshot.revision;
        self.publisher.publish(View::from_entries(
            self.scope.clone(),
            &self.keys,
            snapshot.entries,
            revision,
        ));
        self.publisher.confirm(asked_at);
        self.publisher.note_heard(asked_at);
        self.publisher.shared.relists.fetch_add(1, Ordering::Relaxed);

        // Opened from the revision just read, never from one that an earlier etcd told.
        let budget = Budget::new(CALL_MAX, 1);
        let mut watch = self.etcd.watch(self.keys.prefix(), revision + 1, budget).await?;
        self.publisher.report(SourceHealth::Following);
        let mut heartbeat = interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard_at = Instant::now();
        loop {
            tokio::select! {
                message = watch.message() => {
                    let message = message?;
                    heard_at = Instant::now();
                    self.publisher.note_heard(Boottime::now());
                    if !message.changes.is_empty() {
                        let view = self.publisher.shared.view.load().with(&self.keys, message.changes, message.revision);
                        self.publisher.publish(view);
                    }
                }
                _ = heartbeat.tick() => {
                    if heard_at.elapsed() > SILENCE_MAX {
                        return Err(StoreError::Unreachable { what: format!("the watch is silent for {SILENCE_MAX:?}") });
                    }
                    // Bounded: a full request channel means a stream that moves nothing.
                    timeout(HEARTBEAT, watch.request_progress()).await.map_err(|_| StoreError::Unreachable {
                        what: "the watch takes no requests".to_owned(),
                    })??;
                }
                () = self.publisher.shared.relist.notified() => {
                    return Err(StoreError::Unreachable { what: "a reader doubted the view".to_owned() });
                }
            }
        }
    }

    async fn confirm_for_ever(&self) {
        let mut tick = interval(HEARTBEAT);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let leader_key = self.keys.of(&Key::Leader);
        let etcd = self.etcd.separate();
        loop {
            tick.tick().await;
            let asked_at = Boottime::now();
            let budget = Budget::new(CALL_MAX, etcd.endpoint_count());
            let Ok(snapshot) = etcd.read(&leader_key, budget).await else {
                continue;
            };
            let seen = View::from_entries(self.scope.clone(), &self.keys, snapshot.entries, snapshot.revision);
            let mut changes = self.publisher.changes.subscribe();
            let agrees = timeout(CATCH_UP_MAX, changes.wait_for(|view| view.epoch() == seen.epoch())).await;
            match agrees {
                Ok(Ok(_)) => self.publisher.confirm(asked_at),
                // The watch has not told what the store says: read it all again.
                Ok(Err(_)) | Err(_) => self.publisher.shared.relist.notify_one(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_confirmation_never_moves_back() {
        let (publisher, handle) = channel(Scope::new("c").expect("a plain name"));
        assert_eq!(handle.current_as_of(), None);
        publisher.confirm(Boottime::from_nanos(9));
        publisher.confirm(Boottime::from_nanos(5));
        assert_eq!(handle.current_as_of(), Some(Boottime::from_nanos(9)));
    }

    #[test]
    fn a_reason_that_quotes_a_long_answer_is_cut() {
        let whole = "it answers 500".to_owned();
        assert_eq!(brief(whole.clone()), whole);
        let long = brief("ü".repeat(1 << 20));
        assert_eq!((long.chars().count(), long.ends_with("ü...")), (REASON_MAX + 3, true));
    }

    #[test]
    fn a_published_view_is_what_readers_load_and_watch() {
        let (publisher, handle) = channel(Scope::new("c").expect("a plain name"));
        let changes = handle.subscribe();
        let view = View {
            revision: 7,
            ..View::empty(Scope::new("c").expect("a plain name"))
        };
        publisher.publish(view);
        assert_eq!(handle.load().revision, 7);
        assert!(changes.has_changed().expect("the publisher lives"));
    }
}

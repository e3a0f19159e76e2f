//! The doors of a running proxy, its listeners and its page, and how a new configuration changes them: entirely or not at
//! all, and without touching a session.
//!
//! What is new is bound first, so that an address that cannot be had changes nothing. An address that stays keeps its
//! socket, and its newcomers get the new settings; one that goes is closed, and its sessions go on.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::config::{ConfigError, ListenerConfig, ProxyConfig};
use crate::events::EventKind;
use crate::listener::{self, Acceptor, BindError, Inbox, Inherited};
use crate::proxy::{Addresses, Parts};
use crate::shared::{ListenerState, Shared, count};
use crate::stats;
use crate::tls::TlsSettings;

/// What a reload came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reloaded {
    /// Where the proxy listens now.
    pub addresses: Addresses,
    /// The settings whose new value counts from the next start on.
    pub at_next_start: Vec<&'static str>,
}

/// Why a reload changed nothing.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The new configuration cannot work, or an address cannot be had.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The proxy stops or has stopped.
    #[error("the proxy stops")]
    Stopping,
}

/// Gives a running proxy a new configuration.
#[derive(Clone)]
pub struct Reloader {
    orders: mpsc::Sender<Order>,
    counts: Arc<ReloadCounts>,
}

/// What became of reloads.
#[derive(Debug, Default)]
pub(crate) struct ReloadCounts {
    pub(crate) applied: AtomicU64,
    pub(crate) refused: AtomicU64,
}

/// What a running proxy is asked for.
pub(crate) enum Order {
    Reload {
        config: Box<ProxyConfig>,
        done: oneshot::Sender<Result<Reloaded, ReloadError>>,
    },
    /// Copies of every socket that listens.
    Sockets {
        done: oneshot::Sender<io::Result<Vec<TcpListener>>>,
    },
}

/// A reloader, and where its orders arrive.
pub(crate) fn channel(counts: &Arc<ReloadCounts>) -> (Reloader, mpsc::Receiver<Order>) {
    let (orders, receiver) = mpsc::channel(1);
    let counts = Arc::clone(counts);
    (Reloader { orders, counts }, receiver)
}

impl Reloader {
    /// Applies `config`. Whoever comes after this returned is served by it; sessions go on as they are.
    ///
    /// # Errors
    /// When it cannot work; nothing has changed then.
    pub async fn reload(&self, config: ProxyConfig) -> Result<Reloaded, ReloadError> {
        let (done, answer) = oneshot::channel();
        let config = Box::new(config);
        let sent = self.orders.send(Order::Reload { config, done }).await;
        sent.map_err(|_| ReloadError::Stopping)?;
        let reloaded = answer.await.map_err(|_| ReloadError::Stopping)?;
        if reloaded.is_ok() {
            count(&self.counts.applied);
        }
        reloaded
    }

    /// Copies of the sockets that the proxy listens on, its page's included, for another process to go on with.
    ///
    /// # Errors
    /// When one cannot be copied, or the proxy stops.
    pub async fn sockets(&self) -> io::Result<Vec<TcpListener>> {
        let stopping = || io::Error::other("the proxy stops");
        let (done, answer) = oneshot::channel();
        let sent = self.orders.send(Order::Sockets { done }).await;
        sent.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }

    /// Counts a new configuration that was not applied, whoever refused it.
    pub fn note_failure(&self) {
        count(&self.counts.refused);
    }
}

/// The sockets that a configuration asks for.
pub(crate) struct Bound {
    pub(crate) listeners: Vec<(ListenerConfig, Vec<TcpListener>)>,
    pub(crate) page: Vec<TcpListener>,
}

impl Bound {
    pub(crate) fn new(config: &ProxyConfig, mut inherited: Inherited) -> Result<Self, BindError> {
        let mut bind = |address: &str| listener::bind_or_inherit(address, &mut inherited);
        let page = match &config.stats {
            Some(stats) => bind(&stats.address)?,
            None => Vec::new(),
        };
        let bind = |config: &ListenerConfig| Ok((config.clone(), bind(&config.address)?));
        Ok(Self {
            listeners: config.listeners.iter().map(bind).collect::<Result<_, BindError>>()?,
            page,
        })
    }

    pub(crate) fn addresses(&self) -> Addresses {
        let sockets = self.listeners.iter().map(|(_, sockets)| sockets);
        Addresses {
            listeners: sockets.map(|sockets| listener::addresses(sockets)).collect(),
            stats: listener::addresses(&self.page),
        }
    }
}

/// How long a name may take to resolve.
const BIND_MAX: Duration = Duration::from_secs(5);

/// Binds off the threads that fence sessions: a resolver may be slow exactly when the network is in trouble.
async fn bind(address: String) -> Result<Vec<TcpListener>, BindError> {
    let mut binding = JoinSet::new();
    let asked_for = address.clone();
    binding.spawn_blocking(move || listener::bind(&asked_for));
    let failed = |why: &'static str| {
        let source = std::io::Error::other(why);
        Err(BindError::Listen { address, source })
    };
    match timeout(BIND_MAX, binding.join_next()).await {
        Ok(Some(Ok(bound))) => bound,
        Ok(_) => failed("binding ended by a defect"),
        Err(_) => failed("its name was not resolved in time"),
    }
}

/// An open listener.
struct Door {
    state: Arc<ListenerState>,
    /// Copies, for whoever takes the proxy over.
    sockets: Vec<TcpListener>,
    /// Stops its acceptors when dropped.
    stop: DropGuard,
    /// Closed once their sockets are.
    ended: mpsc::Receiver<()>,
}

/// The page's sockets.
struct Page {
    addresses: Vec<std::net::SocketAddr>,
    /// Copies, for whoever takes the proxy over.
    sockets: Vec<TcpListener>,
    /// Stops it when dropped.
    stop: DropGuard,
}

/// Everything that listens.
pub(crate) struct Doors {
    shared: Arc<Shared>,
    inboxes: Vec<Inbox>,
    /// In the order of the configuration.
    open: Vec<Door>,
    page: Page,
    /// End only when they are told to, or by failing.
    pub(crate) acceptors: Parts,
    /// The same.
    pub(crate) pages: Parts,
    /// Not a child of what stops the proxy: the page outlives the drain.
    background: CancellationToken,
}

/// What becomes of one listener of a new configuration.
enum Plan {
    /// This one of the open doors stays.
    Stays(Door),
    Opens(Vec<TcpListener>),
}

impl Doors {
    /// Opens what was bound. Pages end with `background`.
    pub(crate) fn open(
        shared: &Arc<Shared>,
        bound: Bound,
        inboxes: Vec<Inbox>,
        background: &CancellationToken,
    ) -> Self {
        let mut pages = JoinSet::new();
        let page = open_page(shared, bound.page, &mut pages, background);
        let mut doors = Self {
            shared: Arc::clone(shared),
            inboxes,
            open: Vec::new(),
            page,
            acceptors: JoinSet::new(),
            pages,
            background: background.clone(),
        };
        for (config, sockets) in bound.listeners {
            let door = doors.open_one(config, sockets);
            doors.open.push(door);
        }
        doors
    }

    fn open_one(&mut self, config: ListenerConfig, sockets: Vec<TcpListener>) -> Door {
        let (index, state) = self.state_for(config, &sockets);
        let stop = CancellationToken::new();
        let (ended, all_ended) = mpsc::channel(1);
        let copies = copies(&sockets);
        for socket in sockets {
            let acceptor = Acceptor {
                shared: Arc::clone(&self.shared),
                index,
                listener: Arc::clone(&state),
                inboxes: self.inboxes.clone(),
                ended: ended.clone(),
            };
            self.acceptors.spawn(acceptor.run(socket, stop.clone()));
        }
        Door {
            state,
            sockets: copies,
            stop: stop.drop_guard(),
            ended: all_ended,
        }
    }

    /// The listener that was there before goes on counting, or reloads would add listeners for ever.
    fn state_for(&self, config: ListenerConfig, sockets: &[TcpListener]) -> (usize, Arc<ListenerState>) {
        let fresh = ListenerState::new(config, listener::addresses(sockets));
        let listeners = self.shared.listeners();
        let before = listeners
            .iter()
            .enumerate()
            .find(|(_, state)| !state.is_open() && state.name == fresh.name && state.addresses == fresh.addresses);
        let Some((index, state)) = before else {
            return self.shared.add_listener(fresh);
        };
        state.config.store(fresh.config.load_full());
        state.closed.store(false, Ordering::Relaxed);
        (index, Arc::clone(state))
    }

    /// Obeys an order, and says what came of it.
    pub(crate) async fn obey(&mut self, order: Order) {
        match order {
            Order::Reload { config, done } => {
                let reloaded = self.reload(*config).await;
                let _ = done.send(reloaded); // Who asked may be gone; the configuration counts all the same.
            }
            Order::Sockets { done } => {
                let doors = self.open.iter().flat_map(|door| &door.sockets);
                let sockets = doors.chain(&self.page.sockets).map(TcpListener::try_clone);
                let _ = done.send(sockets.collect()); // Closed again when nobody takes them.
            }
        }
    }

    async fn reload(&mut self, mut config: ProxyConfig) -> Result<Reloaded, ReloadError> {
        config.check().map_err(BindError::from)?;
        // Also when only the files have changed.
        let tls = TlsSettings::load(config.client_tls.as_ref(), &config.server_tls)
            .map_err(|error| BindError::from(ConfigError::from(error)))?;
        let before = self.shared.config.load_full();
        let page_stays = config.stats == before.stats;
        // Bound before anything is changed.
        let mut fresh = Vec::new();
        let mut staying = self.matched(&config.listeners);
        for (listener, stays) in config.listeners.iter().zip(&staying) {
            let sockets = if stays.is_none() {
                bind(listener.address.clone()).await?
            } else {
                Vec::new()
            };
            fresh.push(sockets);
        }
        let page = match &config.stats {
            Some(stats) if !page_stays => bind(stats.address.clone()).await?,
            Some(_) | None => Vec::new(),
        };

        let mut at_next_start = Vec::new();
        if config.workers != before.workers {
            at_next_start.push("workers");
            config.workers = before.workers;
        }
        self.shared.tls.store(Arc::new(tls));
        self.shared.set_config(config.clone());
        let mut open: Vec<Option<Door>> = std::mem::take(&mut self.open).into_iter().map(Some).collect();
        let plans: Vec<Plan> = staying
            .drain(..)
            .zip(fresh)
            .map(|(stays, sockets)| match stays.and_then(|at| open.get_mut(at)?.take()) {
                Some(door) => Plan::Stays(door),
                None => Plan::Opens(sockets),
            })
            .collect();
        for door in open.into_iter().flatten() {
            door.close().await;
        }
        for (listener, plan) in config.listeners.into_iter().zip(plans) {
            let door = match plan {
                Plan::Stays(door) => {
                    door.state.config.store(Arc::new(listener));
                    door
                }
                Plan::Opens(sockets) => self.open_one(listener, sockets),
            };
            self.open.push(door);
        }
        if !page_stays {
            self.page = open_page(&self.shared, page, &mut self.pages, &self.background);
        }
        self.shared.events.record(EventKind::Reloaded);
        Ok(Reloaded {
            addresses: self.addresses(),
            at_next_start,
        })
    }

    /// For each of these listeners the open door that has its address; each door at most once.
    fn matched(&self, listeners: &[ListenerConfig]) -> Vec<Option<usize>> {
        let mut taken = vec![false; self.open.len()];
        let find = |listener: &ListenerConfig| {
            let mut doors = self.open.iter().zip(taken.iter_mut()).enumerate();
            let found =
                doors.find(|(_, (door, taken))| !**taken && door.state.config.load().address == listener.address);
            found.map(|(at, (_, taken))| {
                *taken = true;
                at
            })
        };
        listeners.iter().map(find).collect()
    }

    fn addresses(&self) -> Addresses {
        let listeners = self.open.iter().map(|door| door.state.addresses.clone());
        Addresses {
            listeners: listeners.collect(),
            stats: self.page.addresses.clone(),
        }
    }

    /// Closes the listeners and gives their ports back; the pages stay, until their background ends.
    pub(crate) async fn close(mut self) -> Parts {
        self.open.clear();
        while self.acceptors.join_next().await.is_some() {} // Ports are free from here on, inboxes closed.
        self.page.sockets.clear();
        // Pages go on without their door.
        self.page.stop.disarm();
        self.pages
    }
}

impl Door {
    /// Returns when the port is free.
    async fn close(self) {
        let Self {
            state,
            sockets,
            stop,
            mut ended,
        } = self;
        drop(sockets);
        state.closed.store(true, Ordering::Relaxed);
        drop(stop);
        while ended.recv().await.is_some() {}
    }
}

/// A socket that cannot be copied is not handed on.
fn copies(sockets: &[TcpListener]) -> Vec<TcpListener> {
    sockets.iter().filter_map(|socket| socket.try_clone().ok()).collect()
}

fn open_page(
    shared: &Arc<Shared>,
    sockets: Vec<TcpListener>,
    pages: &mut Parts,
    background: &CancellationToken,
) -> Page {
    let stop = background.child_token();
    let addresses = listener::addresses(&sockets);
    let copies = copies(&sockets);
    for socket in sockets {
        pages.spawn(stats::serve(Arc::clone(shared), socket, stop.clone()));
    }
    Page {
        addresses,
        sockets: copies,
        stop: stop.drop_guard(),
    }
}

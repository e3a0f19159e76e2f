//! The doors of a running proxy, its listeners and its page, and how a new configuration changes them: entirely or not at
//! all, and without touching a session.
//!
//! What is new is bound first, so that an address that cannot be had changes nothing. An address that stays keeps its
//! socket, and its newcomers get the new settings; one that goes is closed, and its sessions go on.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::warn;

use crate::config::{ConfigError, ListenerConfig, ProxyConfig};
use crate::events::EventKind;
use crate::listener::{self, Acceptor, BindError, Inbox, Inherited};
use crate::listening::Listening;
use crate::proxy::{Addresses, Parts, all_ended};
use crate::shared::{ListenerState, Shared, count};
use crate::stats;
use crate::tls::{TlsConfigError, TlsSettings};
use crate::unix;
use crate::worker::Job;

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
        done: oneshot::Sender<io::Result<Vec<OwnedFd>>>,
    },
    /// The page is served by whoever took the sockets over.
    ClosePage { done: oneshot::Sender<()> },
    /// Whose the files of unix sockets are from now on.
    Files { ours: bool, done: oneshot::Sender<()> },
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
    pub async fn sockets(&self) -> io::Result<Vec<OwnedFd>> {
        let stopping = || io::Error::other("the proxy stops");
        let (done, answer) = oneshot::channel();
        let sent = self.orders.send(Order::Sockets { done }).await;
        sent.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }

    /// Closes the page, since whoever took the sockets over serves it now, and knows the newcomers. Returns when this process
    /// accepts nothing more there, or the proxy stops.
    pub async fn close_page(&self) {
        let (done, closed) = oneshot::channel();
        if self.orders.send(Order::ClosePage { done }).await.is_ok() {
            let _ = closed.await; // A proxy that stops closes it as well.
        }
    }

    /// Says whose the files of unix sockets are from now on, and so whether this process removes them at its end: `ours`
    /// where it goes on with another's sockets, and not where another one goes on with its own.
    pub async fn set_files_ours(&self, ours: bool) {
        let (done, answer) = oneshot::channel();
        if self.orders.send(Order::Files { ours, done }).await.is_ok() {
            let _ = answer.await; // A proxy that stops has removed them.
        }
    }

    /// Counts a new configuration that was not applied, whoever refused it.
    pub fn note_failure(&self) {
        count(&self.counts.refused);
    }
}

/// The sockets that a configuration asks for.
pub(crate) struct Bound {
    pub(crate) listeners: Vec<(ListenerConfig, Vec<Listening>)>,
    pub(crate) page: Vec<TcpListener>,
}

impl Bound {
    pub(crate) fn new(config: &ProxyConfig, mut inherited: Inherited) -> Result<Self, BindError> {
        let page = match &config.stats {
            Some(stats) => listener::bind_or_inherit(&stats.address, &mut inherited)?,
            None => Vec::new(),
        };
        let open = |config: &ListenerConfig| Ok((config.clone(), listener::open(config, &mut inherited)?));
        Ok(Self {
            listeners: config.listeners.iter().map(open).collect::<Result<_, BindError>>()?,
            page,
        })
    }

    pub(crate) fn addresses(&self) -> Addresses {
        let sockets = self.listeners.iter().map(|(_, sockets)| sockets);
        Addresses {
            listeners: sockets.clone().map(|sockets| listener::addresses(sockets)).collect(),
            unix: sockets.flat_map(|sockets| listener::names(sockets)).collect(),
            stats: page_addresses(&self.page),
        }
    }
}

/// How long a name may take to resolve.
const BIND_MAX: Duration = Duration::from_secs(5);
/// How long a few small files may take to be read.
const FILES_MAX: Duration = Duration::from_secs(5);

/// How long acceptors may take to end: whom they have just accepted they hand over, for a moment. A worker that hangs must
/// not keep the others from a reload or a stop.
const CLOSE_MAX: Duration = Duration::from_secs(4);

/// Binds off the threads that fence sessions: a resolver may be slow exactly when the network is in trouble.
async fn bind<T: Send + 'static>(
    address: String,
    open: impl FnOnce() -> Result<T, BindError> + Send + 'static,
) -> Result<T, BindError> {
    let mut binding = JoinSet::new();
    binding.spawn_blocking(open);
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

/// Reads the files of certificates, off the same threads: a disk may hang.
async fn load_tls(config: &ProxyConfig) -> Result<TlsSettings, BindError> {
    let (clients, servers, page) = (
        config.client_tls.clone(),
        config.server_tls.clone(),
        config.page_tls.clone(),
    );
    let mut loading = JoinSet::new();
    loading.spawn_blocking(move || {
        let tls = TlsSettings::load(clients.as_ref(), &servers);
        tls.and_then(|tls| tls.with_page(page.as_ref()))
    });
    let loaded = match timeout(FILES_MAX, loading.join_next()).await {
        Ok(Some(Ok(loaded))) => loaded,
        Ok(_) => Err(TlsConfigError::Other(
            "reading certificates ended by a defect".to_owned(),
        )),
        Err(_) => Err(TlsConfigError::Other(
            "the files of certificates were not read in time".to_owned(),
        )),
    };
    loaded.map_err(|error| ConfigError::from(error).into())
}

/// An open listener.
struct Door {
    state: Arc<ListenerState>,
    /// Copies, for whoever takes the proxy over.
    sockets: Vec<Listening>,
    /// It listens on a unix socket whose file some proxy has made.
    has_file: bool,
    /// Stops its acceptors when dropped.
    stop: DropGuard,
    /// Closed once their sockets are.
    ended: mpsc::Receiver<()>,
}

/// The page's sockets.
struct Page {
    addresses: Vec<SocketAddr>,
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
    Opens(Vec<Listening>),
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

    fn open_one(&mut self, config: ListenerConfig, sockets: Vec<Listening>) -> Door {
        let (index, state) = self.state_for(config, &sockets);
        let stop = CancellationToken::new();
        let (ended, all_ended) = mpsc::channel(1);
        let copies = sockets.iter().filter_map(|socket| socket.try_clone().ok()).collect();
        let has_file = sockets.iter().any(Listening::has_file);
        let home = index % self.inboxes.len().max(1);
        for socket in sockets {
            let acceptor = Acceptor {
                shared: Arc::clone(&self.shared),
                index,
                listener: Arc::clone(&state),
                inboxes: self.inboxes.clone(),
                home,
                ended: ended.clone(),
            };
            // On a worker's thread: what that one serves itself is not handed from thread to thread.
            let (done, was) = oneshot::channel();
            let job = Job::Accept {
                acceptor: Box::new(acceptor),
                socket,
                stop: stop.clone(),
                done,
            };
            let worker = self.inboxes.get(home).cloned();
            self.acceptors.spawn(async move {
                if let Some(worker) = worker {
                    let _ = worker.sender.send(job).await; // One that has ended says nothing.
                }
                was.await.map_err(|_| io::Error::other("its worker has ended"))?
            });
        }
        Door {
            state,
            sockets: copies,
            has_file,
            stop: stop.drop_guard(),
            ended: all_ended,
        }
    }

    /// The listener that was there before goes on counting, or reloads would add listeners for ever.
    fn state_for(&self, config: ListenerConfig, sockets: &[Listening]) -> (usize, Arc<ListenerState>) {
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
                let doors = doors.map(|socket| socket.try_clone().map(OwnedFd::from));
                let pages = self
                    .page
                    .sockets
                    .iter()
                    .map(|socket| socket.try_clone().map(OwnedFd::from));
                let _ = done.send(doors.chain(pages).collect()); // Closed again when nobody takes them.
            }
            Order::Files { ours, done } => {
                for door in &self.open {
                    door.set_file_ours(ours);
                }
                let _ = done.send(());
            }
            Order::ClosePage { done } => {
                self.page = open_page(&self.shared, Vec::new(), &mut self.pages, &self.background);
                let _ = timeout(CLOSE_MAX, all_ended(&mut self.pages)).await;
                let _ = done.send(()); // Who asked may be gone.
            }
        }
    }

    async fn reload(&mut self, mut config: ProxyConfig) -> Result<Reloaded, ReloadError> {
        config.check().map_err(BindError::from)?;
        // Also when only the files have changed.
        let tls = load_tls(&config).await?;
        let before = self.shared.config.load_full();
        let page_stays = config.stats == before.stats;
        // Bound before anything is changed.
        let mut fresh = Vec::new();
        let mut staying = self.matched(&config.listeners);
        for (listener, stays) in config.listeners.iter().zip(&staying) {
            let sockets = if stays.is_none() {
                let listener = listener.clone();
                bind(listener.address.clone(), move || {
                    listener::open(&listener, &mut Inherited::default())
                })
                .await?
            } else {
                Vec::new()
            };
            fresh.push(sockets);
        }
        let page = match &config.stats {
            Some(stats) if !page_stays => {
                let address = stats.address.clone();
                bind(address.clone(), move || listener::bind(&address)).await?
            }
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
                    door.change(listener);
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
            unix: self
                .open
                .iter()
                .flat_map(|door| listener::names(&door.sockets))
                .collect(),
            stats: self.page.addresses.clone(),
        }
    }

    /// Closes the listeners and gives their ports back; the pages stay, until their background ends.
    pub(crate) async fn close(mut self) -> Parts {
        self.open.clear();
        // Ports are free from here on, inboxes closed.
        if timeout(CLOSE_MAX, all_ended(&mut self.acceptors)).await.is_err() {
            warn!(
                "a listener has not closed in {} s: its worker hangs",
                CLOSE_MAX.as_secs()
            );
            self.acceptors.abort_all();
        }
        self.page.sockets.clear();
        // Pages go on without their door.
        self.page.stop.disarm();
        self.pages
    }
}

impl Door {
    /// Takes new settings for its newcomers.
    fn change(&self, config: ListenerConfig) {
        let before = self.state.config.swap(Arc::new(config.clone()));
        if let Some(path) = listener::file_of(&config).filter(|_| before.mode != config.mode)
            && let Err(error) = unix::set_mode(&path, config.mode)
        {
            warn!(%error, "the mode of {} stays as it is", path.display());
        }
    }

    fn set_file_ours(&self, ours: bool) {
        if let Some(path) = listener::file_of(&self.state.config.load()).filter(|_| self.has_file) {
            if ours { unix::claim(&path) } else { unix::release(&path) }
        }
    }

    /// Returns when the port is free, or its worker has not given it back in time.
    async fn close(self) {
        let Self {
            state,
            sockets,
            has_file: _,
            stop,
            mut ended,
        } = self;
        drop(sockets);
        state.closed.store(true, Ordering::Relaxed);
        drop(stop);
        let closed = async { while ended.recv().await.is_some() {} };
        if timeout(CLOSE_MAX, closed).await.is_err() {
            let (listener, seconds) = (&state.name, CLOSE_MAX.as_secs());
            warn!(listener, "a listener has not closed in {seconds} s: its worker hangs");
        }
    }
}

fn page_addresses(sockets: &[TcpListener]) -> Vec<SocketAddr> {
    sockets.iter().filter_map(|socket| socket.local_addr().ok()).collect()
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
    let addresses = page_addresses(&sockets);
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

#[cfg(test)]
mod tests {
    use pgherd_cluster::name::Scope;
    use pgherd_cluster::source;

    use super::*;
    use crate::counters::Gauge;

    /// Far more than everything here takes.
    const PATIENCE: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_worker_that_hangs_keeps_neither_a_reload_nor_a_stop_waiting() {
        let mut config = ProxyConfig::new(vec![ListenerConfig::write("127.0.0.1:0")]);
        let tls = TlsSettings::load(None, &config.server_tls).expect("nothing to read");
        let (_publisher, view) = source::channel(Scope::new("c").expect("a plain name"));
        let bound = Bound::new(&config, Inherited::default()).expect("any free port");
        let shared = Arc::new(Shared::new(config.clone(), tls, view, 1));
        // Nobody takes what is in it.
        let (sender, _inbox) = mpsc::channel(8);
        let load = Gauge::default();
        let inboxes = vec![Inbox { sender, load }];
        let mut doors = Doors::open(&shared, bound, inboxes, &CancellationToken::new());
        config.listeners = vec![ListenerConfig::write("localhost:0")];
        let (done, told) = oneshot::channel();
        let order = Order::Reload {
            config: Box::new(config),
            done,
        };
        timeout(PATIENCE, doors.obey(order)).await.expect("it is obeyed");
        told.await.expect("told").expect("a good configuration");
        timeout(PATIENCE, doors.close()).await.expect("it is closed");
    }
}

//! Binding ports, and handing what connects to the least loaded worker.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::admission::Place;
use crate::config::{ConfigError, ListenerConfig};
use crate::counters::{Counted, Gauge};
use crate::entrance::{STARTUPS, Starting};
use crate::listening::Listening;
use crate::network::Network;
use crate::peer::Peer;
use crate::seldom::Seldom;
use crate::shared::{ListenerState, Shared, count};
use crate::stream::socket::{self, Socket as ClientSocket, Travelling};
use crate::unix::{self, UnixName};
use crate::worker::Job;

const BACKLOG: i32 = 1024;
/// Connections beyond the limit that may be there at a time to hear why they are refused.
const OVER_LIMIT_MAX: usize = 64;
/// Of these, from one address: operators come in by the same way.
const OVER_LIMIT_PER_ADDRESS_MAX: usize = OVER_LIMIT_MAX / 4;
/// For a client that was accepted when the listener is told to stop.
const HAND_OVER_MAX: Duration = Duration::from_secs(2);
/// After an error of accept that concerns the process, such as no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

static CANNOT_ACCEPT: Seldom = Seldom::new();

/// Why a proxy could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The configuration cannot work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A port could not be had.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// As configured.
        address: String,
        /// The system's word.
        source: io::Error,
    },
}

/// Sockets that listen already: another proxy's that this one takes over, or those that a service manager holds.
#[derive(Debug, Default)]
pub struct Inherited(Vec<Listening>);

impl Inherited {
    /// All of them. Those whose address is not configured are closed once the proxy is bound, and what is no socket that
    /// clients could use is closed here.
    #[must_use]
    pub fn new(sockets: Vec<OwnedFd>) -> Self {
        Self(sockets.into_iter().filter_map(Listening::of).collect())
    }

    /// Their addresses.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        addresses(&self.0)
    }

    /// The names of those that are unix sockets, as a configuration has them.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        names(&self.0)
    }

    fn take(&mut self, address: SocketAddr) -> Option<TcpListener> {
        let at = self.0.iter().position(|socket| socket.address() == Some(address))?;
        match self.0.swap_remove(at) {
            Listening::Tcp(listener) => Some(listener),
            Listening::Unix { .. } => None,
        }
    }

    fn take_named(&mut self, name: &str) -> Option<Listening> {
        let is_it = |socket: &Listening| socket.name().is_some_and(|own| own == name);
        let at = self.0.iter().position(is_it)?;
        Some(self.0.swap_remove(at))
    }
}

/// Sockets for a listener: on every address that its own stands for, or the one that it names.
pub(crate) fn open(config: &ListenerConfig, inherited: &mut Inherited) -> Result<Vec<Listening>, BindError> {
    let address = &config.address;
    let Some(name) = UnixName::of(address) else {
        let sockets = bind_or_inherit(address, inherited)?;
        return Ok(sockets.into_iter().map(Listening::Tcp).collect());
    };
    let socket = match inherited.take_named(address) {
        Some(socket) => Ok(socket.with_file_of_another()),
        None => unix::bind(&name, config.mode, BACKLOG).map(|(listener, file)| Listening::Unix { listener, file }),
    };
    socket.map(|socket| vec![socket]).map_err(|source| BindError::Listen {
        address: address.clone(),
        source,
    })
}

/// The file of a listener on a unix socket.
pub(crate) fn file_of(config: &ListenerConfig) -> Option<PathBuf> {
    match UnixName::of(&config.address)? {
        UnixName::Path(path) => Some(path),
        UnixName::Abstract(_) => None,
    }
}

/// Sockets that listen on every address that `address` stands for.
pub(crate) fn bind(address: &str) -> Result<Vec<TcpListener>, BindError> {
    bind_or_inherit(address, &mut Inherited::default())
}

/// The same, with those that listen already.
pub(crate) fn bind_or_inherit(address: &str, inherited: &mut Inherited) -> Result<Vec<TcpListener>, BindError> {
    let failed = |source| BindError::Listen {
        address: address.to_owned(),
        source,
    };
    let mut listeners = Vec::new();
    for socket_address in address.to_socket_addrs().map_err(failed)? {
        let socket = match inherited.take(socket_address) {
            Some(socket) => inherit(socket),
            None => bind_one(socket_address),
        };
        listeners.push(socket.map_err(failed)?);
    }
    if listeners.is_empty() {
        return Err(failed(io::Error::new(
            io::ErrorKind::NotFound,
            "the name stands for no address",
        )));
    }
    Ok(listeners)
}

fn inherit(socket: TcpListener) -> io::Result<TcpListener> {
    socket.set_nonblocking(true)?;
    socket::tune(&SockRef::from(&socket))?;
    Ok(socket)
}

fn bind_one(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // Sessions of a proxy that has just ended keep no new one from starting.
    socket.set_reuse_address(true)?;
    // Whoever is accepted inherits these.
    socket::tune(&SockRef::from(&socket))?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// The addresses that were bound; ports that were asked for as 0 are known here.
pub(crate) fn addresses(listeners: &[Listening]) -> Vec<SocketAddr> {
    listeners.iter().filter_map(Listening::address).collect()
}

/// The names of those that are unix sockets.
pub(crate) fn names(listeners: &[Listening]) -> Vec<String> {
    listeners.iter().filter_map(Listening::name).collect()
}

/// A place under a limit, given back when dropped.
pub(crate) struct Admission {
    /// Here only to be told that there is no room, or to cancel a query.
    pub(crate) over_limit: bool,
    _place: Counted,
    _over_limit_from: Option<Place<Network>>,
}

/// A client's socket.
pub(crate) enum Arrival {
    /// On the thread that accepted it, and registered there.
    Here(ClientSocket),
    /// On its way to another.
    Elsewhere(Travelling),
}

impl Arrival {
    /// Registered on this thread.
    pub(crate) fn arrive(self) -> io::Result<ClientSocket> {
        match self {
            Self::Here(stream) => Ok(stream),
            Self::Elsewhere(stream) => ClientSocket::arrive(stream),
        }
    }
}

/// A connection on its way to a worker.
pub(crate) struct Accepted {
    pub(crate) stream: Arrival,
    pub(crate) peer: Peer,
    pub(crate) starting: Starting,
    /// The listener's number, and itself.
    pub(crate) index: usize,
    pub(crate) listener: Arc<ListenerState>,
    pub(crate) admission: Admission,
    pub(crate) load: Counted,
}

/// A place for one more connection, within the limit as last read, or among the few beyond it. `address` is whose it is, as far
/// as that is known.
fn admit(shared: &Shared, address: Option<IpAddr>) -> Option<Admission> {
    let limit = shared.config.load().limits.connections;
    if let Some(place) = shared.admitted.enter_below(limit) {
        return Some(Admission {
            over_limit: false,
            _place: place,
            _over_limit_from: None,
        });
    }
    let from = match address {
        Some(address) => Some(
            shared
                .over_limit_from
                .enter(address, Some(OVER_LIMIT_PER_ADDRESS_MAX))?,
        ),
        None => None,
    };
    Some(Admission {
        over_limit: true,
        _place: shared.over_limit.enter_below(OVER_LIMIT_MAX)?,
        _over_limit_from: from,
    })
}

/// A worker's inbox, and how many connections it has.
#[derive(Clone)]
pub(crate) struct Inbox {
    pub(crate) sender: mpsc::Sender<Job>,
    pub(crate) load: Gauge,
}

/// Accepts on one socket of a listener.
pub(crate) struct Acceptor {
    pub(crate) shared: Arc<Shared>,
    /// The listener's number, and itself.
    pub(crate) index: usize,
    pub(crate) listener: Arc<ListenerState>,
    pub(crate) inboxes: Vec<Inbox>,
    /// The number of the worker on whose thread this runs.
    pub(crate) home: usize,
    /// Dropped after the socket: who holds the other end learns that the port is free.
    pub(crate) ended: mpsc::Sender<()>,
}

impl Acceptor {
    /// Runs until `stop`. The port is given back when it returns.
    pub(crate) async fn run(self, socket: Listening, stop: CancellationToken) -> io::Result<()> {
        let _ended = self.ended.clone(); // Dropped last of all.
        let (socket, _file) = socket.ready()?;
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                accepted = socket.accept() => accepted,
            };
            match accepted {
                // Who has been accepted is nobody else's to serve.
                Ok((stream, peer)) => tokio::select! {
                    () = self.hand_over(stream, peer) => {}
                    () = a_while_after(&stop) => return Ok(()),
                },
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    if let Some(kept_back) = CANNOT_ACCEPT.admits(Boottime::now()) {
                        warn!(%error, kept_back, "cannot accept connections");
                    }
                    self.shared.limited.count("accept", "");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Whose connection this is: behind a trusted proxy are many clients, each known when it is told of.
    fn address_of(&self, peer: &Peer) -> Option<IpAddr> {
        let is_trusted = peer.is_in(&self.listener.config.load().proxy_protocol);
        peer.address().filter(|_| !is_trusted)
    }

    /// A place among those of its address that have not said yet what they come for.
    fn enter(&self, address: Option<IpAddr>) -> Option<Option<Place<Network>>> {
        let Some(address) = address else {
            return Some(None);
        };
        let limit = self.shared.config.load().limits.startups_per_client_address;
        self.shared.entrance.enter(address, limit).map(Some)
    }

    async fn hand_over(&self, stream: ClientSocket, peer: Peer) {
        count(&self.listener.accepted);
        let address = self.address_of(&peer);
        let Some(from_address) = self.enter(address) else {
            self.shared.limited.count(STARTUPS, "");
            return; // Closed without a word: whoever is served well says something before there are so many.
        };
        let Some(admission) = admit(&self.shared, address) else {
            self.shared.limited.count("refusals", "");
            return; // Closed without a word: there are too many even to refuse.
        };
        // The first among equals is this thread's own.
        let (before, from_here) = self.inboxes.split_at(self.home.min(self.inboxes.len()));
        let inboxes = from_here.iter().chain(before);
        let Some((steps, inbox)) = inboxes.enumerate().min_by_key(|(_, inbox)| inbox.load.get()) else {
            return;
        };
        let stream = if steps == 0 {
            Arrival::Here(stream)
        } else {
            let Ok(stream) = stream.leave() else { return };
            Arrival::Elsewhere(stream)
        };
        // Waiting here leaves further clients in the kernel's queue, and so does waiting for a worker.
        let starting = Starting {
            from_address,
            _on_listener: self.listener.startups.wait(Boottime::now()).await,
        };
        let accepted = Box::new(Accepted {
            stream,
            peer,
            starting,
            index: self.index,
            listener: Arc::clone(&self.listener),
            admission,
            load: inbox.load.enter(),
        });
        // A worker that has ended takes the proxy with it.
        let _ = inbox.sender.send(Job::Serve(accepted)).await;
    }
}

/// A stop waits no longer than this for the last client to reach its worker.
async fn a_while_after(stop: &CancellationToken) {
    stop.cancelled().await;
    sleep(HAND_OVER_MAX).await;
}

/// The client was gone before it was accepted; see accept(2) on errors that are already pending on the new socket.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

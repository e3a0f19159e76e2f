//! The proxy's life: bind, run, stop.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

use pgherd_cluster::source::ViewHandle;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::config::ProxyConfig;
use crate::events::EventKind;
use crate::listener::{self, Acceptor, BindError, Inbox, Limits};
use crate::sessions::Ending;
use crate::shared::{ListenerState, Shared};
use crate::worker::Worker;
use crate::{fence, stats, vouch};

/// For workers to end after their sessions were cut.
const WORKERS_END_MAX: Duration = Duration::from_secs(5);

/// Why a proxy ended unasked.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// A thread or a runtime could not be had.
    #[error("cannot start a worker: {0}")]
    Start(std::io::Error),
    /// Part of the proxy failed: half a proxy is worse than none.
    #[error("the {part} failed: {source}")]
    Part {
        /// Which.
        part: &'static str,
        /// How.
        source: std::io::Error,
    },
    /// A defect.
    #[error("the {part} ended by a defect")]
    Defect {
        /// Where.
        part: &'static str,
    },
}

/// The addresses that a proxy listens on, as many per listener as its name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// In the order of the configuration.
    pub listeners: Vec<Vec<SocketAddr>>,
    /// The page; empty without one.
    pub stats: Vec<SocketAddr>,
}

/// A proxy that has its ports.
pub struct Proxy {
    shared: Arc<Shared>,
    sockets: Vec<Vec<TcpListener>>,
    stats: Vec<TcpListener>,
    workers: usize,
}

impl Proxy {
    /// Binds every port.
    ///
    /// # Errors
    /// When the configuration cannot work, or a port cannot be had.
    pub fn bind(config: ProxyConfig, view: ViewHandle) -> Result<Self, BindError> {
        config.check()?;
        let sockets: Vec<Vec<TcpListener>> = config
            .listeners
            .iter()
            .map(|listener| listener::bind(&listener.address))
            .collect::<Result<_, _>>()?;
        let stats = match &config.stats {
            Some(stats) => listener::bind(&stats.address)?,
            None => Vec::new(),
        };
        let workers = match config.workers {
            0 => available_parallelism().map_or(1, usize::from),
            workers => workers,
        };
        let bound = config.listeners.iter().zip(&sockets);
        let states = bound.map(|(config, sockets)| ListenerState::new(config.clone(), listener::addresses(sockets)));
        let states = states.collect();
        let shared = Arc::new(Shared::new(config, view, states, workers));
        Ok(Self {
            shared,
            sockets,
            stats,
            workers,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        Addresses {
            listeners: self
                .shared
                .listeners
                .iter()
                .map(|listener| listener.addresses.clone())
                .collect(),
            stats: listener::addresses(&self.stats),
        }
    }

    /// Serves until `stop`, then lets sessions end by themselves for the grace period, then cuts them. When the future is
    /// dropped, sessions are cut at once.
    ///
    /// # Errors
    /// When a part of it fails; the rest is ended first.
    pub async fn run(self, stop: CancellationToken) -> Result<(), ProxyError> {
        let Self {
            shared,
            sockets,
            stats,
            workers,
        } = self;
        let cutter = Cutter {
            shared: Arc::clone(&shared),
            cut: CancellationToken::new(),
        };
        let workers = (0..workers)
            .map(|index| Worker::start(index, Arc::clone(&shared), cutter.cut.clone()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(ProxyError::Start)?;
        let (inboxes, mut sessions) = watch_workers(workers);

        // Not a child of `stop`: an acceptor that ends by itself is a failure, and must not look like one on a stop.
        let closed = CancellationToken::new();
        let _closed_when_dropped = closed.clone().drop_guard();
        let mut acceptors = start_acceptors(&shared, sockets, inboxes, &closed);
        // The fence and the page outlive the drain.
        let background = CancellationToken::new();
        let _background_when_dropped = background.clone().drop_guard();
        let mut parts = start_parts(&shared, stats, &background);
        shared.events.record(EventKind::Started);

        let outcome = tokio::select! {
            () = stop.cancelled() => Ok(()),
            Some(ended) = acceptors.join_next() => failure("listener", ended),
            Some(ended) = parts.join_next() => failure("fence, vouch or page", ended),
            Some(ended) = sessions.join_next() => failure("worker", ended),
        };
        closed.cancel();
        while acceptors.join_next().await.is_some() {} // Ports are free from here on, inboxes closed.
        if outcome.is_ok() {
            shared.events.record(EventKind::Stopping);
            drain(&shared, &mut sessions, &mut parts).await;
        }
        drop(cutter);
        let _ = timeout(WORKERS_END_MAX, all_ended(&mut sessions)).await;
        background.cancel();
        while parts.join_next().await.is_some() {}
        outcome
    }
}

/// Cuts every session when dropped: nothing fences them after that.
struct Cutter {
    shared: Arc<Shared>,
    cut: CancellationToken,
}

impl Drop for Cutter {
    fn drop(&mut self) {
        self.cut.cancel();
        self.shared.sessions.end_where(|_| Some(Ending::Stopping));
    }
}

type Parts = JoinSet<std::io::Result<()>>;

/// Splits workers into what acceptors need and a set that tells when one has ended.
fn watch_workers(workers: Vec<Worker>) -> (Vec<Inbox>, Parts) {
    let mut sessions = JoinSet::new();
    let mut inboxes = Vec::new();
    for worker in workers {
        inboxes.push(worker.inbox);
        let done = worker.done;
        sessions.spawn(async move { done.await.map_err(|_| std::io::Error::other("the thread panicked")) });
    }
    (inboxes, sessions)
}

fn start_acceptors(
    shared: &Arc<Shared>,
    sockets: Vec<Vec<TcpListener>>,
    inboxes: Vec<Inbox>,
    closed: &CancellationToken,
) -> Parts {
    let limits = Limits::new(shared.config.limits.connections);
    let mut acceptors = JoinSet::new();
    for (listener, sockets) in sockets.into_iter().enumerate() {
        for socket in sockets {
            let acceptor = Acceptor {
                shared: Arc::clone(shared),
                listener,
                limits: limits.clone(),
                inboxes: inboxes.clone(),
            };
            acceptors.spawn(acceptor.run(socket, closed.clone()));
        }
    }
    acceptors
}

fn start_parts(shared: &Arc<Shared>, stats: Vec<TcpListener>, stop: &CancellationToken) -> Parts {
    let mut parts = JoinSet::new();
    let fenced = Arc::clone(shared);
    let stopped = stop.clone();
    parts.spawn(async move { fence::run(&fenced, stopped).await });
    let vouched = Arc::clone(shared);
    let stopped = stop.clone();
    parts.spawn(async move { vouch::run(&vouched, stopped).await });
    for socket in stats {
        parts.spawn(stats::serve(Arc::clone(shared), socket, stop.clone()));
    }
    parts
}

/// Until every session has ended, or the grace period is over, or nothing would fence them any more.
async fn drain(shared: &Shared, sessions: &mut Parts, parts: &mut Parts) {
    info!(grace = ?shared.config.drain, "stopping: no new connections, sessions may end by themselves");
    tokio::select! {
        drained = timeout(shared.config.drain, all_ended(sessions)) => {
            if drained.is_err() {
                info!("sessions are still open after the grace period: they are cut");
            }
        }
        Some(_) = parts.join_next() => {}
    }
}

async fn all_ended(parts: &mut Parts) {
    while parts.join_next().await.is_some() {}
}

/// Parts end only by failing while nobody asked for a stop.
fn failure(part: &'static str, ended: Result<std::io::Result<()>, tokio::task::JoinError>) -> Result<(), ProxyError> {
    match ended {
        Ok(Err(source)) => Err(ProxyError::Part { part, source }),
        Ok(Ok(())) | Err(_) => Err(ProxyError::Defect { part }),
    }
}

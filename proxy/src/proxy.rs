//! The proxy's life: bind, run, reload, stop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

use pgherd_cluster::source::ViewHandle;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::config::{ConfigError, ProxyConfig};
use crate::console::ReloadRequests;
use crate::events::EventKind;
use crate::listener::{BindError, Inbox, Inherited};
use crate::reload::{self, Bound, Doors, Order, Reloader};
use crate::sessions::{Ending, Verdict};
use crate::shared::Shared;
use crate::tls::TlsSettings;
use crate::worker::Worker;
use crate::{fence, silence, stats, usher, vouch};

/// For workers to end after their sessions were cut.
const WORKERS_END_MAX: Duration = Duration::from_secs(5);

/// For everything else to end after that.
const PARTS_END_MAX: Duration = Duration::from_secs(5);

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
    /// The unix sockets among the listeners, by name; these have no address above.
    pub unix: Vec<String>,
    /// The page; empty without one.
    pub stats: Vec<SocketAddr>,
}

/// A proxy that has its ports.
pub struct Proxy {
    shared: Arc<Shared>,
    bound: Bound,
    workers: usize,
    reloader: Reloader,
    orders: mpsc::Receiver<Order>,
}

impl Proxy {
    /// Binds every port.
    ///
    /// # Errors
    /// When the configuration cannot work, or a port cannot be had.
    pub fn bind(config: ProxyConfig, view: ViewHandle) -> Result<Self, BindError> {
        Self::bind_or_inherit(config, view, Inherited::default())
    }

    /// The same, with sockets that listen already where they have the configured addresses.
    ///
    /// # Errors
    /// As for [`Self::bind`].
    pub fn bind_or_inherit(config: ProxyConfig, view: ViewHandle, inherited: Inherited) -> Result<Self, BindError> {
        config.check()?;
        let tls = TlsSettings::load(config.client_tls.as_ref(), &config.server_tls);
        let tls = tls
            .and_then(|tls| tls.with_page(config.page_tls.as_ref()))
            .map_err(ConfigError::from)?;
        let bound = Bound::new(&config, inherited)?;
        let workers = match config.workers {
            0 => available_parallelism().map_or(1, usize::from),
            workers => workers,
        };
        let shared = Arc::new(Shared::new(config, tls, view, workers));
        let (reloader, orders) = reload::channel(&shared.reloads);
        Ok(Self {
            shared,
            bound,
            workers,
            reloader,
            orders,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        self.bound.addresses()
    }

    /// What gives it a new configuration while it runs.
    #[must_use]
    pub fn reloader(&self) -> Reloader {
        self.reloader.clone()
    }

    /// Where wishes of the console arrive to have the configuration read again. For one who reads configurations; without one
    /// the console says that there is nobody.
    #[must_use]
    pub fn reload_requests(&self) -> ReloadRequests {
        self.shared.console.reload_requests()
    }

    /// Serves until `stop`, then lets sessions end by themselves for the grace period, then cuts them. When the future is
    /// dropped, sessions are cut at once.
    ///
    /// # Errors
    /// When a part of it fails; the rest is ended first.
    pub async fn run(self, stop: CancellationToken) -> Result<(), ProxyError> {
        let Self {
            shared,
            bound,
            workers,
            reloader: _reloader, // So that orders never end, whoever else has one.
            mut orders,
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

        // The fence and the page outlive the drain.
        let background = CancellationToken::new();
        let _background_when_dropped = background.clone().drop_guard();
        let mut doors = Doors::open(&shared, bound, inboxes, &background);
        let mut parts = start_parts(&shared, &background);
        shared.events.record(EventKind::Started);

        let outcome = loop {
            tokio::select! {
                () = stop.cancelled() => break Ok(()),
                Some(order) = orders.recv() => doors.obey(order).await,
                // A listener or a page that was told to end has.
                Some(ended) = doors.acceptors.join_next() => if !matches!(ended, Ok(Ok(()))) {
                    break failure("listener", ended);
                },
                Some(ended) = doors.pages.join_next() => if !matches!(ended, Ok(Ok(()))) {
                    break failure("page", ended);
                },
                Some(ended) = parts.join_next() => break failure("fence, vouch, silence, usher or page", ended),
                Some(ended) = sessions.join_next() => break failure("worker", ended),
            }
        };
        shared.stopping.cancel();
        drop(orders); // Whoever waits for a reload hears that there is none.
        let mut pages = doors.close().await;
        if outcome.is_ok() {
            shared.events.record(EventKind::Stopping);
            drain(&shared, &mut sessions, &mut parts).await;
        }
        drop(cutter);
        let _ = timeout(WORKERS_END_MAX, all_ended(&mut sessions)).await;
        background.cancel();
        let rest = async {
            all_ended(&mut parts).await;
            all_ended(&mut pages).await;
        };
        let _ = timeout(PARTS_END_MAX, rest).await;
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
        self.shared
            .sessions
            .tell_where(|_, _| Some(Verdict::End(Ending::Stopping)));
    }
}

pub(crate) type Parts = JoinSet<std::io::Result<()>>;

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

fn start_parts(shared: &Arc<Shared>, stop: &CancellationToken) -> Parts {
    let mut parts = JoinSet::new();
    let (fenced, stopped) = (Arc::clone(shared), stop.clone());
    parts.spawn(async move { fence::run(&fenced, stopped).await });
    let (vouched, stopped) = (Arc::clone(shared), stop.clone());
    parts.spawn(async move { vouch::run(&vouched, stopped).await });
    let (asked, stopped) = (Arc::clone(shared), stop.clone());
    parts.spawn(async move { silence::run(&asked, stopped).await });
    let (ushered, stopped) = (Arc::clone(shared), stop.clone());
    parts.spawn(async move { usher::run(&ushered, stopped).await });
    let (shown, stopped) = (Arc::clone(shared), stop.clone());
    parts.spawn(async move { stats::follow(&shown, stopped).await });
    parts
}

/// Until every session has ended, or the grace period is over, or nothing would fence them any more.
async fn drain(shared: &Shared, sessions: &mut Parts, parts: &mut Parts) {
    let grace = shared.config.load().drain;
    info!(?grace, "stopping: no new connections, sessions may end by themselves");
    tokio::select! {
        drained = timeout(grace, all_ended(sessions)) => {
            if drained.is_err() {
                info!("sessions are still open after the grace period: they are cut");
            }
        }
        Some(_) = parts.join_next() => {}
    }
}

pub(crate) async fn all_ended(parts: &mut Parts) {
    while parts.join_next().await.is_some() {}
}

/// Parts end only by failing while nobody asked for a stop.
fn failure(part: &'static str, ended: Result<std::io::Result<()>, tokio::task::JoinError>) -> Result<(), ProxyError> {
    match ended {
        Ok(Err(source)) => Err(ProxyError::Part { part, source }),
        Ok(Ok(())) | Err(_) => Err(ProxyError::Defect { part }),
    }
}

//! Threads that carry sessions. A connection lives and dies on one of them.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::carrier::{CARRIER_FILES, Carrier};
use crate::connection::Connection;
use crate::counters::Gauge;
use crate::listener::{Accepted, Acceptor, Inbox};
use crate::listening::Listening;
use crate::relay::PIPE_FILES_MAX;
use crate::shared::{Shared, count};

/// Connections on their way to one worker.
const INBOX_LENGTH: usize = 128;
/// How often the clock is looked at anyway while connections come. The runtime wakes itself, by a system call, for each timer
/// that is due before all others; with this one before them, the deadlines of a connection's beginning are not.
const BEAT: Duration = Duration::from_millis(500);
/// For clients to hear that the proxy stops, once their grace period is over.
const LAST_WORDS_MAX: Duration = Duration::from_secs(2);

/// Files that a worker may have open beside its connections: its sessions' pipes, and its runtime's own.
pub const FILES_PER_WORKER: usize = 2 * PIPE_FILES_MAX + CARRIER_FILES + 8;

/// What a worker is given to do.
pub(crate) enum Job {
    /// A connection to serve.
    Serve(Box<Accepted>),
    /// A listener to accept on, until it is told to stop; what became of it is said to `done`.
    Accept {
        acceptor: Box<Acceptor>,
        socket: Listening,
        stop: CancellationToken,
        done: oneshot::Sender<io::Result<()>>,
    },
    /// Anything.
    #[cfg(test)]
    Do(std::pin::Pin<Box<dyn Future<Output = ()> + Send>>),
}

/// A running worker.
pub(crate) struct Worker {
    pub(crate) inbox: Inbox,
    /// Resolves when the thread ends; with an error when it ended by a panic.
    pub(crate) done: oneshot::Receiver<()>,
}

impl Worker {
    /// Starts a thread. It ends when every sender of its inbox is gone and its connections have ended, or soon after `cut`.
    pub(crate) fn start(index: usize, shared: Arc<Shared>, cut: CancellationToken) -> io::Result<Self> {
        let (sender, inbox) = mpsc::channel(INBOX_LENGTH);
        let (finished, done) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        std::thread::Builder::new()
            .name(format!("session-{index}"))
            .spawn(move || {
                // A task of its own: waking what the thread itself blocks on costs a system call each time, and this is
                // woken by every connection that ends.
                let carrier = Arc::new(Carrier::new(index, shared.workers));
                let ended = runtime.block_on(async {
                    let mut tasks = JoinSet::new();
                    tasks.spawn(run(index, shared, carrier, cut, inbox));
                    tasks.join_next().await
                });
                if matches!(ended, Some(Ok(()))) {
                    // Nobody listens when the proxy itself was dropped.
                    let _ = finished.send(());
                }
            })?;
        let load = Gauge::default();
        Ok(Self {
            inbox: Inbox { sender, load },
            done,
        })
    }
}

async fn run(
    index: usize,
    shared: Arc<Shared>,
    carrier: Arc<Carrier>,
    cut: CancellationToken,
    mut inbox: mpsc::Receiver<Job>,
) {
    let mut connections = JoinSet::new();
    let beat = sleep(BEAT);
    tokio::pin!(beat);
    let (mut beats, mut somebody_came) = (false, false);
    loop {
        tokio::select! {
            Some(ended) = connections.join_next(), if !connections.is_empty() => note(&shared, ended),
            job = inbox.recv() => match job {
                None => break,
                Some(Job::Serve(accepted)) => {
                    let connection = Connection {
                        shared: Arc::clone(&shared),
                        worker: index,
                        carrier: Arc::clone(&carrier),
                        cut: cut.clone(),
                    };
                    connections.spawn(connection.serve(accepted));
                    somebody_came = true;
                    if !std::mem::replace(&mut beats, true) {
                        beat.as_mut().reset(Instant::now() + BEAT);
                    }
                }
                Some(Job::Accept { acceptor, socket, stop, done }) => {
                    connections.spawn(async move {
                        let _ = done.send(acceptor.run(socket, stop).await); // Who asked may be gone, and the port free.
                    });
                }
                #[cfg(test)]
                Some(Job::Do(task)) => {
                    connections.spawn(task);
                }
            },
            () = &mut beat, if beats => {
                beats = std::mem::take(&mut somebody_came);
                if beats {
                    beat.as_mut().reset(Instant::now() + BEAT);
                }
            }
            () = cut.cancelled() => break,
        }
    }
    drop(inbox);
    let rest = async {
        while let Some(ended) = connections.join_next().await {
            note(&shared, ended);
        }
    };
    tokio::pin!(rest);
    tokio::select! {
        () = &mut rest => return,
        () = cut.cancelled() => {}
    }
    // What is left after this ends with the set.
    let _ = timeout(LAST_WORDS_MAX, rest).await;
}

/// A panic ends one connection and is counted; the others go on.
fn note(shared: &Shared, ended: Result<(), JoinError>) {
    if let Err(panic) = ended {
        count(&shared.panics);
        debug!(%panic, "a connection ended by a defect of this proxy");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use pgherd_cluster::name::Scope;
    use pgherd_cluster::source::channel;

    use super::*;
    use crate::config::{ListenerConfig, ProxyConfig};
    use crate::tls::TlsSettings;

    #[tokio::test]
    async fn a_panic_ends_one_connection_and_the_worker_serves_on() {
        let (_publisher, view) = channel(Scope::new("c").expect("a plain name"));
        let config = ProxyConfig::new(vec![ListenerConfig::write("h:1")]);
        let tls = TlsSettings::load(None, &config.server_tls).expect("no TLS");
        let shared = Arc::new(Shared::new(config, tls, view, 1));
        let worker = Worker::start(0, Arc::clone(&shared), CancellationToken::new()).expect("a thread");
        let (before, is_before) = oneshot::channel::<()>();
        let send = async |task| assert!(worker.inbox.sender.send(Job::Do(task)).await.is_ok());
        // One that goes on is not touched by the other's end.
        let (end, ended) = oneshot::channel::<()>();
        let (told, tells) = oneshot::channel();
        send(Box::pin(async move {
            let _ = is_before.await;
            let _ = told.send(ended.await);
        }))
        .await;
        send(Box::pin(async { panic!("on purpose") })).await;
        drop(before);
        assert!(end.send(()).is_ok());
        let going_on = timeout(Duration::from_secs(10), tells).await;
        assert!(matches!(going_on, Ok(Ok(Ok(())))), "{going_on:?}");
        let Worker { inbox, done } = worker;
        drop(inbox);
        let ended = timeout(Duration::from_secs(10), done).await;
        assert!(matches!(ended, Ok(Ok(()))), "{ended:?}");
        assert_eq!(shared.panics.load(Ordering::Relaxed), 1);
    }
}

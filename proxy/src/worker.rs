//! Threads that carry sessions. A connection lives and dies on one of them.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinError, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::connection::Connection;
use crate::counters::Gauge;
use crate::listener::{Accepted, Acceptor, Inbox};
use crate::shared::{Shared, count};

/// Connections on their way to one worker.
const INBOX_LENGTH: usize = 128;
/// For clients to hear that the proxy stops, once their grace period is over.
const LAST_WORDS_MAX: Duration = Duration::from_secs(2);

/// What a worker is given to do.
pub(crate) enum Job {
    /// A connection to serve.
    Serve(Box<Accepted>),
    /// A listener to accept on, until it is told to stop; what became of it is said to `done`.
    Accept {
        acceptor: Box<Acceptor>,
        socket: TcpListener,
        stop: CancellationToken,
        done: oneshot::Sender<io::Result<()>>,
    },
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
                let ended = runtime.block_on(async {
                    let mut tasks = JoinSet::new();
                    tasks.spawn(run(index, shared, cut, inbox));
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

async fn run(index: usize, shared: Arc<Shared>, cut: CancellationToken, mut inbox: mpsc::Receiver<Job>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(ended) = connections.join_next(), if !connections.is_empty() => note(&shared, ended),
            job = inbox.recv() => match job {
                None => break,
                Some(Job::Serve(accepted)) => {
                    let connection = Connection {
                        shared: Arc::clone(&shared),
                        worker: index,
                        cut: cut.clone(),
                    };
                     connections.spawn(connection.serve(accepted));
                }
                Some(Job::Accept { acceptor, socket, stop, done }) => {
                    connections.spawn(async move {
                        let _ = done.send(acceptor.run(socket, stop).await); // Who asked may be gone, and the port free.
                    });
                }
            },
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
        error!(%panic, "a connection ended by a defect of this proxy");
    }
}

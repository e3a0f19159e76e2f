//! The listening socket and its connections, bounded in number, size and time.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::Api;
use super::doors::Client;
use super::stall::StallGuard;

/// Connections are kept for further requests only while there are no more than this: what waits for a request must not
/// take the place of what has one.
const KEPT_MAX: usize = CONNECTIONS_MAX / 2;
/// How many connections there may be; more wait in the listener's backlog.
const CONNECTIONS_MAX: usize = 320;
/// How long the head of a request may take to arrive; and so how long a connection may wait for its next request.
const HEAD_MAX: Duration = Duration::from_secs(5);
/// How long a client may take nothing of its answer.
const STALL_MAX: Duration = Duration::from_secs(10);
/// What is kept of a request's head, and of an answer that is not taken yet.
const BUFFER_BYTES_MAX: usize = 64 << 10;
/// How long open answers get to end.
const DRAIN_MAX: Duration = Duration::from_secs(2);
/// After an accept that failed, such as for want of descriptors: trying at once would spin.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Serves `api` on `listener` until `stop`, then lets open answers end for a short while.
pub async fn serve(listener: TcpListener, api: Arc<Api>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    tokio::select! {
        () = stop.cancelled() => {}
        never = api.note_outages() => match never {},
        never = super::ui::keep(&api) => match never {},
        never = accept_for_ever(&listener, &api, &stop, &mut connections) => match never {},
    }
    drop(listener);
    let drained = timeout(DRAIN_MAX, async { while connections.join_next().await.is_some() {} });
    if drained.await.is_err() {
        connections.shutdown().await;
    }
}

async fn accept_for_ever(
    listener: &TcpListener,
    api: &Arc<Api>,
    stop: &CancellationToken,
    connections: &mut JoinSet<()>,
) -> Infallible {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let (stream, from, slot) = tokio::select! {
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a REST connection ended badly");
                }
                continue;
            }
            accepted = accept(listener, &slots) => accepted,
        };
        let (api, stop) = (Arc::clone(api), stop.clone());
        let keep = CONNECTIONS_MAX - slots.available_permits() <= KEPT_MAX;
        connections.spawn(async move {
            welcome(stream, from, keep, &api, &stop).await;
            drop(slot);
        });
    }
}

/// The next connection, once there is room for it. Cancel safe.
async fn accept(listener: &TcpListener, slots: &Arc<Semaphore>) -> (TcpStream, SocketAddr, OwnedSemaphorePermit) {
    loop {
        // Nobody closes this semaphore; were it closed, waiting for ever is all that is left.
        let Ok(slot) = Arc::clone(slots).acquire_owned().await else {
            return std::future::pending().await;
        };
        match listener.accept().await {
            Ok((stream, from)) => return (stream, from, slot),
            Err(error) => {
                tracing::warn!(%error, "accepting a REST connection");
                sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

/// Speaks TLS first, where it is configured. The handshake has the time that a request's head has.
async fn welcome(stream: TcpStream, from: SocketAddr, keep: bool, api: &Api, stop: &CancellationToken) {
    let mut client = Client {
        address: Some(from.ip()),
        certified: false,
    };
    let guarded = StallGuard::new(stream, STALL_MAX);
    let Some(acceptor) = api.doors.load().acceptor() else {
        return converse(guarded, client, keep, api, stop).await;
    };
    match timeout(HEAD_MAX, acceptor.accept(guarded)).await {
        Ok(Ok(secured)) => {
            let (_, session) = secured.get_ref();
            client.certified = session.peer_certificates().is_some_and(|shown| !shown.is_empty());
            converse(secured, client, keep, api, stop).await;
        }
        Ok(Err(error)) => tracing::debug!(%from, %error, "a REST client does not speak our TLS"),
        Err(_) => tracing::debug!(%from, "a REST client has not finished its TLS handshake in time"),
    }
}

async fn converse<S>(stream: S, client: Client, keep: bool, api: &Api, stop: &CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let io = TokioIo::new(stream);
    let service = service_fn(async |request| {
        let mut answer = api.answer(request, client, stop).await;
        api.doors.load().dress(&mut answer);
        Ok::<_, Infallible>(answer)
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_MAX)
            .max_buf_size(BUFFER_BYTES_MAX)
            .keep_alive(keep)
            .serve_connection(io, service)
    );
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        // Checks hang up as soon as they have read the status line: nothing to tell anybody.
        tracing::debug!(%error, "a REST connection ended early");
    }
}

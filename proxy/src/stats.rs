//! The page, metrics and health over HTTP, for people and their tools; and, for who has a password worth the name, forms.

mod act;
mod answer;
mod changes;
pub(crate) mod csv;
mod follow;
pub(crate) mod metrics;
pub(crate) mod state;

use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request};
use hyper_util::rt::{TokioIo, TokioTimer};
use pgherd_cluster::clock::Boottime;
use pgherd_page::headers::{Paths, file};
use pgherd_page::live::Feed;
use pgherd_page::login::PageLogin;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use self::answer::{Answer, page_file, redirect, stream, text, unauthorized, whole};
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use self::follow::page;
pub(crate) use self::follow::{Board, follow};
use crate::counters::Gauge;
use crate::seldom::Seldom;
use crate::shared::{Shared, count};
use state::State;

/// Where the page is, as HAProxy's usual configuration has it.
const PATHS: Paths = Paths { root: "/stats" };
/// Where HAProxy has its own; `;csv;norefresh` is asked for too.
const CSV: &str = "/stats;csv";

const CONNECTIONS_MAX: usize = 512;
/// Streams stay open, so they may not take all connections.
const STREAMS_MAX: usize = 384;
const HEADER_MAX: Duration = Duration::from_secs(5);
const REQUEST_BYTES_MAX: usize = 16 * 1024;
/// A stream is opened again by its browser.
const CONNECTION_MAX: Duration = Duration::from_secs(600);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

static CANNOT_ACCEPT: Seldom = Seldom::new();

/// Serves on `socket` until `stop`.
pub(crate) async fn serve(shared: Arc<Shared>, socket: TcpListener, stop: CancellationToken) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(socket)?;
    let streams = Gauge::default();
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            Some(ended) = connections.join_next(), if !connections.is_empty() => if ended.is_err() {
                count(&shared.panics);
            },
            accepted = listener.accept() => match accepted {
                // Beyond the bound it is closed without a word.
                Ok((stream, _)) if connections.len() < CONNECTIONS_MAX => {
                    connections.spawn(converse(Arc::clone(&shared), stream, streams.clone()));
                }
                Ok(_) => {}
                Err(error) => {
                    if let Some(kept_back) = CANNOT_ACCEPT.admits(Boottime::now()) {
                        warn!(%error, kept_back, "cannot accept a connection to the page");
                    }
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

async fn converse(shared: Arc<Shared>, stream: TcpStream, streams: Gauge) {
    let Some(config) = shared.tls.load().page.clone() else {
        return converse_over(shared, stream, streams).await;
    };
    match timeout(HEADER_MAX, TlsAcceptor::from(config).accept(stream)).await {
        Ok(Ok(stream)) => converse_over(shared, stream, streams).await,
        Ok(Err(error)) => debug!(%error, "a connection to the page does not come to TLS"),
        Err(_) => {} // It said too little in time.
    }
}

/// One connection, from its first byte to its end.
pub(crate) async fn converse_over(shared: Arc<Shared>, stream: impl AsyncRead + AsyncWrite + Unpin, streams: Gauge) {
    let service = service_fn(|request: Request<Incoming>| {
        let (shared, streams) = (Arc::clone(&shared), streams.clone());
        async move { Ok::<_, Infallible>(answer(&shared, request, &streams).await) }
    });
    let mut http = http1::Builder::new();
    // One request each: what is idle between requests could hold a place for nothing.
    http.keep_alive(false);
    http.timer(TokioTimer::new())
        .header_read_timeout(HEADER_MAX)
        .max_buf_size(REQUEST_BYTES_MAX);
    let served = http.serve_connection(TokioIo::new(stream), service);
    if let Ok(Err(error)) = timeout(CONNECTION_MAX, served).await {
        debug!(%error, "a connection to the page ended early");
    }
}

async fn answer(shared: &Shared, request: Request<Incoming>, streams: &Gauge) -> Answer {
    let path = request.uri().path();
    let login = shared.config.load().page_login.clone();
    // Who checks whether the proxy lives has no password.
    if path != "/healthz" && !is_let_in(login.as_ref(), &request) {
        return unauthorized();
    }
    let is_form = PATHS.below(path) == Some("act");
    match *request.method() {
        Method::POST if is_form => act::submit(shared, login.as_ref(), request).await,
        Method::GET | Method::HEAD if is_form => act::form(shared, login.as_ref(), request.uri().query()).await,
        Method::GET | Method::HEAD => shown(shared, path, streams),
        _ => text(hyper::StatusCode::METHOD_NOT_ALLOWED, "only GET\n"),
    }
}

fn is_let_in(login: Option<&PageLogin>, request: &Request<Incoming>) -> bool {
    let presented = request.headers().get(header::AUTHORIZATION);
    login.is_none_or(|login| login.lets_in(presented.map(HeaderValue::as_bytes)))
}

fn shown(shared: &Shared, path: &str, streams: &Gauge) -> Answer {
    const NOT_FOUND: &str = "there are /stats, /stats;csv, /api/v1/state, /metrics and /healthz\n";
    let not_found = || text(hyper::StatusCode::NOT_FOUND, NOT_FOUND);
    match path {
        "/" => redirect(PATHS.root),
        "/stats" | "/stats/" => whole("text/html; charset=utf-8", follow::page(shared)),
        "/stats.json" | "/api/v1/state" => whole("application/json", json(shared)),
        "/api/v1/stream" => follow_by(shared, Feed::State, streams),
        "/metrics" => match metrics::render(shared) {
            Ok(rendered) => whole("text/plain; version=0.0.4; charset=utf-8", rendered),
            Err(error) => text(hyper::StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        },
        "/healthz" => text(hyper::StatusCode::OK, health(shared)),
        _ if path.starts_with(CSV) => whole("text/plain; charset=utf-8", follow::csv(shared)),
        _ => match PATHS.below(path) {
            Some("live") => follow_by(shared, Feed::Page, streams),
            Some(name) => file(name).map_or_else(not_found, |(content_type, body)| page_file(content_type, body)),
            None => not_found(),
        },
    }
}

fn follow_by(shared: &Shared, feed: Feed, streams: &Gauge) -> Answer {
    match streams.enter_below(STREAMS_MAX) {
        Some(place) => stream(shared.board.live.watch(feed, place)),
        None => text(hyper::StatusCode::SERVICE_UNAVAILABLE, "too many streams are open\n"),
    }
}

pub(crate) fn json(shared: &Shared) -> String {
    // The state has text keys only, which is all that could fail.
    serde_json::to_string(&*State::of(shared)).unwrap_or_default()
}

/// One that serves is healthy: it holds clients and says why while others are at fault.
fn health(shared: &Shared) -> String {
    let state = State::of(shared);
    let age = match state.view.age_seconds {
        Some(age) => format!("{age:.3} s"),
        None => "never confirmed".to_owned(),
    };
    let writable = if state.writable { "yes" } else { "no" };
    format!(
        "ok\nwritable: {writable}\nverdict: {} {}\nview age: {age}\n",
        state.verdict.word, state.verdict.sentence
    )
}

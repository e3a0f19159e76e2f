//! The page, metrics and health over HTTP, for people and their tools. Read only.

pub(crate) mod login;
pub(crate) mod metrics;
pub(crate) mod page;
pub(crate) mod state;
mod stream;

use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use pgherd_cluster::clock::Boottime;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::counters::Gauge;
use crate::draw::draws;
use crate::seldom::Seldom;
use crate::shared::{Shared, count};
pub use login::PageLogin;
use state::State;
use stream::StateStream;

const CONNECTIONS_MAX: usize = 64;
/// Streams stay open, so they may not take all connections.
const STREAMS_MAX: usize = 16;
const HEADER_MAX: Duration = Duration::from_secs(5);
const REQUEST_BYTES_MAX: usize = 16 * 1024;
/// A stream is opened again by its browser.
const CONNECTION_MAX: Duration = Duration::from_secs(600);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

static CANNOT_ACCEPT: Seldom = Seldom::new();

type Answer = Response<Either<Full<Bytes>, StateStream>>;

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
        let answer = answer(&shared, &request, &streams);
        async move { Ok::<_, Infallible>(answer) }
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

fn answer(shared: &Arc<Shared>, request: &Request<Incoming>, streams: &Gauge) -> Answer {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
    }
    let uri = request.uri();
    // Who checks whether the proxy lives has no password.
    if uri.path() != "/healthz"
        && let Some(login) = &shared.config.load().page_login
    {
        let presented = request.headers().get(header::AUTHORIZATION);
        if !login.lets_in(presented.map(HeaderValue::as_bytes)) {
            return unauthorized();
        }
    }
    match (uri.path(), uri.query()) {
        ("/", _) => redirect("/stats"),
        ("/stats", Some("fragment")) => whole("text/html; charset=utf-8", page::fragment(&State::of(shared))),
        ("/stats", _) => stats_page(shared),
        ("/stats.json" | "/api/v1/state", _) => whole("application/json", json(shared)),
        ("/api/v1/stream", _) => match streams.enter_below(STREAMS_MAX) {
            Some(place) => event_stream(shared, place),
            None => text(StatusCode::SERVICE_UNAVAILABLE, "too many streams are open\n"),
        },
        ("/metrics", _) => match metrics::render(shared) {
            Ok(rendered) => whole("text/plain; version=0.0.4; charset=utf-8", rendered),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        },
        ("/healthz", _) => text(StatusCode::OK, health(shared)),
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /stats, /stats.json, /metrics and /healthz\n",
        ),
    }
}

pub(crate) fn json(shared: &Shared) -> String {
    // The state has text keys only, which is all that could fail.
    serde_json::to_string(&State::of(shared)).unwrap_or_default()
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

fn stats_page(shared: &Shared) -> Answer {
    // Every text on the page is escaped; that no other script may run is the second lock.
    let nonce: String = draws().map(|draw| format!("{draw:016x}")).concat();
    let policy = format!(
        "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let mut answer = whole("text/html; charset=utf-8", page::whole(&State::of(shared), &nonce));
    if let Ok(policy) = HeaderValue::from_str(&policy) {
        answer.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    answer
}

fn event_stream(shared: &Arc<Shared>, place: crate::counters::Counted) -> Answer {
    let stream = StateStream::new(Arc::clone(shared), place);
    let mut answer = Response::new(Either::Right(stream));
    set_headers(&mut answer, "text/event-stream");
    answer
}

fn whole(content_type: &'static str, body: String) -> Answer {
    let mut answer = Response::new(Either::Left(Full::from(body)));
    set_headers(&mut answer, content_type);
    answer
}

fn text(status: StatusCode, body: impl Into<String>) -> Answer {
    let mut answer = whole("text/plain; charset=utf-8", body.into());
    *answer.status_mut() = status;
    answer
}

fn unauthorized() -> Answer {
    let mut answer = text(StatusCode::UNAUTHORIZED, "this page needs a name and a password\n");
    let challenge = HeaderValue::from_static("Basic realm=\"pgherd\", charset=\"UTF-8\"");
    answer.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
    answer
}

fn redirect(to: &'static str) -> Answer {
    let mut answer = text(StatusCode::FOUND, "");
    answer
        .headers_mut()
        .insert(header::LOCATION, HeaderValue::from_static(to));
    answer
}

fn set_headers(answer: &mut Answer, content_type: &'static str) {
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
}

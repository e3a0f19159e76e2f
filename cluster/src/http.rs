//! A small HTTP client for members' REST interfaces: one request, one answer, one deadline, a bounded body.

mod access;
mod events;

use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

pub use self::access::{Access, AccessConfig, Endpoint};
pub use self::events::{Event, EventStream, Opened, events};
use crate::record::Address;
use crate::resolve::resolve;
use crate::tls::explain_handshake;

/// The longest answer that is read; a member's status is a few kilobytes.
const BODY_BYTES_MAX: usize = 1 << 20;

/// Why a member gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Nothing within the deadline.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The connection could not be made.
    #[error("connecting to {address}")]
    Connect {
        /// Whom.
        address: Address,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It spoke, but not HTTP, or too much of it.
    #[error("talking HTTP: {0}")]
    Protocol(String),
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body, at most 1 MiB.
    pub body: Bytes,
}

impl Answer {
    /// The body as text, with what is not UTF-8 replaced.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON, when it is.
    #[must_use]
    pub fn json(&self) -> Option<serde_json::Value> {
        serde_json::from_slice(&self.body).ok()
    }
}

/// What to ask.
#[derive(Clone, Debug, Default)]
pub struct Ask {
    /// `GET` unless set.
    pub method: hyper::Method,
    /// Path and query.
    pub path: String,
    /// Sent as JSON when there is one.
    pub json: Option<serde_json::Value>,
    /// An `Authorization` header.
    pub authorization: Option<String>,
}

impl Ask {
    /// A plain GET of `path`.
    #[must_use]
    pub fn get(path: &str) -> Self {
        Self {
            path: path.to_owned(),
            ..Self::default()
        }
    }
}

/// Asks a member by plain HTTP, on a connection of its own, within `limit`.
///
/// # Errors
/// See [`HttpError`]; an HTTP status of any kind is an answer.
pub async fn ask(address: &Address, ask: Ask, limit: Duration) -> Result<Answer, HttpError> {
    let endpoint = Endpoint {
        address: address.clone(),
        tls: false,
    };
    ask_at(&endpoint, ask, limit, &Access::default()).await
}

/// Asks a member, on a connection of its own, within `limit`.
///
/// # Errors
/// See [`HttpError`]; an HTTP status of any kind is an answer.
pub async fn ask_at(endpoint: &Endpoint, ask: Ask, limit: Duration, access: &Access) -> Result<Answer, HttpError> {
    timeout(limit, ask_unbounded(endpoint, ask, access))
        .await
        .map_err(|_| HttpError::Timeout(limit))?
}

/// What carries a conversation, with TLS or without.
pub(crate) trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Wire for S {}

async fn connect(endpoint: &Endpoint, access: &Access) -> Result<TokioIo<Box<dyn Wire>>, HttpError> {
    let address = &endpoint.address;
    let failed = |source| HttpError::Connect {
        address: address.clone(),
        source,
    };
    let found = resolve(address).await.map_err(failed)?;
    let stream = TcpStream::connect(&found[..]).await.map_err(failed)?;
    if !endpoint.tls {
        return Ok(TokioIo::new(Box::new(stream)));
    }
    let no_tls = || HttpError::Protocol(format!("{endpoint} speaks TLS, and nothing says whom to believe"));
    let config = access.tls.clone().ok_or_else(no_tls)?;
    let name = rustls::pki_types::ServerName::try_from(address.host.clone());
    let name = name.map_err(|error| HttpError::Protocol(format!("{endpoint}: {error}")))?;
    let secured = tokio_rustls::TlsConnector::from(config).connect(name, stream).await;
    // Who does not speak TLS, or is somebody else, is there all the same.
    let failed = |error| HttpError::Protocol(format!("TLS with {endpoint}: {}", explain_handshake(&error)));
    let secured = secured.map_err(failed)?;
    Ok(TokioIo::new(Box::new(secured)))
}

/// Sends a request; the head of its answer, and what has to live while the body is read.
async fn exchange(
    io: TokioIo<Box<dyn Wire>>,
    endpoint: &Endpoint,
    ask: Ask,
    access: &Access,
) -> Result<(Response<Incoming>, JoinSet<()>), HttpError> {
    let protocol = |error: &dyn std::fmt::Display| HttpError::Protocol(error.to_string());
    let handshake = hyper::client::conn::http1::handshake(io).await;
    let (mut sender, connection) = handshake.map_err(|error| protocol(&error))?;
    let mut moving = JoinSet::new();
    moving.spawn(async move {
        let _ = connection.await; // What was wrong with it is told to who waits for the answer.
    });
    let mut request = Request::builder()
        .method(ask.method)
        .uri(ask.path)
        .header("host", endpoint.address.to_string());
    let authorization = ask.authorization.as_deref().or(access.authorization_for(endpoint));
    if let Some(authorization) = authorization {
        request = request.header("authorization", authorization);
    }
    let body = match ask.json {
        Some(json) => {
            request = request.header("content-type", "application/json");
            Bytes::from(json.to_string())
        }
        None => Bytes::new(),
    };
    let request = request.body(Full::new(body)).map_err(|error| protocol(&error))?;
    let response = sender.send_request(request).await.map_err(|error| protocol(&error))?;
    Ok((response, moving))
}

async fn ask_unbounded(endpoint: &Endpoint, ask: Ask, access: &Access) -> Result<Answer, HttpError> {
    let io = connect(endpoint, access).await?;
    let (response, _moving) = exchange(io, endpoint, ask, access).await?;
    let status = response.status().as_u16();
    let body = Limited::new(response.into_body(), BODY_BYTES_MAX).collect().await;
    let body = body.map_err(|error| HttpError::Protocol(error.to_string()))?;
    Ok(Answer {
        status,
        body: body.to_bytes(),
    })
}

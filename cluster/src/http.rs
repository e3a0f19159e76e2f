//! A small HTTP client for members' REST interfaces: one request, one answer, one deadline, a bounded body.

use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::record::Address;

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

/// Asks a member, on a connection of its own, within `limit`.
///
/// # Errors
/// See [`HttpError`]; an HTTP status of any kind is an answer.
pub async fn ask(address: &Address, ask: Ask, limit: Duration) -> Result<Answer, HttpError> {
    timeout(limit, ask_unbounded(address, ask))
        .await
        .map_err(|_| HttpError::Timeout(limit))?
}

async fn ask_unbounded(address: &Address, ask: Ask) -> Result<Answer, HttpError> {
    let stream = TcpStream::connect((address.host.as_str(), address.port))
        .await
        .map_err(|source| HttpError::Connect {
            address: address.clone(),
            source,
        })?;
    let protocol = |error: &dyn std::fmt::Display| HttpError::Protocol(error.to_string());
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| protocol(&error))?;
    let exchange = async {
        let mut request = Request::builder()
            .method(ask.method)
            .uri(ask.path)
            .header("host", address.to_string());
        if let Some(authorization) = ask.authorization {
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
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), BODY_BYTES_MAX).collect().await;
        Ok(Answer {
            status,
            body: body.map_err(|error| protocol(&error))?.to_bytes(),
        })
    };
    tokio::pin!(exchange);
    tokio::select! {
        biased;
        answer = &mut exchange => answer,
        // The connection ends when the peer closes after its answer; what was sent of it is still to be read.
        _ = connection => exchange.await,
    }
}

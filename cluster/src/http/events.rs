//! Server-sent events, as they come in: bounded in size, and each awaited for no longer than its sender should be silent.

use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Access, Ask, Endpoint, HttpError, connect, exchange};

/// The longest event that is read: a view of a large cluster is some hundred kilobytes.
const EVENT_BYTES_MAX: usize = 1 << 20;

/// What comes next in a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// An event's data.
    Data(String),
    /// A comment: the sender lives.
    Alive,
}

/// An open stream of events.
pub struct EventStream {
    body: Incoming,
    buffer: Vec<u8>,
    /// So much of it holds no end of an event.
    searched: usize,
    /// Moves the connection's bytes; ends with this.
    _connection: JoinSet<()>,
}

/// What a request for events is answered with.
pub enum Opened {
    /// They come.
    Events(EventStream),
    /// Something else, with this status.
    Refused(u16),
}

/// Asks for a stream of events, whose first word has to come within `limit`.
///
/// # Errors
/// See [`HttpError`].
pub async fn events(endpoint: &Endpoint, path: &str, limit: Duration, access: &Access) -> Result<Opened, HttpError> {
    let opening = async {
        let io = connect(endpoint, access).await?;
        let (response, connection) = exchange(io, endpoint, Ask::get(path), access).await?;
        let status = response.status().as_u16();
        let is_stream = |kind: &hyper::header::HeaderValue| kind.as_bytes().starts_with(b"text/event-stream");
        if status != 200 || !response.headers().get("content-type").is_some_and(is_stream) {
            return Ok(Opened::Refused(status));
        }
        Ok(Opened::Events(EventStream {
            body: response.into_body(),
            buffer: Vec::new(),
            searched: 0,
            _connection: connection,
        }))
    };
    timeout(limit, opening).await.map_err(|_| HttpError::Timeout(limit))?
}

impl EventStream {
    /// The next event or sign of life, within `limit`. Not to be used again after an error.
    ///
    /// # Errors
    /// See [`HttpError`]; the end of the stream is one. Cancel safe.
    pub async fn next(&mut self, limit: Duration) -> Result<Event, HttpError> {
        timeout(limit, self.next_unbounded())
            .await
            .map_err(|_| HttpError::Timeout(limit))?
    }

    async fn next_unbounded(&mut self) -> Result<Event, HttpError> {
        loop {
            if let Some(event) = take_event(&mut self.buffer, &mut self.searched) {
                return Ok(event);
            }
            if self.buffer.len() > EVENT_BYTES_MAX {
                return Err(HttpError::Protocol(format!(
                    "an event of more than {EVENT_BYTES_MAX} bytes"
                )));
            }
            let frame = self.body.frame().await;
            let frame = frame.ok_or_else(|| HttpError::Protocol("the stream has ended".to_owned()))?;
            let frame = frame.map_err(|error| HttpError::Protocol(error.to_string()))?;
            let bytes: Bytes = frame.into_data().unwrap_or_default();
            self.buffer.extend_from_slice(&bytes);
        }
    }
}

/// Takes the first whole event; they end with an empty line. What was `searched` in vain is not searched again, so that a long
/// event that comes in small pieces costs no more than one in large ones.
fn take_event(buffer: &mut Vec<u8>, searched: &mut usize) -> Option<Event> {
    // The last byte may be the first of a pair.
    let from = searched.saturating_sub(1);
    let new = buffer.get(from..).unwrap_or_default();
    let Some(end) = new.windows(2).position(|pair| pair == b"\n\n") else {
        *searched = buffer.len();
        return None;
    };
    *searched = 0;
    let rest = buffer.split_off(from + end + 2);
    let event = std::mem::replace(buffer, rest);
    let text = String::from_utf8_lossy(&event);
    let data: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("data:"))
        .map(|data| data.strip_prefix(' ').unwrap_or(data))
        .collect();
    Some(if data.is_empty() {
        Event::Alive
    } else {
        Event::Data(data.join("\n"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_taken_whole_however_they_arrive() {
        let sent = b": alive\n\nevent: view\nid: 5\ndata: {\"a\":1}\n\nid: 6\ndata: one\ndata: two\n\nda";
        let (mut buffer, mut searched, mut events) = (Vec::new(), 0, Vec::new());
        for byte in sent {
            buffer.push(*byte);
            events.extend(take_event(&mut buffer, &mut searched));
            assert!(searched == buffer.len() || searched == 0, "nothing is searched twice");
        }
        let data = |text: &str| Event::Data(text.to_owned());
        assert_eq!(events, [Event::Alive, data("{\"a\":1}"), data("one\ntwo")]);
        assert_eq!(buffer, b"da");
    }
}

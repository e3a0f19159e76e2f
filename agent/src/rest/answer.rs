//! Answers and their bodies, as bytes on the wire.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use http_body_util::Full;
use hyper::Response;
use hyper::body::{Body, Bytes, Frame, SizeHint};
use hyper::ext::ReasonPhrase;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE};
use pgherd_page::live::Watching;
use serde_json::Value;
use tokio::sync::OwnedSemaphorePermit;

use super::events::EventStream;
use super::json;

const TEXT_HTML: &str = "text/html";
const TEXT_PLAIN: &str = "text/plain";

/// A body: all there, or made while it is read.
pub(super) enum Payload {
    Whole(Full<Bytes>),
    Events(EventStream),
    Page(Watching<OwnedSemaphorePermit>),
}

impl Body for Payload {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Self::Whole(body) => Pin::new(body).poll_frame(context),
            Self::Events(stream) => stream
                .poll_next(context)
                .map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes)))),
            Self::Page(page) => Pin::new(page).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(body) => body.is_end_stream(),
            Self::Events(_) | Self::Page(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(body) => body.size_hint(),
            Self::Events(_) | Self::Page(_) => SizeHint::default(),
        }
    }
}

/// An answer. Each says how long it is, so that its connection can serve the next question.
pub(super) type Answer = Response<Payload>;

fn whole(code: u16, content_type: Option<&'static str>, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Payload::Whole(Full::new(body.into())));
    // Every code here is a literal between 200 and 503.
    *answer.status_mut() = hyper::StatusCode::from_u16(code).unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    let headers = answer.headers_mut();
    if let Some(content_type) = content_type {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    }
    answer
}

/// Nothing but the status line: what checks read.
pub(super) fn code_only(code: u16) -> Answer {
    whole(code, None, Bytes::new())
}

/// A JSON document in Patroni's spacing.
pub(super) fn document(code: u16, value: &Value) -> Answer {
    whole(code, Some("application/json"), json::spaced(value))
}

/// A sentence. Patroni sends its sentences as HTML, without a newline.
pub(super) fn sentence(code: u16, text: impl Into<String>) -> Answer {
    let text = text.into();
    let mut answer = whole(code, Some(TEXT_HTML), text.clone());
    answer.extensions_mut().insert(Said(text));
    answer
}

/// What an answer says in a sentence, for the journal.
#[derive(Clone, Debug)]
pub(super) struct Said(pub(super) String);

/// Lines of plain text.
pub(super) fn plain(code: u16, text: impl Into<String>) -> Answer {
    whole(code, Some(TEXT_PLAIN), text.into())
}

/// A stream of events.
pub(super) fn events(stream: EventStream) -> Answer {
    let mut answer = Response::new(Payload::Events(stream));
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    answer
}

/// A part of the operator's page.
pub(super) fn page_part(content_type: &'static str, text: impl Into<Bytes>) -> Answer {
    let mut answer = whole(200, None, text);
    pgherd_page::headers::dress(answer.headers_mut(), content_type);
    answer
}

/// The operator's page as it changes.
pub(super) fn page_stream(stream: Watching<OwnedSemaphorePermit>) -> Answer {
    let mut answer = Response::new(Payload::Page(stream));
    pgherd_page::headers::dress(answer.headers_mut(), "text/event-stream");
    answer
}

/// A refusal that asks for credentials.
pub(super) fn unauthorized(text: &'static str) -> Answer {
    let mut answer = sentence(401, text);
    let challenge = HeaderValue::from_static("Basic realm=\"Patroni\"");
    answer.headers_mut().insert(WWW_AUTHENTICATE, challenge);
    answer
}

/// A small page, where Patroni answers with the error page of its HTTP library. `message` is the reason phrase too; of
/// a request it holds the method at most, which cannot spell markup.
pub(super) fn error_page(code: u16, message: &str) -> Answer {
    let page = format!(
        "<!DOCTYPE HTML>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"><title>Error response</title></head>\n\
         <body>\n<h1>Error response</h1>\n<p>Error code: {code}</p>\n<p>Message: {message}.</p>\n</body>\n</html>\n"
    );
    let mut answer = whole(code, Some("text/html;charset=utf-8"), page);
    if let Ok(reason) = ReasonPhrase::try_from(message.as_bytes()) {
        answer.extensions_mut().insert(reason);
    }
    answer
}

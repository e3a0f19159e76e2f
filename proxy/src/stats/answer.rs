//! Answers over HTTP.

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::header::{self, HeaderValue};
use hyper::{Response, StatusCode};
use pgherd_page::headers::dress;
use pgherd_page::live::Watching;

use crate::counters::Counted;

/// One that is whole, or a stream of events.
pub(super) type Answer = Response<Either<Full<Bytes>, Watching<Counted>>>;

pub(super) fn whole(content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Either::Left(Full::new(body.into())));
    dress(answer.headers_mut(), content_type);
    answer
}

/// A file that changes with the program only.
pub(super) fn page_file(content_type: &'static str, body: &'static str) -> Answer {
    whole(content_type, Bytes::from_static(body.as_bytes()))
}

pub(super) fn stream(body: Watching<Counted>) -> Answer {
    let mut answer = Response::new(Either::Right(body));
    dress(answer.headers_mut(), "text/event-stream");
    answer
}

pub(super) fn html(status: StatusCode, body: String) -> Answer {
    let mut answer = whole("text/html; charset=utf-8", body);
    *answer.status_mut() = status;
    answer
}

pub(super) fn text(status: StatusCode, body: impl Into<String>) -> Answer {
    let mut answer = whole("text/plain; charset=utf-8", body.into());
    *answer.status_mut() = status;
    answer
}

pub(super) fn unauthorized() -> Answer {
    let mut answer = text(StatusCode::UNAUTHORIZED, "this page needs a name and a password\n");
    let challenge = HeaderValue::from_static("Basic realm=\"pgherd\", charset=\"UTF-8\"");
    answer.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
    answer
}

pub(super) fn redirect(to: &'static str) -> Answer {
    let mut answer = text(StatusCode::FOUND, "");
    answer
        .headers_mut()
        .insert(header::LOCATION, HeaderValue::from_static(to));
    answer
}

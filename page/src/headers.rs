//! What is sent with the page, and the files that it is made of.

use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};

/// Nothing but our own files, nothing within the markup, no other host: every text on the page is escaped, and this is the
/// second lock.
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; \
     form-action 'self'; frame-ancestors 'none'",
);

/// Where the page is served; everything else lies below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paths {
    /// Such as `/stats`.
    pub root: &'static str,
}

impl Paths {
    /// A file below the page.
    #[must_use]
    pub fn of(self, file: &str) -> String {
        format!("{}/{file}", self.root)
    }

    /// The part below the page of a path that lies there.
    #[must_use]
    pub fn below(self, path: &str) -> Option<&str> {
        path.strip_prefix(self.root)?.strip_prefix('/')
    }
}

/// A file that is part of the page: its type and its text.
#[must_use]
pub fn file(name: &str) -> Option<(&'static str, &'static str)> {
    match name {
        "page.css" => Some(("text/css; charset=utf-8", include_str!("assets/page.css"))),
        "page.js" => Some(("text/javascript; charset=utf-8", include_str!("assets/page.js"))),
        "icon.svg" => Some(("image/svg+xml", include_str!("assets/icon.svg"))),
        _ => None,
    }
}

/// Puts the headers that every part of the page has.
pub fn dress(headers: &mut HeaderMap, content_type: &'static str) {
    let all: [(HeaderName, HeaderValue); 6] = [
        (header::CONTENT_TYPE, HeaderValue::from_static(content_type)),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        // With less, browsers would not say where a form comes from.
        (header::REFERRER_POLICY, HeaderValue::from_static("same-origin")),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            HeaderValue::from_static("same-origin"),
        ),
    ];
    headers.extend(all);
}

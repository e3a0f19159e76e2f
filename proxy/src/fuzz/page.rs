//! Requests to the page.

use std::cell::RefCell;
use std::sync::Arc;

use pgherd_cluster::name::Scope;
use pgherd_cluster::source::channel;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

use super::wait;
use crate::config::{ListenerConfig, ProxyConfig};
use crate::counters::Gauge;
use crate::shared::Shared;
use crate::stats::converse_over;
use crate::tls::TlsSettings;

const REQUEST_BYTES_MAX: usize = 64 * 1024;
/// As much of an answer as is looked at; a stream of events has no end.
const ANSWER_BYTES: usize = 256;
const STATUSES: [&str; 9] = ["200", "302", "400", "403", "404", "405", "414", "431", "503"];

fn shared() -> Option<Arc<Shared>> {
    let (_, handle) = channel(Scope::new("c").ok()?);
    let config = ProxyConfig::new(vec![ListenerConfig::write("h:1")]);
    let tls = TlsSettings::load(None, &config.server_tls).ok()?;
    Some(Arc::new(Shared::new(config, tls, handle, 1)))
}

/// Any bytes on a connection to the page: an answer of HTTP or none, and an end.
pub(super) fn request(input: &[u8]) {
    thread_local! {
        static SHARED: RefCell<Option<Arc<Shared>>> = const { RefCell::new(None) };
    }
    if input.len() > REQUEST_BYTES_MAX {
        return;
    }
    let Some(shared) = SHARED.with_borrow_mut(|known| {
        *known = known.take().or_else(shared);
        known.clone()
    }) else {
        panic!("a proxy without a cluster is always possible")
    };
    let answer = wait(async move {
        let (mut near, far) = duplex(2 * REQUEST_BYTES_MAX);
        assert!(near.write_all(input).await.is_ok() && near.shutdown().await.is_ok());
        let mut served = std::pin::pin!(converse_over(shared, far, Gauge::default()));
        let (mut answer, mut is_served) = (Vec::new(), false);
        let mut piece = [0; ANSWER_BYTES];
        while answer.len() < ANSWER_BYTES {
            tokio::select! {
                biased;
                read = near.read(&mut piece) => match read {
                    Ok(count @ 1..) => answer.extend_from_slice(&piece[..count]),
                    Ok(0) | Err(_) => break,
                },
                () = &mut served, if !is_served => is_served = true,
            }
        }
        answer
    });
    let text = String::from_utf8_lossy(&answer);
    let status = text
        .strip_prefix("HTTP/1.1 ")
        .or_else(|| text.strip_prefix("HTTP/1.0 "));
    let known = status.is_some_and(|status| STATUSES.iter().any(|known| status.starts_with(known)));
    assert!(answer.is_empty() || known, "{text}");
}

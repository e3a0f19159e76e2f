//! `GET /api/v1/events`: the view and its changes, pushed.
//!
//! A subscriber reads from the newest view, not from a queue: one that is slow misses versions in between, and one that
//! takes nothing at all is cut by the connection's own limit. An event may close a route, never open one.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::body::Bytes;
use pgherd_cluster::clock::Boottime;
use pgherd_cluster::source::ViewHandle;
use pgherd_cluster::timing::LeaseTiming;
use pgherd_cluster::view::{Member, View};
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::body::{epoch, shown_role};

/// A quiet stream says this often that it lives.
const HEARTBEAT: Duration = Duration::from_secs(15);

type Next = Pin<Box<dyn Future<Output = Option<(Bytes, Feed)>> + Send>>;

/// Events, one chunk each.
pub(super) struct EventStream {
    /// Nothing once the stream has ended.
    next: Option<Next>,
}

impl EventStream {
    /// A stream that starts with the current view and ends with `stop`. `slot` is held as long as it lives.
    pub(super) fn new(view: ViewHandle, slot: OwnedSemaphorePermit, stop: CancellationToken) -> Self {
        let feed = Feed {
            changes: view.subscribe(),
            view,
            stop,
            began: false,
            _slot: slot,
        };
        Self {
            next: Some(Box::pin(feed.next())),
        }
    }

    pub(super) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let Some(next) = &mut self.next else {
            return Poll::Ready(None);
        };
        let chunk = ready!(next.as_mut().poll(context));
        self.next = None;
        Poll::Ready(chunk.map(|(bytes, feed)| {
            self.next = Some(Box::pin(feed.next()));
            bytes
        }))
    }
}

struct Feed {
    view: ViewHandle,
    changes: watch::Receiver<Arc<View>>,
    stop: CancellationToken,
    began: bool,
    _slot: OwnedSemaphorePermit,
}

impl Feed {
    async fn next(mut self) -> Option<(Bytes, Self)> {
        if self.began {
            let changed = tokio::select! {
                biased;
                () = self.stop.cancelled() => return None,
                changed = timeout(HEARTBEAT, self.changes.changed()) => changed,
            };
            match changed {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return None, // The source has ended: there will be no more views.
                Err(_) => return Some((Bytes::from_static(b": alive\n\n"), self)),
            }
        }
        self.began = true;
        let view = Arc::clone(&self.changes.borrow_and_update());
        let age = self
            .view
            .current_as_of()
            .map(|asked_at| Boottime::now().since(asked_at));
        Some((event(&view, age), self))
    }
}

fn event(view: &View, age: Option<Duration>) -> Bytes {
    // JSON has no line breaks of its own, so the data is one line.
    format!("event: view\nid: {}\ndata: {}\n\n", view.revision, data(view, age)).into()
}

/// What a subscriber needs to route, and to judge by its own rules: a member's own words stand beside how it is shown.
fn data(view: &View, age: Option<Duration>) -> Value {
    json!({
        "revision": view.revision,
        "scope": view.scope,
        "leader": view.epoch().map(|epoch| &epoch.holder),
        "epoch": view.epoch().map(epoch),
        "members": view.members.values().map(|one| member(view, one)).collect::<Vec<_>>(),
        "sync": view.sync.value,
        "optime": view.status.optime,
        "timing": times(view.timing()),
        "pause": view.config.value.as_ref().is_some_and(|config| config.is_paused()),
        "failover": view.failover.value,
        // How long ago the question was sent whose answer confirmed this leader. A relay passes on its own proof.
        "age_ms": age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
    })
}

fn member(view: &View, member: &Member) -> Value {
    let record = &member.record;
    json!({
        "name": member.name,
        "role": record.role,
        "shown_role": shown_role(view, member),
        "state": record.state,
        "replication_state": record.replication_state,
        "timeline": record.timeline,
        "lsn": record.xlog_location,
        "conn_url": record.conn_url,
        "api_url": record.api_url,
        "tags": record.tags,
        "pgherd": record.pgherd,
        // Evidence of writability counts only when it was written under the present holding of the key.
        "mod_revision": member.mod_revision,
    })
}

fn times(timing: LeaseTiming) -> Value {
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    json!({
        "ttl_ms": millis(timing.ttl()),
        "loop_wait_ms": millis(timing.loop_wait()),
        "retry_timeout_ms": millis(timing.retry_timeout()),
    })
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::view;
    use super::*;

    #[test]
    fn an_event_is_one_line_of_json_with_its_revision() {
        let text = String::from_utf8(event(&view(), Some(Duration::from_millis(12))).to_vec()).expect("text");
        let json = text
            .strip_prefix("event: view\nid: 50\ndata: ")
            .and_then(|rest| rest.strip_suffix("\n\n"));
        let json: Value = serde_json::from_str(json.expect("one event")).expect("JSON");
        assert_eq!(json["epoch"], json!({"holder": "node1", "create_revision": 33}));
        assert_eq!(json["members"][1]["name"], "node2");
        assert_eq!(json["members"][0]["shown_role"], "leader");
        assert_eq!(json["timing"]["ttl_ms"], 30_000);
        assert_eq!(json["failover"], Value::Null);
        assert_eq!(json["age_ms"], 12);
    }
}

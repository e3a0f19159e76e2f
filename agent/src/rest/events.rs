//! Streams of events, and the first of them, `GET /api/v1/events`: the view and its changes, pushed.
//!
//! A subscriber reads from the newest view, not from a queue: one that is slow misses versions in between, and one that
//! takes nothing at all is cut by the connection's own limit. An event may close a route, never open one.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::body::Bytes;
use pgherd_cluster::clock::Boottime;
use pgherd_cluster::record::Status;
use pgherd_cluster::source::{SourceHealth, ViewHandle, view_document};
use pgherd_cluster::view::View;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use super::query::Query;

/// A quiet stream says this often that it lives, unless it is asked to do so more often.
const HEARTBEAT: Duration = Duration::from_secs(15);

type Next = Pin<Box<dyn Future<Output = Option<(Bytes, Box<dyn Feed>)>> + Send>>;

/// Where a stream's chunks come from.
pub(super) trait Feed: Send + 'static {
    /// The next chunk and what comes after it; nothing at the end.
    fn next(self: Box<Self>) -> Next;
}

/// A quiet stream's sign of life.
pub(super) const ALIVE: &[u8] = b": alive\n\n";

/// Events, one chunk each.
pub(super) struct EventStream {
    /// Nothing once the stream has ended.
    next: Option<Next>,
}

impl EventStream {
    /// A stream that starts with the current view and ends with `stop`. `slot` is held as long as it lives.
    pub(super) fn of_views(
        view: ViewHandle,
        query: &Query,
        slot: OwnedSemaphorePermit,
        stop: CancellationToken,
    ) -> Self {
        let feed = Views {
            changes: view.subscribe(),
            health: view.health(),
            heartbeat: heartbeat(query),
            view,
            stop,
            sent: None,
            _slot: slot,
        };
        Self::of(feed)
    }

    pub(super) fn of(feed: impl Feed) -> Self {
        Self {
            next: Some(Box::new(feed).next()),
        }
    }

    pub(super) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let Some(next) = &mut self.next else {
            return Poll::Ready(None);
        };
        let chunk = ready!(next.as_mut().poll(context));
        self.next = None;
        Poll::Ready(chunk.map(|(bytes, feed)| {
            self.next = Some(feed.next());
            bytes
        }))
    }
}

pub(super) fn heartbeat(query: &Query) -> Duration {
    let asked = query.first("heartbeat").and_then(|text| text.parse().ok());
    asked.map_or(HEARTBEAT, |seconds: u64| {
        Duration::from_secs(seconds.clamp(1, HEARTBEAT.as_secs()))
    })
}

enum News {
    OfView,
    /// The store is followed again, or no longer.
    OfHealth,
    /// The source has ended: there will be no more views.
    NoMore,
}

/// The next change of either.
async fn news(changes: &mut watch::Receiver<Arc<View>>, health: &mut watch::Receiver<SourceHealth>) -> News {
    let followed = *health.borrow() == SourceHealth::Following;
    loop {
        tokio::select! {
            changed = changes.changed() => return if changed.is_ok() { News::OfView } else { News::NoMore },
            changed = health.changed() => {
                // One failure after another is no news.
                let now = *health.borrow() == SourceHealth::Following;
                match changed {
                    Err(_) => return News::NoMore,
                    Ok(()) if now != followed => return News::OfHealth,
                    Ok(()) => {}
                }
            }
        }
    }
}

struct Views {
    view: ViewHandle,
    changes: watch::Receiver<Arc<View>>,
    /// Whether the store is followed: a subscriber may know somebody who is better off.
    health: watch::Receiver<SourceHealth>,
    heartbeat: Duration,
    stop: CancellationToken,
    sent: Option<Arc<View>>,
    _slot: OwnedSemaphorePermit,
}

impl Feed for Views {
    fn next(self: Box<Self>) -> Next {
        Box::pin(async move {
            let (bytes, feed) = self.advance().await?;
            let feed: Box<dyn Feed> = Box::new(feed);
            Some((bytes, feed))
        })
    }
}

impl Views {
    async fn advance(mut self) -> Option<(Bytes, Self)> {
        let due = Instant::now() + self.heartbeat;
        while let Some(sent) = &self.sent {
            let changed = tokio::select! {
                biased;
                () = self.stop.cancelled() => return None,
                changed = timeout_at(due, news(&mut self.changes, &mut self.health)) => changed,
            };
            match changed {
                Ok(News::OfView) if only_positions_differ(sent, &self.changes.borrow()) => {}
                Ok(News::OfView | News::OfHealth) => break,
                Ok(News::NoMore) => return None,
                Err(_) if Arc::ptr_eq(sent, &self.changes.borrow()) => {
                    return Some((Bytes::from_static(ALIVE), self));
                }
                Err(_) => break,
            }
        }
        let in_touch = *self.health.borrow_and_update() == SourceHealth::Following;
        let age = age(&self.view);
        let view = Arc::clone(&self.changes.borrow_and_update());
        let event = event(&view, age, in_touch);
        self.sent = Some(view);
        Some((event, self))
    }
}

/// Whether nothing but how far members are tells one view from the other: in a cluster that is written to that changes all
/// the time, and changes no route. It is told with the next sign of life.
fn only_positions_differ(one: &View, other: &View) -> bool {
    let without = |view: &View| {
        let mut view = view.clone();
        view.revision = 0;
        view.status = Status::default();
        for member in view.members.values_mut() {
            // What that proves is compared below.
            member.mod_revision = 0;
            member.record.xlog_location = None;
            member.record.replay_lsn = None;
            member.record.receive_lsn = None;
        }
        view
    };
    one.writable_leader().is_some() == other.writable_leader().is_some() && without(one) == without(other)
}

fn event(view: &View, age: Option<Duration>, in_touch: bool) -> Bytes {
    // JSON has no line breaks of its own, so the data is one line.
    let data = view_document(view, age, in_touch);
    format!("event: view\nid: {}\ndata: {data}\n\n", view.revision).into()
}

/// The view as it is now, for whoever asks instead of being told.
pub(super) fn document(view: &ViewHandle) -> Value {
    let in_touch = *view.health().borrow() == SourceHealth::Following;
    let heard = age(view);
    view_document(&view.load(), heard, in_touch)
}

/// How long ago the store was last heard. Read before the view, which may be newer and never older.
fn age(view: &ViewHandle) -> Option<Duration> {
    view.heard_at().map(|heard_at| Boottime::now().since(heard_at))
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::name::Lsn;
    use pgherd_cluster::record::PgState;
    use serde_json::json;

    use super::super::fixtures::view;
    use super::*;

    #[test]
    fn an_event_is_one_line_of_json_with_its_revision() {
        let text = String::from_utf8(event(&view(), Some(Duration::from_millis(12)), true).to_vec()).expect("text");
        let json = text
            .strip_prefix("event: view\nid: 50\ndata: ")
            .and_then(|rest| rest.strip_suffix("\n\n"));
        let json: Value = serde_json::from_str(json.expect("one event")).expect("JSON");
        assert_eq!(json["epoch"], json!({"holder": "node1", "create_revision": 33}));
        assert_eq!(json["members"][1]["name"], "node2");
        assert_eq!(json["members"][0]["shown_role"], "leader");
        assert_eq!(json["timing"]["ttl_ms"], 30_000);
        assert_eq!(json["failover"], Value::Null);
        assert_eq!(
            (&json["age_ms"], &json["in_touch"]),
            (&Value::from(12), &Value::from(true))
        );
    }

    #[test]
    fn positions_alone_are_no_news() {
        let (before, mut after) = (view(), view());
        after.revision += 1;
        after.status.optime = after.status.optime.map(|optime| Lsn(optime.0 + 1));
        for member in after.members.values_mut() {
            member.mod_revision += 1;
            member.record.xlog_location = Some(Lsn(4711));
        }
        assert!(only_positions_differ(&before, &after));
        let mut leaderless = after.clone();
        leaderless.leader = None;
        assert!(!only_positions_differ(&before, &leaderless));
        for member in after.members.values_mut() {
            member.record.state = PgState::Stopped;
        }
        assert!(!only_positions_differ(&before, &after));
    }
}

//! `GET /api/v1/journal`: what happened, by this member's own word and by what all have written to etcd; and what operators
//! ask for by this interface, told to the journal.
//!
//! `since=` is a time in milliseconds since 1970, `kind=` a kind of event, `follow=1` makes it a stream of server-sent events
//! that begins with those there are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Bytes;
use pgherd_cluster::event::{Event, EventId, Kind};
use pgherd_cluster::source::{SourceHealth, ViewHandle};
use pgherd_cluster::view::View;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use super::Api;
use super::answer::{self, Answer, Said, document, sentence};
use super::events::{ALIVE, EventStream, Feed, heartbeat};
use super::query::Query;
use super::route::Route;
use crate::journal::{Draft, Journal};

/// Which events are asked for.
#[derive(Clone, Debug)]
struct Wanted {
    since_ms: u64,
    kind: Option<Kind>,
}

impl Wanted {
    fn parse(query: &Query) -> Result<Self, String> {
        let since = query.first("since").map(str::parse::<u64>).transpose();
        let since_ms = since.map_err(|_| "since is a time in milliseconds since 1970".to_owned())?;
        let kind = match query.first("kind") {
            None => None,
            Some(word) => Some(Kind::of(word).ok_or_else(|| {
                let known: Vec<&str> = Kind::ALL.iter().map(|kind| kind.as_str()).collect();
                format!("kind is one of {}", known.join(", "))
            })?),
        };
        Ok(Self {
            since_ms: since_ms.unwrap_or_default(),
            kind,
        })
    }

    fn takes(&self, event: &Event) -> bool {
        event.at_ms >= self.since_ms && self.kind.is_none_or(|kind| event.kind == kind)
    }

    /// What is known, by id, which is by time. What this member has told and etcd does not have is among it.
    fn of(&self, view: &View, journal: &Journal) -> BTreeMap<EventId, Arc<Event>> {
        let own = journal.latest();
        let all = view.events.iter().cloned().chain(own);
        let wanted = all.filter(|event| self.takes(event));
        wanted.map(|event| (event.id.clone(), event)).collect()
    }
}

/// Serves the journal.
pub(super) fn serve(api: &Api, query: &Query, stop: &CancellationToken) -> Answer {
    let wanted = match Wanted::parse(query) {
        Ok(wanted) => wanted,
        Err(why) => return sentence(400, why),
    };
    if query.first("follow").is_none_or(|word| word == "0") {
        let in_touch = *api.view.health().borrow() == SourceHealth::Following;
        let events = wanted.of(&api.view.load(), &api.journal);
        let events: Vec<Value> = events.values().map(|event| event.to_json()).collect();
        return document(
            200,
            &json!({"member": api.status.borrow().name, "in_touch": in_touch, "events": events}),
        );
    }
    let Ok(slot) = Arc::clone(&api.subscribers).try_acquire_owned() else {
        return sentence(503, "too many subscribers");
    };
    answer::events(EventStream::of(Happenings {
        wanted,
        changes: api.view.subscribe(),
        view: api.view.clone(),
        told: api.journal.subscribe(),
        journal: api.journal.clone(),
        heartbeat: heartbeat(query),
        stop: stop.clone(),
        sent: BTreeSet::new(),
        _slot: slot,
    }))
}

struct Happenings {
    wanted: Wanted,
    view: ViewHandle,
    changes: watch::Receiver<Arc<View>>,
    journal: Journal,
    told: watch::Receiver<u64>,
    heartbeat: Duration,
    stop: CancellationToken,
    /// Of what is known; an event of another's may come with an earlier id than the last that was sent.
    sent: BTreeSet<EventId>,
    _slot: OwnedSemaphorePermit,
}

impl Feed for Happenings {
    fn next(self: Box<Self>) -> std::pin::Pin<Box<dyn Future<Output = Option<(Bytes, Box<dyn Feed>)>> + Send>> {
        Box::pin(async move {
            let (bytes, feed) = self.advance().await?;
            let feed: Box<dyn Feed> = Box::new(feed);
            Some((bytes, feed))
        })
    }
}

impl Happenings {
    async fn advance(mut self) -> Option<(Bytes, Self)> {
        let due = Instant::now() + self.heartbeat;
        loop {
            self.changes.mark_unchanged();
            self.told.mark_unchanged();
            if let Some(chunk) = self.chunk() {
                return Some((chunk, self));
            }
            let news = async {
                tokio::select! {
                    changed = self.changes.changed() => changed.is_ok(),
                    told = self.told.changed() => told.is_ok(),
                }
            };
            let lives = tokio::select! {
                biased;
                () = self.stop.cancelled() => return None,
                news = timeout_at(due, news) => news,
            };
            match lives {
                Ok(true) => {}
                Ok(false) => return None,
                Err(_) => return Some((Bytes::from_static(ALIVE), self)),
            }
        }
    }

    /// What has not been sent.
    fn chunk(&mut self) -> Option<Bytes> {
        let known = self.wanted.of(&self.view.load(), &self.journal);
        let new = known.values().filter(|event| !self.sent.contains(&event.id));
        let text: String = new
            .map(|event| format!("event: event\nid: {}\ndata: {}\n\n", event.id, event.to_json()))
            .collect();
        self.sent = known.into_keys().collect();
        (!text.is_empty()).then(|| text.into())
    }
}

/// Tells that an operator has asked for something, and what the answer was. A hand-over that was begun is told of by those
/// who carry it out.
pub(super) fn note(api: &Api, route: Route, actor: String, answer: &Answer) {
    let Some(action) = route.action() else { return };
    let code = answer.status().as_u16();
    let hands_over = matches!(route, Route::Switchover | Route::Failover);
    let refused = !answer.status().is_success();
    if hands_over && !refused {
        return;
    }
    let said = answer.extensions().get::<Said>().map(|said| said.0.clone());
    let reason = answer.status().canonical_reason().unwrap_or_default();
    let said = said.unwrap_or_else(|| reason.to_owned());
    let name = &api.status.borrow().name;
    let draft = if refused {
        Draft::new(
            Kind::Refusal,
            format!("{name} was asked for {action} and did not do it: {said}"),
        )
    } else {
        Draft::new(Kind::Operator, format!("{name} was asked for {action}: {said}"))
    };
    api.journal.say(draft.asked_by(Some(actor)).with("status", code));
}

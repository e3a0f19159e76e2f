//! The page as it changes, rendered once and sent to everybody who watches.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hyper::body::{Body, Frame};
use serde_json::{Map, Value};
use tokio::sync::{Notify, watch};

use crate::render::{Page, Section};

/// One rendering, as server-sent events.
struct Rendered {
    number: u64,
    /// All sections.
    whole: Bytes,
    /// Those that differ from the rendering before.
    changed: Bytes,
    /// The state as JSON.
    state: Bytes,
}

/// What one who watches is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feed {
    /// Sections of the page.
    Page,
    /// The state as JSON.
    State,
}

/// The newest rendering, and who waits for the next.
pub struct Live {
    rendered: watch::Sender<Arc<Rendered>>,
    sections: Mutex<Vec<Section>>,
    came: Notify,
}

impl Default for Live {
    fn default() -> Self {
        let nothing = Rendered {
            number: 0,
            whole: Bytes::new(),
            changed: Bytes::new(),
            state: Bytes::new(),
        };
        Self {
            rendered: watch::Sender::new(Arc::new(nothing)),
            sections: Mutex::default(),
            came: Notify::new(),
        }
    }
}

impl Live {
    /// Whether anybody would see another rendering.
    #[must_use]
    pub fn is_watched(&self) -> bool {
        self.rendered.receiver_count() > 0
    }

    /// Ends when somebody begins to watch, who has nothing yet. Cancel safe.
    pub async fn somebody_came(&self) {
        self.came.notified().await;
    }

    /// Renders, and sends what has changed. For one writer.
    pub fn publish(&self, page: &Page<'_>) {
        let sections = page.sections();
        let mut before = self.sections.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = |section: &&Section| {
            !before
                .iter()
                .any(|old| old.id == section.id && old.html == section.html)
        };
        let title = format!("{} {} - pgherd", page.state.verdict.word, page.state.scope);
        let changed = event(&title, sections.iter().filter(is_new));
        let whole = event(&title, sections.iter());
        *before = sections;
        drop(before);
        // The state has text keys only, which is all that could fail.
        let state = serde_json::to_string(page.state).unwrap_or_default();
        let number = self.rendered.borrow().number + 1;
        self.rendered.send_replace(Arc::new(Rendered {
            number,
            whole,
            changed,
            state: format!("event: state\ndata: {state}\n\n").into(),
        }));
    }

    /// What is sent from now on. `place` is held as long as somebody listens.
    pub fn watch<P: Send + Unpin + 'static>(&self, feed: Feed, place: P) -> Watching<P> {
        let watching = Watching {
            feed,
            sent: 0,
            next: Some(Box::pin(next(self.rendered.subscribe()))),
            _place: place,
        };
        self.came.notify_one();
        watching
    }
}

/// JSON has no line breaks of its own, so the data is one line.
fn event<'a>(title: &str, sections: impl Iterator<Item = &'a Section>) -> Bytes {
    let mut parts: Map<String, Value> = sections
        .map(|section| (section.id.to_owned(), Value::from(section.html.as_str())))
        .collect();
    parts.insert("title".to_owned(), title.into());
    format!("event: page\ndata: {}\n\n", Value::Object(parts)).into()
}

type Next = Pin<Box<dyn Future<Output = Option<watch::Receiver<Arc<Rendered>>>> + Send>>;

async fn next(mut rendered: watch::Receiver<Arc<Rendered>>) -> Option<watch::Receiver<Arc<Rendered>>> {
    rendered.changed().await.ok()?;
    Some(rendered)
}

/// The body of an answer that ends with the page's server.
pub struct Watching<P> {
    feed: Feed,
    /// The number of the last rendering that was sent.
    sent: u64,
    /// Nothing once it has ended.
    next: Option<Next>,
    _place: P,
}

impl<P: Unpin> Body for Watching<P> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let Some(waiting) = &mut self.next else {
            return Poll::Ready(None);
        };
        let Some(mut receiver) = ready!(waiting.as_mut().poll(cx)) else {
            self.next = None;
            return Poll::Ready(None);
        };
        let rendered = Arc::clone(&receiver.borrow_and_update());
        let follows = self.sent != 0 && self.sent + 1 == rendered.number;
        let bytes = match self.feed {
            Feed::State => rendered.state.clone(),
            Feed::Page if follows => rendered.changed.clone(),
            // One that is new or was slow.
            Feed::Page => rendered.whole.clone(),
        };
        self.sent = rendered.number;
        self.next = Some(Box::pin(next(receiver)));
        Poll::Ready(Some(Ok(Frame::data(bytes))))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;
    use crate::fixtures;
    use crate::ring::Ring;

    async fn text(watching: &mut Watching<()>) -> String {
        let frame = poll_fn(|cx| Pin::new(&mut *watching).poll_frame(cx)).await;
        let bytes = frame.and_then(Result::ok).and_then(|frame| frame.into_data().ok());
        String::from_utf8(bytes.expect("bytes").to_vec()).expect("text")
    }

    fn parts(event: &str) -> Map<String, Value> {
        let data = event.strip_prefix("event: page\ndata: ").expect("an event");
        serde_json::from_str(data.trim_end()).expect("JSON")
    }

    #[tokio::test(flavor = "current_thread")]
    async fn who_follows_gets_what_has_changed_and_who_is_slow_gets_all() {
        let (live, ring, mut state) = (Live::default(), Ring::default(), fixtures::state());
        assert!(!live.is_watched());
        let (mut quick, mut slow) = (live.watch(Feed::Page, ()), live.watch(Feed::Page, ()));
        live.somebody_came().await;
        assert!(live.is_watched());
        live.publish(&fixtures::page(&state, &ring));
        let first = parts(&text(&mut quick).await);
        assert!(first.contains_key("verdict") && first.contains_key("events"));
        assert_eq!(parts(&text(&mut slow).await), first);

        state.verdict.sentence = "something else".to_owned();
        live.publish(&fixtures::page(&state, &ring));
        let second = parts(&text(&mut quick).await);
        assert_eq!(second.keys().collect::<Vec<_>>(), ["verdict", "title"]);
        assert!(
            second["verdict"]
                .as_str()
                .is_some_and(|html| html.contains("something else"))
        );
        state.verdict.word = "NO LEADER";
        live.publish(&fixtures::page(&state, &ring));
        let missed_one = parts(&text(&mut slow).await);
        assert!(missed_one.contains_key("events") && missed_one["title"] == "NO LEADER c - pgherd");
        drop((quick, slow));
        assert!(!live.is_watched());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_stream_ends_with_its_page() {
        let live = Live::default();
        let mut watching = live.watch(Feed::State, ());
        drop(live);
        assert!(poll_fn(|cx| Pin::new(&mut watching).poll_frame(cx)).await.is_none());
    }
}

//! The state as server-sent events: one when something happens, and one each second.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame};
use tokio::time::{sleep, timeout};

use super::json;
use crate::counters::Counted;
use crate::shared::Shared;

/// Numbers move without events.
const REFRESH: Duration = Duration::from_secs(1);
/// However much happens.
const REFRESH_MIN: Duration = Duration::from_millis(200);

/// A body without an end.
pub(crate) struct StateStream {
    shared: Arc<Shared>,
    next: Pin<Box<dyn Future<Output = ()> + Send>>,
    _place: Counted,
}

impl StateStream {
    pub(crate) fn new(shared: Arc<Shared>, place: Counted) -> Self {
        Self {
            shared,
            next: Box::pin(std::future::ready(())),
            _place: place,
        }
    }
}

impl Body for StateStream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        ready!(self.next.as_mut().poll(cx));
        let mut recorded = self.shared.events.subscribe();
        let mut changes = self.shared.view.subscribe();
        changes.mark_unchanged();
        self.next = Box::pin(async move {
            sleep(REFRESH_MIN).await;
            let news = async {
                tokio::select! {
                    Ok(()) = recorded.changed() => {}
                    Ok(()) = changes.changed() => {}
                    else => std::future::pending().await,
                }
            };
            // Without news the time alone is reason enough.
            let _ = timeout(REFRESH - REFRESH_MIN, news).await;
        });
        let event = format!("event: state\ndata: {}\n\n", json(&self.shared));
        Poll::Ready(Some(Ok(Frame::data(event.into()))))
    }
}

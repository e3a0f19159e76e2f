//! When a session that is asked to leave may be ended: between two transactions.
//!
//! That the server's last word is a ReadyForQuery and the client has sent nothing since does not say so for certain: a client
//! may have sent its next statements before. So a session leaves once it has been quiet for a moment. One that is never quiet
//! leaves at the first moment between two transactions after a while.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};

use crate::sessions::Ending;

/// A server that has statements left to answer says something within this time, mostly.
const QUIET: Duration = Duration::from_millis(20);
/// For how long a moment of quiet is waited for.
const QUIET_WAIT_MAX: Duration = Duration::from_secs(10);

/// A session that has been asked to leave.
pub(crate) struct Leaving {
    ending: Ending,
    asked_at: Instant,
    quiet: Pin<Box<Sleep>>,
}

impl Leaving {
    pub(crate) fn new(ending: Ending) -> Self {
        Self {
            ending,
            asked_at: Instant::now(),
            quiet: Box::pin(sleep(QUIET)),
        }
    }

    /// Ready when it may be ended. To be asked whenever bytes have moved; `is_idle` says whether the session looks so now.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, is_idle: bool) -> Poll<Ending> {
        let now = Instant::now();
        if !is_idle {
            self.quiet.as_mut().reset(now + QUIET);
            return Poll::Pending;
        }
        let is_over = self.quiet.as_mut().poll(cx).is_ready();
        if is_over || now.duration_since(self.asked_at) >= QUIET_WAIT_MAX {
            return Poll::Ready(self.ending.clone());
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    async fn once(leaving: &mut Leaving, is_idle: bool) -> bool {
        poll_fn(|cx| Poll::Ready(leaving.poll(cx, is_idle).is_ready())).await
    }

    #[tokio::test]
    async fn it_leaves_after_a_moment_of_quiet_and_not_while_it_is_busy() {
        let mut leaving = Leaving::new(Ending::Stopping);
        assert!(!once(&mut leaving, true).await, "it may have sent more");
        sleep(2 * QUIET).await;
        assert!(!once(&mut leaving, false).await);
        assert!(!once(&mut leaving, true).await, "it was busy a moment ago");
        let left = poll_fn(|cx| leaving.poll(cx, true)).await;
        assert_eq!(left, Ending::Stopping);
    }
}

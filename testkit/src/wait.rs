//! Waiting for conditions. Nothing here waits for a time: each wait ends as soon as what it waits for is seen, and says
//! what it saw last when its deadline passes.

use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Result, anyhow};
use serde_json::Value;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};

use crate::sql::{Sql, SqlFailure};

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(50);
/// A look that takes longer hangs.
const HUNG: Duration = Duration::from_secs(2);

/// What a look may return that has seen what it looked for. Any `Ok` ends the wait, so neither a `bool` nor an `Option` is one:
/// `Ok(false)` and `Ok(None)` would pass for having seen it. A look that has not says so by an error, as `ensure!` makes it,
/// which is also what the report of a wait in vain is made of.
///
/// Implement it for a type of a test's own; never for one with a value that means "not yet".
///
/// ```compile_fail,E0277
/// # use std::time::Duration;
/// # async fn look(n: u32) -> anyhow::Result<()> {
/// pgherd_testkit::eventually("it is three", Duration::from_secs(1), async || Ok(n == 3)).await?;
/// # Ok(())
/// # }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not show that anything was seen",
    note = "a look that returns Ok ends the wait: use ensure! or context, and return what was seen"
)]
pub trait Seen {}

macro_rules! seen {
    ($($type:ty),* $(,)?) => { $(impl Seen for $type {})* };
}

seen!((), String, PathBuf, ExitStatus, Instant, std::time::Instant, Value);
seen!(Sql, SqlFailure);
seen!(u8, u16, u32, u64, usize, i32, i64, f64);

impl<T: ?Sized> Seen for &T {}
impl<T> Seen for Vec<T> {}
/// An end of what was waited for, in one way or the other; nobody can leave it unlooked at.
impl<T: Seen, E> Seen for std::result::Result<T, E> {}
impl<A: Seen, B: Seen> Seen for (A, B) {}
impl<A: Seen, B: Seen, C: Seen> Seen for (A, B, C) {}

/// Looks until `look` returns `Ok`, and returns that. A look that does not return counts as not seen.
///
/// # Errors
/// When `limit` has passed: names `what` was waited for and why the last look did not do.
pub async fn eventually<T: Seen>(what: &str, limit: Duration, mut look: impl AsyncFnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    let mut poll = interval(POLL);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = anyhow!("nothing was seen");
    while Instant::now() < deadline {
        poll.tick().await;
        let began = Instant::now();
        match timeout_at(deadline, look()).await {
            Ok(Ok(seen)) => return Ok(seen),
            Ok(Err(reason)) => last = reason,
            // A look that had only just begun says nothing.
            Err(_) if began.elapsed() < HUNG => {}
            Err(_) => last = last.context("the last look did not return; the one before"),
        }
    }
    Err(last.context(format!("waited {limit:?} in vain until {what}; last seen")))
}

/// Watches for as long as `span` that `look` stays `Ok`: for what must *not* happen while something else goes on.
///
/// # Errors
/// What `look` returned, the first time that it was not `Ok`.
pub async fn throughout(what: &str, span: Duration, mut look: impl AsyncFnMut() -> Result<()>) -> Result<()> {
    let deadline = Instant::now() + span;
    let mut poll = interval(POLL);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while Instant::now() < deadline {
        poll.tick().await;
        look()
            .await
            .map_err(|reason| reason.context(format!("expected throughout {span:?}: {what}")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use anyhow::{bail, ensure};

    use super::*;

    #[tokio::test]
    async fn a_condition_that_comes_true_ends_the_wait() {
        let mut looks = 0;
        let seen = eventually("three looks were made", Duration::from_secs(5), async || {
            looks += 1;
            ensure!(looks >= 3, "{looks} looks");
            Ok(looks)
        });
        assert_eq!(seen.await.unwrap(), 3);
    }

    #[tokio::test]
    async fn a_wait_in_vain_says_what_was_seen_last() {
        let seen = eventually(
            "the moon is green",
            Duration::from_millis(120),
            async || -> Result<()> { bail!("it is grey") },
        );
        let text = format!("{:#}", seen.await.unwrap_err());
        assert_eq!(
            text,
            "waited 120ms in vain until the moon is green; last seen: it is grey"
        );
    }

    #[tokio::test]
    async fn a_look_that_hangs_is_not_waited_for() {
        let seen = eventually("it answers", Duration::from_millis(80), async || {
            std::future::pending::<Result<()>>().await
        });
        assert!(seen.await.is_err());
    }
}

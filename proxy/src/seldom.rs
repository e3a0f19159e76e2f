//! Lines of the log that strangers could make the proxy write without end.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pgherd_cluster::clock::Boottime;

/// So often one line of a kind is written, however often there is reason for one.
const PAUSE: Duration = Duration::from_secs(10);

/// One kind of line: at most one each ten seconds is written, and tells how many were not.
#[derive(Debug, Default)]
pub(crate) struct Seldom {
    /// Before this, in nanoseconds since boot, nothing is written.
    next: AtomicU64,
    kept_back: AtomicU64,
}

impl Seldom {
    pub(crate) const fn new() -> Self {
        Self {
            next: AtomicU64::new(0),
            kept_back: AtomicU64::new(0),
        }
    }

    /// Whether there is to be a line `now`, and then how many others were kept back since the last one.
    pub(crate) fn admits(&self, now: Boottime) -> Option<u64> {
        let next = self.next.load(Ordering::Relaxed);
        let after = (now + PAUSE).as_nanos();
        let is_time = now.as_nanos() >= next;
        // One of several threads writes it.
        let writes = is_time
            && self
                .next
                .compare_exchange(next, after, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        if !writes {
            self.kept_back.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(self.kept_back.swap(0, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_line_and_the_next_tells_of_it() {
        let line = Seldom::new();
        let at = |millis: u64| Boottime::from_nanos(5_000_000_000) + Duration::from_millis(millis);
        assert_eq!(line.admits(at(0)), Some(0));
        assert!((1..10_000).all(|millis| line.admits(at(millis)).is_none()));
        assert_eq!(line.admits(at(10_000)), Some(9_999));
        assert_eq!(line.admits(at(10_001)), None);
        assert_eq!(line.admits(at(60_000)), Some(1));
    }
}

//! Who decides may itself hang on the disk of the data directory. Others, which never touch it, notice.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::timing::LeaseTiming;
use tokio::sync::watch;

use crate::health::Health;

/// No disk fails for this long because of a freeze, a checkpoint or a busy machine, and no loop stands still for as long
/// because of a slow etcd beside it.
const HUNG_MIN: Duration = Duration::from_secs(10);

/// When the loop last turned.
#[derive(Debug, Default)]
pub struct Turns(AtomicU64);

impl Turns {
    /// It turns.
    pub fn note(&self, now: Boottime) {
        self.0.store(now.as_nanos(), Ordering::Relaxed);
    }

    fn last(&self) -> Boottime {
        Boottime::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

/// What tells whether the loop hangs.
#[derive(Clone)]
pub struct Vigil {
    /// What the probes find.
    pub health: watch::Receiver<Health>,
    /// When the loop last turned.
    pub turns: Arc<Turns>,
}

impl Vigil {
    /// Whether the loop hangs on the disk: it has not turned for long, and as long ago the disk has stopped answering. What
    /// it would decide then, to leave the lead to a member whose disk works, it cannot.
    #[must_use]
    pub fn loop_hangs(&self, timing: LeaseTiming, now: Boottime) -> bool {
        hangs(*self.health.borrow(), self.turns.last(), timing, now)
    }

    /// Of a member whose loop always turns.
    #[cfg(test)]
    pub(crate) fn of_a_sound_member() -> Self {
        Self {
            health: watch::channel(Health::default()).1,
            turns: Arc::default(),
        }
    }
}

fn hangs(health: Health, turned_at: Boottime, timing: LeaseTiming, now: Boottime) -> bool {
    // As long as a loop that turns is patient, and one turn more.
    let patience = (2 * timing.ttl()).max(HUNG_MIN) + timing.loop_wait();
    let for_long = |since: Boottime| now.since(since) >= patience;
    health.disk_fails_since.is_some_and(for_long) && for_long(turned_at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_hangs_when_it_and_the_disk_have_stood_still_for_long() {
        let at = |seconds: u64| Boottime::from_nanos(seconds * 1_000_000_000);
        let timing = LeaseTiming::DEFAULT;
        let patience = (2 * timing.ttl()).max(HUNG_MIN) + timing.loop_wait();
        let (began, over) = (at(100), at(100) + patience);
        let disk = |since| Health {
            disk_fails_since: since,
            ..Health::default()
        };
        assert!(hangs(disk(Some(began)), began, timing, over));
        assert!(!hangs(disk(None), began, timing, over), "a slow etcd is no reason");
        assert!(!hangs(disk(Some(began)), over, timing, over), "it turns");
        let sooner = over - Duration::from_millis(1);
        assert!(!hangs(disk(Some(began)), began, timing, sooner), "not for long enough");
    }
}

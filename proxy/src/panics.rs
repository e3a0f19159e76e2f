//! Panics. Each is a defect of the proxy, and ends the one connection that met it.

use std::panic::{self, PanicHookInfo};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pgherd_cluster::clock::Boottime;
use tracing::error;

use crate::seldom::Seldom;

static ARE_WATCHED: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicU64 = AtomicU64::new(0);
static LINE: Seldom = Seldom::new();

/// Counts every panic of this process from now on, on whichever thread, and tells it in the log by one line with its place,
/// no more often than every ten seconds. For a process whose log is started: nothing more is written to standard error.
pub fn watch_panics() {
    ARE_WATCHED.store(true, Ordering::Relaxed);
    panic::set_hook(Box::new(note));
}

fn note(panic: &PanicHookInfo<'_>) {
    COUNT.fetch_add(1, Ordering::Relaxed);
    let Some(kept_back) = LINE.admits(Boottime::now()) else {
        return;
    };
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    let said = panic.payload_as_str().unwrap_or("no words");
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or_default();
    error!(
        place,
        said, thread, kept_back, "a defect of this proxy, please report it"
    );
}

/// How many there were: of the whole process where they are watched, otherwise those that `seen` has seen itself.
pub(crate) fn total(seen: &AtomicU64) -> u64 {
    let count = if ARE_WATCHED.load(Ordering::Relaxed) {
        &COUNT
    } else {
        seen
    };
    count.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_on_any_thread_is_counted() {
        let seen = AtomicU64::new(7);
        let before = total(&seen);
        assert_eq!(before, 7, "nobody watches");
        watch_panics();
        let ended = std::thread::spawn(|| panic!("on purpose")).join();
        assert!(ended.is_err() && total(&seen) >= 1);
        drop(panic::take_hook());
        ARE_WATCHED.store(false, Ordering::Relaxed);
    }
}

//! A small world, searched: three members, no chance, and two faults at every pair of moments out of those at which a
//! message arrives or a step begins.
//!
//! `STRIDE` says how many moments lie between two that are tried. `STRIDE=1` is the long version and tries all: millions of
//! runs, which take hours.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use pgherd_simulator::{Report, Setup, alphabet_len, run_pair};

/// Less than a minute on two threads, in the `sim` profile.
const STRIDE: usize = 26;

#[test]
fn two_faults_at_any_two_moments_break_no_rule() {
    let stride = std::env::var("STRIDE")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(STRIDE);
    let setup = Setup::quiet(3);
    let (alone, points) = run_pair(&setup, &[]);
    assert!(alone.violations.is_empty(), "{}", alone.summary());
    let moments: Vec<usize> = (1..=points).step_by(stride).collect();
    let mut cases = Vec::new();
    for (place, first) in moments.iter().enumerate() {
        for second in moments.iter().skip(place) {
            for one in 0..alphabet_len() {
                cases.extend((0..alphabet_len()).map(|two| [(*first, one), (*second + 1, two)]));
            }
        }
    }
    let (next, broken, started) = (
        AtomicUsize::new(0),
        Mutex::new(Vec::<([(usize, usize); 2], Report)>::new()),
        Instant::now(),
    );
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (report, _) = run_pair(&setup, case);
                    if !report.violations.is_empty() {
                        broken
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .push((*case, report));
                    }
                }
            });
        }
    });
    let broken = broken.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!(
        "{} runs of {}, at {} of {points} moments, in {:.1} s",
        cases.len(),
        points * (points + 1) / 2 * alphabet_len() * alphabet_len(),
        moments.len(),
        started.elapsed().as_secs_f64()
    );
    for (case, report) in broken.iter().take(5) {
        println!("{case:?}: {}", report.summary());
    }
    assert!(
        broken.is_empty(),
        "{} of {} runs broke a rule",
        broken.len(),
        cases.len()
    );
}

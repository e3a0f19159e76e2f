//! A check that cannot fail proves nothing: each of these bugs, planted in the glue around the decisions, is found by the
//! schedules within a few hundred seeds, and the same schedules without it find nothing.
//!
//! `SEED` runs one, with the bug, and prints what happened in it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use pgherd_simulator::{Planted, Setup, run};

/// How many seeds a bug may hide in.
const SEEDS_MAX: u64 = 400;

/// The schedule of a seed as it fits a bug: with the faults and the mode that the bug needs to do harm.
fn fitting(planted: Planted, seed: u64) -> Setup {
    Setup::drawn(seed).fitting(planted)
}

/// The first seed that finds it, by breaking a rule of safety.
fn found(planted: Planted) -> Option<u64> {
    let (next, first) = (AtomicU64::new(1), Mutex::new(None::<u64>));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed > SEEDS_MAX || first.lock().expect("no thread panics").is_some() {
                        return;
                    }
                    let setup = Setup {
                        planted: Some(planted),
                        ..fitting(planted, seed)
                    };
                    let unsafe_by = |rule: &str| rule.starts_with('S') || rule == "key";
                    if run(&setup).violations.iter().any(|violation| unsafe_by(violation.rule)) {
                        let mut first = first.lock().expect("no thread panics");
                        *first = Some(first.map_or(seed, |other| other.min(seed)));
                    }
                }
            });
        }
    });
    first.into_inner().expect("no thread panics")
}

/// The bug is found, and what found it finds nothing without it.
fn is_found(planted: Planted) {
    if let Some(seed) = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()) {
        let setup = Setup {
            planted: Some(planted),
            trace: true,
            ..fitting(planted, seed)
        };
        let report = run(&setup);
        return println!("{}\n{}", report.lines.join("\n"), report.summary());
    }
    let seed = found(planted);
    println!("{planted:?} is found by seed {seed:?}");
    let Some(seed) = seed else {
        panic!("{SEEDS_MAX} schedules did not find {planted:?}");
    };
    let report = run(&fitting(planted, seed));
    assert!(report.violations.is_empty(), "without the bug: {}", report.summary());
}

macro_rules! found_by_schedules {
    ($($name:ident: $bug:ident,)*) => {
        $(#[test]
        fn $name() {
            is_found(Planted::$bug);
        })*

        /// Also of the schedules that each bug gets.
        #[test]
        fn without_a_planted_bug_nothing_is_found() {
            for planted in [$(Planted::$bug,)*] {
                for seed in 1..=25 {
                    let report = run(&fitting(planted, seed));
                    assert!(report.violations.is_empty(), "{planted:?}: {}", report.summary());
                }
            }
        }
    };
}

found_by_schedules! {
    a_deadline_counted_from_the_reply: DeadlineFromReply,
    a_keepalive_taken_for_a_proof_of_the_key: KeepaliveProves,
    a_passed_deadline_that_is_extended: PassedDeadlineExtended,
    steps_of_synchronous_replication_in_the_wrong_order: SyncOrderSwapped,
    a_bid_that_does_not_compare_sync: StaleSync,
    an_election_that_does_not_look_at_timelines: NoTimelineCheck,
    a_vouch_while_bidding: VouchWhileBidding,
    a_lease_given_up_while_a_backend_lives: ReleaseWhileBackendLives,
    a_setting_taken_over_at_once: TakenOverAtOnce,
}

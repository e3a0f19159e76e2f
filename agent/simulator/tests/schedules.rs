//! Seeded schedules of faults: whatever happens, no rule is broken, and when it is over the cluster is well.
//!
//! `SCHEDULES` says how many and `FROM` from which on, `SEED` runs one and prints what happened in it. A seed that breaks a
//! rule is printed and kept in `seeds.txt`, unless `KEEP` is 0.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use pgherd_simulator::{Report, Setup, run};

/// A bit more than a minute on two threads, in the `sim` profile.
const SCHEDULES: u64 = 5000;

fn kept_file() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("seeds.txt")
}

/// Seeds that once found something run first, for ever.
fn kept() -> Vec<u64> {
    let text = std::fs::read_to_string(kept_file()).unwrap_or_default();
    let seed = |line: &str| line.split_whitespace().next()?.parse().ok();
    text.lines().filter_map(seed).collect()
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn keep(report: &Report) {
    let known = kept();
    if known.contains(&report.seed) {
        return;
    }
    let rule = report.violations.first().map_or("", |violation| violation.rule);
    let mut text = std::fs::read_to_string(kept_file()).unwrap_or_default();
    text.push_str(&format!("{} {rule}\n", report.seed));
    std::fs::write(kept_file(), text).expect("the file of seeds lies in the source tree");
}

/// What all runs together saw.
#[derive(Default)]
struct Totals {
    commits: usize,
    confirmed: usize,
    lost: usize,
    lost_by_restore: usize,
    failed_over: usize,
    promotions: usize,
    steps: u64,
}

impl Totals {
    fn add(&mut self, report: &Report) {
        self.commits += report.commits;
        self.confirmed += report.confirmed;
        self.lost += report.lost;
        self.lost_by_restore += report.lost_by_restore;
        self.failed_over += usize::from(report.promotions > 0);
        self.promotions += report.promotions;
        self.steps += report.steps;
    }
}

impl std::fmt::Display for Totals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} commits, {} of them synchronous, {} lost within the rules of asynchronous replication, {} by restores \
             of etcd; {} promotions in {} schedules; {} steps",
            self.commits,
            self.confirmed,
            self.lost,
            self.lost_by_restore,
            self.promotions,
            self.failed_over,
            self.steps
        )
    }
}

fn run_all(seeds: &[u64]) -> Vec<Report> {
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let next = AtomicU64::new(0);
    let (broken, totals) = (Mutex::new(Vec::new()), Mutex::new(Totals::default()));
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(seed) = usize::try_from(next.fetch_add(1, Ordering::Relaxed))
                    .ok()
                    .and_then(|at| seeds.get(at))
                {
                    let report = run(&Setup::drawn(*seed));
                    let mut totals = totals.lock().unwrap_or_else(PoisonError::into_inner);
                    totals.add(&report);
                    if !report.violations.is_empty() {
                        broken.lock().unwrap_or_else(PoisonError::into_inner).push(report);
                    }
                }
            });
        }
    });
    let seconds = started.elapsed().as_secs_f64();
    let totals = totals.into_inner().unwrap_or_else(PoisonError::into_inner);
    let count = u32::try_from(seeds.len()).map_or(0.0, f64::from);
    println!(
        "{} schedules in {seconds:.1} s on {threads} threads, {:.0} a minute; {totals}",
        seeds.len(),
        60.0 * count / seconds
    );
    broken.into_inner().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn no_schedule_of_faults_breaks_a_rule() {
    if let Some(seed) = number("SEED") {
        let report = run(&Setup {
            trace: true,
            ..Setup::drawn(seed)
        });
        println!("{:?}\n{}", Setup::drawn(seed), report.lines.join("\n"));
        assert!(report.violations.is_empty(), "{}", report.summary());
        return;
    }
    let from = number("FROM").unwrap_or(1);
    let mut seeds = kept();
    seeds.extend(from..from + number("SCHEDULES").unwrap_or(SCHEDULES));
    let broken = run_all(&seeds);
    for report in &broken {
        println!("{}", report.summary());
        println!(
            "  again: SEED={} cargo test --profile sim -p pgherd-simulator --test schedules -- --nocapture",
            report.seed
        );
        if number("KEEP") != Some(0) {
            keep(report);
        }
    }
    assert!(
        broken.is_empty(),
        "{} of {} schedules broke a rule",
        broken.len(),
        seeds.len()
    );
}

#[test]
fn a_seed_repeats_itself_to_the_last_step() {
    let setup = Setup {
        trace: true,
        ..Setup::drawn(11)
    };
    let (one, two) = (run(&setup), run(&setup));
    assert_eq!((one.steps, one.commits), (two.steps, two.commits));
    assert_eq!(one.lines, two.lines);
}

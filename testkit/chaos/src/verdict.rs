//! Whether a run kept what is promised. Pure.

use std::time::Duration;

use crate::case::{Case, Side, TTL};
use crate::record::Run;

/// What a run did not keep.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Misses {
    /// Promises of safety. These fail any test.
    pub safety: Vec<String>,
    /// Promises of time, and runs that did not come to their end.
    pub time: Vec<String>,
}

impl Misses {
    /// Whether everything was kept.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.safety.is_empty() && self.time.is_empty()
    }

    /// All of them, in one line.
    #[must_use]
    pub fn text(&self) -> String {
        let all: Vec<&str> = self.safety.iter().chain(&self.time).map(String::as_str).collect();
        all.join("; ")
    }
}

/// The gap that a case is about.
#[must_use]
pub fn gap(case: Case, run: &Run) -> f64 {
    match case.side() {
        Side::Writers => run.write_gap,
        Side::Readers => run.read_gap,
    }
}

/// Judges a run; `quiet` is the longest gap of a quiet one.
#[must_use]
pub fn misses(case: Case, run: &Run, quiet: Duration) -> Misses {
    let mut misses = Misses::default();
    if run.lost > 0 && !case.may_lose_rows_in(run.mode) {
        misses.safety.push(format!("{} acknowledged rows lost", run.lost));
    }
    // A client on the leader's own host is a client, too, where commits wait for a replica.
    if run.orphans > 0 && !case.may_lose_rows_in(run.mode) {
        misses
            .safety
            .push(format!("{} rows acknowledged on a member's host lost", run.orphans));
    }
    if run.two_writers_by_proxy > 0 {
        let count = run.two_writers_by_proxy;
        misses.safety.push(format!("two writers through the proxy: {count}"));
    }
    let by_two = run.two_writers - run.two_writers_on_their_way;
    if by_two > 0 && !case.may_answer_after_thaw() {
        misses
            .safety
            .push(format!("two writers: {by_two} for {:.3} s", run.overlap));
    }
    let ttl = TTL.as_secs_f64();
    if case.ends_at_deadline() && run.last_of_old > ttl {
        let late = format!(
            "the isolated leader acknowledged until {:.3} s, over its deadline",
            run.last_of_old
        );
        misses.safety.push(late);
    }
    if let Some(trouble) = &run.trouble {
        misses.time.push(trouble.clone());
    }
    let gap = gap(case, run);
    if let Some(limit) = case.bound().limit(quiet)
        && gap > limit.as_secs_f64()
    {
        misses
            .time
            .push(format!("{gap:.3} s, over {:.3} s", limit.as_secs_f64()));
    }
    misses
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::Mode;
    use crate::judge::Judgement;
    use crate::record::Subject;

    fn run(mode: Mode, judgement: &Judgement) -> Run {
        let subject = Subject {
            binary: String::new(),
            etcd: String::new(),
            short: false,
            over: String::new(),
        };
        Run::new(&subject, Case::Partitioned, mode, 1, judgement)
    }

    #[test]
    fn what_asynchronous_replication_may_lose_quorum_may_not() {
        let judgement = Judgement {
            lost: 3,
            orphans: 5,
            last_of_old: Duration::from_secs(4),
            write_gap: Duration::from_secs(5),
            ..Judgement::default()
        };
        let of = |mode| misses(Case::Partitioned, &run(mode, &judgement), Duration::ZERO);
        assert!(of(Mode::Asynchronous).is_empty());
        assert_eq!(of(Mode::Quorum).safety.len(), 2);
        let switchover = misses(Case::Switchover, &run(Mode::Asynchronous, &judgement), Duration::ZERO);
        assert_eq!((switchover.safety.len(), switchover.time.len()), (2, 1));
    }

    #[test]
    fn two_writers_are_forgiven_only_to_whoever_was_frozen_whole() {
        let judgement = Judgement {
            two_writers: 4,
            two_writers_on_their_way: 1,
            ..Judgement::default()
        };
        let run = run(Mode::Asynchronous, &judgement);
        assert_eq!(
            misses(Case::AgentFrozen, &run, Duration::ZERO).safety,
            ["two writers: 3 for 0.000 s"]
        );
        assert!(misses(Case::MemberFrozen, &run, Duration::ZERO).is_empty());
    }
}

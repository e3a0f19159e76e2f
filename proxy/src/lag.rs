//! For how long a replica has been behind, from the positions that the leader has told over time. Pure.
//!
//! A member tells how far it is, not when it was there. The leader's positions are noted as they become known; a replica at
//! some position has been behind since the leader was first known to be past that. Members tell their positions once per
//! loop_wait, so a lag is known to about that.

use std::collections::VecDeque;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::Lsn;
use pgherd_cluster::record::Role;
use pgherd_cluster::view::View;

/// Of more, those in between are forgotten, the older ones first: old lags become less exact.
const POSITIONS_MAX: usize = 256;

/// The positions of the leader, each with the time at which it became known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeaderPositions {
    /// Both parts grow from each to the next.
    seen: VecDeque<(Boottime, Lsn)>,
}

/// How long a position has been behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behind {
    /// For this long; zero when it is not.
    For(Duration),
    /// Since before anything was noted: at least for this long.
    AtLeast(Duration),
}

impl LeaderPositions {
    /// Nothing is known.
    #[must_use]
    pub const fn none() -> Self {
        Self { seen: VecDeque::new() }
    }

    /// Notes a position that has become known at `at`. What was noted beyond it belongs to a history that is no more: another
    /// leads, or the store has been restored.
    pub fn note(&mut self, position: Lsn, at: Boottime) {
        while self.seen.back().is_some_and(|(_, last)| *last > position) {
            self.seen.pop_back();
        }
        if self.seen.back().is_some_and(|(_, last)| *last == position) {
            return;
        }
        // A clock that stands still, or another thread's later reading.
        let at = self.seen.back().map_or(at, |(last, _)| at.max(*last));
        self.seen.push_back((at, position));
        if self.seen.len() > POSITIONS_MAX {
            self.thin_out();
        }
    }

    /// Forgets every second one of the older half. The first of all stays: it tells since when anything is known.
    fn thin_out(&mut self) {
        let mut index = 0;
        self.seen.retain(|_| {
            index += 1;
            index > POSITIONS_MAX / 2 || index % 2 == 1
        });
    }

    /// The newest position.
    #[must_use]
    pub fn newest(&self) -> Option<Lsn> {
        self.seen.back().map(|(_, position)| *position)
    }

    /// How long `position` has been behind at `now`; nothing while nothing is known of the leader.
    #[must_use]
    pub fn behind(&self, position: Lsn, now: Boottime) -> Option<Behind> {
        let newest = self.newest()?;
        if position >= newest {
            return Some(Behind::For(Duration::ZERO));
        }
        let passed = self.seen.partition_point(|(_, known)| *known <= position);
        let (at, _) = self.seen.get(passed)?;
        let since = now.since(*at);
        Some(if passed == 0 {
            Behind::AtLeast(since)
        } else {
            Behind::For(since)
        })
    }
}

/// The furthest position that is known of the leader: what `/status` says, or its own record once that speaks of a leader.
#[must_use]
pub fn leader_position(view: &View) -> Option<Lsn> {
    let leader = view.leader_member().map(|member| &member.record);
    let leads = leader.filter(|record| matches!(record.role, Role::Primary | Role::StandbyLeader));
    view.status.optime.max(leads.and_then(|record| record.xlog_location))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::Cluster;

    fn at(seconds: u64) -> Boottime {
        Boottime::from_nanos(seconds * 1_000_000_000)
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn positions(noted: &[(u64, u64)]) -> LeaderPositions {
        let mut positions = LeaderPositions::none();
        for (time, position) in noted {
            positions.note(Lsn(*position), at(*time));
        }
        positions
    }

    #[test]
    fn a_replica_is_behind_since_the_leader_was_past_it() {
        let known = positions(&[(10, 100), (20, 200), (30, 300)]);
        let behind = |position, now| known.behind(Lsn(position), at(now));
        assert_eq!(behind(300, 99), Some(Behind::For(Duration::ZERO)));
        assert_eq!(behind(400, 99), Some(Behind::For(Duration::ZERO)));
        assert_eq!(behind(299, 99), Some(Behind::For(seconds(69))));
        assert_eq!(behind(200, 31), Some(Behind::For(seconds(1))));
        assert_eq!(behind(100, 31), Some(Behind::For(seconds(11))));
        // Since when, nobody saw.
        assert_eq!(behind(99, 31), Some(Behind::AtLeast(seconds(21))));
        assert_eq!(LeaderPositions::none().behind(Lsn(1), at(1)), None);
    }

    #[test]
    fn an_idle_leader_leaves_nobody_behind_and_its_next_write_does_only_from_then_on() {
        let mut known = positions(&[(10, 100), (3_600, 100)]);
        assert_eq!(known.behind(Lsn(100), at(7_200)), Some(Behind::For(Duration::ZERO)));
        known.note(Lsn(200), at(7_200));
        assert_eq!(known.behind(Lsn(100), at(7_201)), Some(Behind::For(seconds(1))));
    }

    #[test]
    fn a_leader_that_is_further_back_takes_what_was_beyond_it_with_it() {
        let mut known = positions(&[(10, 100), (20, 200), (30, 300)]);
        known.note(Lsn(150), at(40));
        assert_eq!(known.newest(), Some(Lsn(150)));
        assert_eq!(known.behind(Lsn(120), at(41)), Some(Behind::For(seconds(1))));
        known.note(Lsn(50), at(50));
        assert_eq!(known.behind(Lsn(40), at(51)), Some(Behind::AtLeast(seconds(1))));
    }

    #[test]
    fn the_leader_is_as_far_as_the_furthest_that_is_told_of_it() {
        let leader = |more: &str| {
            let cluster = Cluster::new().status(r#"{"optime":1000}"#).leader("n1", 10);
            leader_position(&cluster.member("n1", "primary", "running", more).view())
        };
        assert_eq!(leader(r#""xlog_location":900"#), Some(Lsn(1000)));
        assert_eq!(leader(r#""xlog_location":1100"#), Some(Lsn(1100)));
        let candidate = Cluster::new().leader("n1", 10);
        let candidate = candidate.member("n1", "replica", "running", r#""xlog_location":1100"#);
        assert_eq!(leader_position(&candidate.view()), None);
    }

    proptest! {
        /// Against a record of everything: never more than the truth, exact while nothing had to be forgotten, and who is
        /// further back is not behind for less long.
        #[test]
        fn what_is_kept_tells_the_same_as_everything_would(
            steps in proptest::collection::vec((1_u64..5, 1_u64..50), 1..600),
            asked in proptest::collection::vec(0_u64..20_000, 1..20),
        ) {
            let (mut time, mut position) = (0, 0);
            let mut everything = Vec::new();
            let mut kept = LeaderPositions::none();
            for (later, further) in steps {
                (time, position) = (time + later, position + further);
                everything.push((time, position));
                kept.note(Lsn(position), at(time));
            }
            prop_assert!(kept.seen.len() <= POSITIONS_MAX);
            let now = time + 1;
            let mut asked = asked;
            asked.sort_unstable();
            let mut last = Duration::MAX;
            for asked in asked {
                let truth = everything.iter().find(|(_, known)| *known > asked).map_or(0, |(at, _)| now - at);
                let told = match kept.behind(Lsn(asked), at(now)) {
                    Some(Behind::For(told) | Behind::AtLeast(told)) => told,
                    None => panic!("something is known"),
                };
                prop_assert!(told <= seconds(truth));
                prop_assert!((told == Duration::ZERO) == (truth == 0));
                prop_assert!(everything.len() > POSITIONS_MAX || told == seconds(truth));
                prop_assert!(told <= last);
                last = told;
            }
        }
    }
}

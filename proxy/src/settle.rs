//! Which sessions of readers should leave their member: how many, so that a member that comes back gets its part, and where a
//! member has been other than its listener asks for so long that it is no passing thing. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;

/// How far above its part a member may be before anybody is moved: so much lies in how the choice is made.
const TOLERANCE: f64 = 0.05;
/// And so many sessions besides, where there are few.
const TOLERANCE_SESSIONS: f64 = 2.0;

/// What counts for balance of one member that readers of a listener are with, or may go to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Place {
    /// How many sessions it should have in relation to others; nothing where newcomers do not go now.
    pub weight: Option<f64>,
    /// Sessions that are open there, of all listeners that count for it.
    pub open: usize,
    /// Those of this listener among them.
    pub ours: usize,
}

/// How many sessions of a listener should leave each member: not more than there is room for elsewhere, less those `leaving`
/// already, and at most `max`.
#[must_use]
pub fn plan(places: &BTreeMap<MemberName, Place>, leaving: usize, max: usize) -> BTreeMap<MemberName, usize> {
    let weights: f64 = places.values().filter_map(|place| place.weight).sum();
    if weights <= 0.0 {
        return BTreeMap::new(); // There is nowhere to go.
    }
    let counted = |place: &Place| if place.weight.is_some() { place.open } else { place.ours };
    let total: usize = places.values().map(counted).sum();
    let part = |weight: f64| total as f64 * weight / weights;
    let room: f64 = places
        .values()
        .filter_map(|place| Some((part(place.weight?) - place.open as f64).max(0.0)))
        .sum();
    let mut left = whole(room).saturating_sub(leaving).min(max);
    let mut moves = BTreeMap::new();
    for (member, place) in places {
        let excess = match place.weight {
            None => place.ours,
            Some(weight) => {
                let part = part(weight);
                let is_above = place.open as f64 > part * (1.0 + TOLERANCE) + TOLERANCE_SESSIONS;
                let above = if is_above { whole(place.open as f64 - part) } else { 0 };
                above.min(place.ours)
            }
        };
        let count = excess.min(left);
        if count > 0 {
            left -= count;
            moves.insert(member.clone(), count);
        }
    }
    moves
}

/// A number from zero up without its fraction.
fn whole(number: f64) -> usize {
    let millis = Duration::try_from_secs_f64(number.max(0.0) / 1000.0).unwrap_or(Duration::MAX);
    usize::try_from(millis.as_millis()).unwrap_or(usize::MAX)
}

/// Since when members have been other than listeners ask for.
#[derive(Debug, Default)]
pub struct Strayed {
    since: BTreeMap<(usize, MemberName), Boottime>,
}

impl Strayed {
    /// Notes for which listener which members are other than asked for now; those among them that have been for `grace`.
    pub fn note(
        &mut self,
        now_strayed: &BTreeSet<(usize, MemberName)>,
        grace: Duration,
        now: Boottime,
    ) -> BTreeSet<(usize, MemberName)> {
        self.since.retain(|strayed, _| now_strayed.contains(strayed));
        let mut for_good = BTreeSet::new();
        for strayed in now_strayed {
            let since = *self.since.entry(strayed.clone()).or_insert(now);
            if now.since(since) >= grace {
                for_good.insert(strayed.clone());
            }
        }
        for_good
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::name;

    fn places(of: &[(Option<f64>, usize, usize)]) -> BTreeMap<MemberName, Place> {
        let place = |(index, (weight, open, ours)): (usize, &(Option<f64>, usize, usize))| {
            let place = Place {
                weight: *weight,
                open: *open,
                ours: *ours,
            };
            (name(&format!("n{index}")), place)
        };
        of.iter().enumerate().map(place).collect()
    }

    fn moved(of: &[(Option<f64>, usize, usize)], leaving: usize, max: usize) -> Vec<usize> {
        let places = places(of);
        let moves = plan(&places, leaving, max);
        places
            .keys()
            .map(|member| moves.get(member).copied().unwrap_or_default())
            .collect()
    }

    #[test]
    fn as_many_move_as_there_is_room_for_and_no_more_than_allowed() {
        let full = Some(1.0);
        assert_eq!(
            moved(&[(full, 150, 150), (full, 150, 150), (full, 0, 0)], 0, 1000),
            [50, 50, 0]
        );
        assert_eq!(
            moved(&[(full, 150, 150), (full, 150, 150), (full, 0, 0)], 0, 3),
            [3, 0, 0]
        );
        assert_eq!(
            moved(&[(full, 150, 150), (full, 150, 150), (full, 0, 0)], 90, 1000),
            [10, 0, 0]
        );
        assert_eq!(
            moved(&[(full, 150, 150), (full, 150, 150), (full, 0, 0)], 100, 1000),
            [0, 0, 0]
        );
        // One that has just come back is to have little at first.
        assert_eq!(moved(&[(full, 110, 110), (Some(0.1), 0, 0)], 0, 1000), [10, 0]);
        // Balanced, nearly.
        assert_eq!(moved(&[(full, 52, 52), (full, 48, 48)], 0, 1000), [0, 0]);
        assert_eq!(moved(&[(full, 2, 2), (full, 0, 0)], 0, 1000), [0, 0]);
        // Those of another listener cannot be moved.
        assert_eq!(moved(&[(full, 100, 5), (full, 0, 0)], 0, 1000), [5, 0]);
    }

    #[test]
    fn sessions_where_newcomers_do_not_go_move_to_where_they_do() {
        // On the leader, which writers are on too.
        assert_eq!(moved(&[(None, 500, 20), (Some(1.0), 0, 0)], 0, 1000), [20, 0]);
        assert_eq!(moved(&[(None, 20, 20)], 0, 1000), [0], "there is nowhere to go");
    }

    #[test]
    fn what_passes_is_not_for_good() {
        let at = |seconds: u64| Boottime::from_nanos(seconds * 1_000_000_000);
        let grace = Duration::from_secs(5);
        let n2 = BTreeSet::from([(0, name("n2"))]);
        let mut strayed = Strayed::default();
        assert!(strayed.note(&n2, grace, at(0)).is_empty());
        assert!(strayed.note(&n2, grace, at(4)).is_empty());
        assert!(strayed.note(&BTreeSet::new(), grace, at(5)).is_empty());
        assert!(strayed.note(&n2, grace, at(6)).is_empty());
        assert_eq!(strayed.note(&n2, grace, at(11)), n2);
        assert_eq!(strayed.note(&n2, grace, at(12)), n2);
    }

    proptest! {
        /// Nobody is moved that is not there or not of the listener, not more than allowed, and nobody who is at or below
        /// its part loses any.
        #[test]
        fn a_plan_keeps_within_its_bounds(
            of in proptest::collection::vec((proptest::option::of(1_u32..=10), 0_usize..500, 0_usize..500), 0..6),
            leaving in 0_usize..20,
            max in 0_usize..50,
        ) {
            let of: Vec<_> = of.into_iter().map(|(weight, open, ours)| (weight.map(|weight| f64::from(weight) / 10.0), open.max(ours), ours)).collect();
            let places = places(&of);
            let moves = plan(&places, leaving, max);
            prop_assert!(moves.values().sum::<usize>() <= max);
            let weights: f64 = places.values().filter_map(|place| place.weight).sum();
            let counted = |place: &Place| if place.weight.is_some() { place.open } else { place.ours };
            let total: usize = places.values().map(counted).sum();
            for (member, count) in moves {
                let place = places[&member];
                prop_assert!(count > 0 && count <= place.ours);
                if let Some(weight) = place.weight {
                    prop_assert!((place.open - count) as f64 >= total as f64 * weight / weights - 1.0);
                }
            }
        }

        /// Followed again and again, with everybody who leaves going to whoever has least for its weight, it comes to an
        /// end: the sessions are balanced then, and nobody is moved any more.
        #[test]
        fn moving_comes_to_an_end_with_the_sessions_balanced(
            of in proptest::collection::vec((1_u32..=10, 0_usize..300), 2..6),
        ) {
            let mut places = places(&of.iter().map(|(weight, open)| (Some(f64::from(*weight) / 10.0), *open, *open)).collect::<Vec<_>>());
            let mut rounds = 0;
            loop {
                let moves = plan(&places, 0, 10);
                if moves.is_empty() {
                    break;
                }
                rounds += 1;
                prop_assert!(rounds < 400);
                for (member, count) in moves {
                    let left = places.get_mut(&member).expect("it is one of them");
                    left.open -= count;
                    left.ours -= count;
                    for _ in 0..count {
                        let burden = |place: &Place| (place.open + 1) as f64 / place.weight.unwrap_or(1.0);
                        let least = places.values_mut().min_by(|a, b| burden(a).total_cmp(&burden(b))).expect("two at least");
                        least.open += 1;
                        least.ours += 1;
                    }
                }
            }
            let weights: f64 = places.values().filter_map(|place| place.weight).sum();
            let total: usize = places.values().map(|place| place.open).sum();
            for place in places.values() {
                let part = total as f64 * place.weight.unwrap_or_default() / weights;
                prop_assert!(place.open as f64 <= part * (1.0 + TOLERANCE) + TOLERANCE_SESSIONS + 1.0);
            }
        }
    }
}

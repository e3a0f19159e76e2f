//! Which of the members that may be read from a reader gets: one of its own zone first, then the less loaded of two.

use std::time::Duration;

use pgherd_cluster::name::MemberName;
use pgherd_cluster::view::Member;

/// The tag that names a member's zone.
const ZONE_TAG: &str = "zone";

/// How many sessions a member should have in relation to others. Above zero.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Weight(f64);

impl Weight {
    /// That of a member of which nothing speaks against it.
    pub const FULL: Self = Self(1.0);

    /// A share of what a member would have otherwise, from 0 to 1, where connecting takes so long in relation to where it
    /// takes next to no time.
    #[must_use]
    pub fn new(share: f64, slowness: f64) -> Self {
        Self((share / slowness.max(1.0)).max(f64::MIN_POSITIVE))
    }

    /// In relation to [`Self::FULL`].
    #[must_use]
    pub const fn as_f64(self) -> f64 {
        self.0
    }
}

/// How a member stands with this proxy, by what it has experienced with it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Standing {
    /// It takes newcomers.
    Takes(Weight),
    /// It has failed, and the next newcomer tries it.
    Trial,
    /// It has failed lately, or is being tried.
    Out,
}

/// What the choice between members that may be read from rests on.
#[derive(Clone, Copy)]
pub struct Load<'a> {
    /// Sessions open on a member.
    pub open: &'a dyn Fn(&MemberName) -> usize,
    /// Those of the client's own listener among them.
    pub of_listener: &'a dyn Fn(&MemberName) -> usize,
    /// How a member stands with this proxy.
    pub standing: &'a dyn Fn(&MemberName) -> Standing,
    /// The zone whose members go first; nothing where all are alike.
    pub zone: Option<&'a str>,
    /// Two random numbers.
    pub draws: [u64; 2],
    /// Members that did not answer this client.
    pub avoid: &'a [MemberName],
}

impl Load<'_> {
    /// No session is open, nothing is known against anybody, and the first candidate is drawn.
    pub const IDLE: Load<'static> = Load {
        open: &|_| 0,
        of_listener: &|_| 0,
        standing: &|_| Standing::Takes(Weight::FULL),
        zone: None,
        draws: [0, 0],
        avoid: &[],
    };
}

/// The candidates that newcomers go to now: of this zone while there are any, not those that have failed lately while there
/// are others. Nobody is left out for good: when all have failed, all are tried.
#[must_use]
pub fn preferred<'a>(candidates: &[&'a Member], load: Load<'_>) -> Vec<&'a Member> {
    let untried = |member: &&Member| !load.avoid.contains(&member.name);
    let pool: Vec<&Member> = candidates.iter().copied().filter(untried).collect();
    let is_near = |member: &Member| load.zone.is_none_or(|zone| zone_of(member).as_deref() == Some(zone));
    let is_up = |member: &Member| (load.standing)(&member.name) != Standing::Out;
    let near_and_up = |member: &&Member| is_near(member) && is_up(member);
    let near: Vec<&Member> = pool.iter().copied().filter(near_and_up).collect();
    if !near.is_empty() {
        return near;
    }
    let up: Vec<&Member> = pool.iter().copied().filter(|member| is_up(member)).collect();
    if up.is_empty() { pool } else { up }
}

/// The zone that a member's tag names.
#[must_use]
pub fn zone_of(member: &Member) -> Option<String> {
    member.record.tags.get(ZONE_TAG).and_then(super::tag_text)
}

/// The less loaded of two preferred candidates drawn at random, in relation to their weights. With one proxy of many, always
/// taking the least loaded would send every proxy's next client to the same member.
#[must_use]
pub fn choose<'a>(candidates: &[&'a Member], load: Load<'_>) -> Option<&'a Member> {
    let pool = preferred(candidates, load);
    let on_trial = |member: &&&Member| (load.standing)(&member.name) == Standing::Trial;
    if let Some(member) = pool.iter().find(on_trial) {
        return Some(member);
    }
    let mut pool: Vec<(&Member, f64)> = pool.iter().map(|member| (*member, weight(member, load))).collect();
    let [first_draw, second_draw] = load.draws;
    // The second is drawn from the others, so that the two differ.
    let first = draw(&mut pool, first_draw)?;
    let Some(second) = draw(&mut pool, second_draw) else {
        return Some(first.0);
    };
    // What one more session would make of a member's load.
    let burden = |(member, weight): (&Member, f64)| ((load.open)(&member.name) + 1) as f64 / weight;
    let chosen = if burden(second) < burden(first) { second } else { first };
    Some(chosen.0)
}

fn weight(member: &Member, load: Load<'_>) -> f64 {
    match (load.standing)(&member.name) {
        Standing::Takes(weight) => weight.0,
        Standing::Trial | Standing::Out => Weight::FULL.0,
    }
}

/// Takes one out, each as likely as it is heavy: who should have most sessions must be drawn most often.
fn draw<'a>(pool: &mut Vec<(&'a Member, f64)>, random: u64) -> Option<(&'a Member, f64)> {
    let sum: f64 = pool.iter().map(|(_, weight)| weight).sum();
    let mut left = random as f64 / u64::MAX as f64 * sum;
    let passed = |(_, weight): &(&Member, f64)| {
        left -= weight;
        left < 0.0
    };
    let index = pool.iter().position(passed).or(pool.len().checked_sub(1))?;
    Some(pool.remove(index))
}

/// How long connecting may take before it counts against a member: below this, differences are noise.
pub const QUICK: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use pgherd_cluster::view::View;
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Cluster, name};

    fn replicas(count: usize) -> View {
        let names = (0..count).map(|index| format!("n{index}"));
        names
            .fold(Cluster::new(), |cluster, name| cluster.replica(&name))
            .view()
    }

    /// Numbers that look random, from a seed.
    fn random(seed: &mut u64) -> u64 {
        *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (*seed ^ (*seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Opens sessions one after another, all of which stay, where members stand as `standing` says.
    fn open_sessions(
        view: &View,
        count: usize,
        mut seed: u64,
        standing: &dyn Fn(&MemberName) -> Standing,
    ) -> BTreeMap<MemberName, usize> {
        let candidates: Vec<&Member> = view.members.values().collect();
        let mut open: BTreeMap<MemberName, usize> = view.members.keys().map(|name| (name.clone(), 0)).collect();
        for _ in 0..count {
            let load = Load {
                open: &|member| open[member],
                standing,
                draws: [random(&mut seed), random(&mut seed)],
                ..Load::IDLE
            };
            let chosen = choose(&candidates, load).expect("there are candidates").name.clone();
            *open.entry(chosen).or_default() += 1;
        }
        open
    }

    #[test]
    fn members_of_the_same_zone_go_first_and_others_when_there_is_none() {
        let in_zone = |zone: &str| format!(r#""replication_state":"streaming","tags":{{"zone":"{zone}"}}"#);
        let cluster = Cluster::new()
            .member("n1", "replica", "running", &in_zone("a"))
            .member("n2", "replica", "running", &in_zone("a"))
            .member("n3", "replica", "running", &in_zone("b"))
            .replica("n4");
        let view = cluster.view();
        let candidates: Vec<&Member> = view.members.values().collect();
        let whom = |zone: Option<&str>, avoid: &[&str], out: &[&str]| -> Vec<String> {
            let avoid: Vec<MemberName> = avoid.iter().map(|member| name(member)).collect();
            let standing = |member: &MemberName| {
                if out.contains(&member.as_str()) {
                    Standing::Out
                } else {
                    Standing::Takes(Weight::FULL)
                }
            };
            let load = Load {
                zone,
                avoid: &avoid,
                standing: &standing,
                ..Load::IDLE
            };
            let preferred = preferred(&candidates, load);
            preferred.iter().map(|member| member.name.to_string()).collect()
        };
        assert_eq!(whom(None, &[], &[]), ["n1", "n2", "n3", "n4"]);
        assert_eq!(whom(Some("a"), &[], &[]), ["n1", "n2"]);
        assert_eq!(whom(Some("b"), &[], &[]), ["n3"]);
        assert_eq!(whom(Some("c"), &[], &[]), ["n1", "n2", "n3", "n4"]);
        assert_eq!(whom(Some("a"), &["n1"], &[]), ["n2"]);
        assert_eq!(whom(Some("a"), &["n1"], &["n2"]), ["n3", "n4"]);
        // Better one that failed a while ago than none.
        assert_eq!(
            whom(Some("a"), &[], &["n1", "n2", "n3", "n4"]),
            ["n1", "n2", "n3", "n4"]
        );
        assert_eq!(whom(Some("a"), &["n1", "n2", "n3", "n4"], &[]), Vec::<String>::new());
    }

    #[test]
    fn one_on_trial_gets_the_next_newcomer_and_one_that_is_out_none() {
        let view = replicas(3);
        let candidates: Vec<&Member> = view.members.values().collect();
        let choose_with = |standing: &dyn Fn(&MemberName) -> Standing, draws| {
            let load = Load {
                standing,
                draws,
                ..Load::IDLE
            };
            choose(&candidates, load).map(|member| member.name.to_string())
        };
        for draws in [[0, 0], [1, 1], [2, 0]] {
            let trial = |member: &MemberName| match member.as_str() {
                "n1" => Standing::Trial,
                _ => Standing::Takes(Weight::FULL),
            };
            assert_eq!(choose_with(&trial, draws).as_deref(), Some("n1"));
            let out = |member: &MemberName| match member.as_str() {
                "n1" => Standing::Takes(Weight::FULL),
                _ => Standing::Out,
            };
            assert_eq!(choose_with(&out, draws).as_deref(), Some("n1"));
        }
    }

    proptest! {
        #[test]
        fn the_choice_is_a_candidate_that_is_not_avoided(
            count in 0_usize..6,
            draws: [u64; 2],
            avoided in proptest::collection::vec(0_usize..6, 0..4),
            open in proptest::collection::vec(0_usize..9, 6),
        ) {
            let view = replicas(count);
            let candidates: Vec<&Member> = view.members.values().collect();
            let avoid: Vec<MemberName> = avoided.iter().map(|index| name(&format!("n{index}"))).collect();
            let index_of = |member: &MemberName| member.as_str()[1..].parse::<usize>().expect("named above");
            let load = Load { open: &|member| open[index_of(member)], draws, avoid: &avoid, ..Load::IDLE };
            match choose(&candidates, load) {
                Some(chosen) => {
                    prop_assert!(!avoid.contains(&chosen.name));
                    // Two are drawn, so the most loaded one is never chosen while another is less loaded.
                    let left: Vec<usize> = candidates.iter().filter(|member| !avoid.contains(&member.name)).map(|member| open[index_of(&member.name)]).collect();
                    let worst = left.iter().max().copied().expect("one was chosen");
                    let alone = left.iter().filter(|load| **load == worst).count() == 1 && left.len() > 1;
                    prop_assert!(!alone || open[index_of(&chosen.name)] < worst);
                }
                None => prop_assert!(candidates.iter().all(|member| avoid.contains(&member.name))),
            }
        }

        /// Nobody is left without a choice by where members are and how they stand.
        #[test]
        fn somebody_is_chosen_whatever_is_known_of_them(
            standings in proptest::collection::vec(0_u8..3, 1..6),
            zone in proptest::option::of("[ab]"),
            draws: [u64; 2],
        ) {
            let view = replicas(standings.len());
            let candidates: Vec<&Member> = view.members.values().collect();
            let standing = |member: &MemberName| {
                let index: usize = member.as_str()[1..].parse().expect("named above");
                match standings[index] {
                    0 => Standing::Takes(Weight::FULL),
                    1 => Standing::Trial,
                    _ => Standing::Out,
                }
            };
            let load = Load { standing: &standing, zone: zone.as_deref(), draws, ..Load::IDLE };
            let chosen = choose(&candidates, load).expect("there is one");
            let all_out = standings.iter().all(|standing| *standing == 2);
            prop_assert!(all_out || standing(&chosen.name) != Standing::Out);
        }

        /// At equal zone and latency a thousand sessions are spread within five percent.
        #[test]
        fn a_thousand_sessions_are_spread_within_five_percent(count in 2_usize..7, seed: u64) {
            let view = replicas(count);
            let open = open_sessions(&view, 1000, seed, &|_| Standing::Takes(Weight::FULL));
            let fair = 1000.0 / count as f64;
            for (member, open) in open {
                let off = (open as f64 - fair).abs() / fair;
                prop_assert!(off <= 0.05, "{} has {} of {}", member, open, fair);
            }
        }

        /// Sessions are spread in relation to the weights, also when one has a fraction of another's.
        #[test]
        fn sessions_follow_the_weights(
            shares in proptest::collection::vec(1_u32..=10, 2..5),
            seed: u64,
        ) {
            let view = replicas(shares.len());
            let share = |member: &MemberName| -> f64 {
                let index: usize = member.as_str()[1..].parse().expect("named above");
                f64::from(shares[index]) / 10.0
            };
            let open = open_sessions(&view, 1000, seed, &|member| Standing::Takes(Weight::new(share(member), 1.0)));
            let sum: f64 = view.members.keys().map(share).sum();
            for (member, open) in &open {
                let fair = 1000.0 * share(member) / sum;
                prop_assert!((*open as f64 - fair).abs() <= fair * 0.1 + 5.0, "{} has {} of {}", member, open, fair);
            }
        }
    }
}

//! What this proxy has experienced with each member that readers go to: how soon it answers, whether it has failed, and since
//! when it is back. Pure.
//!
//! Of every reader's connection at most two things are noted, when it is made or has failed; nothing while bytes move.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;

use crate::balance::{QUICK, Standing, Weight};

/// How long a member that has failed gets nobody, doubled with each failure in a row.
const OUT_MIN: Duration = Duration::from_secs(1);
const OUT_MAX: Duration = Duration::from_secs(30);
/// How long one newcomer may be at trying a member, while others keep away.
const TRIAL_MAX: Duration = Duration::from_secs(5);
/// What the newest time counts for.
const NEWEST: f64 = 0.2;
/// After so long without a newcomer, half of what is known of a member's slowness is forgotten: it gets another chance.
const HALF_LIFE: Duration = Duration::from_secs(10);
/// What a member that comes back gets at once.
const SHARE_MIN: f64 = 0.1;

/// All members that readers may go to, by name.
#[derive(Debug, Default)]
pub struct Experience {
    members: BTreeMap<MemberName, Known>,
    /// Members have been looked at before: who appears from then on comes back, or is new.
    has_looked: bool,
}

#[derive(Debug, Default)]
struct Known {
    /// How long connecting takes on average, in seconds, as of when.
    latency: Option<(f64, Boottime)>,
    out: Option<Out>,
    /// When it came back.
    back_at: Option<Boottime>,
    is_up: bool,
}

#[derive(Clone, Copy, Debug)]
struct Out {
    until: Boottime,
    /// In a row.
    failures: u32,
    /// A newcomer is trying it, and `until` is when that has taken too long.
    on_trial: bool,
}

fn backoff(failures: u32) -> Duration {
    OUT_MIN
        .saturating_mul(1 << failures.saturating_sub(1).min(16))
        .min(OUT_MAX)
}

impl Known {
    /// Seconds that connecting takes, as far as that is still remembered.
    fn latency(&self, now: Boottime) -> Option<f64> {
        let (latency, at) = self.latency?;
        let forgotten = now.since(at).as_secs_f64() / HALF_LIFE.as_secs_f64();
        Some(latency * 0.5_f64.powf(forgotten))
    }

    /// From [`SHARE_MIN`] to 1, growing since it came back.
    fn share(&self, now: Boottime, slow_start: Duration) -> f64 {
        let Some(back_at) = self.back_at.filter(|_| !slow_start.is_zero()) else {
            return 1.0;
        };
        (now.since(back_at).as_secs_f64() / slow_start.as_secs_f64()).clamp(SHARE_MIN, 1.0)
    }

    fn comes_back(&mut self, now: Boottime) {
        self.back_at = Some(now);
        self.latency = None;
    }
}

impl Experience {
    /// How `member` stands at `now`. One that has come back grows to its full share over `slow_start`.
    #[must_use]
    pub fn standing(&self, member: &MemberName, now: Boottime, slow_start: Duration) -> Standing {
        let Some(known) = self.members.get(member) else {
            return Standing::Takes(Weight::FULL);
        };
        match known.out {
            Some(out) if now < out.until => Standing::Out,
            Some(_) => Standing::Trial,
            None => {
                let slowness = known.latency(now).unwrap_or_default() / QUICK.as_secs_f64();
                Standing::Takes(Weight::new(known.share(now, slow_start), slowness))
            }
        }
    }

    /// How long connecting to `member` takes, as far as that is remembered.
    #[must_use]
    pub fn latency(&self, member: &MemberName, now: Boottime) -> Option<Duration> {
        let seconds = self.members.get(member)?.latency(now)?;
        Duration::try_from_secs_f64(seconds).ok()
    }

    /// Notes who is up. Who was not before, after the first look, comes back. Who is `known` no more is forgotten.
    pub fn note(&mut self, known: impl Fn(&MemberName) -> bool, up: &BTreeSet<MemberName>, now: Boottime) {
        self.members.retain(|member, _| known(member));
        for (member, known) in &mut self.members {
            known.is_up = known.is_up && up.contains(member);
        }
        for member in up {
            let known = self.members.entry(member.clone()).or_default();
            if !std::mem::replace(&mut known.is_up, true) && self.has_looked {
                known.comes_back(now);
            }
        }
        self.has_looked = true;
    }

    /// A newcomer is on its way to `member`. If that is a trial, it is the only one for a while.
    pub fn chosen(&mut self, member: &MemberName, now: Boottime) {
        let out = self.members.get_mut(member).and_then(|known| known.out.as_mut());
        if let Some(out) = out.filter(|out| out.until <= now) {
            out.until = now + TRIAL_MAX;
            out.on_trial = true;
        }
    }

    /// `member` took a session, and connecting took so long.
    pub fn answered(&mut self, member: &MemberName, took: Duration, now: Boottime) {
        let Some(known) = self.members.get_mut(member) else {
            return; // It has left meanwhile.
        };
        if known.out.take().is_some() {
            known.comes_back(now);
        }
        // What it is compared with is where it begins, so that the first time does not decide alone.
        let before = known.latency(now).unwrap_or(QUICK.as_secs_f64());
        let latency = before + NEWEST * (took.as_secs_f64() - before);
        known.latency = Some((latency, now));
    }

    /// `member` did not take a session. Failures of those who were on their way together are one.
    pub fn failed(&mut self, member: &MemberName, now: Boottime) {
        let Some(known) = self.members.get_mut(member) else {
            return;
        };
        let failures = match known.out {
            Some(out) if now < out.until && !out.on_trial => return,
            Some(out) => out.failures.saturating_add(1),
            None => 1,
        };
        known.out = Some(Out {
            until: now + backoff(failures),
            failures,
            on_trial: false,
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::name;

    const SLOW_START: Duration = Duration::from_secs(30);

    fn at(millis: u64) -> Boottime {
        Boottime::from_nanos(1_000_000_000_000 + millis * 1_000_000)
    }

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// With these members up at the first look.
    fn of(up: &[&str]) -> Experience {
        let mut experience = Experience::default();
        note(&mut experience, up, 0);
        experience
    }

    fn note(experience: &mut Experience, up: &[&str], now: u64) {
        experience.note(|_| true, &up.iter().map(|member| name(member)).collect(), at(now));
    }

    fn weight(experience: &Experience, now: u64) -> f64 {
        match experience.standing(&name("n2"), at(now), SLOW_START) {
            Standing::Takes(weight) => weight.as_f64(),
            other => panic!("{other:?}"),
        }
    }

    fn stands(experience: &Experience, now: u64) -> &'static str {
        match experience.standing(&name("n2"), at(now), SLOW_START) {
            Standing::Takes(_) => "takes",
            Standing::Trial => "trial",
            Standing::Out => "out",
        }
    }

    #[test]
    fn who_failed_is_out_for_a_while_then_tried_by_one_and_back_when_it_answers() {
        let mut experience = of(&["n2"]);
        let n2 = name("n2");
        experience.failed(&n2, at(0));
        // Others were on their way too.
        experience.failed(&n2, at(10));
        assert_eq!(stands(&experience, 999), "out");
        assert_eq!(stands(&experience, 1_000), "trial");
        experience.chosen(&n2, at(1_000));
        assert_eq!(stands(&experience, 1_001), "out", "one at a time");
        experience.failed(&n2, at(1_200));
        assert_eq!(stands(&experience, 3_199), "out", "twice as long");
        assert_eq!(stands(&experience, 3_200), "trial");
        experience.chosen(&n2, at(3_200));
        experience.answered(&n2, millis(1), at(3_300));
        assert_eq!(stands(&experience, 3_300), "takes");
        assert!(weight(&experience, 3_300) < 0.2 && weight(&experience, 33_300) >= 1.0);
        experience.failed(&n2, at(40_000));
        assert_eq!(stands(&experience, 41_000), "trial", "it is the first failure in a row");
    }

    #[test]
    fn a_trial_of_which_nothing_is_heard_is_made_again() {
        let mut experience = of(&["n2"]);
        experience.failed(&name("n2"), at(0));
        experience.chosen(&name("n2"), at(1_000));
        assert_eq!(stands(&experience, 5_999), "out");
        assert_eq!(stands(&experience, 6_000), "trial");
    }

    #[test]
    fn who_comes_back_gets_a_share_that_grows_and_who_was_there_at_first_all() {
        let mut experience = of(&["n2"]);
        assert!(weight(&experience, 0) >= 1.0);
        note(&mut experience, &[], 1_000);
        note(&mut experience, &["n2"], 2_000);
        note(&mut experience, &["n2"], 2_500);
        assert!((weight(&experience, 2_000) - SHARE_MIN).abs() < 0.001);
        assert!((weight(&experience, 17_000) - 0.5).abs() < 0.001);
        assert!(weight(&experience, 32_000) >= 1.0);
        let at_once = experience.standing(&name("n2"), at(2_000), Duration::ZERO);
        assert_eq!(at_once, Standing::Takes(Weight::FULL));
        let mut new = of(&[]);
        note(&mut new, &["n2"], 2_000);
        assert!(weight(&new, 2_000) < 0.2);
        new.note(|_| false, &BTreeSet::new(), at(2_000));
        assert!(new.members.is_empty(), "who is known no more is forgotten");
    }

    #[test]
    fn a_slow_member_weighs_less_until_that_is_forgotten_and_a_single_time_decides_little() {
        let mut experience = of(&["n2"]);
        let n2 = name("n2");
        experience.answered(&n2, millis(40), at(0));
        assert!(weight(&experience, 0) > 0.8);
        for sample in 0..50 {
            experience.answered(&n2, millis(80), at(sample));
        }
        assert!((weight(&experience, 50) - 0.25).abs() < 0.02);
        assert!((weight(&experience, 10_050) - 0.5).abs() < 0.04);
        assert!(weight(&experience, 60_000) >= 1.0);
        // Below what counts, all are alike.
        let mut quick = of(&["n2"]);
        for sample in 0..50 {
            quick.answered(&n2, millis(sample % 20), at(sample));
        }
        assert!(weight(&quick, 50) >= 1.0);
    }

    proptest! {
        /// Whatever happens, a member that has failed is tried again within the longest time out, weights are above zero and
        /// at most full, and only members that are up or have been are known.
        #[test]
        fn nobody_is_out_for_good(
            happenings in proptest::collection::vec((0_u8..5, 0_u64..4_000), 0..60),
        ) {
            let mut experience = of(&["n2"]);
            let n2 = name("n2");
            let mut now = 0;
            for (what, later) in happenings {
                now += later;
                match what {
                    0 => experience.failed(&n2, at(now)),
                    1 => experience.answered(&n2, millis(later), at(now)),
                    2 => experience.chosen(&n2, at(now)),
                    3 => note(&mut experience, &[], now),
                    _ => note(&mut experience, &["n2"], now),
                }
                match experience.standing(&n2, at(now), SLOW_START) {
                    Standing::Takes(weight) => prop_assert!(weight.as_f64() > 0.0 && weight.as_f64() <= 1.0),
                    Standing::Trial => {}
                    Standing::Out => prop_assert_eq!(stands(&experience, now + 30_000), "trial"),
                }
            }
            prop_assert!(experience.members.len() <= 1);
        }
    }
}

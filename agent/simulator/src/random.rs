//! One stream of numbers for a whole run, so that a seed repeats it exactly. `SplitMix64`.

use std::time::Duration;

/// The source of everything that is left to chance in a run.
#[derive(Clone, Debug)]
pub(crate) struct Random {
    state: u64,
    /// Whether every choice is the middle one: an exhaustive search varies the faults and nothing else.
    steady: bool,
}

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self {
            state: seed,
            steady: false,
        }
    }

    /// A source without chance.
    pub(crate) const fn steady() -> Self {
        Self { state: 0, steady: true }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number from `low` to `high`, both included.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        let span = high.saturating_sub(low);
        if self.steady {
            return low + span / 2;
        }
        // The bias of a remainder is far below what any schedule could show.
        low + self.next() % span.saturating_add(1).max(1)
    }

    /// A duration between two numbers of milliseconds, in microseconds' steps.
    pub(crate) fn millis(&mut self, low: u64, high: u64) -> Duration {
        Duration::from_micros(self.between(low * 1000, high * 1000))
    }

    /// Whether something happens that does so `per_mille` times of a thousand.
    pub(crate) fn chance(&mut self, per_mille: u64) -> bool {
        if self.steady {
            return per_mille >= 1000;
        }
        self.next() % 1000 < per_mille
    }

    /// A place in a list of `count`, which is not empty.
    pub(crate) fn index(&mut self, count: usize) -> usize {
        let last = u64::try_from(count.saturating_sub(1)).unwrap_or(0);
        usize::try_from(self.between(0, last)).unwrap_or(0)
    }

    /// One of several, by weight.
    pub(crate) fn weighted<T: Copy>(&mut self, choices: &[(u64, T)]) -> Option<T> {
        let total: u64 = choices.iter().map(|(weight, _)| weight).sum();
        let mut left = self.between(0, total.checked_sub(1)?);
        for (weight, choice) in choices {
            if left < *weight {
                return Some(*choice);
            }
            left -= weight;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_itself_and_another_does_not() {
        let draw = |seed| {
            let mut random = Random::new(seed);
            (0..8).map(|_| random.between(0, u64::MAX - 1)).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn numbers_stay_within_their_bounds() {
        let mut random = Random::new(1);
        for _ in 0..1000 {
            assert!((3..=5).contains(&random.between(3, 5)));
            assert!(random.index(4) < 4);
            assert!(matches!(
                random.weighted(&[(1, 'a'), (0, 'b'), (2, 'c')]),
                Some('a' | 'c')
            ));
        }
        assert_eq!(random.between(9, 9), 9);
        assert_eq!(random.weighted::<u8>(&[]), None);
    }

    #[test]
    fn without_chance_nothing_is_left_to_it() {
        let mut random = Random::steady();
        assert_eq!(random.between(2, 10), 6);
        assert!(!random.chance(999) && random.chance(1000));
    }
}

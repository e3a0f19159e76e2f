//! Lease arithmetic. Pure: durations in, durations out.

use std::time::Duration;

use crate::clock::Boottime;

/// The three times that the dynamic configuration sets, checked against each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseTiming {
    ttl: Duration,
    loop_wait: Duration,
    retry_timeout: Duration,
}

/// Why three times cannot work together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TimingError {
    /// etcd grants nothing shorter than about 1.5 election timeouts (2 s by default), and an expiry may be half a second
    /// late, so a lease below this leaves no time to renew.
    #[error("ttl is {} s, the minimum is {} s", .ttl.as_secs_f64(), LeaseTiming::TTL_MIN.as_secs_f64())]
    TtlTooShort {
        /// What was asked for.
        ttl: Duration,
    },
    /// A time of zero would spin or give up at once.
    #[error("{name} is zero, the minimum is 1 s")]
    Zero {
        /// The key.
        name: &'static str,
    },
    /// A leader needs two chances to renew before others may take the lease.
    #[error("ttl is {} s, but loop_wait + 2 * retry_timeout is {} s", .ttl.as_secs_f64(), .needed.as_secs_f64())]
    LeaseTooShort {
        /// What was asked for.
        ttl: Duration,
        /// The least that the other two allow.
        needed: Duration,
    },
}

impl LeaseTiming {
    /// The shortest lease that still leaves time for a renewal after etcd's own rounding.
    pub const TTL_MIN: Duration = Duration::from_secs(3);

    /// What a cluster bootstrapped by pgherd gets.
    pub const DEFAULT: Self = Self {
        ttl: Duration::from_secs(5),
        loop_wait: Duration::from_secs(1),
        retry_timeout: Duration::from_secs(2),
    };

    /// Patroni's defaults, in force in a cluster whose configuration does not say otherwise.
    pub const PATRONI_DEFAULT: Self = Self {
        ttl: Duration::from_secs(30),
        loop_wait: Duration::from_secs(10),
        retry_timeout: Duration::from_secs(10),
    };

    /// Patroni raises lower values to these, in memory: `ttl`, `loop_wait`, `retry_timeout`.
    const PATRONI_MIN: (Duration, Duration, Duration) =
        (Duration::from_secs(20), Duration::from_secs(1), Duration::from_secs(3));

    /// Checks the relations.
    ///
    /// # Errors
    /// Names the relation that does not hold.
    pub fn new(ttl: Duration, loop_wait: Duration, retry_timeout: Duration) -> Result<Self, TimingError> {
        for (name, value) in [("loop_wait", loop_wait), ("retry_timeout", retry_timeout)] {
            if value < Duration::from_secs(1) {
                return Err(TimingError::Zero { name });
            }
        }
        if ttl < Self::TTL_MIN {
            return Err(TimingError::TtlTooShort { ttl });
        }
        let needed = loop_wait + 2 * retry_timeout;
        if ttl < needed {
            return Err(TimingError::LeaseTooShort { ttl, needed });
        }
        Ok(Self {
            ttl,
            loop_wait,
            retry_timeout,
        })
    }

    /// Three times as Patroni adjusts what cannot work: each raised to its minimum, then `loop_wait` and `retry_timeout` cut
    /// to fit the ttl. For a configuration that is already there and that all members must read alike.
    #[must_use]
    pub fn adjusted(ttl: Duration, loop_wait: Duration, retry_timeout: Duration) -> Self {
        Self {
            ttl,
            loop_wait,
            retry_timeout,
        }
        .beside_patroni()
    }

    /// These times as a member of a mixed cluster uses them. Patroni's members raise what is below their minimums, each in
    /// its own memory, and so must we while any of them is about: they would renew too slowly for a shorter lease.
    #[must_use]
    pub fn beside_patroni(self) -> Self {
        let (ttl_min, loop_min, retry_min) = Self::PATRONI_MIN;
        let ttl = self.ttl.max(ttl_min);
        let loop_wait = self.loop_wait.max(loop_min);
        let retry_timeout = self.retry_timeout.max(retry_min);
        if Duration::from_secs(1) + 2 * retry_timeout > ttl {
            let retry_timeout = Duration::from_secs((ttl.as_secs() - 1) / 2);
            return Self {
                ttl,
                loop_wait: Duration::from_secs(1),
                retry_timeout,
            };
        }
        let loop_wait = loop_wait.min(ttl - 2 * retry_timeout);
        Self {
            ttl,
            loop_wait,
            retry_timeout,
        }
    }

    /// How long a lease lives without renewal.
    #[must_use]
    pub const fn ttl(self) -> Duration {
        self.ttl
    }

    /// The period of the agent's loop when nothing happens.
    #[must_use]
    pub const fn loop_wait(self) -> Duration {
        self.loop_wait
    }

    /// How long one operation on etcd may take in all.
    #[must_use]
    pub const fn retry_timeout(self) -> Duration {
        self.retry_timeout
    }

    /// How much of a deadline's end is kept for ending PostgreSQL: a tenth of the lease, at least half a second.
    #[must_use]
    pub fn margin(self) -> Duration {
        (self.ttl / 10).max(Duration::from_millis(500))
    }

    /// How often a holder renews: each cycle, and several times per lease however long the cycle is.
    #[must_use]
    pub fn renew_every(self) -> Duration {
        self.loop_wait.min(self.ttl / 5)
    }

    /// How long one renewal attempt on one endpoint may take, so that another endpoint can be tried well before the end.
    #[must_use]
    pub fn renewal_attempt(self) -> Duration {
        (self.retry_timeout / 3).clamp(Duration::from_millis(300), Duration::from_secs(2))
    }

    /// Until when a proof that was asked for at `asked_at` entitles to write. Counted from *before* the question: etcd
    /// starts the lease's clock when it handles the request, which is not before it was sent.
    #[must_use]
    pub fn deadline(self, asked_at: Boottime) -> Boottime {
        asked_at + self.ttl
    }

    /// Until when a proxy may route writes on a view known to be current at `asked_at`: the holder may have renewed just
    /// before that, and ends PostgreSQL a margin before its own deadline.
    #[must_use]
    pub fn warrant_end(self, asked_at: Boottime) -> Boottime {
        asked_at + self.ttl - self.margin()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seconds(ttl: u64, loop_wait: u64, retry_timeout: u64) -> Result<LeaseTiming, TimingError> {
        LeaseTiming::new(
            Duration::from_secs(ttl),
            Duration::from_secs(loop_wait),
            Duration::from_secs(retry_timeout),
        )
    }

    #[test]
    fn the_constants_satisfy_their_own_rule() {
        assert_eq!(seconds(5, 1, 2), Ok(LeaseTiming::DEFAULT));
        assert_eq!(seconds(30, 10, 10), Ok(LeaseTiming::PATRONI_DEFAULT));
    }

    #[test]
    fn impossible_times_are_refused_by_the_relation_that_fails() {
        assert!(matches!(seconds(2, 1, 1), Err(TimingError::TtlTooShort { .. })));
        assert!(matches!(
            seconds(10, 0, 2),
            Err(TimingError::Zero { name: "loop_wait" })
        ));
        assert!(matches!(seconds(10, 10, 10), Err(TimingError::LeaseTooShort { .. })));
    }

    #[test]
    fn beside_patroni_its_own_adjustment_applies() {
        assert_eq!(seconds(5, 1, 2).map(LeaseTiming::beside_patroni), seconds(20, 1, 3));
        assert_eq!(
            seconds(30, 10, 10).map(LeaseTiming::beside_patroni),
            seconds(30, 10, 10)
        );
    }

    proptest! {
        #[test]
        fn a_margin_leaves_room_to_renew(ttl in 3_u64..600, loop_wait in 1_u64..300, retry in 1_u64..300) {
            if let Ok(timing) = seconds(ttl, loop_wait, retry) {
                for timing in [timing, timing.beside_patroni()] {
                    prop_assert!(timing.renew_every() + 2 * timing.renewal_attempt() + timing.margin() <= timing.ttl());
                    prop_assert!(timing.loop_wait() + 2 * timing.retry_timeout() <= timing.ttl());
                    let asked = Boottime::from_nanos(1_000_000_000);
                    prop_assert!(timing.warrant_end(asked) < timing.deadline(asked));
                }
            }
        }
    }
}

//! Why the proxy believes that the leader of its view may take writes, and until when. Pure.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::timing::LeaseTiming;
use pgherd_cluster::view::View;

/// The belief that the leader of a view may take writes. It says nothing about who that is: the view does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Warrant {
    as_of: Option<Boottime>,
    end: Option<Boottime>,
}

impl Warrant {
    /// From a view and the time as of which its leader is known to be right. The view may be newer than the proof, never
    /// older: the caller reads the proof first.
    #[must_use]
    pub fn new(view: &View, as_of: Option<Boottime>) -> Self {
        Self {
            as_of,
            end: as_of.map(|as_of| timing(view).warrant_end(as_of)),
        }
    }

    /// Whether it holds at `now`. One that was never given does not.
    #[must_use]
    pub fn holds(self, now: Boottime) -> bool {
        self.end.is_some_and(|end| now < end)
    }

    /// When it ends or ended.
    #[must_use]
    pub const fn end(self) -> Option<Boottime> {
        self.end
    }

    /// How long it still holds; zero when it does not.
    #[must_use]
    pub fn left(self, now: Boottime) -> Duration {
        self.end.map_or(Duration::ZERO, |end| end.since(now))
    }

    /// The age of the proof.
    #[must_use]
    pub fn age(self, now: Boottime) -> Option<Duration> {
        self.as_of.map(|as_of| now.since(as_of))
    }
}

/// The lease times that the members of `view` use.
#[must_use]
pub fn timing(view: &View) -> LeaseTiming {
    let configured = view.config.value.as_ref().and_then(|config| config.timing().ok());
    let timing = configured.unwrap_or(LeaseTiming::PATRONI_DEFAULT);
    if view.all_pgherd() {
        timing
    } else {
        timing.beside_patroni()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::Cluster;

    #[test]
    fn a_proxy_that_was_never_told_anything_has_no_warrant() {
        let view = Cluster::new().view();
        assert!(!Warrant::new(&view, None).holds(Boottime::from_nanos(1)));
    }

    #[test]
    fn beside_a_patroni_member_its_minimums_apply() {
        let ours = Cluster::new()
            .config(r#"{"ttl":5,"loop_wait":1,"retry_timeout":2}"#)
            .replica("n1");
        assert_eq!(timing(&ours.view()).ttl(), Duration::from_secs(5));
        assert_eq!(timing(&ours.patroni("n2").view()).ttl(), Duration::from_secs(20));
    }

    #[test]
    fn times_that_cannot_work_count_as_patronis_defaults() {
        let view = Cluster::new().config(r#"{"ttl":1}"#).view();
        assert_eq!(timing(&view), LeaseTiming::PATRONI_DEFAULT);
    }

    proptest! {
        #[test]
        fn a_warrant_ends_before_the_lease_that_it_rests_on(ttl in 0_u64..100, asked in 1_u64..1_000_000_000_000, late in 0_u64..200_000) {
            let view = Cluster::new().config(&format!(r#"{{"ttl":{ttl},"loop_wait":1,"retry_timeout":1}}"#)).view();
            let asked = Boottime::from_nanos(asked);
            let warrant = Warrant::new(&view, Some(asked));
            let now = asked + Duration::from_millis(late);
            let lease_end = asked + timing(&view).ttl();
            prop_assert!(!warrant.holds(now) || now < lease_end);
            prop_assert_eq!(warrant.holds(now), warrant.left(now) > Duration::ZERO);
        }
    }
}

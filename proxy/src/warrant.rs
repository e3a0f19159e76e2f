//! Why the proxy believes that the leader of its view may take writes, and until when. Pure.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::view::{Epoch, View};

/// The belief that the leader of a view may take writes. It says nothing about who that is: the view does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Warrant {
    as_of: Option<Boottime>,
    end: Option<Boottime>,
}

/// What the leader's own agent has told: until when it may be writable under `epoch`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vouch {
    /// The holding that it speaks of, and no other.
    pub epoch: Epoch,
    /// When its word ends, counted from before it was asked.
    pub end: Boottime,
}

impl Warrant {
    /// From a view and the time as of which its leader is known to be right. The view may be newer than the proof, never
    /// older: the caller reads the proof first.
    #[must_use]
    pub fn new(view: &View, as_of: Option<Boottime>) -> Self {
        Self {
            as_of,
            end: as_of.map(|as_of| view.timing().warrant_end(as_of)),
        }
    }

    /// The later end of this and the leader's own word, when that is about the epoch of `view`.
    #[must_use]
    pub fn vouched(self, view: &View, vouch: Option<&Vouch>) -> Self {
        let same = vouch.filter(|vouch| view.epoch() == Some(&vouch.epoch));
        Self {
            end: self.end.max(same.map(|vouch| vouch.end)),
            ..self
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

    /// The age of the view's proof.
    #[must_use]
    pub fn age(self, now: Boottime) -> Option<Duration> {
        self.as_of.map(|as_of| now.since(as_of))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Cluster, name};

    #[test]
    fn a_proxy_that_was_never_told_anything_has_no_warrant() {
        let view = Cluster::new().view();
        assert!(!Warrant::new(&view, None).holds(Boottime::from_nanos(1)));
    }

    #[test]
    fn the_leaders_own_word_lengthens_the_warrant_of_its_epoch_and_shortens_none() {
        let cluster = Cluster::new().leader("n1", 10);
        let at = |millis: u64| Boottime::from_nanos(millis * 1_000_000);
        let end = |revision: i64, vouched: u64| {
            let view = cluster.view();
            let epoch = Epoch {
                holder: name("n1"),
                create_revision: revision,
            };
            let end = at(vouched);
            Warrant::new(&view, Some(at(1_000)))
                .vouched(&view, Some(&Vouch { epoch, end }))
                .end()
        };
        assert_eq!(end(10, 9_000), Some(at(9_000)));
        assert_eq!(end(10, 2_000), Some(at(5_500)));
        assert_eq!(end(11, 9_000), Some(at(5_500)));
    }

    #[test]
    fn beside_a_patroni_member_the_lease_is_longer_and_so_is_the_warrant() {
        let ours = Cluster::new()
            .config(r#"{"ttl":5,"loop_wait":1,"retry_timeout":2}"#)
            .replica("n1");
        let asked = Boottime::from_nanos(1_000_000_000);
        let left = |cluster: &Cluster| Warrant::new(&cluster.view(), Some(asked)).left(asked);
        assert_eq!(left(&ours), Duration::from_millis(4500));
        assert_eq!(left(&ours.patroni("n2")), Duration::from_secs(18));
    }

    proptest! {
        #[test]
        fn a_warrant_ends_before_the_lease_that_it_rests_on(ttl in 0_u64..100, asked in 1_u64..1_000_000_000_000, late in 0_u64..200_000) {
            let view = Cluster::new().config(&format!(r#"{{"ttl":{ttl},"loop_wait":1,"retry_timeout":1}}"#)).view();
            let asked = Boottime::from_nanos(asked);
            let warrant = Warrant::new(&view, Some(asked));
            let now = asked + Duration::from_millis(late);
            let lease_end = asked + view.timing().ttl();
            prop_assert!(!warrant.holds(now) || now < lease_end);
            prop_assert_eq!(warrant.holds(now), warrant.left(now) > Duration::ZERO);
        }
    }
}

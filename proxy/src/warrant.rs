//! Why the proxy believes that the leader of its view may take writes, and until when: by what the store confirms, or by the
//! leader's own word, also when its key has just gone. Pure.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::view::{Epoch, Leader, Member, View};

/// The belief that the leader of a view may take writes. It says nothing about who that is: the view does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Warrant {
    as_of: Option<Boottime>,
    end: Option<Boottime>,
    admits: bool,
    /// Nothing but the leader's own word counts.
    by_word_alone: bool,
}

/// What the leader's own agent has told: until when it may be writable under its holding of the leader key.
#[derive(Clone, Debug, PartialEq)]
pub struct Vouch {
    /// The holding that it speaks of, and no other.
    pub leader: Leader,
    /// Its member as it was when it was asked: its key is bound to the lease that the leader key is bound to.
    pub member: Member,
    /// When its word ends, counted from before it was asked.
    pub end: Boottime,
    /// Whether the agent itself has named the holding; Patroni's only says that it leads.
    pub names_epoch: bool,
    /// Whether it was asked after its key had gone. One that has given its key away keeps what it had told before from
    /// being taken back for a moment, which is no reason to send it anybody.
    pub without_key: bool,
}

impl Vouch {
    /// The holding that it speaks of.
    #[must_use]
    pub const fn epoch(&self) -> &Epoch {
        &self.leader.epoch
    }
}

/// The last words of leaders' own agents: the newest, and the last one about another holding before it, by which a session
/// may go over from the one to the other.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Words {
    newest: Option<Vouch>,
    before: Option<Vouch>,
}

impl Words {
    /// Nothing was told.
    #[must_use]
    pub const fn none() -> Self {
        Self {
            newest: None,
            before: None,
        }
    }

    /// With one more. A later word about the same holding shortens nothing: the first still stands.
    #[must_use]
    pub fn with(&self, vouch: Vouch) -> Self {
        match &self.newest {
            Some(newest) if newest.epoch() == vouch.epoch() => Self {
                newest: Some(Vouch {
                    end: newest.end.max(vouch.end),
                    ..vouch
                }),
                before: self.before.clone(),
            },
            newest => Self {
                before: newest.clone(),
                newest: Some(vouch),
            },
        }
    }

    /// Without what was told about `epoch`.
    #[must_use]
    pub fn without(&self, epoch: &Epoch) -> Self {
        let other = |vouch: &Option<Vouch>| vouch.clone().filter(|vouch| vouch.epoch() != epoch);
        Self {
            newest: other(&self.newest),
            before: other(&self.before),
        }
    }

    /// Without the words of anybody but `holder`, who has the leader key: theirs are over, whatever they said.
    #[must_use]
    pub fn only_of(&self, holder: &MemberName) -> Self {
        let theirs = |vouch: &Option<Vouch>| vouch.clone().filter(|vouch| vouch.epoch().holder == *holder);
        Self {
            newest: theirs(&self.newest),
            before: theirs(&self.before),
        }
    }

    /// The word about `epoch`.
    #[must_use]
    pub fn about(&self, epoch: &Epoch) -> Option<&Vouch> {
        let both = [&self.newest, &self.before];
        both.into_iter().flatten().find(|vouch| vouch.epoch() == epoch)
    }

    /// The word by which the last leader goes on at `now` although nobody holds the leader key in `view`: its lease has
    /// expired while the other members vouch for it. It has named the holding itself, and another holder's key ends this.
    #[must_use]
    pub fn instead_of_key(&self, view: &View, now: Boottime) -> Option<&Vouch> {
        let newest = self.newest.as_ref()?;
        (view.leader.is_none() && newest.names_epoch && now < newest.end).then_some(newest)
    }

    /// Whether the holder of `earlier` has come to hold `later` without having been ended in between: it made its key anew
    /// while its word about the earlier holding still stood, and is on the same timeline.
    #[must_use]
    pub fn reach(&self, earlier: &Epoch, later: &Epoch, view: &View, now: Boottime) -> bool {
        let stands = |vouch: &&Vouch| vouch.names_epoch && now < vouch.end;
        let Some(vouch) = self.about(earlier).filter(stands) else {
            return false;
        };
        let timeline = |member: &Member| member.record.timeline;
        let (then, now) = (
            timeline(&vouch.member),
            view.members.get(&later.holder).and_then(timeline),
        );
        earlier.holder == later.holder && (then.is_none() || now.is_none() || then == now)
    }
}

/// `view` with the leader that goes on by its own word.
#[must_use]
pub fn with_leader(view: &View, vouch: &Vouch) -> View {
    let mut view = view.clone();
    let holder = vouch.epoch().holder.clone();
    view.leader = Some(vouch.leader.clone());
    view.members.entry(holder).or_insert_with(|| vouch.member.clone());
    view
}

impl Warrant {
    /// From a view and the time as of which its leader is known to be right. The view may be newer than the proof, never
    /// older: the caller reads the proof first.
    #[must_use]
    pub fn new(view: &View, as_of: Option<Boottime>) -> Self {
        Self {
            as_of,
            end: as_of.map(|as_of| view.timing().warrant_end(as_of)),
            admits: true,
            by_word_alone: false,
        }
    }

    /// From what members tell of each other, as of then: it proves nothing until the leader's own word is added.
    #[must_use]
    pub const fn hearsay(as_of: Option<Boottime>) -> Self {
        Self {
            as_of,
            end: None,
            admits: true,
            by_word_alone: true,
        }
    }

    /// From the leader's server, which was asked then whether it takes writes, and is believed for `good_for`.
    #[must_use]
    pub fn from_server(as_of: Option<Boottime>, good_for: Duration) -> Self {
        Self {
            as_of,
            end: as_of.map(|as_of| as_of + good_for),
            admits: true,
            by_word_alone: false,
        }
    }

    /// From the leader's own word alone. What the store confirmed meanwhile, at `as_of`, is that nobody holds the key.
    #[must_use]
    pub const fn by_word(vouch: &Vouch, as_of: Option<Boottime>) -> Self {
        Self {
            as_of,
            end: Some(vouch.end),
            admits: vouch.without_key,
            by_word_alone: false,
        }
    }

    /// The later end of this and the leader's own word about the epoch of `view`, if there is one.
    #[must_use]
    pub fn vouched(self, view: &View, words: &Words) -> Self {
        let same = view.epoch().and_then(|epoch| words.about(epoch));
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

    /// Whether new sessions may begin on it, not only old ones go on.
    #[must_use]
    pub const fn admits(self) -> bool {
        self.admits
    }

    /// Whether nothing but the leader's own word counts.
    #[must_use]
    pub const fn by_word_alone(self) -> bool {
        self.by_word_alone
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

    fn word(holder: &str, create_revision: i64, end: Boottime) -> Vouch {
        Cluster::new()
            .leader(holder, create_revision)
            .primary(holder, create_revision + 1)
            .word(end)
    }

    fn at(millis: u64) -> Boottime {
        Boottime::from_nanos(millis * 1_000_000)
    }

    fn epoch(holder: &str, create_revision: i64) -> Epoch {
        Epoch {
            holder: name(holder),
            create_revision,
        }
    }

    #[test]
    fn a_leader_whose_key_is_gone_goes_on_by_its_own_word_and_no_longer() {
        let words = Words::default().with(word("n1", 10, at(2_000)));
        let gone = Cluster::new().replica("n2").view();
        let vouch = words.instead_of_key(&gone, at(1_999)).expect("its word stands");
        let warrant = Warrant::by_word(vouch, Some(at(1_900)));
        assert_eq!((warrant.end(), warrant.admits()), (Some(at(2_000)), false));
        let asked_again = Vouch {
            without_key: true,
            ..vouch.clone()
        };
        let again = words.with(asked_again);
        let again = again.instead_of_key(&gone, at(1_000)).expect("its word stands");
        assert!(Warrant::by_word(again, None).admits());
        let view = with_leader(&gone, vouch);
        assert_eq!(view.epoch(), Some(&epoch("n1", 10)));
        assert_eq!(view.writable_leader().map(|member| &member.name), Some(&name("n1")));
        assert_eq!(words.instead_of_key(&gone, at(2_000)), None);
        // Another's key, the same member's new one, or a holding that only the proxy has named.
        for taken in [Cluster::new().leader("n2", 20), Cluster::new().leader("n1", 20)] {
            assert_eq!(words.instead_of_key(&taken.view(), at(1_000)), None);
        }
        let unnamed = Vouch {
            names_epoch: false,
            ..word("n1", 10, at(2_000))
        };
        assert_eq!(Words::default().with(unnamed).instead_of_key(&gone, at(1_000)), None);
    }

    #[test]
    fn a_member_that_says_otherwise_of_itself_is_not_made_primary_by_an_old_word() {
        let words = Words::default().with(word("n1", 10, at(2_000)));
        let gone = Cluster::new().with_role("n1", "replica", 30).view();
        let vouch = words.instead_of_key(&gone, at(1_000)).expect("its word stands");
        assert!(with_leader(&gone, vouch).writable_leader().is_none());
    }

    #[test]
    fn a_word_is_taken_back_and_a_shorter_one_shortens_nothing() {
        let words = Words::default()
            .with(word("n1", 10, at(2_000)))
            .with(word("n1", 10, at(1_500)));
        assert_eq!(words.about(&epoch("n1", 10)).map(|vouch| vouch.end), Some(at(2_000)));
        assert_eq!(words.without(&epoch("n1", 10)), Words::default());
        assert_eq!(words.without(&epoch("n1", 11)), words);
        assert_eq!(words.only_of(&name("n2")), Words::none());
        assert_eq!(words.only_of(&name("n1")), words);
    }

    #[test]
    fn a_holder_that_makes_its_key_anew_while_its_word_stands_was_not_ended() {
        let words = Words::default().with(word("n1", 10, at(2_000)));
        let reach = |words: &Words, cluster: Cluster, now: u64| {
            let view = cluster.view();
            words.reach(&epoch("n1", 10), view.epoch().expect("somebody leads"), &view, at(now))
        };
        let anew = Cluster::new().leader("n1", 20);
        assert!(reach(&words, anew.clone(), 1_999));
        assert!(reach(&words.with(word("n1", 20, at(9_000))), anew.clone(), 1_999));
        assert!(!reach(&words, anew.clone(), 2_000));
        assert!(!reach(&Words::default(), anew, 1_000));
        assert!(!reach(&words, Cluster::new().leader("n2", 20), 1_000));
        let on_timeline = |timeline: u32| {
            let more = format!(r#""timeline":{timeline}"#);
            Cluster::new()
                .leader("n1", 20)
                .member("n1", "primary", "running", &more)
        };
        let then = on_timeline(4).word(at(2_000));
        let words = Words::default().with(Vouch {
            leader: word("n1", 10, at(2_000)).leader,
            ..then
        });
        assert!(reach(&words, on_timeline(4), 1_000));
        assert!(!reach(&words, on_timeline(5), 1_000));
    }

    #[test]
    fn a_proxy_that_was_never_told_anything_has_no_warrant() {
        let view = Cluster::new().view();
        assert!(!Warrant::new(&view, None).holds(Boottime::from_nanos(1)));
    }

    #[test]
    fn the_leaders_own_word_lengthens_the_warrant_of_its_epoch_and_shortens_none() {
        let cluster = Cluster::new().leader("n1", 10);
        let end = |revision: i64, vouched: u64| {
            let view = cluster.view();
            let words = Words::default().with(word("n1", revision, at(vouched)));
            Warrant::new(&view, Some(at(1_000))).vouched(&view, &words).end()
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

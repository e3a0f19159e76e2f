//! The failsafe mode. When etcd does not answer, a deadline may rest on vouches instead: every member named in `/failsafe`
//! said that it will not bid for a while, counted from before it was asked. A vouch and a bid exclude each other, which
//! is why both are decided here, by one owner.

use std::collections::BTreeMap;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::view::Epoch;

use super::{Flow, LeaseCore, Output, Proof, Vouched};
use crate::lease::AskedBy;

/// A member that may vouch.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Voucher {
    /// Its name.
    pub name: MemberName,
    /// Where its REST interface is, as the failsafe list says.
    pub api_url: String,
}

/// What this member's view shows of the leader key when it is asked to vouch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySeen {
    /// etcd does not answer.
    Unknown,
    /// Nobody holds it.
    Free,
    /// Somebody does.
    Held(Epoch),
}

/// Why a member does not vouch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VouchRefusal {
    /// It holds the key itself.
    #[error("this member holds the leader key")]
    Holds,
    /// It bids for the key, or does not know yet what came of its bid.
    #[error("this member seeks the leader key")]
    Seeks,
    /// It sees another holder.
    #[error("{0} holds the leader key")]
    OtherHolder(Epoch),
    /// It has vouched for another.
    #[error("this member has vouched for {0}")]
    VouchedFor(MemberName),
}

/// What the core keeps of the failsafe mode.
#[derive(Clone, Debug, Default)]
pub(super) struct Failsafe {
    /// Every list that may stand in etcd, united; nothing while the mode is off.
    pub(super) list: Option<Vec<Voucher>>,
    /// The questions that are out.
    pub(super) round: Option<Round>,
    rounds: u64,
    given: Option<Vouched>,
}

/// Questions to all the others.
#[derive(Clone, Debug)]
pub(super) struct Round {
    number: u64,
    asked_at: Boottime,
    /// Who has not answered yet, or for how long.
    answers: BTreeMap<MemberName, Option<Duration>>,
    failed: bool,
}

impl Failsafe {
    /// The list and the questions of one holding say nothing of the next.
    pub(super) fn forget(&mut self) {
        self.list = None;
        self.round = None;
    }

    /// For whom this member has vouched, while that lasts.
    pub(super) fn vouched(&self, now: Boottime) -> Option<Vouched> {
        self.given.clone().filter(|given| now < given.until)
    }
}

impl LeaseCore {
    /// Whether the holding's deadline in force rests on vouches and lies ahead.
    pub(super) fn rests_on_vouches(&self, now: Boottime) -> bool {
        self.state
            .holding
            .as_ref()
            .is_some_and(|held| held.proof == Proof::Vouches && held.deadline.is_some_and(|deadline| now < deadline))
    }

    /// When half of the deadline in force is gone, and again each renewal period until its end.
    pub(super) fn vouches_due_at(&self) -> Option<Boottime> {
        let held = self.state.holding.as_ref()?;
        held.deadline?;
        self.failsafe.list.as_ref()?;
        if self.state.paused != Some(false) {
            return None;
        }
        let (asked_at, lasts) = self.proof;
        let half = asked_at + lasts / 2;
        let again = self
            .failsafe
            .round
            .as_ref()
            .map(|round| round.asked_at + self.timing.renew_every());
        Some(again.map_or(half, |again| again.max(half)))
    }

    pub(super) fn ask_vouches_if_due(&mut self, now: Boottime) {
        let ahead = |held: &super::Held| held.deadline.is_some_and(|deadline| now < deadline);
        if !self.state.holding.as_ref().is_some_and(ahead) || self.vouches_due_at().is_none_or(|due| now < due) {
            return;
        }
        let (Some(list), Some(held)) = (&self.failsafe.list, &self.state.holding) else {
            return;
        };
        // A list that does not name us says that others may be elected without asking us.
        if !list.iter().any(|voucher| voucher.name == self.name) {
            return;
        }
        let mut members: Vec<Voucher> = list
            .iter()
            .filter(|voucher| voucher.name != self.name)
            .cloned()
            .collect();
        members.sort();
        members.dedup();
        let epoch = held.epoch.clone();
        self.failsafe.rounds += 1;
        let number = self.failsafe.rounds;
        self.failsafe.round = Some(Round {
            number,
            asked_at: now,
            answers: members.iter().map(|voucher| (voucher.name.clone(), None)).collect(),
            failed: false,
        });
        if members.is_empty() {
            return self.conclude(now);
        }
        self.out.push(Output::AskVouches {
            round: number,
            epoch,
            lasts: self.timing.ttl(),
            members,
        });
    }

    pub(super) fn vouched(&mut self, now: Boottime, number: u64, member: &MemberName, lasts: Option<Duration>) {
        let Some(round) = self.failsafe.round.as_mut().filter(|round| round.number == number) else {
            return;
        };
        let Some(answer) = round.answers.get_mut(member) else {
            return;
        };
        match lasts {
            // A member that is in the lists of two addresses has to agree at both.
            Some(lasts) => *answer = Some(answer.map_or(lasts, |before| before.min(lasts))),
            None => round.failed = true,
        }
        self.conclude(now);
    }

    /// Once all have agreed: the smallest of what they said, counted from before they were asked.
    fn conclude(&mut self, now: Boottime) {
        let Some(round) = &self.failsafe.round else { return };
        let ttl = self.timing.ttl();
        let agreed = round
            .answers
            .values()
            .try_fold(ttl, |least, answer| answer.map(|lasts| lasts.min(least)));
        let (Some(lasts), false) = (agreed, round.failed) else {
            return;
        };
        let asked_at = round.asked_at;
        let in_force = self.state.holding.as_ref().and_then(|held| held.deadline);
        if in_force.is_some_and(|deadline| now < deadline && deadline < asked_at + lasts) {
            self.give_deadline(asked_at, lasts, Proof::Vouches);
        }
    }

    /// Another member, which holds the key, asks this one not to bid for `lasts`. Answers for how long it will not.
    ///
    /// # Errors
    /// When this member holds or seeks the key, sees another holder, or has vouched for another.
    pub fn vouch(
        &mut self,
        now: Boottime,
        leader: &MemberName,
        lasts: Duration,
        seen: &KeySeen,
    ) -> Result<Duration, VouchRefusal> {
        if self.state.holding.is_some() {
            return Err(VouchRefusal::Holds);
        }
        if self.is_bidding() {
            return Err(VouchRefusal::Seeks);
        }
        if let KeySeen::Held(other) = seen
            // The same member's other holding is no objection: our view may be behind, and it asks only while its own
            // deadline lies ahead.
            && other.holder != *leader
        {
            return Err(VouchRefusal::OtherHolder(other.clone()));
        }
        if let Some(given) = self.failsafe.vouched(now)
            && given.leader != *leader
        {
            return Err(VouchRefusal::VouchedFor(given.leader));
        }
        let lasts = lasts.min(self.timing.ttl());
        let until = self
            .failsafe
            .vouched(now)
            .map_or(now + lasts, |given| given.until.max(now + lasts));
        let given = Vouched {
            leader: leader.clone(),
            holding: AskedBy::default(),
            until,
        };
        self.failsafe.given = Some(given.clone());
        self.state.vouched = Some(given);
        Ok(lasts)
    }

    /// As [`Self::vouch`], for a leader that says by which of its holdings it asks.
    ///
    /// # Errors
    /// As for [`Self::vouch`].
    pub fn vouch_for(
        &mut self,
        now: Boottime,
        leader: &MemberName,
        holding: AskedBy,
        lasts: Duration,
        seen: &KeySeen,
    ) -> Result<Duration, VouchRefusal> {
        let before = self.failsafe.vouched(now);
        let lasts = self.vouch(now, leader, lasts, seen)?;
        if let Some(given) = &mut self.failsafe.given {
            // A question may have been long on its way: of two holdings nobody knows which is the later one, and the vouch
            // is owed to either.
            let same = before.is_none_or(|before| before.holding.create_revision == holding.create_revision);
            given.holding = if same { holding } else { AskedBy::default() };
            self.state.vouched = Some(given.clone());
        }
        Ok(lasts)
    }

    /// A leader has given a holding up, and PostgreSQL has ended there. A vouch for another of its holdings stands. When etcd
    /// does not confirm it any more, since the key has expired, whoever says so proves by the `lease` that it was the holder.
    pub fn withdraw(&mut self, holding: &Epoch, lease: Option<i64>) {
        let for_it = |given: &Vouched| {
            given.leader == holding.holder
                && given.holding.create_revision == Some(holding.create_revision)
                && (lease.is_none() || given.holding.lease == lease)
        };
        if self.failsafe.given.as_ref().is_some_and(for_it) {
            (self.failsafe.given, self.state.vouched) = (None, None);
        }
    }

    /// Whether a request to etcd is under way, for those who drive this by hand.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.flow == Flow::Idle
    }
}

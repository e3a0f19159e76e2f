//! What happened lately, for people: a ring of the last events.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pgherd_cluster::clock::{Boottime, wall_now};
use pgherd_cluster::event::{EventId, Ids};
use pgherd_cluster::name::MemberName;
use pgherd_cluster::view::Epoch;
use tokio::sync::watch;

const EVENTS_KEPT: usize = 50;
/// Repetitions within this time are one event with a count, or a full hold would push everything else out.
const REPEAT_WITHIN: Duration = Duration::from_secs(10);

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum EventKind {
    Started,
    Stopping,
    LeaderChanged {
        from: Option<Epoch>,
        to: Option<Epoch>,
    },
    LeaderWritable {
        leader: MemberName,
        after: Duration,
    },
    LeaderWritableAgain {
        leader: MemberName,
        after: Duration,
    },
    MemberJoined(MemberName),
    MemberLeft(MemberName),
    SessionsEnded {
        reason: &'static str,
    },
    /// They have been asked to leave, for balance.
    SessionsMoved,
    HoldExpired {
        listener: String,
    },
    HoldFull,
    /// A client was refused by a limit; the key under `limits`.
    Limited {
        limit: &'static str,
    },
    WarrantLapsed,
    WarrantBack,
    StoreLost(String),
    StoreBack,
    /// Nobody holds the leader key, and its last holder goes on by its own word.
    LeaderVouched(MemberName),
    MemberSilent(MemberName),
    MemberAnswers(MemberName),
    Reloaded,
    MemberUnreachable(MemberName),
    MemberNotNow {
        member: MemberName,
        said: String,
    },
    /// By an operator, from the page.
    AskedFor {
        order: String,
        by: String,
        said: String,
        done: bool,
    },
}

impl EventKind {
    /// One word for filters and styles.
    pub(crate) const fn label(&self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Stopping => "stopping",
            Self::LeaderChanged { .. } => "leader_changed",
            Self::LeaderWritable { .. } => "leader_writable",
            Self::LeaderWritableAgain { .. } => "leader_writable_again",
            Self::MemberJoined(_) => "member_joined",
            Self::MemberLeft(_) => "member_left",
            Self::SessionsEnded { .. } => "sessions_ended",
            Self::SessionsMoved => "sessions_moved",
            Self::HoldExpired { .. } => "hold_expired",
            Self::HoldFull => "hold_full",
            Self::Limited { .. } => "limited",
            Self::WarrantLapsed => "warrant_lapsed",
            Self::WarrantBack => "warrant_back",
            Self::StoreLost(_) => "store_lost",
            Self::StoreBack => "store_back",
            Self::LeaderVouched(_) => "leader_vouched",
            Self::MemberSilent(_) => "member_silent",
            Self::MemberAnswers(_) => "member_answers",
            Self::Reloaded => "reloaded",
            Self::MemberUnreachable(_) => "member_unreachable",
            Self::MemberNotNow { .. } => "member_not_now",
            Self::AskedFor { .. } => "asked_for",
        }
    }
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Started => f.write_str("this proxy started"),
            Self::Stopping => f.write_str("this proxy was asked to stop"),
            Self::LeaderChanged {
                from: Some(from),
                to: Some(to),
            } if from.holder == to.holder => {
                write!(f, "leader {} took the lease anew", to.holder)
            }
            Self::LeaderChanged {
                from: Some(from),
                to: Some(to),
            } => {
                write!(f, "leader changed {} -> {}", from.holder, to.holder)
            }
            Self::LeaderChanged {
                from: Some(from),
                to: None,
            } => write!(f, "leader {} is gone, nobody leads", from.holder),
            Self::LeaderChanged {
                from: None,
                to: Some(to),
            } => write!(f, "{} leads", to.holder),
            Self::LeaderChanged { from: None, to: None } => f.write_str("nobody leads"),
            Self::LeaderWritable { leader, after } => {
                write!(
                    f,
                    "{leader} is writable, {:.3} s after it took the lease",
                    after.as_secs_f64()
                )
            }
            Self::LeaderWritableAgain { leader, after } => {
                write!(
                    f,
                    "{leader} is writable again, {:.3} s after it stopped",
                    after.as_secs_f64()
                )
            }
            Self::MemberJoined(member) => write!(f, "member {member} joined"),
            Self::MemberLeft(member) => write!(f, "member {member} left"),
            Self::SessionsEnded { reason } => write!(f, "session ended: {reason}"),
            Self::SessionsMoved => f.write_str("sessions are moved to members that have fewer than their part"),
            Self::HoldExpired { listener } => write!(
                f,
                "a held client on {listener} was refused: nobody could serve it in time"
            ),
            Self::HoldFull => f.write_str("a client was refused: too many are held already"),
            Self::Limited { limit } => write!(f, "a client was refused: limits.{limit} is reached"),
            Self::WarrantLapsed => f.write_str("it is no longer certain who leads: writes are held"),
            Self::WarrantBack => f.write_str("it is certain again who leads"),
            Self::StoreLost(error) => write!(f, "the cluster's store does not answer: {error}"),
            Self::StoreBack => f.write_str("the cluster's store answers"),
            Self::LeaderVouched(leader) => {
                write!(f, "nobody holds the leader key; {leader} goes on by its own word")
            }
            Self::MemberSilent(member) => write!(f, "{member} does not answer: its readers go elsewhere"),
            Self::MemberAnswers(member) => write!(f, "{member} answers again"),
            Self::Reloaded => f.write_str("the configuration was read again"),
            Self::MemberUnreachable(member) => write!(f, "{member} cannot be connected to"),
            Self::MemberNotNow { member, said } => write!(f, "{member} takes no connections now: {said}"),
            Self::AskedFor { order, by, said, done } => {
                let outcome = if *done { "done" } else { "not done" };
                write!(f, "{by} asked from the page for {order}: {outcome}, {said}")
            }
        }
    }
}

/// An event, and how often it came.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) id: EventId,
    pub(crate) kind: EventKind,
    pub(crate) count: usize,
    pub(crate) at: SystemTime,
    pub(crate) at_boottime: Boottime,
}

/// The ring.
pub(crate) struct EventLog {
    ring: Mutex<VecDeque<Event>>,
    ids: Ids,
    /// Counts the events, so that a page can wait for the next.
    recorded: watch::Sender<u64>,
}

impl EventLog {
    pub(crate) fn new() -> Self {
        Self {
            ring: Mutex::default(),
            // Proxies have no names; two that share this twentieth of a million still differ in time.
            ids: Ids::new(&format!("proxy {} {}", std::process::id(), wall_ms())),
            recorded: watch::Sender::new(0),
        }
    }

    /// The name of an event that is about to be recorded.
    pub(crate) fn next_id(&self) -> EventId {
        self.ids.next(wall_ms())
    }

    /// Records `count` of the same.
    pub(crate) fn record_many(&self, kind: EventKind, count: usize) {
        self.record_as(None, kind, count);
    }

    /// Records what has its name already.
    pub(crate) fn record_named(&self, id: EventId, kind: EventKind) {
        self.record_as(Some(id), kind, 1);
    }

    fn record_as(&self, id: Option<EventId>, kind: EventKind, count: usize) {
        let at_boottime = Boottime::now();
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let same = ring
            .iter_mut()
            .rev()
            .take_while(|event| at_boottime.since(event.at_boottime) < REPEAT_WITHIN)
            .find(|event| event.kind == kind && id.is_none());
        if let Some(same) = same {
            same.count += count;
        } else {
            ring.push_back(Event {
                id: id.unwrap_or_else(|| self.next_id()),
                kind,
                count,
                at: wall_now(),
                at_boottime,
            });
            if ring.len() > EVENTS_KEPT {
                ring.pop_front();
            }
        }
        drop(ring);
        self.recorded.send_modify(|recorded| *recorded += 1);
    }

    pub(crate) fn record(&self, kind: EventKind) {
        self.record_many(kind, 1);
    }

    /// The last events, newest first.
    pub(crate) fn latest(&self) -> Vec<Event> {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.iter().rev().cloned().collect()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.recorded.subscribe()
    }
}

/// Milliseconds since 1970.
pub(crate) fn wall_ms() -> u64 {
    let since = wall_now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::name;

    #[test]
    fn repetitions_are_counted_and_the_ring_is_bounded() {
        let log = EventLog::new();
        log.record(EventKind::HoldFull);
        log.record(EventKind::StoreBack);
        log.record(EventKind::HoldFull);
        let latest = log.latest();
        assert_eq!(latest.len(), 2);
        assert_eq!((latest[1].kind.clone(), latest[1].count), (EventKind::HoldFull, 2));
        for index in 0..200 {
            log.record(EventKind::MemberJoined(name(&format!("n{index}"))));
        }
        assert_eq!(log.latest().len(), EVENTS_KEPT);
    }
}

//! Changes of leader, put together from what this proxy saw. Pure.

use pgherd_cluster::clock::Boottime;
use pgherd_page::model::{EventRow, LeaderChange, Phase};
use pgherd_page::words::utc;

use crate::events::{Event, EventKind};

const SEEN_BY: &str = "this proxy";
const NOBODY_LEADS: &str = "nobody leads";
const TAKES_OVER: &str = "until the new leader takes writes";

/// A change that is being put together.
struct Building {
    began: Boottime,
    change: LeaderChange,
    /// Since when its last phase lasts; nothing when it is over.
    open_since: Option<Boottime>,
}

impl Building {
    fn new(event: &Event, from: Option<String>, now: Boottime) -> Self {
        Self {
            began: event.at_boottime,
            change: LeaderChange {
                at: utc(event.at),
                age_seconds: now.since(event.at_boottime).as_secs_f64(),
                from,
                to: None,
                cause: None,
                phases: Vec::new(),
                going_on: false,
            },
            open_since: None,
        }
    }

    fn open(&mut self, name: &str, at: Boottime) {
        self.close(at);
        self.change.phases.push(Phase {
            name: name.to_owned(),
            begins_seconds: at.since(self.began).as_secs_f64(),
            seconds: 0.0,
            by: SEEN_BY.to_owned(),
        });
        self.open_since = Some(at);
    }

    fn close(&mut self, at: Boottime) {
        if let (Some(since), Some(phase)) = (self.open_since.take(), self.change.phases.last_mut()) {
            phase.seconds = at.since(since).as_secs_f64();
        }
    }
}

/// The changes of leader among events that come newest first, in the same order.
pub(crate) fn of_events(events: &[Event], now: Boottime) -> Vec<LeaderChange> {
    let mut all: Vec<Building> = Vec::new();
    for event in events.iter().rev() {
        follow(&mut all, event, now);
    }
    if let Some(last) = all.last_mut() {
        last.change.going_on = last.open_since.is_some();
        last.close(now);
    }
    all.into_iter().rev().map(|building| building.change).collect()
}

fn follow(all: &mut Vec<Building>, event: &Event, now: Boottime) {
    let at = event.at_boottime;
    match &event.kind {
        EventKind::LeaderChanged { from, to } => {
            let from = from.as_ref().map(|epoch| epoch.holder.to_string());
            let goes_on = from.is_none() && all.last().is_some_and(|last| last.change.to.is_none());
            // Who is found leading at the first look has not just come.
            if from.is_none() && !goes_on {
                return;
            }
            if !goes_on {
                if let Some(last) = all.last_mut() {
                    last.close(at);
                }
                all.push(Building::new(event, from, now));
            }
            let Some(current) = all.last_mut() else { return };
            match to {
                None => current.open(NOBODY_LEADS, at),
                Some(to) => {
                    current.change.to = Some(to.holder.to_string());
                    current.open(TAKES_OVER, at);
                }
            }
        }
        EventKind::LeaderWritable { leader, after } => {
            let current = all
                .last_mut()
                .filter(|last| last.change.to.as_deref() == Some(leader.as_str()));
            let begun = current.and_then(|current| Some((current.open_since?, current)));
            if let Some((since, current)) = begun {
                current.close(since + *after);
            }
        }
        _ => {}
    }
}

/// The events as rows.
pub(crate) fn rows(events: &[Event], now: Boottime) -> Vec<EventRow> {
    let row = |event: &Event| EventRow {
        id: Some(event.id.to_string()),
        at: utc(event.at),
        age_seconds: now.since(event.at_boottime).as_secs_f64(),
        kind: event.kind.label(),
        text: event.kind.to_string(),
        count: event.count,
    };
    events.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use pgherd_cluster::event::Ids;
    use pgherd_cluster::view::Epoch;

    use super::*;
    use crate::testing::name;

    fn epoch(holder: &str) -> Option<Epoch> {
        Some(Epoch {
            holder: name(holder),
            create_revision: 1,
        })
    }

    fn event(kind: EventKind, seconds: f64) -> Event {
        let at = Duration::from_secs_f64(100.0 + seconds);
        Event {
            id: Ids::new("p").next(1),
            kind,
            count: 1,
            at: SystemTime::UNIX_EPOCH + at,
            at_boottime: Boottime::from_nanos(0) + at,
        }
    }

    fn gone(from: &str, seconds: f64) -> Event {
        event(
            EventKind::LeaderChanged {
                from: epoch(from),
                to: None,
            },
            seconds,
        )
    }

    fn came(to: &str, seconds: f64) -> Event {
        event(
            EventKind::LeaderChanged {
                from: None,
                to: epoch(to),
            },
            seconds,
        )
    }

    fn writable(leader: &str, after: f64, seconds: f64) -> Event {
        let after = Duration::from_secs_f64(after);
        event(
            EventKind::LeaderWritable {
                leader: name(leader),
                after,
            },
            seconds,
        )
    }

    fn phases(change: &LeaderChange) -> Vec<(&str, f64, f64)> {
        let of = |phase: &'static str, all: &[Phase]| {
            all.iter()
                .find(|of| of.name == phase)
                .map(|of| (phase, of.begins_seconds, of.seconds))
        };
        [NOBODY_LEADS, TAKES_OVER]
            .iter()
            .filter_map(|phase| of(phase, &change.phases))
            .collect()
    }

    #[test]
    fn a_failover_is_the_time_without_a_leader_and_the_time_until_the_next_takes_writes() {
        let mut events = vec![gone("n1", 0.0), came("n2", 2.0), writable("n2", 0.5, 2.5)];
        events.reverse();
        let now = Boottime::from_nanos(0) + Duration::from_secs(160);
        let changes = of_events(&events, now);
        let [change] = changes.as_slice() else {
            panic!("{changes:?}")
        };
        assert_eq!((change.from.as_deref(), change.to.as_deref()), (Some("n1"), Some("n2")));
        assert_eq!(phases(change), [(NOBODY_LEADS, 0.0, 2.0), (TAKES_OVER, 2.0, 0.5)]);
        assert!(!change.going_on && change.age_seconds == 60.0);
    }

    #[test]
    fn one_that_goes_on_grows() {
        let now = Boottime::from_nanos(0) + Duration::from_secs(103);
        let changes = of_events(&[gone("n1", 0.0)], now);
        assert!(changes[0].going_on && changes[0].to.is_none());
        assert_eq!(phases(&changes[0]), [(NOBODY_LEADS, 0.0, 3.0)]);
        let changes = of_events(&[came("n2", 2.0), gone("n1", 0.0)], now);
        assert_eq!(changes.len(), 1);
        assert_eq!(phases(&changes[0]), [(NOBODY_LEADS, 0.0, 2.0), (TAKES_OVER, 2.0, 1.0)]);
    }

    #[test]
    fn whoever_led_before_the_first_look_has_not_just_come() {
        let now = Boottime::from_nanos(0) + Duration::from_secs(160);
        assert_eq!(of_events(&[came("n1", 0.0)], now), []);
    }

    #[test]
    fn one_that_another_follows_is_over() {
        let handed = event(
            EventKind::LeaderChanged {
                from: epoch("n1"),
                to: epoch("n2"),
            },
            0.0,
        );
        let back = event(
            EventKind::LeaderChanged {
                from: epoch("n2"),
                to: epoch("n1"),
            },
            1.0,
        );
        let now = Boottime::from_nanos(0) + Duration::from_secs(160);
        let changes = of_events(&[writable("n1", 0.25, 1.5), back, handed], now);
        assert_eq!(changes.len(), 2);
        assert_eq!(phases(&changes[0]), [(TAKES_OVER, 0.0, 0.25)]);
        assert_eq!(phases(&changes[1]), [(TAKES_OVER, 0.0, 1.0)]);
        assert!(changes.iter().all(|change| !change.going_on));
    }
}

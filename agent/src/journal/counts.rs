//! How many events there were, and how long changes of the leader took: what metrics show. Pure.

use std::collections::BTreeMap;

use pgherd_cluster::event::{Event, Kind, phase};

/// The upper ends of the buckets, in seconds.
pub const BUCKETS: [f64; 11] = [0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Durations, in buckets.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    /// How many were no longer than each of [`BUCKETS`].
    pub up_to: [u64; BUCKETS.len()],
    /// How many.
    pub count: u64,
    /// Their sum, in seconds.
    pub sum: f64,
}

impl Histogram {
    fn add(&mut self, millis: u64) {
        // Durations are far below where a float loses a millisecond.
        #[expect(clippy::cast_precision_loss, reason = "see above")]
        let seconds = millis as f64 / 1000.0;
        for (end, count) in BUCKETS.iter().zip(&mut self.up_to) {
            *count += u64::from(seconds <= *end);
        }
        self.count += 1;
        self.sum += seconds;
    }
}

/// Counters since this agent began.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counts {
    /// Events, by kind.
    pub by_kind: BTreeMap<Kind, u64>,
    /// What was told again within a moment, and is no event.
    pub repeated: u64,
    /// Events that could not be written to etcd.
    pub dropped: u64,
    /// Changes of the leader in which this member took the lead, by whether somebody handed it over.
    pub changes: BTreeMap<&'static str, u64>,
    /// How long each phase lasted, by its name, as this member measured it.
    pub phases: BTreeMap<String, Histogram>,
    /// How long writes stood still when this member took the lead, as far as it can tell.
    pub stall: Histogram,
    /// When the last change was, in milliseconds since 1970; 0 for never.
    pub last_change_ms: u64,
}

impl Counts {
    /// Counts an event of this member's own.
    pub fn note(&mut self, event: &Event) {
        *self.by_kind.entry(event.kind).or_default() += 1;
        for (one, next) in event.phases.iter().zip(event.phases.iter().skip(1)) {
            // Told by the former leader's clock.
            if one.name != phase::LAST_COMMIT {
                let lasted = next.at_ms.saturating_sub(one.at_ms);
                self.phases.entry(one.name.clone()).or_default().add(lasted);
            }
        }
        let Some(writable) = event.phase(phase::WRITABLE) else {
            return;
        };
        let end = event.phase(phase::ANNOUNCED).unwrap_or(writable);
        let begin = phase::STALL_BEGINS.into_iter().find_map(|name| event.phase(name));
        if let Some(begin) = begin {
            self.stall.add(end.saturating_sub(begin));
        }
        let kind = match event.kind {
            Kind::Leader if event.actor.is_some() => "switchover",
            Kind::Leader => "failover",
            _ => "restart",
        };
        *self.changes.entry(kind).or_default() += 1;
        self.last_change_ms = event.at_ms;
    }
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::event::{EventId, Phase};

    use super::*;

    #[test]
    fn a_change_counts_its_phases_and_the_stall() {
        let phases = [
            (phase::LAST_COMMIT, 900),
            (phase::LEASE_FREE, 1000),
            (phase::BID_WON, 1040),
            (phase::WRITABLE, 1400),
        ];
        let event = Event {
            phases: phases
                .map(|(name, at_ms)| Phase {
                    name: name.to_owned(),
                    at_ms,
                })
                .to_vec(),
            ..Event::new(EventId::new(1400, "n2"), 1400, "n2", Kind::Leader, "n2 leads")
        };
        let mut counts = Counts::default();
        counts.note(&event);
        let names: Vec<&str> = counts.phases.keys().map(String::as_str).collect();
        assert_eq!(names, ["bid_won", "lease_free"]);
        let bid = &counts.phases["bid_won"];
        assert_eq!((bid.count, bid.up_to[3], bid.up_to[4]), (1, 0, 1), "0.36 s");
        assert_eq!((counts.stall.count, counts.changes["failover"]), (1, 1));
        assert!((counts.stall.sum - 0.5).abs() < 1e-9);
    }
}

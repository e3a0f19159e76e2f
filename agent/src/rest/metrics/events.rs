//! What happened, as metrics. Pure.

use std::fmt::Write;

use super::Page;
use crate::journal::{BUCKETS, Counts, Histogram};

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a text cannot fail.
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    /// The page's labels and one more.
    fn labels_with(&self, name: &str, value: &str) -> String {
        let own = self.labels.trim_end_matches('}');
        format!("{own},{name}=\"{value}\"}}")
    }

    fn sample(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.text, "{name}{labels} {value}");
    }

    fn histogram(&mut self, name: &str, labels: &str, histogram: &Histogram) {
        let own = labels.trim_end_matches('}');
        for (end, count) in BUCKETS.iter().zip(histogram.up_to) {
            self.sample(&format!("{name}_bucket"), &format!("{own},le=\"{end}\"}}"), count);
        }
        self.sample(
            &format!("{name}_bucket"),
            &format!("{own},le=\"+Inf\"}}"),
            histogram.count,
        );
        self.sample(&format!("{name}_sum"), labels, format!("{:.3}", histogram.sum));
        self.sample(&format!("{name}_count"), labels, histogram.count);
    }
}

/// Adds them.
pub(super) fn add(page: &mut Page, counts: &Counts) {
    let name = "pgherd_events_total";
    page.family(name, "counter", "Events that this member has told of, by kind.");
    for (kind, count) in &counts.by_kind {
        let labels = page.labels_with("kind", kind.as_str());
        page.sample(name, &labels, count);
    }
    let help = "Events that could not be written to etcd.";
    page.add(
        "pgherd_events_dropped_total",
        "counter",
        help,
        &counts.dropped.to_string(),
    );
    let help = "Events that were told a moment before, and were not told again.";
    page.add(
        "pgherd_events_repeated_total",
        "counter",
        help,
        &counts.repeated.to_string(),
    );
    let name = "pgherd_failovers_total";
    page.family(
        name,
        "counter",
        "How often this member took the lead, or restarted in it.",
    );
    for (kind, count) in &counts.changes {
        let labels = page.labels_with("kind", kind);
        page.sample(name, &labels, count);
    }
    let name = "pgherd_failover_phase_seconds";
    page.family(
        name,
        "histogram",
        "How long each phase of a change of the leader lasted.",
    );
    for (phase, histogram) in &counts.phases {
        let labels = page.labels_with("phase", phase);
        page.histogram(name, &labels, histogram);
    }
    let name = "pgherd_failover_stall_seconds";
    page.family(
        name,
        "histogram",
        "How long writes stood still, as the new leader can tell.",
    );
    let labels = page.labels.clone();
    page.histogram(name, &labels, &counts.stall);
    let help = "When this member last took the lead, in seconds since 1970, 0 for never.";
    let last = format!("{}.{:03}", counts.last_change_ms / 1000, counts.last_change_ms % 1000);
    page.add("pgherd_last_failover_timestamp_seconds", "gauge", help, &last);
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::event::{Event, EventId, Kind, Phase, phase};

    use super::super::super::fixtures::facts;
    use super::super::page;
    use super::*;

    #[test]
    fn a_change_of_the_leader_is_in_the_metrics() {
        let phase = |name: &str, at_ms| Phase {
            name: name.to_owned(),
            at_ms,
        };
        let mut counts = Counts::default();
        counts.note(&Event {
            phases: vec![
                phase(phase::DIED, 1000),
                phase(phase::START, 1020),
                phase(phase::WRITABLE, 1300),
            ],
            ..Event::new(EventId::new(1300, "n1"), 1300, "n1", Kind::Postgres, "it is back")
        });
        let page = page(&facts(), &counts);
        let own = "scope=\"batman\",name=\"node1\"";
        for line in [
            format!("pgherd_events_total{{{own},kind=\"postgres\"}} 1\n"),
            format!("pgherd_failovers_total{{{own},kind=\"restart\"}} 1\n"),
            format!("pgherd_failover_phase_seconds_bucket{{{own},phase=\"died\",le=\"0.05\"}} 1\n"),
            format!("pgherd_failover_stall_seconds_sum{{{own}}} 0.300\n"),
            format!("pgherd_last_failover_timestamp_seconds{{{own}}} 1.300\n"),
        ] {
            assert!(page.contains(&line), "{line}{page}");
        }
    }
}

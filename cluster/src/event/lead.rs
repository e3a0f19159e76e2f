//! A change of the leader, put together from what each of those who took part has measured.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Event, Kind, phase};

/// One phase of a change, and who measured it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// See [`phase`].
    pub name: String,
    /// Who measured it.
    pub by: String,
    /// In milliseconds since 1970, by that member's clock.
    pub at_ms: u64,
}

/// A change of the leader, or a restart of it in place.
#[derive(Clone, Debug, PartialEq)]
pub struct LeadChange {
    /// The holding that ended; that went on, where a leader restarted in place.
    pub from: Option<String>,
    /// The holding that follows.
    pub to: Option<String>,
    /// Why.
    pub cause: Option<String>,
    /// Who wanted it, where somebody did.
    pub actor: Option<String>,
    /// The phases, by time.
    pub steps: Vec<Step>,
    /// Those who tell of it, by id.
    pub events: Vec<Arc<Event>>,
}

impl LeadChange {
    /// When writes began to stand still, and when they could go on: when the new leader had told that it takes them, by which
    /// clients are let in. As far as the clocks of those who measured it agree.
    #[must_use]
    pub fn stall(&self) -> Option<(u64, u64)> {
        let at = |name: &str| self.steps.iter().find(|step| step.name == name).map(|step| step.at_ms);
        let end = at(phase::ANNOUNCED).or_else(|| at(phase::WRITABLE))?;
        let begin = phase::STALL_BEGINS.into_iter().find_map(at)?;
        (begin <= end).then_some((begin, end))
    }
}

/// The changes of the leader among `events`, oldest first. What belongs together names the same holding that ended.
#[must_use]
pub fn lead_changes<'a>(events: impl IntoIterator<Item = &'a Arc<Event>>) -> Vec<LeadChange> {
    let mut changes: BTreeMap<String, LeadChange> = BTreeMap::new();
    for event in events {
        if let (Kind::Refusal, Some(from)) = (event.kind, &event.from) {
            // What was asked for before was not done.
            changes.remove(from);
        }
        let belongs = event.kind != Kind::Refusal && (event.from.is_some() || !event.phases.is_empty());
        if !belongs {
            continue;
        }
        // A cluster's first leader follows nobody, and a restart in place follows itself.
        let in_place = event.phase(phase::START).is_some();
        let key = match &event.from {
            Some(from) if !in_place => from.clone(),
            _ => format!("{}:{}", event.from.as_deref().unwrap_or_default(), event.id),
        };
        let change = changes.entry(key).or_insert_with(|| LeadChange {
            from: event.from.clone(),
            to: None,
            cause: None,
            actor: None,
            steps: Vec::new(),
            events: Vec::new(),
        });
        let steps = event.phases.iter().map(|phase| Step {
            name: phase.name.clone(),
            by: event.by.clone(),
            at_ms: phase.at_ms,
        });
        change.steps.extend(steps);
        // The word of whoever leads in the end counts, which is the last.
        if event.kind == Kind::Leader {
            change.to = event.to.clone().or(change.to.take());
            change.cause = event.cause.clone().or(change.cause.take());
            // They know whose order it was; one that was given and came to nothing is no part of this.
            change.actor = event.actor.clone().or(change.actor.take());
        }
        change.events.push(Arc::clone(event));
    }
    let mut changes: Vec<LeadChange> = changes
        .into_values()
        .filter(|change| !change.steps.is_empty())
        .collect();
    for change in &mut changes {
        change.steps.sort_by_key(|step| step.at_ms);
    }
    changes.sort_by_key(|change| change.steps.first().map(|step| step.at_ms));
    changes
}

#[cfg(test)]
mod tests {
    use super::super::{EventId, Phase};
    use super::*;

    fn event(at_ms: u64, by: &str, kind: Kind, from: &str, phases: &[(&str, u64)]) -> Arc<Event> {
        let phase = |(name, at_ms): &(&str, u64)| Phase {
            name: (*name).to_owned(),
            at_ms: *at_ms,
        };
        Arc::new(Event {
            from: Some(from.to_owned()),
            phases: phases.iter().map(phase).collect(),
            ..Event::new(EventId::new(at_ms, by), at_ms, by, kind, "it happened")
        })
    }

    #[test]
    fn what_two_members_measured_of_one_change_is_one_story() {
        let asked = Arc::new(Event {
            actor: Some("admin at 10.0.0.5".to_owned()),
            ..(*event(1000, "n3", Kind::Operator, "n1@5", &[])).clone()
        });
        let gave = event(
            1400,
            "n1",
            Kind::Leader,
            "n1@5",
            &[(phase::ASKED, 1010), (phase::STOP, 1100), (phase::RELEASED, 1400)],
        );
        let took = Arc::new(Event {
            to: Some("n2@9".to_owned()),
            cause: Some("handed over".to_owned()),
            actor: Some("admin at 10.0.0.5".to_owned()),
            ..(*event(
                1700,
                "n2",
                Kind::Leader,
                "n1@5",
                &[
                    (phase::LAST_COMMIT, 1099),
                    (phase::BID_WON, 1410),
                    (phase::WRITABLE, 1650),
                ],
            ))
            .clone()
        });
        let refused = event(900, "n1", Kind::Refusal, "n1@5", &[]);
        let all = [refused, asked, gave, took];
        let changes = lead_changes(&all);
        let [change] = &changes[..] else { panic!("{changes:?}") };
        let names: Vec<&str> = change.steps.iter().map(|step| step.name.as_str()).collect();
        assert_eq!(
            names,
            ["asked", "last_commit", "stop", "released", "bid_won", "writable"]
        );
        assert_eq!(
            change.stall(),
            Some((1100, 1650)),
            "the stop is surer than the last commit"
        );
        assert_eq!(change.to.as_deref(), Some("n2@9"));
        assert_eq!(change.actor.as_deref(), Some("admin at 10.0.0.5"));
        assert_eq!(change.events.len(), 3);
    }

    #[test]
    fn each_restart_in_place_is_a_change_of_its_own() {
        let one = |at| {
            let phases = [(phase::DIED, at), (phase::START, at + 10), (phase::WRITABLE, at + 200)];
            event(at, "n1", Kind::Postgres, "n1@5", &phases)
        };
        let all = [one(1000), one(5000)];
        let stalls: Vec<_> = lead_changes(&all).iter().map(LeadChange::stall).collect();
        assert_eq!(stalls, [Some((1000, 1200)), Some((5000, 5200))]);
    }
}

//! The events that are known, bounded. Cheap to clone: a view has one.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Event, EventId, Kind};

/// How many events a cluster keeps in etcd, and everybody of them: about twenty changes of the leader. Each is some hundred
/// bytes, and whoever lists the prefix reads them all.
pub const EVENTS_KEPT: usize = 200;
/// Until somebody has deleted what is too much; what comes beyond this is not kept in memory.
const SEEN_MAX: usize = 4 * EVENTS_KEPT;

/// Events by id, which is by time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Events(Arc<BTreeMap<EventId, Arc<Event>>>);

impl Events {
    /// Puts one in; the oldest go when there are too many.
    pub fn put(&mut self, event: Event) {
        let events = Arc::make_mut(&mut self.0);
        events.insert(event.id.clone(), Arc::new(event));
        while events.len() > SEEN_MAX {
            events.pop_first();
        }
    }

    /// Takes one out.
    pub fn remove(&mut self, id: &EventId) {
        if self.0.contains_key(id) {
            Arc::make_mut(&mut self.0).remove(id);
        }
    }

    /// All, oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Arc<Event>> {
        self.0.values()
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether this one is known.
    #[must_use]
    pub fn contains(&self, id: &EventId) -> bool {
        self.0.contains_key(id)
    }

    /// The oldest, of which there are too many when `more` come.
    #[must_use]
    pub fn too_many(&self, more: usize) -> Vec<EventId> {
        let count = (self.len() + more).saturating_sub(EVENTS_KEPT);
        self.0.keys().take(count).cloned().collect()
    }

    /// What began the end of a holding of the leader key: the first that tells of it. An operator who asked goes before the
    /// members that did as they were told.
    #[must_use]
    pub fn end_of(&self, holding: &str) -> Option<&Arc<Event>> {
        let ends = || {
            self.iter()
                .filter(|event| event.kind != Kind::Refusal && event.from.as_deref() == Some(holding))
        };
        ends()
            .find(|event| event.kind == Kind::Operator)
            .or_else(|| ends().next())
    }
}

impl FromIterator<Event> for Events {
    fn from_iter<I: IntoIterator<Item = Event>>(events: I) -> Self {
        let mut log = Self::default();
        for event in events {
            log.put(event);
        }
        log
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(at_ms: u64, kind: Kind, from: Option<&str>) -> Event {
        Event {
            from: from.map(str::to_owned),
            ..Event::new(EventId::new(at_ms, "n1"), at_ms, "n1", kind, "it happened")
        }
    }

    #[test]
    fn what_is_too_much_is_the_oldest() {
        let mut events = Events::default();
        for at_ms in 0..10_000 {
            events.put(event(at_ms, Kind::Role, None));
        }
        assert_eq!(events.len(), SEEN_MAX);
        let surplus = events.too_many(3);
        assert_eq!(surplus.len(), SEEN_MAX + 3 - EVENTS_KEPT);
        assert_eq!(surplus.first(), events.iter().next().map(|event| &event.id));
        assert!(Events::default().too_many(3).is_empty());
    }

    #[test]
    fn the_end_of_a_holding_is_told_by_who_asked_for_it() {
        let events: Events = [
            event(1, Kind::Refusal, Some("n1@5")),
            event(2, Kind::Leader, Some("n1@5")),
            event(3, Kind::Operator, Some("n1@5")),
            event(4, Kind::Leader, Some("n2@9")),
        ]
        .into_iter()
        .collect();
        let at = |holding| events.end_of(holding).map(|event| event.at_ms);
        assert_eq!((at("n1@5"), at("n2@9"), at("n3@1")), (Some(3), Some(4), None));
    }
}

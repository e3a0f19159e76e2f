//! The events that are known, bounded. Cheap to clone: a view has one.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Event, EventId, Kind};

/// How many events a cluster keeps in etcd, and everybody of them: about twenty changes of the leader. Each is some hundred
/// bytes, and whoever lists the prefix reads them all.
pub const EVENTS_KEPT: usize = 200;
/// Until somebody has deleted what is too much; what comes beyond this is not kept in memory.
const SEEN_MAX: usize = 4 * EVENTS_KEPT;

/// How long an order to hand over may be under way: a checkpoint before it takes minutes at most.
const ORDER_MAX_MS: u64 = 600_000;

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

    /// What began the end of a holding of the leader key, which is over at `now_ms`: the first that tells of it. An operator who
    /// asked goes before the members that did as they were told; not one whom the leader refused, nor one of long ago, whose
    /// order came to nothing: he would be blamed for a later crash.
    #[must_use]
    pub fn end_of(&self, holding: &str, now_ms: u64) -> Option<&Arc<Event>> {
        let (mut asked, mut other) = (None, None);
        for event in self.iter().filter(|event| event.from.as_deref() == Some(holding)) {
            match event.kind {
                Kind::Refusal => (asked, other) = (None, None),
                Kind::Operator if now_ms.saturating_sub(event.at_ms) > ORDER_MAX_MS => {}
                Kind::Operator => asked = asked.or(Some(event)),
                _ => other = other.or(Some(event)),
            }
        }
        asked.or(other)
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
        let at = |holding| events.end_of(holding, 10).map(|event| event.at_ms);
        assert_eq!((at("n1@5"), at("n2@9"), at("n3@1")), (Some(3), Some(4), None));
    }

    #[test]
    fn an_order_that_came_to_nothing_is_not_blamed_for_a_later_end() {
        let asked = event(1, Kind::Operator, Some("n1@5"));
        let ordered: Events = [asked.clone()].into_iter().collect();
        let refused: Events = [asked, event(2, Kind::Refusal, Some("n1@5"))].into_iter().collect();
        assert_eq!(ordered.end_of("n1@5", 10).map(|event| event.at_ms), Some(1));
        assert_eq!(ordered.end_of("n1@5", 10 + ORDER_MAX_MS), None);
        assert_eq!(refused.end_of("n1@5", 10), None);
    }
}

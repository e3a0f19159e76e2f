//! What happened to this member and by it: told once, kept in memory for REST, and written to etcd for everybody.
//!
//! Nothing waits for it. Telling takes a lock for a moment; [`keeping`] writes by itself, with a bound on what waits and a
//! deadline on each write. An event that is lost is counted, and no decision is made by any.

mod counts;
mod keeping;
mod news;
mod stopwatch;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use pgherd_cluster::clock::{Boottime, wall_now};
use pgherd_cluster::event::{Event, EventId, Ids, Kind, Phase};
use serde_json::{Map, Value};
use tokio::sync::{mpsc, watch};

pub use self::counts::{BUCKETS, Counts, Histogram};
pub use self::keeping::Keeping;
pub use self::news::{News, kind_of};
pub use self::stopwatch::{Measured, Stopwatch};

/// How many of its own events a member keeps in memory.
const KEPT: usize = 200;
/// What is said again within this time is no news.
const REPEAT_WITHIN: Duration = Duration::from_secs(30);
/// How many events may wait for etcd.
const QUEUE: usize = 64;
/// A member that flaps writes so many at once, and then one in so long.
const BURST: u32 = 40;
const ONE_EVERY: Duration = Duration::from_secs(2);

/// An event that has not been told.
#[derive(Clone, Debug, PartialEq)]
pub struct Draft {
    kind: Kind,
    what: String,
    cause: Option<String>,
    actor: Option<String>,
    evidence: Map<String, Value>,
    from: Option<String>,
    to: Option<String>,
    phases: Vec<Phase>,
}

impl Draft {
    /// A sentence about something.
    #[must_use]
    pub fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self {
            kind,
            what: what.into(),
            cause: None,
            actor: None,
            evidence: Map::new(),
            from: None,
            to: None,
            phases: Vec::new(),
        }
    }

    /// Why.
    #[must_use]
    pub fn because(mut self, cause: Option<String>) -> Self {
        self.cause = cause;
        self
    }

    /// Who wanted it.
    #[must_use]
    pub fn asked_by(mut self, actor: Option<String>) -> Self {
        self.actor = actor;
        self
    }

    /// A number or a word that it rests on.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.evidence.insert(name.to_owned(), value.into());
        self
    }

    /// The same, many at once.
    #[must_use]
    pub fn with_all(mut self, evidence: Map<String, Value>) -> Self {
        self.evidence.extend(evidence);
        self
    }

    /// The holding of the leader key that ends or has ended by it.
    #[must_use]
    pub fn from(mut self, from: Option<String>) -> Self {
        self.from = from;
        self
    }

    /// What follows that.
    #[must_use]
    pub fn to(mut self, to: Option<String>) -> Self {
        self.to = to;
        self
    }

    /// How long its parts took.
    #[must_use]
    pub fn with_phases(mut self, phases: Vec<Phase>) -> Self {
        self.phases = phases;
        self
    }

    /// What it is about.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its sentence.
    #[must_use]
    pub fn what(&self) -> &str {
        &self.what
    }

    fn event(self, id: EventId, at_ms: u64, by: &str) -> Event {
        Event {
            cause: self.cause,
            actor: self.actor,
            evidence: self.evidence,
            from: self.from,
            to: self.to,
            phases: self.phases,
            ..Event::new(id, at_ms, by, self.kind, &self.what)
        }
    }
}

#[derive(Default)]
struct Own {
    ring: VecDeque<(Arc<Event>, Boottime)>,
    /// What may be written to etcd now, and as of when.
    allowance: Option<(u32, Boottime)>,
    counts: Counts,
}

struct Shared {
    name: String,
    ids: Ids,
    own: Mutex<Own>,
    stopwatch: Mutex<Stopwatch>,
    told: watch::Sender<u64>,
    queue: mpsc::Sender<Arc<Event>>,
}

/// Where events are told. Cheap to clone.
#[derive(Clone)]
pub struct Journal {
    shared: Arc<Shared>,
}

impl Journal {
    /// The journal of a member, and what comes out of it for etcd.
    #[must_use]
    pub fn new(name: &str) -> (Self, mpsc::Receiver<Arc<Event>>) {
        let (queue, waiting) = mpsc::channel(QUEUE);
        let shared = Shared {
            name: name.to_owned(),
            ids: Ids::new(name),
            own: Mutex::default(),
            stopwatch: Mutex::default(),
            told: watch::Sender::new(0),
            queue,
        };
        let journal = Self {
            shared: Arc::new(shared),
        };
        (journal, waiting)
    }

    fn own(&self) -> MutexGuard<'_, Own> {
        self.shared.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells what happened, and writes a line of the log for it. What was told a moment ago is not told again, and not logged.
    pub fn say(&self, draft: Draft) -> EventId {
        let (what, cause) = (draft.what.clone(), draft.cause.clone());
        let warns = matches!(draft.kind, Kind::Fence | Kind::Refusal);
        let (id, is_new) = self.tell(draft);
        let because = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
        match (is_new, warns) {
            (false, _) => {}
            (true, true) => tracing::warn!(event = %id, "{what}{because}"),
            (true, false) => tracing::info!(event = %id, "{what}{because}"),
        }
        id
    }

    /// The same where a line of the log is written by who tells it; says whether it is news.
    pub fn tell(&self, draft: Draft) -> (EventId, bool) {
        let (now, at_ms) = (Boottime::now(), wall_ms());
        let mut own = self.own();
        let lately = own
            .ring
            .iter()
            .rev()
            .take_while(|(_, at)| now.since(*at) < REPEAT_WITHIN);
        let same = |(event, _): &&(Arc<Event>, Boottime)| {
            event.kind == draft.kind && event.what == draft.what && event.from == draft.from && event.phases.is_empty()
        };
        if draft.phases.is_empty()
            && let Some((event, _)) = lately.into_iter().find(same)
        {
            let id = event.id.clone();
            own.counts.repeated += 1;
            return (id, false);
        }
        let id = self.shared.ids.next(at_ms);
        let event = Arc::new(draft.event(id.clone(), at_ms, &self.shared.name));
        own.counts.note(&event);
        own.ring.push_back((Arc::clone(&event), now));
        while own.ring.len() > KEPT {
            own.ring.pop_front();
        }
        // Who flaps for hours must not push out of etcd what the others have told.
        let allowed = own.allow(now);
        if !allowed || self.shared.queue.try_send(event).is_err() {
            own.counts.dropped += 1;
        }
        drop(own);
        self.shared.told.send_modify(|told| *told += 1);
        (id, true)
    }

    /// This member's own events, oldest first.
    #[must_use]
    pub fn latest(&self) -> Vec<Arc<Event>> {
        self.own().ring.iter().map(|(event, _)| Arc::clone(event)).collect()
    }

    /// Changes whenever one is told.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.shared.told.subscribe()
    }

    /// How many there were, and how long changes of the leader took.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.own().counts.clone()
    }

    /// Notes that a phase of a change of the leader begins now.
    pub fn mark(&self, phase: &'static str) {
        self.stopwatch().mark(phase, Boottime::now());
    }

    /// What is measured of the change that is under way.
    pub fn stopwatch(&self) -> MutexGuard<'_, Stopwatch> {
        self.shared.stopwatch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lost(&self, count: usize) {
        self.own().counts.dropped += u64::try_from(count).unwrap_or(u64::MAX);
    }
}

impl Own {
    fn allow(&mut self, now: Boottime) -> bool {
        let (left, since) = self.allowance.unwrap_or((BURST, now));
        let grown = u32::try_from(now.since(since).as_secs() / ONE_EVERY.as_secs()).unwrap_or(BURST);
        let left = left.saturating_add(grown).min(BURST);
        let since = if grown > 0 || left == BURST { now } else { since };
        self.allowance = Some((left.saturating_sub(1), since));
        left > 0
    }
}

/// Milliseconds since 1970.
#[must_use]
pub fn wall_ms() -> u64 {
    let since = wall_now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::event::phase;

    use super::*;

    #[test]
    fn what_is_said_again_is_no_news_and_is_counted() {
        let (journal, mut waiting) = Journal::new("n1");
        let (first, news) = journal.tell(Draft::new(Kind::Role, "n1 is a replica now"));
        assert!(news);
        assert_eq!(
            journal.tell(Draft::new(Kind::Role, "n1 is a replica now")),
            (first, false)
        );
        let change = || {
            Draft::new(Kind::Leader, "n1 takes writes").with_phases(vec![Phase {
                name: phase::WRITABLE.to_owned(),
                at_ms: 5,
            }])
        };
        assert!(
            journal.tell(change()).1 && journal.tell(change()).1,
            "each change is told"
        );
        assert_eq!((journal.latest().len(), journal.counts().repeated), (3, 1));
        assert_eq!(std::iter::from_fn(|| waiting.try_recv().ok()).count(), 3);
    }

    #[test]
    fn who_flaps_is_heard_by_its_own_interface_and_not_by_etcd() {
        let (journal, mut waiting) = Journal::new("n1");
        for number in 0..1000 {
            journal.tell(Draft::new(Kind::Role, format!("change {number}")));
        }
        let written = std::iter::from_fn(|| waiting.try_recv().ok()).count();
        let written = u64::try_from(written).expect("few");
        assert_eq!(
            (journal.latest().len(), journal.counts().dropped),
            (KEPT, 1000 - written)
        );
        // A slow machine earns a few more meanwhile.
        assert!(
            (u64::from(BURST)..u64::from(BURST) + 20).contains(&written),
            "{written}"
        );
    }
}

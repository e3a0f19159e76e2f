//! What happened in a cluster, for people: events with cause, actor, evidence and an id. Pure.
//!
//! Members write theirs to etcd, each under a key of its own beside Patroni's (see [`crate::key::Keys::events`]), so that a
//! switchover's whole story can be read there, whoever measured which part of it. Nothing is decided by an event: it may come
//! late, or be lost with the member that would have told it.

mod id;
mod lead;
mod log;

use serde_json::{Map, Value, json};

pub use self::id::{EventId, Ids};
pub use self::lead::{LeadChange, Step, lead_changes};
pub use self::log::{EVENTS_KEPT, Events};

/// The longest sentence, in characters.
const TEXT_MAX: usize = 300;
/// The longest name or piece of evidence, in characters.
const WORD_MAX: usize = 120;
/// How many pieces of evidence, and how many phases.
const PIECES_MAX: usize = 24;
/// What a reader of a later form may rely on.
const FORM: u64 = 1;

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Who leads.
    Leader,
    /// What a member is.
    Role,
    /// Where clients go.
    Route,
    /// Whom commits wait for.
    Sync,
    /// The dynamic configuration.
    Configuration,
    /// Clients are kept waiting.
    Hold,
    /// A former leader was made sure to take no write.
    Fence,
    /// Something was asked for and not done.
    Refusal,
    /// Somebody asked for something.
    Operator,
    /// A server: it died, was restarted, copied anew.
    Postgres,
    /// A word that this build does not know.
    Other,
}

impl Kind {
    /// All that are told.
    pub const ALL: [Self; 10] = [
        Self::Leader,
        Self::Role,
        Self::Route,
        Self::Sync,
        Self::Configuration,
        Self::Hold,
        Self::Fence,
        Self::Refusal,
        Self::Operator,
        Self::Postgres,
    ];

    /// The word in records, filters and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Leader => "leader",
            Self::Role => "role",
            Self::Route => "route",
            Self::Sync => "sync",
            Self::Configuration => "configuration",
            Self::Hold => "hold",
            Self::Fence => "fence",
            Self::Refusal => "refusal",
            Self::Operator => "operator",
            Self::Postgres => "postgres",
            Self::Other => "other",
        }
    }

    /// What a word means.
    #[must_use]
    pub fn of(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == word)
    }
}

/// The names of the phases that members measure, in the order in which they come.
pub mod phase {
    /// The last commit of the former leader that the new one has, by the former one's clock.
    pub const LAST_COMMIT: &str = "last_commit";
    /// A hand-over began.
    pub const ASKED: &str = "asked";
    /// PostgreSQL died under its leader.
    pub const DIED: &str = "died";
    /// The former leader's log stopped coming.
    pub const STREAM_LOST: &str = "stream_lost";
    /// A checkpoint was begun while still serving.
    pub const CHECKPOINT: &str = "checkpoint";
    /// PostgreSQL was told to stop: from here on nobody takes writes.
    pub const STOP: &str = "stop";
    /// No process of the former leader's PostgreSQL was left.
    pub const ENDED: &str = "ended";
    /// The next leader had the shutdown checkpoint.
    pub const CONFIRMED: &str = "confirmed";
    /// The leader key was deleted.
    pub const RELEASED: &str = "released";
    /// The leader key was seen to be free.
    pub const LEASE_FREE: &str = "lease_free";
    /// The bid for it was won.
    pub const BID_WON: &str = "bid_won";
    /// PostgreSQL was told to leave recovery.
    pub const PROMOTE: &str = "promote";
    /// PostgreSQL was started in place.
    pub const START: &str = "start";
    /// PostgreSQL said that it is a primary.
    pub const PROMOTED: &str = "promoted";
    /// A write went through.
    pub const WRITABLE: &str = "writable";
    /// The member's key said so: proxies open their routes.
    pub const ANNOUNCED: &str = "announced";

    /// Those after which nobody takes writes, the surest first.
    pub const STALL_BEGINS: [&str; 3] = [STOP, DIED, LAST_COMMIT];
}

/// When a part of something began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Phase {
    /// See [`phase`].
    pub name: String,
    /// In milliseconds since 1970, by the teller's clock.
    pub at_ms: u64,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name.
    pub id: EventId,
    /// When, in milliseconds since 1970, by the teller's clock.
    pub at_ms: u64,
    /// Who measured and tells it: a member.
    pub by: String,
    /// What it is about.
    pub kind: Kind,
    /// A sentence.
    pub what: String,
    /// Why, where that is known.
    pub cause: Option<String>,
    /// Who wanted it, where somebody did: a user, an address.
    pub actor: Option<String>,
    /// Numbers and words that it rests on.
    pub evidence: Map<String, Value>,
    /// The holding of the leader key that ended, or was to, such as `n1@4711`.
    pub from: Option<String>,
    /// The holding that follows, or the member that is to hold it.
    pub to: Option<String>,
    /// How long its parts took, oldest first.
    pub phases: Vec<Phase>,
}

impl Event {
    /// An event about which nothing more is known.
    #[must_use]
    pub fn new(id: EventId, at_ms: u64, by: &str, kind: Kind, what: &str) -> Self {
        Self {
            id,
            at_ms,
            by: by.to_owned(),
            kind,
            what: what.to_owned(),
            cause: None,
            actor: None,
            evidence: Map::new(),
            from: None,
            to: None,
            phases: Vec::new(),
        }
    }

    /// When a phase began.
    #[must_use]
    pub fn phase(&self, name: &str) -> Option<u64> {
        self.phases
            .iter()
            .find(|phase| phase.name == name)
            .map(|phase| phase.at_ms)
    }

    /// The document that is stored and answered. Bounded: texts are cut, and what is too much is left out.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut map = Map::new();
        map.insert("v".to_owned(), FORM.into());
        map.insert("id".to_owned(), self.id.as_str().into());
        map.insert("at_ms".to_owned(), self.at_ms.into());
        map.insert("by".to_owned(), cut(&self.by, WORD_MAX).into());
        map.insert("kind".to_owned(), self.kind.as_str().into());
        map.insert("what".to_owned(), cut(&self.what, TEXT_MAX).into());
        let texts = [
            ("cause", &self.cause, TEXT_MAX),
            ("actor", &self.actor, WORD_MAX),
            ("from", &self.from, TEXT_MAX),
            ("to", &self.to, TEXT_MAX),
        ];
        for (name, text, max) in texts {
            if let Some(text) = text {
                map.insert(name.to_owned(), cut(text, max).into());
            }
        }
        if !self.evidence.is_empty() {
            map.insert("evidence".to_owned(), Value::Object(bounded(&self.evidence)));
        }
        if !self.phases.is_empty() {
            let phase = |phase: &Phase| json!({"phase": cut(&phase.name, WORD_MAX), "at_ms": phase.at_ms});
            let phases: Vec<Value> = self.phases.iter().take(PIECES_MAX).map(phase).collect();
            map.insert("phases".to_owned(), phases.into());
        }
        Value::Object(map)
    }

    /// Reads a document: of this form, and as much as can be understood of a later one. Nothing without an id and a time.
    #[must_use]
    pub fn parse(value: &Value) -> Option<Self> {
        let text = |name: &str, max: usize| value.get(name).and_then(Value::as_str).map(|text| cut(text, max));
        let id = EventId::parse(value.get("id")?.as_str()?)?;
        let phase = |phase: &Value| {
            Some(Phase {
                name: cut(phase.get("phase")?.as_str()?, WORD_MAX),
                at_ms: phase.get("at_ms")?.as_u64()?,
            })
        };
        let phases = value.get("phases").and_then(Value::as_array);
        Some(Self {
            id,
            at_ms: value.get("at_ms")?.as_u64()?,
            by: text("by", WORD_MAX).unwrap_or_default(),
            kind: text("kind", WORD_MAX)
                .and_then(|word| Kind::of(&word))
                .unwrap_or(Kind::Other),
            what: text("what", TEXT_MAX).unwrap_or_default(),
            cause: text("cause", TEXT_MAX),
            actor: text("actor", WORD_MAX),
            evidence: value
                .get("evidence")
                .and_then(Value::as_object)
                .map(bounded)
                .unwrap_or_default(),
            from: text("from", TEXT_MAX),
            to: text("to", TEXT_MAX),
            phases: phases
                .into_iter()
                .flatten()
                .filter_map(phase)
                .take(PIECES_MAX)
                .collect(),
        })
    }
}

/// The beginning of a text that is too long; nothing in it ends a line.
fn cut(text: &str, max: usize) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(max).map(clean).collect()
}

/// Numbers, flags and short words: no document within a document, and not too many.
fn bounded(evidence: &Map<String, Value>) -> Map<String, Value> {
    let piece = |(name, value): (&String, &Value)| {
        let value = match value {
            Value::Number(_) | Value::Bool(_) => value.clone(),
            Value::String(text) => cut(text, WORD_MAX).into(),
            Value::Null | Value::Array(_) | Value::Object(_) => return None,
        };
        Some((cut(name, WORD_MAX), value))
    };
    evidence.iter().filter_map(piece).take(PIECES_MAX).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event() -> Event {
        Event {
            cause: Some("switchover".to_owned()),
            actor: Some("admin at 10.0.0.5".to_owned()),
            evidence: json!({"lag_bytes": 17, "timeline": 4, "armed": true, "lsn": "0/4000060"})
                .as_object()
                .cloned()
                .unwrap_or_default(),
            from: Some("n1@33".to_owned()),
            to: Some("n2@40".to_owned()),
            phases: vec![Phase {
                name: phase::BID_WON.to_owned(),
                at_ms: 1_795_218_269_498,
            }],
            ..Event::new(
                EventId::new(1_795_218_269_500, "n2"),
                1_795_218_269_500,
                "n2",
                Kind::Leader,
                "n2 leads",
            )
        }
    }

    #[test]
    fn an_event_is_read_back_as_itself() {
        let event = event();
        assert_eq!(Event::parse(&event.to_json()), Some(event));
    }

    #[test]
    fn a_later_form_is_read_as_far_as_it_is_understood() {
        let mut later = event().to_json();
        later["v"] = json!(7);
        later["kind"] = json!("moonphase");
        later["evidence"] = json!({"nested": {"a": 1}, "n": 5});
        later["phases"] = json!([{"phase": "bid_won"}, "x", {"phase": "new", "at_ms": 9, "more": 1}]);
        later["unheard_of"] = json!([1]);
        let read = Event::parse(&later).expect("an event");
        assert_eq!((read.kind, read.evidence.len(), read.phases.len()), (Kind::Other, 1, 1));
        for broken in [json!(null), json!({}), json!({"id": "x", "at_ms": 1}), json!([1])] {
            assert_eq!(Event::parse(&broken), None, "{broken}");
        }
    }

    #[test]
    fn every_kind_has_a_word_of_its_own() {
        for kind in Kind::ALL {
            assert_eq!(Kind::of(kind.as_str()), Some(kind));
        }
    }

    proptest! {
        #[test]
        fn whatever_it_says_an_event_is_bounded_and_one_line(what in ".{0,2000}", names in proptest::collection::vec(".{0,200}", 0..40)) {
            let mut event = event();
            event.what = what;
            event.evidence = names.iter().map(|name| (name.clone(), json!(name))).collect();
            let stored = event.to_json().to_string();
            // Four bytes a character, six where it is escaped.
            prop_assert!(stored.len() < 64 << 10, "{}", stored.len());
            let read = Event::parse(&event.to_json()).expect("an event");
            prop_assert!(read.what.chars().count() <= TEXT_MAX && !read.what.contains('\n'));
            prop_assert!(read.evidence.len() <= PIECES_MAX);
        }
    }
}

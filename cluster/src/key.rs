//! The only place that spells an etcd key. The layout is Patroni's, permanently.

use crate::event::EventId;
use crate::name::{MemberName, Scope};

const EVENTS: &str = "pgherd/events/";

/// The keys of one cluster: `/<namespace>/<scope>/...`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    prefix: String,
}

/// What a key under the prefix is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// The system identifier; empty while a member bootstraps.
    Initialize,
    /// The leader's name, bound to its lease.
    Leader,
    /// One member's record.
    Member(MemberName),
    /// The dynamic configuration.
    Config,
    /// The leader's last known position and slots.
    Status,
    /// The synchronous set.
    Sync,
    /// A requested switchover or failover.
    Failover,
    /// Ended timelines.
    History,
    /// The members that must vouch for a leader without etcd.
    Failsafe,
    /// One thing that happened. Not Patroni's: its readers take what lies under `pgherd/` for nothing, and `patronictl remove`
    /// takes it along with the rest. One key each, so that nobody's write waits for another's, and a watch tells no more
    /// than what is new.
    Event(EventId),
}

impl Keys {
    /// The keys of `scope` under `namespace`, whose leading, trailing and repeated slashes do not matter.
    #[must_use]
    pub fn new(namespace: &str, scope: &Scope) -> Self {
        let mut prefix = String::from("/");
        for part in namespace.split('/').filter(|part| !part.is_empty()) {
            prefix.push_str(part);
            prefix.push('/');
        }
        prefix.push_str(scope.as_str());
        prefix.push('/');
        Self { prefix }
    }

    /// What every key of this cluster begins with, with the final `/`.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// What the keys of events begin with.
    #[must_use]
    pub fn events(&self) -> String {
        format!("{}{EVENTS}", self.prefix)
    }

    /// The full text of `key`.
    #[must_use]
    pub fn of(&self, key: &Key) -> String {
        let name = match key {
            Key::Initialize => "initialize",
            Key::Leader => "leader",
            Key::Member(name) => return format!("{}members/{name}", self.prefix),
            Key::Config => "config",
            Key::Status => "status",
            Key::Sync => "sync",
            Key::Failover => "failover",
            Key::History => "history",
            Key::Failsafe => "failsafe",
            Key::Event(id) => return format!("{}{id}", self.events()),
        };
        format!("{}{name}", self.prefix)
    }

    /// What `text` is, or nothing for a key that is not this cluster's or not known: readers ignore those.
    #[must_use]
    pub fn parse(&self, text: &str) -> Option<Key> {
        let rest = text.strip_prefix(&self.prefix)?;
        Some(match rest {
            "initialize" => Key::Initialize,
            "leader" => Key::Leader,
            "config" => Key::Config,
            "status" => Key::Status,
            "sync" => Key::Sync,
            "failover" => Key::Failover,
            "history" => Key::History,
            "failsafe" => Key::Failsafe,
            other if other.starts_with(EVENTS) => Key::Event(EventId::parse(other.strip_prefix(EVENTS)?)?),
            // A name cannot hold a `/`, so deeper paths fall out here.
            other => Key::Member(MemberName::new(other.strip_prefix("members/")?).ok()?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(namespace: &str) -> Keys {
        Keys::new(namespace, &Scope::new("batman").expect("a plain name"))
    }

    #[test]
    fn slashes_around_the_namespace_do_not_matter() {
        for namespace in ["service", "/service", "service/", "//service//"] {
            assert_eq!(keys(namespace).of(&Key::Leader), "/service/batman/leader");
        }
        assert_eq!(keys("").prefix(), "/batman/");
        assert_eq!(keys("/a/b/").prefix(), "/a/b/batman/");
    }

    #[test]
    fn every_key_is_read_back_as_itself() {
        let keys = keys("service");
        let member = Key::Member(MemberName::new("node1").expect("a plain name"));
        for key in [
            Key::Initialize,
            Key::Leader,
            member,
            Key::Config,
            Key::Status,
            Key::Sync,
            Key::Failover,
            Key::History,
            Key::Failsafe,
            Key::Event(EventId::new(1_795_218_269_498, "n1")),
        ] {
            assert_eq!(keys.parse(&keys.of(&key)), Some(key));
        }
    }

    #[test]
    fn foreign_and_deeper_keys_are_ignored() {
        let keys = keys("service");
        for text in [
            "/service/batman2/leader",
            "/service/batman/members/a/b",
            "/service/batman/members/",
            "/service/batman/optime/leader",
            "/service/batman/pgherd/x",
            "/service/batman/pgherd/events/x",
            "/service/batman",
        ] {
            assert_eq!(keys.parse(text), None, "{text}");
        }
    }
}

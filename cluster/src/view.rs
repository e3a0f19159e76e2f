//! The immutable picture of a cluster, and how keys are folded into it. Pure.

use std::collections::BTreeMap;

use crate::event::{Event, Events};
use crate::key::{Key, Keys};
use crate::name::{MemberName, Scope, SystemId, Timeline};
use crate::record::{DynamicConfig, FailoverRequest, History, MemberRecord, PgState, Role, Status, SyncState};
use crate::timing::LeaseTiming;

/// One holding of the leader key. Compared for equality, never for order: a restored etcd counts backwards.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Epoch {
    /// Who holds it.
    pub holder: MemberName,
    /// The revision that created the key.
    pub create_revision: i64,
}

impl std::fmt::Display for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.holder, self.create_revision)
    }
}

/// The leader key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    /// Holder and create revision.
    pub epoch: Epoch,
    /// The lease that the key is bound to; 0 for none.
    pub lease: i64,
    /// The revision of its last change: a re-bound lease moves it.
    pub mod_revision: i64,
}

/// A member's key.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    /// Its name.
    pub name: MemberName,
    /// What it says of itself.
    pub record: MemberRecord,
    /// The revision of its last change.
    pub mod_revision: i64,
}

/// The `initialize` key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initialize {
    /// Somebody is bootstrapping.
    Pending,
    /// Bootstrapped, with this system identifier.
    Done(SystemId),
}

/// A value with the revision that wrote it, for guarded writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revised<T> {
    /// The value.
    pub value: T,
    /// The revision of its last change; 0 while the key does not exist.
    pub mod_revision: i64,
}

impl<T: Default> Default for Revised<T> {
    fn default() -> Self {
        Self {
            value: T::default(),
            mod_revision: 0,
        }
    }
}

/// A key and its value as etcd returns them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The full key.
    pub key: String,
    /// The value; bytes that are not UTF-8 are replaced, since every value here is text.
    pub value: String,
    /// The revision that created the key.
    pub create_revision: i64,
    /// The revision of its last change.
    pub mod_revision: i64,
    /// The lease that it is bound to; 0 for none.
    pub lease: i64,
}

/// A change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Written.
    Put(Entry),
    /// Deleted or expired.
    Delete {
        /// The full key.
        key: String,
    },
}

/// A cluster at one revision.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// The cluster's name.
    pub scope: Scope,
    /// The revision that this picture was built from.
    pub revision: i64,
    /// Who bootstraps or bootstrapped.
    pub initialize: Option<Initialize>,
    /// Who holds the leader key.
    pub leader: Option<Leader>,
    /// All members with a key, by name.
    pub members: BTreeMap<MemberName, Member>,
    /// The dynamic configuration.
    pub config: Revised<Option<DynamicConfig>>,
    /// The leader's last known position and slots.
    pub status: Status,
    /// The synchronous set.
    pub sync: Revised<SyncState>,
    /// A requested switchover or failover.
    pub failover: Revised<Option<FailoverRequest>>,
    /// Ended timelines; nothing while the key does not exist.
    pub history: Option<History>,
    /// The revision of the failsafe list; 0 while there is none.
    pub failsafe_revision: i64,
    /// The failsafe list: names, and where their REST interfaces are.
    pub failsafe: BTreeMap<String, String>,
    /// What happened lately, as members told. Nothing is decided by it.
    pub events: Events,
}

impl View {
    /// A cluster of which nothing is known.
    #[must_use]
    pub fn empty(scope: Scope) -> Self {
        Self {
            scope,
            revision: 0,
            initialize: None,
            leader: None,
            members: BTreeMap::new(),
            config: Revised::default(),
            status: Status::default(),
            sync: Revised::default(),
            failover: Revised::default(),
            history: None,
            failsafe_revision: 0,
            failsafe: BTreeMap::new(),
            events: Events::default(),
        }
    }

    /// A view from a full read at `revision`. Keys that are not known are ignored.
    #[must_use]
    pub fn from_entries(scope: Scope, keys: &Keys, entries: impl IntoIterator<Item = Entry>, revision: i64) -> Self {
        let mut view = Self::empty(scope);
        for entry in entries {
            view.put(keys, entry);
        }
        view.revision = revision;
        view
    }

    /// This view with `changes` applied, at `revision`.
    #[must_use]
    pub fn with(&self, keys: &Keys, changes: impl IntoIterator<Item = Change>, revision: i64) -> Self {
        let mut view = self.clone();
        for change in changes {
            match change {
                Change::Put(entry) => view.put(keys, entry),
                Change::Delete { key } => view.delete(keys, &key),
            }
        }
        view.revision = revision;
        view
    }

    fn put(&mut self, keys: &Keys, entry: Entry) {
        let Some(key) = keys.parse(&entry.key) else { return };
        let mod_revision = entry.mod_revision;
        match key {
            Key::Initialize => {
                self.initialize = Some(entry.value.parse().map_or(Initialize::Pending, Initialize::Done));
            }
            // A name that could not be a member's cannot hold anything.
            Key::Leader => {
                self.leader = MemberName::new(entry.value).ok().map(|holder| Leader {
                    epoch: Epoch {
                        holder,
                        create_revision: entry.create_revision,
                    },
                    lease: entry.lease,
                    mod_revision,
                });
            }
            Key::Member(name) => {
                let record = MemberRecord::parse(&entry.value);
                self.members.insert(
                    name.clone(),
                    Member {
                        name,
                        record,
                        mod_revision,
                    },
                );
            }
            Key::Config => {
                self.config = Revised {
                    value: Some(DynamicConfig::parse(&entry.value)),
                    mod_revision,
                }
            }
            Key::Status => self.status = Status::parse(&entry.value),
            Key::Sync => {
                self.sync = Revised {
                    value: serde_json::from_str(&entry.value).unwrap_or_default(),
                    mod_revision,
                };
            }
            Key::Failover => {
                self.failover = Revised {
                    value: FailoverRequest::parse(&entry.value),
                    mod_revision,
                }
            }
            Key::History => self.history = Some(History::parse(&entry.value)),
            Key::Failsafe => {
                let list: serde_json::Map<String, serde_json::Value> =
                    serde_json::from_str(&entry.value).unwrap_or_default();
                let entry =
                    |(name, url): (String, serde_json::Value)| (name, url.as_str().unwrap_or_default().to_owned());
                self.failsafe = list.into_iter().map(entry).collect();
                self.failsafe_revision = mod_revision;
            }
            Key::Event(id) => {
                let event = serde_json::from_str(&entry.value).ok();
                if let Some(event) = event
                    .and_then(|value| Event::parse(&value))
                    .filter(|event| event.id == id)
                {
                    self.events.put(event);
                }
            }
        }
    }

    fn delete(&mut self, keys: &Keys, key: &str) {
        match keys.parse(key) {
            None => {}
            Some(Key::Initialize) => self.initialize = None,
            Some(Key::Leader) => self.leader = None,
            Some(Key::Member(name)) => {
                self.members.remove(&name);
            }
            Some(Key::Config) => self.config = Revised::default(),
            Some(Key::Status) => self.status = Status::default(),
            Some(Key::Sync) => self.sync = Revised::default(),
            Some(Key::Failover) => self.failover = Revised::default(),
            Some(Key::History) => self.history = None,
            Some(Key::Failsafe) => {
                self.failsafe_revision = 0;
                self.failsafe.clear();
            }
            Some(Key::Event(id)) => self.events.remove(&id),
        }
    }

    /// The current holding of the leader key.
    #[must_use]
    pub fn epoch(&self) -> Option<&Epoch> {
        self.leader.as_ref().map(|leader| &leader.epoch)
    }

    /// The member that holds the leader key, when its own key is there too.
    #[must_use]
    pub fn leader_member(&self) -> Option<&Member> {
        self.members.get(&self.epoch()?.holder)
    }

    /// The leader, once its own record says that it is primary and was written under this holding of the key. A leader
    /// key alone names a leader before its PostgreSQL takes writes.
    #[must_use]
    pub fn writable_leader(&self) -> Option<&Member> {
        let create_revision = self.epoch()?.create_revision;
        let member = self.leader_member()?;
        let proven = member.mod_revision > create_revision;
        (proven && member.record.role == Role::Primary && member.record.state == PgState::Running).then_some(member)
    }

    /// The leader, once its own record says under this holding that others can follow it: it is primary, or leads a
    /// standby cluster.
    #[must_use]
    pub fn ready_leader(&self) -> Option<&Member> {
        let create_revision = self.epoch()?.create_revision;
        let member = self.leader_member()?;
        let ready = matches!(member.record.role, Role::Primary | Role::StandbyLeader);
        (member.mod_revision > create_revision && ready && member.record.state == PgState::Running).then_some(member)
    }

    /// How a member is shown: as the leader key says, not as it says of itself.
    #[must_use]
    pub fn shown_role(&self, member: &Member) -> ShownRole {
        if self.epoch().is_some_and(|epoch| epoch.holder == member.name) {
            return if member.record.role == Role::StandbyLeader {
                ShownRole::StandbyLeader
            } else {
                ShownRole::Leader
            };
        }
        if self.sync.value.is_active() && self.sync.value.lists(&member.name) {
            return if self.sync.value.quorum > 0 {
                ShownRole::QuorumStandby
            } else {
                ShownRole::SyncStandby
            };
        }
        ShownRole::Replica
    }

    /// How a member's state is shown: a replica that streams says so.
    #[must_use]
    pub fn shown_state<'a>(&self, member: &'a Member) -> &'a str {
        let leads = self.epoch().is_some_and(|epoch| epoch.holder == member.name);
        match &member.record.replication_state {
            Some(state) if !leads => state,
            _ => member.record.state.as_str(),
        }
    }

    /// The cluster's timeline, as far as `history` tells.
    #[must_use]
    pub fn timeline(&self) -> Option<Timeline> {
        self.history.as_ref().map(History::timeline)
    }

    /// The times in force: the configuration's, raised to Patroni's minimums while one of its members is about, since that
    /// raises them too. A cluster that has no configuration yet is about to get ours.
    #[must_use]
    pub fn timing(&self) -> LeaseTiming {
        let Some(config) = &self.config.value else {
            return LeaseTiming::DEFAULT;
        };
        let timing = config.timing_in_force();
        if self.all_pgherd() {
            timing
        } else {
            timing.beside_patroni()
        }
    }

    /// Whether every member is one of ours; an empty cluster is.
    #[must_use]
    pub fn all_pgherd(&self) -> bool {
        self.members.values().all(|member| member.record.pgherd.is_some())
    }
}

/// The role of a member as operators see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShownRole {
    /// Holds the leader key.
    Leader,
    /// Holds the leader key of a standby cluster.
    StandbyLeader,
    /// A synchronous standby.
    SyncStandby,
    /// A voter in quorum mode.
    QuorumStandby,
    /// Any other member.
    Replica,
}

impl ShownRole {
    /// The word in REST answers.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Leader => "leader",
            Self::StandbyLeader => "standby_leader",
            Self::SyncStandby => "sync_standby",
            Self::QuorumStandby => "quorum_standby",
            Self::Replica => "replica",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope() -> Scope {
        Scope::new("c").expect("a plain name")
    }

    fn keys() -> Keys {
        Keys::new("service", &scope())
    }

    fn entry(name: &str, value: &str, create_revision: i64, mod_revision: i64) -> Entry {
        Entry {
            key: format!("/service/c/{name}"),
            value: value.to_owned(),
            create_revision,
            mod_revision,
            lease: 1,
        }
    }

    fn member(role: &str, mod_revision: i64) -> Entry {
        let value = format!(
            r#"{{"conn_url":"postgres://h:1/p","api_url":"http://h:2/patroni","state":"running","role":"{role}"}}"#
        );
        entry("members/n1", &value, 1, mod_revision)
    }

    fn view(entries: Vec<Entry>) -> View {
        View::from_entries(scope(), &keys(), entries, 100)
    }

    #[test]
    fn a_leader_key_alone_proves_no_writability() {
        let leader = || entry("leader", "n1", 10, 10);
        assert!(view(vec![leader()]).writable_leader().is_none());
        assert!(view(vec![leader(), member("replica", 11)]).writable_leader().is_none());
        assert!(view(vec![leader(), member("promoted", 11)]).writable_leader().is_none());
        // Written before this holding of the key: it speaks of an earlier one.
        assert!(view(vec![leader(), member("primary", 9)]).writable_leader().is_none());
        assert!(view(vec![leader(), member("primary", 11)]).writable_leader().is_some());
        let standby = view(vec![leader(), member("standby_leader", 11)]);
        assert!(standby.writable_leader().is_none() && standby.ready_leader().is_some());
        assert!(
            view(vec![leader(), member("standby_leader", 9)])
                .ready_leader()
                .is_none()
        );
    }

    #[test]
    fn a_rebound_lease_is_the_same_epoch_and_a_new_key_is_another() {
        let first = view(vec![entry("leader", "n1", 10, 10)]);
        let rebound = first.with(&keys(), [Change::Put(entry("leader", "n1", 10, 20))], 20);
        let again = first.with(&keys(), [Change::Put(entry("leader", "n1", 30, 30))], 30);
        assert_eq!(first.epoch(), rebound.epoch());
        assert_ne!(first.epoch(), again.epoch());
    }

    #[test]
    fn changes_fold_into_the_same_view_as_a_full_read() {
        let entries = vec![
            entry("leader", "n1", 10, 10),
            member("primary", 11),
            entry("initialize", "77", 2, 3),
        ];
        let whole = view(entries.clone());
        let folded = View::empty(scope()).with(&keys(), entries.into_iter().map(Change::Put), 100);
        assert_eq!(whole, folded);
        assert_eq!(whole.initialize, Some(Initialize::Done(SystemId(77))));
        let gone = whole.with(
            &keys(),
            [Change::Delete {
                key: "/service/c/leader".into(),
            }],
            101,
        );
        assert!(gone.leader.is_none() && gone.members.len() == 1);
    }

    #[test]
    fn an_empty_initialize_key_is_a_bootstrap_under_way() {
        assert_eq!(
            view(vec![entry("initialize", "", 2, 2)]).initialize,
            Some(Initialize::Pending)
        );
    }
}

//! Clusters for unit tests, made of keys as etcd would hold them.

use std::collections::BTreeSet;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::key::Keys;
use pgherd_cluster::name::{MemberName, Scope};
use pgherd_cluster::view::{Entry, View};

use crate::lag::LeaderPositions;
use crate::warrant::{Vouch, Words};

pub(crate) fn name(text: &str) -> MemberName {
    MemberName::new(text).expect("a plain name")
}

pub(crate) static NO_WORDS: Words = Words::none();
pub(crate) static NO_POSITIONS: LeaderPositions = LeaderPositions::none();
pub(crate) static NOBODY: BTreeSet<MemberName> = BTreeSet::new();

#[derive(Clone)]
pub(crate) struct Cluster {
    entries: Vec<Entry>,
}

impl Cluster {
    pub(crate) fn new() -> Self {
        Self { entries: Vec::new() }
    }

    fn put(mut self, key: &str, value: String, create_revision: i64, mod_revision: i64) -> Self {
        self.entries.retain(|entry| entry.key != format!("/service/c/{key}"));
        self.entries.push(Entry {
            key: format!("/service/c/{key}"),
            value,
            create_revision,
            mod_revision,
            lease: 1,
        });
        self
    }

    pub(crate) fn leader(self, member: &str, create_revision: i64) -> Self {
        self.put("leader", member.to_owned(), create_revision, create_revision)
    }

    pub(crate) fn config(self, json: &str) -> Self {
        self.put("config", json.to_owned(), 1, 1)
    }

    pub(crate) fn status(self, json: &str) -> Self {
        self.put("status", json.to_owned(), 1, 1)
    }

    pub(crate) fn sync(self, json: &str) -> Self {
        self.put("sync", json.to_owned(), 1, 1)
    }

    pub(crate) fn primary(self, member: &str, mod_revision: i64) -> Self {
        self.with_role(member, "primary", mod_revision)
    }

    pub(crate) fn with_role(self, member: &str, role: &str, mod_revision: i64) -> Self {
        let value = format!(
            r#"{{"conn_url":"postgres://{member}:5432/postgres","api_url":"http://{member}:8008/patroni","state":"running","role":"{role}","pgherd":"0.1.0"}}"#
        );
        self.put(&format!("members/{member}"), value, 1, mod_revision)
    }

    pub(crate) fn replica(self, member: &str) -> Self {
        self.member(member, "replica", "running", r#""replication_state":"streaming""#)
    }

    pub(crate) fn patroni(self, member: &str) -> Self {
        let value = format!(
            r#"{{"conn_url":"postgres://{member}:5432/postgres","api_url":"http://{member}:8008/patroni","state":"running","role":"replica"}}"#
        );
        self.put(&format!("members/{member}"), value, 1, 2)
    }

    pub(crate) fn member(self, member: &str, role: &str, state: &str, more: &str) -> Self {
        let value = format!(
            r#"{{"conn_url":"postgres://{member}:5432/postgres","api_url":"http://{member}:8008/patroni","state":"{state}","role":"{role}","pgherd":"0.1.0",{more}}}"#
        );
        self.put(&format!("members/{member}"), value, 1, 2)
    }

    /// The word of the leader's own agent.
    pub(crate) fn word(&self, end: Boottime) -> Vouch {
        let view = self.view();
        Vouch {
            leader: view.leader.clone().expect("somebody leads"),
            member: view.leader_member().cloned().expect("it has a record"),
            end,
            names_epoch: true,
            without_key: false,
        }
    }

    pub(crate) fn view(&self) -> View {
        let scope = Scope::new("c").expect("a plain name");
        let keys = Keys::new("service", &scope);
        View::from_entries(scope, &keys, self.entries.clone(), 100)
    }
}

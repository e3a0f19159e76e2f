//! The configuration while the agent runs: what it was started with is in [`crate::context::Context::config`]; what an
//! operator may change in a running agent is read from here each time it is used.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, watch};

use crate::config::AgentConfig;

/// The configuration in force. Cheap to copy; all copies see a change at once.
#[derive(Clone)]
pub struct Live(Arc<ArcSwap<AgentConfig>>);

/// Where a running agent gets its configuration anew. Files are the binary's job, so it asks, and is given.
pub struct Reload {
    /// Counts how often the agent has asked.
    pub asked: watch::Sender<u64>,
    /// What was read, and found good. Bounded: a newer one waits until the older is in force.
    pub fresh: mpsc::Receiver<Fresh>,
}

/// A configuration that was read anew.
#[derive(Clone, Debug)]
pub struct Fresh {
    /// All of it.
    pub config: AgentConfig,
    /// How much of it is to be put in force.
    pub extent: Extent,
}

/// How much of a fresh configuration counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All that may change in a running agent: an operator asked for it.
    All,
    /// Passwords and what is in files that hold certificates and keys: such a file has changed, and nobody asked for more.
    Secrets,
}

impl Reload {
    /// One that nothing ever comes from.
    #[must_use]
    pub fn never() -> Self {
        Self {
            asked: watch::channel(0).0,
            fresh: mpsc::channel(1).1,
        }
    }
}

impl Live {
    /// In force from the start.
    #[must_use]
    pub fn new(config: AgentConfig) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(config)))
    }

    /// What is in force now.
    #[must_use]
    pub fn load(&self) -> Arc<AgentConfig> {
        self.0.load_full()
    }

    /// Puts a fresh configuration in force, as far as a running agent can change. Gives the keys that differ and cannot.
    pub fn adopt(&self, fresh: Fresh) -> Vec<&'static str> {
        let before = self.load();
        let (config, kept) = match fresh.extent {
            Extent::All => keep_what_is_bound(&before, fresh.config),
            Extent::Secrets => (only_secrets(&before, fresh.config), Vec::new()),
        };
        self.0.store(Arc::new(config));
        kept
    }
}

/// The fresh configuration with what a running agent is bound to taken from `before`, and the keys where they differ.
fn keep_what_is_bound(before: &AgentConfig, mut fresh: AgentConfig) -> (AgentConfig, Vec<&'static str>) {
    let mut kept = Vec::new();
    let mut keep = |key, differs: bool| {
        if differs {
            kept.push(key);
        }
    };
    keep("scope", before.scope != fresh.scope);
    keep("name", before.name != fresh.name);
    keep("namespace", before.namespace != fresh.namespace);
    keep("etcd3.hosts", before.etcd.endpoints != fresh.etcd.endpoints);
    keep("etcd3.srv", before.etcd.discovery != fresh.etcd.discovery);
    keep("pgherd.runtime_dir", before.runtime_dir != fresh.runtime_dir);
    let (old, new) = (&before.postgresql, &fresh.postgresql);
    keep("postgresql.data_dir", old.data_dir != new.data_dir);
    keep("postgresql.config_dir", old.config_dir != new.config_dir);
    keep(
        "postgresql.config_base_name",
        old.config_base_name != new.config_base_name,
    );
    keep("restapi.listen", before.restapi.listen != fresh.restapi.listen);
    fresh.scope.clone_from(&before.scope);
    fresh.name.clone_from(&before.name);
    fresh.namespace.clone_from(&before.namespace);
    fresh.runtime_dir.clone_from(&before.runtime_dir);
    fresh.etcd.endpoints.clone_from(&before.etcd.endpoints);
    fresh.etcd.discovery.clone_from(&before.etcd.discovery);
    fresh.postgresql.data_dir.clone_from(&before.postgresql.data_dir);
    fresh.postgresql.config_dir.clone_from(&before.postgresql.config_dir);
    let base_name = &before.postgresql.config_base_name;
    fresh.postgresql.config_base_name.clone_from(base_name);
    fresh.restapi.listen.clone_from(&before.restapi.listen);
    // Looked for when the agent began, and what runs was found there.
    fresh.postgresql.bin_dir.clone_from(&before.postgresql.bin_dir);
    (fresh, kept)
}

fn only_secrets(before: &AgentConfig, fresh: AgentConfig) -> AgentConfig {
    let mut config = before.clone();
    let (to, from) = (&mut config.postgresql, fresh.postgresql);
    to.superuser.password = from.superuser.password;
    to.replication.password = from.replication.password;
    if let (Some(to), Some(from)) = (&mut to.rewind, from.rewind) {
        to.password = from.password;
    }
    if let (Some(to), Some(from)) = (&mut config.restapi.credentials, fresh.restapi.credentials) {
        to.password = from.password;
    }
    if let (Some(to), Some(from)) = (&mut config.etcd.credentials, fresh.etcd.credentials) {
        to.1 = from.1;
    }
    config
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::tests::{agent, with_password};

    #[test]
    fn what_a_running_agent_is_bound_to_stays_and_is_told_by_key() {
        let live = Live::new(agent());
        let mut fresh = agent();
        fresh.tags.insert("nosync".to_owned(), json!(true));
        fresh.postgresql.data_dir = "/elsewhere".into();
        fresh.namespace = "other".to_owned();
        let kept = live.adopt(Fresh {
            config: fresh,
            extent: Extent::All,
        });
        assert_eq!(kept, ["namespace", "postgresql.data_dir"]);
        let now = live.load();
        assert_eq!(now.postgresql.data_dir, agent().postgresql.data_dir);
        assert_eq!(now.namespace, agent().namespace);
        assert_eq!(now.tags["nosync"], json!(true));
    }

    #[test]
    fn a_file_with_a_password_changes_the_password_and_nothing_else() {
        let live = Live::new(agent());
        let mut fresh = with_password("new");
        fresh.tags.insert("nosync".to_owned(), json!(true));
        let kept = live.adopt(Fresh {
            config: fresh,
            extent: Extent::Secrets,
        });
        assert_eq!(kept, Vec::<&str>::new());
        assert_eq!(live.load().postgresql.superuser.password.as_deref(), Some("new"));
        assert!(live.load().tags.is_empty(), "nobody asked for that");
    }
}

//! The configuration while the agent runs: what it was started with is in [`crate::context::Context::config`]; what an
//! operator may change in a running agent is read from here each time it is used.

use std::sync::Arc;

use arc_swap::ArcSwap;
use pgherd_cluster::record::Address;
use tokio::sync::{mpsc, watch};

use crate::config::{AgentConfig, PostgresConfig};

/// The configuration in force. Cheap to copy; all copies see a change at once.
#[derive(Clone)]
pub struct Live {
    in_force: Arc<ArcSwap<AgentConfig>>,
    /// What PostgreSQL is started with next.
    next: Arc<ArcSwap<Listening>>,
}

/// Where PostgreSQL listens and is reached. A server that runs listens where it was started, whatever is configured since,
/// so that others are told of another place when it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listening {
    addresses: Vec<String>,
    port: u16,
    connect_address: Address,
}

impl Listening {
    fn of(postgresql: &PostgresConfig) -> Self {
        Self {
            addresses: postgresql.listen_addresses.clone(),
            port: postgresql.port,
            connect_address: postgresql.connect_address.clone(),
        }
    }

    /// The parameters that PostgreSQL is given on its command line.
    #[must_use]
    pub fn parameters(&self) -> [(String, String); 2] {
        let addresses = self.addresses.join(",");
        [
            ("listen_addresses".to_owned(), addresses),
            ("port".to_owned(), self.port.to_string()),
        ]
    }

    fn put(self, postgresql: &mut PostgresConfig) {
        postgresql.listen_addresses = self.addresses;
        postgresql.port = self.port;
        postgresql.connect_address = self.connect_address;
    }
}

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
        let next = Listening::of(&config.postgresql);
        Self {
            in_force: Arc::new(ArcSwap::from_pointee(config)),
            next: Arc::new(ArcSwap::from_pointee(next)),
        }
    }

    /// What is in force now.
    #[must_use]
    pub fn load(&self) -> Arc<AgentConfig> {
        self.in_force.load_full()
    }

    /// Where PostgreSQL will listen once it is started anew.
    #[must_use]
    pub fn next_listening(&self) -> Arc<Listening> {
        self.next.load_full()
    }

    /// PostgreSQL is about to be started, and listens where it is configured to from then on.
    pub fn listen_as_configured(&self) {
        let mut config = (*self.load()).clone();
        (*self.next_listening()).clone().put(&mut config.postgresql);
        self.in_force.store(Arc::new(config));
    }

    /// Puts a fresh configuration in force, as far as a running agent can change. Gives the keys that differ and cannot.
    pub fn adopt(&self, fresh: Fresh) -> Vec<&'static str> {
        let before = self.load();
        let (config, kept) = match fresh.extent {
            Extent::All => {
                let (mut config, kept) = keep_what_is_bound(&before, fresh.config);
                self.next.store(Arc::new(Listening::of(&config.postgresql)));
                keep_where_it_listens(&before.postgresql, &mut config.postgresql);
                (config, kept)
            }
            Extent::Secrets => (only_secrets(&before, fresh.config), Vec::new()),
        };
        self.in_force.store(Arc::new(config));
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

/// How others reach the place where the server listens may change at any time; another place is there after a restart.
fn keep_where_it_listens(before: &PostgresConfig, fresh: &mut PostgresConfig) {
    let (before, after) = (Listening::of(before), Listening::of(fresh));
    if (&before.addresses, before.port) != (&after.addresses, after.port) {
        before.put(fresh);
    }
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
    fn a_server_is_reached_where_it_listens_until_it_is_started_anew() {
        let live = Live::new(agent());
        let adopt = |change: fn(&mut PostgresConfig)| {
            let mut config = agent();
            change(&mut config.postgresql);
            let extent = Extent::All;
            live.adopt(Fresh { config, extent })
        };
        adopt(|postgresql| {
            (postgresql.port, postgresql.connect_address.port) = (5433, 5433);
            postgresql.database = "other".to_owned();
        });
        assert_eq!(
            Listening::of(&live.load().postgresql),
            Listening::of(&agent().postgresql)
        );
        assert_eq!(live.load().postgresql.database, "other");
        assert_eq!(live.next_listening().port, 5433);
        live.listen_as_configured();
        let now = live.load();
        assert_eq!((now.postgresql.port, now.postgresql.connect_address.port), (5433, 5433));
        assert_eq!(now.postgresql.database, "other");

        // Only what others are told: the server listens where it did.
        adopt(|postgresql| postgresql.port = 5433);
        adopt(|postgresql| (postgresql.port, postgresql.connect_address.port) = (5433, 6000));
        assert_eq!(live.load().postgresql.connect_address.port, 6000);
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

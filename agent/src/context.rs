//! What the parts of one member share.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use pgherd_cluster::etcd::{Budget, Etcd};
use pgherd_cluster::key::{Key, Keys};
use pgherd_cluster::record::{Address, DynamicConfig, StandbyCluster};
use pgherd_cluster::source::ViewHandle;
use pgherd_cluster::timing::LeaseTiming;
use pgherd_cluster::view::View;

use crate::config::{AgentConfig, Divergence, PostgresConfig};
use crate::journal::Journal;
use crate::keeper::Keeper;
use crate::lease::Lease;
use crate::live::Live;
use crate::peers::Peers;
use crate::postgres::Programs;
use crate::postgres::settings::value_text;
use crate::postgres::sql::{Replication, Sql, Target};
use crate::rest::Doors;
use crate::scripts::{Callbacks, Scripts};
use crate::slots::Board;
use crate::sync::SyncNames;
use crate::vigil::Vigil;

/// The handles of one member; cheap to share with its jobs.
pub struct Context {
    /// Its configuration as the agent was started with: who it is and where its data is do not change. What may is
    /// in `live`.
    pub config: AgentConfig,
    /// Its configuration as it is in force.
    pub live: Live,
    /// PostgreSQL's programs.
    pub programs: Programs,
    /// The store.
    pub etcd: Etcd,
    /// The cluster's keys.
    pub keys: Keys,
    /// The view of the cluster.
    pub view: ViewHandle,
    /// The keeper.
    pub keeper: Keeper,
    /// How other members are asked.
    pub peers: Peers,
    /// Who gets into our REST interface.
    pub doors: Arc<ArcSwap<Doors>>,
    /// The lease.
    pub lease: Lease,
    /// SQL on our own server.
    pub sql: Sql,
    /// The same for the care of slots, which the loop does not wait for.
    pub slot_sql: Sql,
    /// What the parts of this member tell each other of slots.
    pub slots: Arc<Board>,
    /// What the probes of PostgreSQL and its disk find, and whether the loop turns.
    pub vigil: Vigil,
    /// The operator's callbacks.
    pub callbacks: Callbacks,
    /// Where what happened is told.
    pub journal: Journal,
    /// What `synchronous_standby_names` is written as; the user's own parameters while it is nothing.
    pub sync_names: Mutex<Option<SyncNames>>,
    /// PostgreSQL's parameters as they were last rendered.
    pub wanted: Mutex<BTreeMap<String, String>>,
}

impl Context {
    /// What `synchronous_standby_names` is written as, while that is ours to say.
    #[must_use]
    pub fn sync_names(&self) -> Option<SyncNames> {
        self.sync_names.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has `synchronous_standby_names` written as this from now on.
    pub fn set_sync_names(&self, names: Option<SyncNames>) {
        *self.sync_names.lock().unwrap_or_else(PoisonError::into_inner) = names;
    }

    /// PostgreSQL's parameters as they were last rendered.
    #[must_use]
    pub fn wanted(&self) -> BTreeMap<String, String> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The configuration in force.
    #[must_use]
    pub fn live(&self) -> Arc<AgentConfig> {
        self.live.load()
    }

    /// Reaches our own server as the configuration in force says; `former` is the superuser's password of before. The socket of
    /// one that runs is where it was started, whatever the parameters say since.
    pub fn reach_server(&self, former: Option<String>) {
        let (mut live, dynamic) = ((*self.live()).clone(), self.dynamic());
        let postmaster = self.keeper.instance().borrow().postmaster;
        if let Some(dir) = postmaster.and_then(|pid| running_socket_dir(&live.postgresql.data_dir, pid)) {
            let parameters = &mut live.postgresql.parameters;
            parameters.insert(SOCKET_DIRS_PARAMETER.to_owned(), dir.into());
        }
        let target = local_target_with(&live, &dynamic).with_former_password(former);
        for sql in [&self.sql, &self.slot_sql] {
            let replication = replication_with(&live, &self.programs, &dynamic);
            sql.reach_by(target.clone(), replication);
        }
    }

    /// The full text of a key.
    #[must_use]
    pub fn key(&self, key: &Key) -> String {
        self.keys.of(key)
    }

    /// The operator's programs in force.
    #[must_use]
    pub fn scripts(&self) -> Scripts {
        Scripts::in_force(&self.live().postgresql.scripts, &self.dynamic().postgresql()).0
    }

    /// The same where the first member is made that follows another cluster, whose section may list ways of its own.
    pub fn scripts_of(&self, section: &StandbyCluster) -> Scripts {
        let mut local = self.live().postgresql.scripts.clone();
        if !section.create_replica_methods.is_empty() {
            local.remove("create_replica_method");
            local.insert(
                "create_replica_methods".to_owned(),
                section.create_replica_methods.clone().into(),
            );
        }
        Scripts::in_force(&local, &self.dynamic().postgresql()).0
    }

    /// The newest view, to keep.
    #[must_use]
    pub fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// The times in force.
    #[must_use]
    pub fn timing(&self) -> LeaseTiming {
        self.view.load().timing()
    }

    /// The time that one operation on etcd may take.
    #[must_use]
    pub fn budget(&self) -> Budget {
        Budget::new(self.timing().retry_timeout(), self.etcd.endpoint_count())
    }

    /// What becomes of data that holds what the leader's does not.
    #[must_use]
    pub fn divergence(&self) -> Divergence {
        self.live().postgresql.divergence.over(&self.dynamic())
    }

    /// The dynamic configuration, empty while there is none.
    #[must_use]
    pub fn dynamic(&self) -> DynamicConfig {
        self.view.load().config.value.clone().unwrap_or_default()
    }
}

/// Where PostgreSQL's unix socket is when no parameter says: the packages' place, and PostgreSQL's own.
pub const SOCKET_DIRS: [&str; 2] = ["/var/run/postgresql", "/tmp"];

const SOCKET_DIRS_PARAMETER: &str = "unix_socket_directories";

/// The first directory in which the server with this process id has its sockets, as it says itself.
fn running_socket_dir(data_dir: &Path, postmaster: i32) -> Option<String> {
    let text = std::fs::read_to_string(data_dir.join("postmaster.pid")).ok()?;
    // Process id, data directory, start, port, first directory of sockets: `src/include/utils/pidfile.h`.
    let mut lines = text.lines().map(str::trim);
    let ours = lines.next()?.parse::<i32>().ok() == Some(postmaster);
    let dir = lines.nth(3).filter(|dir| ours && dir.starts_with('/'))?;
    Some(dir.to_owned())
}

/// How our own server is reached, by what this member's own configuration says.
#[must_use]
pub fn local_target(config: &AgentConfig) -> Target {
    local_target_with(config, &DynamicConfig::default())
}

/// How our own server is reached: by TCP at the first address that it listens on, or by its unix socket.
#[must_use]
pub fn local_target_with(config: &AgentConfig, dynamic: &DynamicConfig) -> Target {
    let (address, postgresql) = (local_address(config, dynamic), &config.postgresql);
    Target::new(&address, &postgresql.database, &postgresql.superuser).with_options(&postgresql.connections.superuser)
}

/// Where our own server is reached. A host that begins with a slash is the directory of its unix socket.
#[must_use]
pub fn local_address(config: &AgentConfig, dynamic: &DynamicConfig) -> Address {
    let postgresql = &config.postgresql;
    let host = if postgresql.use_unix_socket {
        socket_dir(postgresql, dynamic)
    } else {
        local_host(postgresql)
    };
    Address {
        host,
        port: postgresql.port,
    }
}

/// How our own server is asked by the replication protocol.
#[must_use]
pub fn replication_with(config: &AgentConfig, programs: &Programs, dynamic: &DynamicConfig) -> Replication {
    let postgresql = &config.postgresql;
    let mut address = postgresql.connect_address.clone();
    if postgresql.use_unix_socket_repl {
        address = Address {
            host: socket_dir(postgresql, dynamic),
            port: postgresql.port,
        };
    }
    Replication {
        programs: programs.clone(),
        address,
        user: postgresql.replication.clone(),
        options: postgresql.connections.replication.clone(),
    }
}

fn local_host(postgresql: &PostgresConfig) -> String {
    match postgresql.listen_addresses.first().map(String::as_str) {
        None | Some("*" | "0.0.0.0" | "") => "127.0.0.1".to_owned(),
        Some("::") => "::1".to_owned(),
        Some(address) => address.to_owned(),
    }
}

/// The first directory of `unix_socket_directories`, as configured; else the one that has the socket.
fn socket_dir(postgresql: &PostgresConfig, dynamic: &DynamicConfig) -> String {
    let dynamic = dynamic.parameters();
    let name = SOCKET_DIRS_PARAMETER;
    let configured = postgresql.parameters.get(name).or_else(|| dynamic.get(name));
    let first = configured.and_then(|value| {
        let text = value_text(value);
        let dir = text.split(',').next().unwrap_or_default().trim().to_owned();
        (!dir.is_empty()).then_some(dir)
    });
    let socket = format!(".s.PGSQL.{}", postgresql.port);
    first.unwrap_or_else(|| {
        let found = SOCKET_DIRS.iter().find(|dir| Path::new(dir).join(&socket).exists());
        (*found.unwrap_or(&SOCKET_DIRS[0])).to_owned()
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::tests::agent;

    #[test]
    fn the_socket_is_where_the_parameters_say() {
        let dynamic = DynamicConfig::new(
            json!({"postgresql": {"parameters": {"unix_socket_directories": "/of/all, /other"}}})
                .as_object()
                .cloned()
                .unwrap_or_default(),
        );
        let mut config = agent();
        assert_eq!(socket_dir(&config.postgresql, &dynamic), "/of/all");
        let own = json!("/own");
        config
            .postgresql
            .parameters
            .insert("unix_socket_directories".to_owned(), own);
        assert_eq!(socket_dir(&config.postgresql, &dynamic), "/own");
    }

    #[test]
    fn a_server_that_runs_says_where_its_socket_is() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(running_socket_dir(dir.path(), 42), None, "none runs");
        let lock = dir.path().join("postmaster.pid");
        std::fs::write(&lock, "42\n/data\n1700000000\n5432\n/run/here\n127.0.0.1\n").expect("written");
        assert_eq!(running_socket_dir(dir.path(), 42).as_deref(), Some("/run/here"));
        assert_eq!(running_socket_dir(dir.path(), 43), None, "another has left it");
        std::fs::write(&lock, "42\n/data\n1700000000\n5432\n\n127.0.0.1\n").expect("written");
        assert_eq!(running_socket_dir(dir.path(), 42), None, "it has no socket");
    }

    #[test]
    fn our_own_server_is_asked_at_the_first_address() {
        let mut config = agent().postgresql;
        for (listen, expected) in [("*", "127.0.0.1"), ("::", "::1"), ("10.0.0.1", "10.0.0.1")] {
            config.listen_addresses = vec![listen.to_owned()];
            assert_eq!(local_host(&config), expected);
        }
    }
}

//! What the parts of one member share.

use std::sync::{Arc, Mutex, PoisonError};

use pgherd_cluster::etcd::{Budget, Etcd};
use pgherd_cluster::key::{Key, Keys};
use pgherd_cluster::record::{Address, DynamicConfig, StandbyCluster};
use pgherd_cluster::source::ViewHandle;
use pgherd_cluster::timing::LeaseTiming;
use pgherd_cluster::view::View;

use crate::config::{AgentConfig, Divergence};
use crate::keeper::Keeper;
use crate::lease::Lease;
use crate::postgres::Programs;
use crate::postgres::sql::{Sql, Target};
use crate::scripts::{Callbacks, Scripts};
use crate::slots::Board;
use crate::sync::SyncNames;
use crate::vigil::Vigil;

/// The handles of one member; cheap to share with its jobs.
pub struct Context {
    /// Its configuration.
    pub config: AgentConfig,
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
    /// What `synchronous_standby_names` is written as; the user's own parameters while it is nothing.
    pub sync_names: Mutex<Option<SyncNames>>,
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

    /// The full text of a key.
    #[must_use]
    pub fn key(&self, key: &Key) -> String {
        self.keys.of(key)
    }

    /// The operator's programs in force.
    #[must_use]
    pub fn scripts(&self) -> Scripts {
        Scripts::in_force(&self.config.postgresql.scripts, &self.dynamic().postgresql()).0
    }

    /// The same where the first member is made that follows another cluster, whose section may list ways of its own.
    pub fn scripts_of(&self, section: &StandbyCluster) -> Scripts {
        let mut local = self.config.postgresql.scripts.clone();
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
        self.config.postgresql.divergence.over(&self.dynamic())
    }

    /// The dynamic configuration, empty while there is none.
    #[must_use]
    pub fn dynamic(&self) -> DynamicConfig {
        self.view.load().config.value.clone().unwrap_or_default()
    }
}

/// How our own server is asked.
#[must_use]
pub fn local_target(config: &AgentConfig) -> Target {
    let postgresql = &config.postgresql;
    Target::new(&local_address(config), &postgresql.database, &postgresql.superuser)
}

/// Where our own server is reached: by TCP, at the first address that it listens on.
#[must_use]
pub fn local_address(config: &AgentConfig) -> Address {
    let postgresql = &config.postgresql;
    let host = match postgresql.listen_addresses.first().map(String::as_str) {
        None | Some("*" | "0.0.0.0" | "") => "127.0.0.1".to_owned(),
        Some("::") => "::1".to_owned(),
        Some(address) => address.to_owned(),
    };
    Address {
        host,
        port: postgresql.port,
    }
}

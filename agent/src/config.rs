//! What an agent is told: one member's part of a `patroni.yml`, already checked. Plain data; reading files is the
//! binary's job.

use std::path::PathBuf;
use std::time::Duration;

use pgherd_cluster::etcd::EtcdConfig;
use pgherd_cluster::name::{MemberName, Scope};
use pgherd_cluster::record::Address;
use serde_json::{Map, Value};

/// One member.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// The cluster's name.
    pub scope: Scope,
    /// This member's name.
    pub name: MemberName,
    /// The first part of every key; `service` unless set.
    pub namespace: String,
    /// The store.
    pub etcd: EtcdConfig,
    /// The REST interface.
    pub restapi: RestConfig,
    /// What to do when the cluster does not exist yet.
    pub bootstrap: BootstrapConfig,
    /// PostgreSQL.
    pub postgresql: PostgresConfig,
    /// Tags, in file order and with their YAML types.
    pub tags: Map<String, Value>,
    /// Where the keeper keeps its memo: outlives the agent, not the machine, and is never inside the data directory.
    pub runtime_dir: PathBuf,
}

/// The `restapi` section.
#[derive(Clone, Debug)]
pub struct RestConfig {
    /// Where to listen.
    pub listen: Address,
    /// What to publish.
    pub connect_address: Address,
    /// What unsafe requests must present.
    pub credentials: Option<Credentials>,
}

/// The `bootstrap` section.
#[derive(Clone, Debug, Default)]
pub struct BootstrapConfig {
    /// The first dynamic configuration, `bootstrap.dcs`.
    pub dcs: Map<String, Value>,
    /// Options of initdb, in order: `--name` or `--name=value`.
    pub initdb: Vec<InitdbOption>,
    /// Lines appended to the `pg_hba.conf` that initdb made, unless `postgresql.pg_hba` is set.
    pub pg_hba: Vec<String>,
}

/// One option of initdb.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitdbOption {
    /// Without the dashes.
    pub name: String,
    /// Absent for a flag.
    pub value: Option<String>,
}

/// The `postgresql` section.
#[derive(Clone, Debug)]
pub struct PostgresConfig {
    /// `listen_addresses`.
    pub listen_addresses: Vec<String>,
    /// `port`.
    pub port: u16,
    /// What to publish.
    pub connect_address: Address,
    /// The data directory.
    pub data_dir: PathBuf,
    /// Where PostgreSQL's programs are; searched for on `PATH` and in the packages' usual places when absent.
    pub bin_dir: Option<PathBuf>,
    /// The password file that is written for clones and replication.
    pub pgpass: PathBuf,
    /// The database for our own connections.
    pub database: String,
    /// Who owns the cluster.
    pub superuser: Credentials,
    /// Who streams.
    pub replication: Credentials,
    /// Who rewinds, when it is not the superuser.
    pub rewind: Option<Credentials>,
    /// Local parameters; win over the dynamic ones, except the controlled ones.
    pub parameters: Map<String, Value>,
    /// The whole `pg_hba.conf`, when set.
    pub pg_hba: Option<Vec<String>>,
    /// The whole `pg_ident.conf`, when set.
    pub pg_ident: Option<Vec<String>>,
    /// How long a start may take before it is given up.
    pub start_timeout: Duration,
}

/// A user and its password.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user.
    pub username: String,
    /// The password; absent for peer or trust authentication.
    pub password: Option<String>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials({})", self.username) // Never the password.
    }
}

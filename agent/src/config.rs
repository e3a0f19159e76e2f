//! What an agent is told: one member's part of a `patroni.yml`, already checked. Plain data; reading files is the
//! binary's job.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use pgherd_cluster::etcd::EtcdConfig;
use pgherd_cluster::http::AccessConfig;
use pgherd_cluster::name::{MemberName, Scope};
use pgherd_cluster::record::{Address, DynamicConfig};
use pgherd_cluster::timing::LeaseTiming;
use pgherd_cluster::tls::KeyFile;
use pgherd_keeper::protocol::{WatchdogDriver, WatchdogMode, WatchdogSettings};
use serde_json::{Map, Value};

use crate::scripts::{BootstrapMethod, ToolOption, Words};

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
    /// PostgreSQL's parameters that hold in one role only, `pgherd.parameters`.
    pub by_role: RoleParameters,
    /// Tags, in file order and with their YAML types.
    pub tags: Map<String, Value>,
    /// The kernel's watchdog.
    pub watchdog: WatchdogConfig,
    /// Where the keeper keeps its memo: outlives the agent, not the machine, and is never inside the data directory.
    pub runtime_dir: PathBuf,
}

/// Parameters that hold in one role only.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoleParameters {
    /// While this member leads.
    pub primary: Map<String, Value>,
    /// While it follows.
    pub replica: Map<String, Value>,
}

impl RoleParameters {
    /// Those of a member that takes writes, or of one that does not.
    #[must_use]
    pub const fn of(&self, writable: bool) -> &Map<String, Value> {
        if writable { &self.primary } else { &self.replica }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.primary.is_empty() && self.replica.is_empty()
    }
}

/// The `watchdog` section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchdogConfig {
    /// Whether one is wanted.
    pub mode: WatchdogMode,
    /// How to speak to it.
    pub driver: WatchdogDriver,
    /// Where it is.
    pub device: PathBuf,
    /// How long before a lease is over it fires.
    pub safety_margin: SafetyMargin,
}

/// How much sooner than the lease a watchdog is over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SafetyMargin {
    /// Five seconds, as with Patroni, or half of a ttl that is too short for that.
    #[default]
    Unset,
    /// Half of the ttl, which is what a negative number asks for.
    Half,
    /// So much.
    Is(Duration),
}

impl Default for WatchdogConfig {
    fn default() -> Self {
        Self {
            mode: WatchdogMode::Automatic,
            driver: WatchdogDriver::Linux,
            device: PathBuf::from("/dev/watchdog"),
            safety_margin: SafetyMargin::Unset,
        }
    }
}

impl WatchdogConfig {
    const SAFETY_MARGIN: Duration = Duration::from_secs(5);
    /// Below this five seconds would leave too little of a lease.
    const TTL_LONG: Duration = Duration::from_secs(20);

    /// What the keeper is to do with a lease of this timing. To be sent again when the timing changes.
    #[must_use]
    pub fn settings(&self, timing: LeaseTiming) -> WatchdogSettings {
        let ttl = timing.ttl();
        let margin = match self.safety_margin {
            SafetyMargin::Unset if ttl >= Self::TTL_LONG => Self::SAFETY_MARGIN,
            SafetyMargin::Unset | SafetyMargin::Half => ttl / 2,
            SafetyMargin::Is(margin) => margin,
        };
        WatchdogSettings {
            mode: self.mode,
            driver: self.driver,
            device: self.device.clone(),
            timeout: ttl.saturating_sub(margin),
            // One renewal may fail on its first endpoint without the machine, or PostgreSQL, being ended for it.
            timeout_min: timing.renew_every() + timing.renewal_attempt() + timing.margin(),
        }
    }
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
    /// Its TLS; plain HTTP without.
    pub tls: Option<RestTls>,
    /// Who may send unsafe requests.
    pub allow: Allow,
    /// Headers that every answer has, by name.
    pub headers: Vec<(String, String)>,
    /// How the interfaces of other members are reached: the `ctl` section, or what `restapi` says of the same.
    pub peers: AccessConfig,
}

/// TLS of the REST interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestTls {
    /// Our certificate, in PEM.
    pub certificate: PathBuf,
    /// Its key, in PEM; may be the same file.
    pub key: KeyFile,
    /// The CAs that clients' certificates lead to.
    pub client_ca: Option<PathBuf>,
    /// Which requests need a client's certificate.
    pub verify_client: VerifyClient,
}

/// Which requests need a client's certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VerifyClient {
    /// None.
    #[default]
    None,
    /// Those that change something.
    Optional,
    /// All.
    Required,
}

/// Who may send requests that change something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allow {
    /// Addresses, networks and names; everybody when empty, unless members are included.
    pub list: Vec<String>,
    /// The members of the cluster too.
    pub include_members: bool,
}

/// The `bootstrap` section.
#[derive(Clone, Debug, Default)]
pub struct BootstrapConfig {
    /// The first dynamic configuration, `bootstrap.dcs`.
    pub dcs: Map<String, Value>,
    /// Options of initdb, in order.
    pub initdb: Vec<ToolOption>,
    /// The operator's own way to make the cluster, instead of initdb.
    pub method: Option<BootstrapMethod>,
    /// `post_bootstrap`, or `post_init`: run once with a connection string when the new cluster takes connections.
    pub post_bootstrap: Option<Words>,
    /// A directory of `.sql` and `.sh` files that are run once in the new cluster, in the order of their names.
    pub initdb_d: Option<PathBuf>,
    /// Lines appended to the `pg_hba.conf` that initdb made, unless `postgresql.pg_hba` is set.
    pub pg_hba: Vec<String>,
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
    /// What to publish as the address of a pool or proxy in front of this PostgreSQL.
    pub proxy_address: Option<Address>,
    /// The data directory.
    pub data_dir: PathBuf,
    /// Where PostgreSQL's configuration is; the data directory unless set.
    pub config_dir: PathBuf,
    /// The stem of the configuration's file, `postgresql` unless set.
    pub config_base_name: String,
    /// What the configuration includes in the place of the original one.
    pub custom_conf: Option<PathBuf>,
    /// Where PostgreSQL's programs are; searched for on `PATH` and in the packages' usual places when absent.
    pub bin_dir: Option<PathBuf>,
    /// The programs' names where they are not the usual ones, by the usual ones.
    pub bin_name: BTreeMap<String, String>,
    /// Whether our own connections go by PostgreSQL's unix socket.
    pub use_unix_socket: bool,
    /// The same for our own replication connections to this PostgreSQL.
    pub use_unix_socket_repl: bool,
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
    /// What goes with these users.
    pub connections: Connections,
    /// Local parameters; win over the dynamic ones, except the controlled ones.
    pub parameters: Map<String, Value>,
    /// Recovery parameters, such as `restore_command`, that stand beside those that follow from the cluster's state.
    pub recovery_conf: Option<Map<String, Value>>,
    /// The whole `pg_hba.conf`, when set.
    pub pg_hba: Option<Vec<String>>,
    /// The whole `pg_ident.conf`, when set.
    pub pg_ident: Option<Vec<String>>,
    /// The keys that [`Scripts::read`](crate::scripts::Scripts::read) reads, as they are written: they go over the dynamic
    /// ones.
    pub scripts: Map<String, Value>,
    /// How long a start may take before it is given up.
    pub start_timeout: Duration,
    /// What becomes of data that holds what the leader's does not; wins over the dynamic configuration.
    pub divergence: DivergenceConfig,
}

/// What becomes of data that holds what the leader's does not. Nothing is what the dynamic configuration says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DivergenceConfig {
    /// Whether it is rewound; it is copied anew otherwise.
    pub use_pg_rewind: Option<bool>,
    /// Whether it is removed, and not moved aside, once a rewind has failed.
    pub remove_on_rewind_failure: Option<bool>,
    /// Whether it is removed, and not moved aside, where it is not rewound.
    pub remove_on_diverged_timelines: Option<bool>,
}

impl DivergenceConfig {
    /// What is said in the section `postgresql` of the dynamic configuration, under what is said here. Each is off unless
    /// it is said to be on.
    #[must_use]
    pub fn over(self, dynamic: &DynamicConfig) -> Divergence {
        let section = dynamic.postgresql();
        let says = |own: Option<bool>, name: &str| own.unwrap_or_else(|| crate::record::is_set(&section, name));
        Divergence {
            use_pg_rewind: says(self.use_pg_rewind, "use_pg_rewind"),
            remove_on_rewind_failure: says(self.remove_on_rewind_failure, "remove_data_directory_on_rewind_failure"),
            remove_on_diverged_timelines: says(
                self.remove_on_diverged_timelines,
                "remove_data_directory_on_diverged_timelines",
            ),
        }
    }
}

/// What becomes of data that holds what the leader's does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Divergence {
    /// See [`DivergenceConfig`].
    pub use_pg_rewind: bool,
    /// See [`DivergenceConfig`].
    pub remove_on_rewind_failure: bool,
    /// See [`DivergenceConfig`].
    pub remove_on_diverged_timelines: bool,
}

/// Connection parameters of libpq's by user, such as `sslmode`, in the order in which they are written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Connections {
    /// The superuser's.
    pub superuser: ConnectionOptions,
    /// Those of who streams and clones.
    pub replication: ConnectionOptions,
    /// Those of who rewinds.
    pub rewind: ConnectionOptions,
}

/// Names and values of connection parameters. A password of a key is among them, so none is ever shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ConnectionOptions(pub Vec<(String, String)>);

impl std::fmt::Debug for ConnectionOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

impl ConnectionOptions {
    /// The value of one.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str())
    }
}

impl ConnectionOptions {
    /// The same with TLS where the server has it, as libpq does for whoever says nothing.
    #[must_use]
    pub fn preferring_tls(&self) -> Self {
        let mut options = self.clone();
        if options.get("sslmode").is_none() {
            options.0.push(("sslmode".to_owned(), "prefer".to_owned()));
        }
        options
    }
}

impl PostgresConfig {
    /// Who rewinds, and reads another member's files, and with what.
    #[must_use]
    pub const fn rewinds_as(&self) -> (&Credentials, &ConnectionOptions) {
        match &self.rewind {
            Some(user) => (user, &self.connections.rewind),
            None => (&self.superuser, &self.connections.superuser),
        }
    }

    /// Whether its configuration is not in the data directory.
    #[must_use]
    pub fn is_configured_elsewhere(&self) -> bool {
        self.config_dir != self.data_dir
    }

    /// `postgresql.conf`, by whatever name it has here.
    #[must_use]
    pub fn conf_file(&self) -> PathBuf {
        self.config_dir.join(format!("{}.conf", self.config_base_name))
    }

    /// The name, beside that file, of what initdb or an administrator wrote.
    #[must_use]
    pub fn base_conf_name(&self) -> String {
        format!("{}.base.conf", self.config_base_name)
    }
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A member's configuration, for tests.
    pub(crate) fn agent() -> AgentConfig {
        let address = |port| Address {
            host: "127.0.0.1".to_owned(),
            port,
        };
        let user = |name: &str, password: Option<&str>| Credentials {
            username: name.to_owned(),
            password: password.map(str::to_owned),
        };
        AgentConfig {
            scope: Scope::new("batman").expect("a plain name"),
            name: MemberName::new("n1").expect("a plain name"),
            namespace: "service".to_owned(),
            etcd: EtcdConfig::default(),
            restapi: RestConfig {
                listen: address(8008),
                connect_address: address(8008),
                credentials: None,
                tls: None,
                allow: Allow::default(),
                headers: Vec::new(),
                peers: AccessConfig::default(),
            },
            bootstrap: BootstrapConfig::default(),
            postgresql: PostgresConfig {
                listen_addresses: vec!["127.0.0.1".to_owned()],
                port: 5432,
                connect_address: address(5432),
                proxy_address: None,
                data_dir: PathBuf::from("/data/n1"),
                config_dir: PathBuf::from("/data/n1"),
                config_base_name: "postgresql".to_owned(),
                custom_conf: None,
                bin_dir: None,
                bin_name: BTreeMap::new(),
                use_unix_socket: false,
                use_unix_socket_repl: false,
                pgpass: PathBuf::from("/run/pgpass"),
                database: "postgres".to_owned(),
                superuser: user("postgres", None),
                replication: user("replicator", Some("secret")),
                rewind: None,
                connections: Connections::default(),
                parameters: Map::new(),
                recovery_conf: None,
                pg_hba: None,
                pg_ident: None,
                scripts: Map::new(),
                divergence: DivergenceConfig::default(),
                start_timeout: Duration::from_secs(60),
            },
            by_role: RoleParameters::default(),
            tags: Map::new(),
            watchdog: WatchdogConfig::default(),
            runtime_dir: PathBuf::from("/run/pgherd"),
        }
    }

    pub(crate) fn with_password(password: &str) -> AgentConfig {
        let mut config = agent();
        config.postgresql.superuser.password = Some(password.to_owned());
        config
    }

    fn timeouts(safety_margin: SafetyMargin, ttl: u64, loop_wait: u64, retry_timeout: u64) -> (u128, u128) {
        let seconds = Duration::from_secs;
        let timing = LeaseTiming::new(seconds(ttl), seconds(loop_wait), seconds(retry_timeout)).expect("they fit");
        let watchdog = WatchdogConfig {
            safety_margin,
            ..WatchdogConfig::default()
        };
        let settings = watchdog.settings(timing);
        (settings.timeout.as_millis(), settings.timeout_min.as_millis())
    }

    #[test]
    fn a_watchdog_fires_a_safety_margin_before_the_lease_is_over() {
        let seconds = |seconds| SafetyMargin::Is(Duration::from_secs(seconds));
        assert_eq!(timeouts(SafetyMargin::Unset, 30, 10, 10), (25_000, 11_000));
        assert_eq!(timeouts(SafetyMargin::Unset, 20, 10, 5).0, 15_000);
        assert_eq!(timeouts(SafetyMargin::Half, 30, 10, 10).0, 15_000);
        assert_eq!(timeouts(seconds(2), 30, 10, 10).0, 28_000);
        assert_eq!(timeouts(seconds(40), 30, 10, 10).0, 0, "which the keeper refuses");
    }

    #[test]
    fn a_short_lease_is_halved_and_not_eaten_up() {
        let (timeout, least) = timeouts(SafetyMargin::Unset, 10, 2, 4);
        assert_eq!(timeout, 5000);
        assert!(least <= timeout, "{least}");
        assert_eq!(timeouts(SafetyMargin::Is(Duration::from_secs(5)), 10, 2, 4).0, 5000);
    }
}

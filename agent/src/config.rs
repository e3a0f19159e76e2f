//! What an agent is told: one member's part of a `patroni.yml`, already checked. Plain data; reading files is the
//! binary's job.

use std::path::PathBuf;
use std::time::Duration;

use pgherd_cluster::etcd::EtcdConfig;
use pgherd_cluster::name::{MemberName, Scope};
use pgherd_cluster::record::{Address, DynamicConfig};
use pgherd_cluster::timing::LeaseTiming;
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
    /// Tags, in file order and with their YAML types.
    pub tags: Map<String, Value>,
    /// The kernel's watchdog.
    pub watchdog: WatchdogConfig,
    /// Where the keeper keeps its memo: outlives the agent, not the machine, and is never inside the data directory.
    pub runtime_dir: PathBuf,
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
mod tests {
    use super::*;

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

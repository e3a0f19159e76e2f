//! What a proxy is told. Plain data; the command line reads it from files and environment.

mod console;
mod limits;

use std::collections::BTreeMap;
use std::time::Duration;

use pgherd_page::login::PageLogin;

pub use self::console::{ConsoleConfig, ConsoleUser};
pub use self::limits::{LimitsConfig, QueueConfig};
use crate::label::ApplicationName;
use crate::network::Network;
use crate::tls::{ClientTlsConfig, ListenerTls, ServerTlsConfig, ServerTlsMode, TlsConfigError};
use crate::unix::SOCKET_MODE;

/// What a listener's clients come for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ListenerRole {
    /// Sessions go to the leader, on a warrant only.
    Write,
    /// Sessions go to replicas.
    Read,
    /// Sessions go to replicas that the record of synchronous replication lists.
    Sync,
    /// Sessions go to replicas that it does not list.
    Async,
    /// Sessions go to replicas and to the leader alike.
    Any,
    /// Sessions go to the leader of a standby cluster.
    StandbyLeader,
}

impl ListenerRole {
    /// The word in configuration, labels and pages.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Read => "read",
            Self::Sync => "sync",
            Self::Async => "async",
            Self::Any => "any",
            Self::StandbyLeader => "standby_leader",
        }
    }

    /// Whether its clients are readers, who are spread over members.
    #[must_use]
    pub const fn is_balanced(self) -> bool {
        match self {
            Self::Read | Self::Sync | Self::Async | Self::Any => true,
            Self::Write | Self::StandbyLeader => false,
        }
    }
}

/// What a listener's readers are promised of the member that they get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadRules {
    /// Tags that a member must have, with these values; a value that is no text is compared as it is written in JSON.
    pub tags: BTreeMap<String, String>,
    /// How far behind the leader a replica may be, in bytes; nothing for any distance.
    pub max_lag_bytes: Option<u64>,
    /// How long the leader may have been past a replica; nothing for any time.
    pub max_lag_time: Option<Duration>,
    /// Whether readers go to the leader when no replica can take them.
    pub fallback_to_leader: bool,
    /// How many of them the leader takes at a time; nothing for any number.
    pub fallback_max: Option<usize>,
    /// What becomes of sessions whose replica is promoted; nothing for [`ListenerConfig::on_promoted`] to decide.
    pub on_promoted: Option<OnChange>,
    /// What becomes of sessions whose replica stops streaming, falls too far behind, or is no longer of the listener's kind.
    pub on_stale: OnChange,
    /// From which age on sessions may be moved, so that a member that comes back gets its part; nothing for never.
    pub rebalance_after: Option<Duration>,
}

/// What becomes of a reader's session when its member is no longer what it came for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnChange {
    /// It goes on.
    Keep,
    /// It is ended between two transactions.
    EndWhenIdle,
    /// It is ended at once.
    End,
}

impl ReadRules {
    /// Any replica will do, and the leader never.
    #[must_use]
    pub const fn none() -> Self {
        Self {
            tags: BTreeMap::new(),
            max_lag_bytes: None,
            max_lag_time: None,
            fallback_to_leader: false,
            fallback_max: None,
            on_promoted: None,
            on_stale: OnChange::Keep,
            rebalance_after: None,
        }
    }
}

/// One address that clients connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerConfig {
    /// `host:port`, or a unix socket: the path of its file, or `@` and a name without a file.
    pub address: String,
    /// Who may connect to the file of a unix socket, as in chmod(2). Without meaning elsewhere.
    pub mode: u32,
    /// What its clients come for.
    pub role: ListenerRole,
    /// For readers only.
    pub reads: ReadRules,
    /// Whether its clients may speak TLS.
    pub tls: ListenerTls,
    /// Where clients may be; everywhere when it is empty. Those on unix sockets are let in by the socket's permissions.
    pub allow: Vec<Network>,
    /// Proxies that begin each connection with a PROXY protocol header, which tells who the client is.
    pub proxy_protocol: Vec<Network>,
}

impl ListenerConfig {
    /// A listener for writers.
    #[must_use]
    pub fn write(address: impl Into<String>) -> Self {
        Self::new(address, ListenerRole::Write)
    }

    /// A listener for readers.
    #[must_use]
    pub fn read(address: impl Into<String>, max_lag_bytes: Option<u64>, fallback_to_leader: bool) -> Self {
        let mut listener = Self::new(address, ListenerRole::Read);
        listener.reads.max_lag_bytes = max_lag_bytes;
        listener.reads.fallback_to_leader = fallback_to_leader;
        listener
    }

    /// A listener with this role that promises readers nothing more.
    #[must_use]
    pub fn new(address: impl Into<String>, role: ListenerRole) -> Self {
        Self {
            address: address.into(),
            mode: SOCKET_MODE,
            role,
            reads: ReadRules::none(),
            tls: ListenerTls::Off,
            allow: Vec::new(),
            proxy_protocol: Vec::new(),
        }
    }

    /// What becomes of sessions whose replica is promoted. Where readers may be on the leader anyway they stay, fenced from
    /// then on like all sessions with a leader; elsewhere they came for a replica.
    #[must_use]
    pub fn on_promoted(&self) -> OnChange {
        let may_be_led = self.role == ListenerRole::Any || self.reads.fallback_to_leader;
        let default = if may_be_led { OnChange::Keep } else { OnChange::End };
        self.reads.on_promoted.unwrap_or(default)
    }

    /// The first setting that needs to know where a transaction ends, which TLS that is the server's hides.
    fn beyond_passthrough(&self) -> Option<&'static str> {
        let reads = &self.reads;
        let settings = [
            ("rebalance", reads.rebalance_after.is_some()),
            ("on_stale: end_when_idle", reads.on_stale == OnChange::EndWhenIdle),
            (
                "on_promoted: end_when_idle",
                reads.on_promoted == Some(OnChange::EndWhenIdle),
            ),
        ];
        let is_set = |(setting, set): (&'static str, bool)| set.then_some(setting);
        let mut found = settings.into_iter().filter_map(is_set);
        found.next().filter(|_| self.tls == ListenerTls::Passthrough)
    }

    /// Whether its readers may be with the leader: as one of them, as the last resort, or since their replica was promoted.
    #[must_use]
    pub fn may_be_with_leader(&self) -> bool {
        self.role == ListenerRole::Any || self.reads.fallback_to_leader || self.on_promoted() != OnChange::End
    }

    /// The first setting that has no meaning for its role.
    fn without_meaning(&self) -> Option<&'static str> {
        let reads = &self.reads;
        let settings = [
            ("tags", !reads.tags.is_empty()),
            ("max_lag", reads.max_lag_bytes.is_some()),
            ("max_lag_time", reads.max_lag_time.is_some()),
            ("fallback", reads.fallback_to_leader),
            ("fallback_max", reads.fallback_max.is_some()),
            ("on_promoted", reads.on_promoted.is_some()),
            ("on_stale", reads.on_stale != OnChange::Keep),
            ("rebalance", reads.rebalance_after.is_some()),
        ];
        let is_set = |(setting, set): (&'static str, bool)| set.then_some(setting);
        let mut found = settings.into_iter().filter_map(is_set);
        match self.role {
            ListenerRole::Write | ListenerRole::StandbyLeader => found.next(),
            // The leader is no last resort where it is one of them.
            ListenerRole::Any => found.find(|setting| setting.starts_with("fallback")),
            ListenerRole::Read | ListenerRole::Sync | ListenerRole::Async => {
                let unlimited = reads.fallback_max.is_some() && !reads.fallback_to_leader;
                unlimited.then_some("fallback_max without fallback")
            }
        }
    }
}

/// How clients are kept waiting while nobody can serve them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldConfig {
    /// For how long.
    pub timeout: Duration,
    /// How many at a time, over all listeners.
    pub clients: usize,
}

impl Default for HoldConfig {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            clients: 1000,
        }
    }
}

/// The page, metrics and health.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatsConfig {
    /// `host:port`.
    pub address: String,
}

/// Programs whose names metrics are told by as well, for dashboards that were made for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompatMetrics {
    /// HAProxy's own `/metrics`.
    pub haproxy: bool,
    /// PgBouncer's exporter.
    pub pgbouncer: bool,
}

/// Half a minute warms the caches of a server that was started, and is soon over.
pub const SLOW_START: Duration = Duration::from_secs(30);

/// Sessions go to a carrier after so many requests, unless said otherwise.
pub const CARRIED_AFTER: Option<u8> = Some(16);

/// Everything that a proxy is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyConfig {
    /// Where clients connect.
    pub listeners: Vec<ListenerConfig>,
    /// How clients are held.
    pub hold: HoldConfig,
    /// How much is taken on.
    pub limits: LimitsConfig,
    /// Where the page is; nothing for no page.
    pub stats: Option<StatsConfig>,
    /// Who may see it; nothing for everybody. Health is everybody's to see.
    pub page_login: Option<PageLogin>,
    /// How the page shows itself; nothing where it speaks plain HTTP.
    pub page_tls: Option<ClientTlsConfig>,
    /// Whose names metrics have beside ours.
    pub compat_metrics: CompatMetrics,
    /// The pseudo-database that the proxy answers itself; nothing for none.
    pub console: Option<ConsoleConfig>,
    /// How the proxy shows itself to clients; nothing where TLS does not end here.
    pub client_tls: Option<ClientTlsConfig>,
    /// How it connects to members.
    pub server_tls: ServerTlsConfig,
    /// Threads that carry sessions; 0 for one per CPU.
    pub workers: usize,
    /// So often a client has asked before its session goes from its worker's runtime to its worker's carrier; nothing for
    /// never. Not for operators: the default is about where the way there is paid for.
    pub carried_after: Option<u8>,
    /// How servers see the `application_name` of clients; nothing for as it came.
    pub application_name: Option<ApplicationName>,
    /// Whether the log tells of each session's begin and end, at the level that is shown unasked.
    pub log_sessions: bool,
    /// How long sessions may go on after a stop was asked for.
    pub drain: Duration,
    /// The zone that this proxy is in: readers go to members of the same first.
    pub zone: Option<String>,
    /// How long a member that comes back takes to get its whole share of readers.
    pub slow_start: Duration,
}

/// Why a configuration cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A proxy without a listener serves nobody.
    #[error("there is no listener")]
    NoListener,
    /// The second of them could not be bound.
    #[error("two listeners have the address {address}")]
    SameAddress {
        /// The address.
        address: String,
    },
    /// It would be ignored in silence.
    #[error("the {role} listener {address} has {setting}, which has no meaning there", role = role.as_str())]
    NoMeaning {
        /// The listener.
        address: String,
        /// Its role.
        role: ListenerRole,
        /// The setting.
        setting: &'static str,
    },
    /// The proxy sees no transaction of such a session: it can only reset it.
    #[error(
        "the listener {address} has {setting} together with tls: passthrough: between two transactions only sessions can be \
         ended whose bytes the proxy can read"
    )]
    Passthrough {
        /// The listener.
        address: String,
        /// The setting.
        setting: &'static str,
    },
    /// There is nothing to show to clients.
    #[error("the listener {address} ends TLS, and there is no proxy.tls with a certificate and a private_key")]
    NoCertificate {
        /// The listener.
        address: String,
    },
    /// A client that sees TLS binds its SCRAM exchange to the proxy's certificate, and the server to its own.
    #[error(
        "the listener {address} ends TLS, and server_tls is {mode}: SCRAM cannot pass from one TLS session into another. \
         Either let the bytes pass (tls: passthrough), or connect to members in plaintext or as they allow (server_tls: \
         prefer or disable), or take only plaintext from clients (tls: off)"
    )]
    TlsTwice {
        /// The listener.
        address: String,
        /// What is asked of the servers' side.
        mode: &'static str,
    },
    /// A certificate cannot be used.
    #[error("TLS: {0}")]
    Tls(#[from] TlsConfigError),
    /// Nobody could connect.
    #[error("limits.connections is 0")]
    NoConnections,
    /// Nobody could take them.
    #[error("limits.reserved is {reserved}, and limits.operators names nobody")]
    NoOperators {
        /// Places that are kept.
        reserved: usize,
    },
    /// Held clients are connected clients.
    #[error("hold.clients is {clients}, more than limits.connections, which is {connections}")]
    HoldOverConnections {
        /// Clients that may be held.
        clients: usize,
        /// Clients that may be connected.
        connections: usize,
    },
}

impl ProxyConfig {
    /// A configuration with these listeners and the defaults for the rest: no page, a thread per CPU, 30 s of drain.
    #[must_use]
    pub fn new(listeners: Vec<ListenerConfig>) -> Self {
        Self {
            listeners,
            hold: HoldConfig::default(),
            limits: LimitsConfig::default(),
            stats: None,
            page_login: None,
            page_tls: None,
            compat_metrics: CompatMetrics::default(),
            console: None,
            client_tls: None,
            server_tls: ServerTlsConfig::default(),
            workers: 0,
            carried_after: CARRIED_AFTER,
            application_name: None,
            log_sessions: false,
            drain: Duration::from_secs(30),
            zone: None,
            slow_start: SLOW_START,
        }
    }

    /// Checks the relations between the settings.
    ///
    /// # Errors
    /// Names the relation that does not hold.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.listeners.is_empty() {
            return Err(ConfigError::NoListener);
        }
        for (index, listener) in self.listeners.iter().enumerate() {
            let address = || listener.address.clone();
            let asks_for_any_port = listener.address.ends_with(":0");
            let earlier = self.listeners.iter().take(index);
            if !asks_for_any_port && earlier.into_iter().any(|other| other.address == listener.address) {
                return Err(ConfigError::SameAddress { address: address() });
            }
            if matches!(listener.tls, ListenerTls::Allow | ListenerTls::Require) {
                if self.client_tls.is_none() {
                    return Err(ConfigError::NoCertificate { address: address() });
                }
                let mode = self.server_tls.mode;
                if mode >= ServerTlsMode::Require {
                    return Err(ConfigError::TlsTwice {
                        address: address(),
                        mode: mode.as_str(),
                    });
                }
            }
            if let Some(setting) = listener.without_meaning() {
                return Err(ConfigError::NoMeaning {
                    address: address(),
                    role: listener.role,
                    setting,
                });
            }
            if let Some(setting) = listener.beyond_passthrough() {
                return Err(ConfigError::Passthrough {
                    address: address(),
                    setting,
                });
            }
        }
        let (clients, connections) = (self.hold.clients, self.limits.connections);
        if connections == 0 {
            return Err(ConfigError::NoConnections);
        }
        let reserved = self.limits.reserved;
        if reserved > 0 && self.limits.operators.is_empty() {
            return Err(ConfigError::NoOperators { reserved });
        }
        if clients > connections {
            return Err(ConfigError::HoldOverConnections { clients, connections });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_that_cannot_work_is_refused_by_the_relation_that_fails() {
        let write = || ListenerConfig::write("0.0.0.0:5432");
        assert_eq!(ProxyConfig::new(vec![]).check(), Err(ConfigError::NoListener));
        assert!(matches!(
            ProxyConfig::new(vec![write(), write()]).check(),
            Err(ConfigError::SameAddress { .. })
        ));
        let mut lagging = write();
        lagging.reads.max_lag_bytes = Some(1);
        assert!(matches!(
            ProxyConfig::new(vec![lagging]).check(),
            Err(ConfigError::NoMeaning { setting: "max_lag", .. })
        ));
        let mut alike = ListenerConfig::new("0.0.0.0:5433", ListenerRole::Any);
        alike.reads.max_lag_bytes = Some(1);
        assert_eq!(ProxyConfig::new(vec![alike.clone()]).check(), Ok(()));
        alike.reads.fallback_to_leader = true;
        assert!(matches!(
            ProxyConfig::new(vec![alike]).check(),
            Err(ConfigError::NoMeaning {
                setting: "fallback",
                ..
            })
        ));
        let mut hidden = ListenerConfig::read("0.0.0.0:5433", None, false);
        hidden.tls = ListenerTls::Passthrough;
        hidden.reads.on_stale = OnChange::End;
        assert_eq!(ProxyConfig::new(vec![hidden.clone()]).check(), Ok(()));
        hidden.reads.rebalance_after = Some(Duration::ZERO);
        let refused = ProxyConfig::new(vec![hidden]).check();
        let setting = "rebalance";
        assert!(matches!(refused, Err(ConfigError::Passthrough { setting: found, .. }) if found == setting));
        let mut small = ProxyConfig::new(vec![write()]);
        small.limits.connections = 10;
        assert!(matches!(small.check(), Err(ConfigError::HoldOverConnections { .. })));
        small.hold.clients = 10;
        small.limits.reserved = 1;
        assert_eq!(small.check(), Err(ConfigError::NoOperators { reserved: 1 }));
        small.limits.operators = vec!["dba".to_owned()];
        assert_eq!(small.check(), Ok(()));
    }

    #[test]
    fn readers_who_may_be_on_the_leader_stay_through_a_promotion_unless_told_otherwise() {
        let listener = |role, fallback: bool, told: Option<OnChange>| {
            let mut listener = ListenerConfig::new("0.0.0.0:5433", role);
            listener.reads.fallback_to_leader = fallback;
            listener.reads.on_promoted = told;
            listener.on_promoted()
        };
        assert_eq!(listener(ListenerRole::Read, false, None), OnChange::End);
        assert_eq!(listener(ListenerRole::Sync, true, None), OnChange::Keep);
        assert_eq!(listener(ListenerRole::Any, false, None), OnChange::Keep);
        let told = Some(OnChange::EndWhenIdle);
        assert_eq!(listener(ListenerRole::Read, true, told), OnChange::EndWhenIdle);
    }

    #[test]
    fn any_port_may_be_asked_for_twice() {
        let listeners = vec![
            ListenerConfig::write("127.0.0.1:0"),
            ListenerConfig::write("127.0.0.1:0"),
        ];
        assert_eq!(ProxyConfig::new(listeners).check(), Ok(()));
    }
}

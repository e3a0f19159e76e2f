//! What a proxy is told. Plain data; the command line reads it from files and environment.

mod limits;

use std::time::Duration;

pub use self::limits::{LimitsConfig, QueueConfig};
use crate::label::ApplicationName;
use crate::network::Network;

/// What a listener's clients come for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ListenerRole {
    /// Sessions go to the leader, on a warrant only.
    Write,
    /// Sessions go to replicas.
    Read,
}

impl ListenerRole {
    /// The word in configuration, labels and pages.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Read => "read",
        }
    }
}

/// One address that clients connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerConfig {
    /// `host:port`.
    pub address: String,
    /// What its clients come for.
    pub role: ListenerRole,
    /// How far behind the leader a replica may be, in bytes; nothing for any distance. For readers only.
    pub max_lag_bytes: Option<u64>,
    /// Whether readers go to the leader when no replica can take them.
    pub fallback_to_leader: bool,
    /// Where clients may be; everywhere when it is empty. Those on unix sockets are let in by the socket's permissions.
    pub allow: Vec<Network>,
    /// Proxies that begin each connection with a PROXY protocol header, which tells who the client is.
    pub proxy_protocol: Vec<Network>,
}

impl ListenerConfig {
    /// A listener for writers.
    #[must_use]
    pub fn write(address: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            role: ListenerRole::Write,
            max_lag_bytes: None,
            fallback_to_leader: false,
            allow: Vec::new(),
            proxy_protocol: Vec::new(),
        }
    }

    /// A listener for readers.
    #[must_use]
    pub fn read(address: impl Into<String>, max_lag_bytes: Option<u64>, fallback_to_leader: bool) -> Self {
        Self {
            address: address.into(),
            role: ListenerRole::Read,
            max_lag_bytes,
            fallback_to_leader,
            allow: Vec::new(),
            proxy_protocol: Vec::new(),
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
    /// Threads that carry sessions; 0 for one per CPU.
    pub workers: usize,
    /// How servers see the `application_name` of clients; nothing for as it came.
    pub application_name: Option<ApplicationName>,
    /// Whether the log tells of each session's begin and end, at the level that is shown unasked.
    pub log_sessions: bool,
    /// How long sessions may go on after a stop was asked for.
    pub drain: Duration,
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
    /// Writers go to the leader, so a setting about replicas would be ignored in silence.
    #[error("the write listener {address} has {setting}, which is for read listeners")]
    ReadersOnly {
        /// The listener.
        address: String,
        /// The setting.
        setting: &'static str,
    },
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
            workers: 0,
            application_name: None,
            log_sessions: false,
            drain: Duration::from_secs(30),
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
            if listener.role == ListenerRole::Write {
                let setting = match listener {
                    ListenerConfig {
                        max_lag_bytes: Some(_), ..
                    } => "max_lag",
                    ListenerConfig {
                        fallback_to_leader: true,
                        ..
                    } => "fallback",
                    ListenerConfig { .. } => continue,
                };
                return Err(ConfigError::ReadersOnly {
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
        lagging.max_lag_bytes = Some(1);
        assert!(matches!(
            ProxyConfig::new(vec![lagging]).check(),
            Err(ConfigError::ReadersOnly { setting: "max_lag", .. })
        ));
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
    fn any_port_may_be_asked_for_twice() {
        let listeners = vec![
            ListenerConfig::write("127.0.0.1:0"),
            ListenerConfig::write("127.0.0.1:0"),
        ];
        assert_eq!(ProxyConfig::new(listeners).check(), Ok(()));
    }
}

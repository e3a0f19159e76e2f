//! How much a proxy takes on.

use std::time::Duration;

/// Bounds on what a proxy carries at a time. Nothing stands for no bound, and 0 where it is a number bounds to nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitsConfig {
    /// Client connections, over all listeners.
    pub connections: usize,
    /// Connections whose startup message names one user, whoever that really is.
    pub per_user: Option<usize>,
    /// Connections to one database.
    pub per_database: Option<usize>,
    /// Connections from one client address.
    pub per_client_address: Option<usize>,
    /// Sessions with one member, over all listeners. Who is beyond it waits in the queue.
    pub per_member: Option<usize>,
    /// For those beyond `per_member`.
    pub queue: QueueConfig,
    /// Connections to one listener that have not said yet what they come for. Further ones stay in the kernel's queue.
    pub startups: Option<usize>,
    /// Of these, from one client address, or from one /64 of IPv6. Further ones are closed.
    pub startups_per_client_address: Option<usize>,
    /// Sessions that one member may be starting at a time: from the dial to its first word.
    pub startups_per_member: Option<usize>,
    /// Places that `operators` have beyond every limit on connections.
    pub reserved: usize,
    /// Users by the name in the startup message.
    pub operators: Vec<String>,
}

/// A connection says what it comes for within one round trip and a TLS handshake, some milliseconds each: so many at a time
/// are more than the proxy could serve, and yet few enough to be held in memory.
const STARTUPS: usize = 4096;
/// An application server that connects its whole pool anew does so from one address, with hundreds of connections at once.
const STARTUPS_PER_CLIENT_ADDRESS_MAX: usize = 1024;

/// A server forks one process after another for those that connect, in one to a few milliseconds each. So many keep it at work
/// over the round trip, and a thousand that come back at once neither fill its queue nor its processors with processes.
const STARTUPS_PER_MEMBER: usize = 32;

impl LimitsConfig {
    /// The defaults for so many connections. What one address may have in its startup, and so for up to ten seconds without
    /// a word, is at most half of them.
    #[must_use]
    pub fn of(connections: usize) -> Self {
        Self {
            connections,
            per_user: None,
            per_database: None,
            per_client_address: None,
            per_member: None,
            queue: QueueConfig::default(),
            startups: Some(STARTUPS),
            startups_per_member: Some(STARTUPS_PER_MEMBER),
            reserved: 0,
            operators: Vec::new(),
            startups_per_client_address: Some((connections / 2).clamp(1, STARTUPS_PER_CLIENT_ADDRESS_MAX)),
        }
    }
}

/// How clients wait for a place at a member that is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// How many at a time, per member.
    pub clients: usize,
    /// For how long.
    pub timeout: Duration,
}

impl Default for QueueConfig {
    fn default() -> Self {
        Self {
            clients: 1000,
            timeout: Duration::from_secs(10),
        }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self::of(10_000)
    }
}

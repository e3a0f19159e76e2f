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
        Self {
            connections: 10_000,
            per_user: None,
            per_database: None,
            per_client_address: None,
            per_member: None,
            queue: QueueConfig::default(),
        }
    }
}

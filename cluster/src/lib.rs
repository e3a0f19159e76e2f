//! What a cluster is: names, LSNs, keys and records in etcd (Patroni's layout), the immutable view of it, the source that
//! keeps the view current, and lease arithmetic.
//!
//! Knows nothing of clients' sockets or of PostgreSQL processes. [`view`], [`event`] and [`timing`] are pure: no clock, no I/O.

pub mod clock;
pub mod etcd;
pub mod event;
pub mod http;
pub mod key;
pub mod name;
pub mod record;
pub mod resolve;
pub mod source;
pub mod timing;
pub mod tls;
pub mod view;

/// The Patroni release whose keys, REST answers and rules this build speaks. Members publish it as their `version`, which
/// Patroni's members parse as dotted numbers and test against minimums.
pub const PATRONI_VERSION: &str = "4.1.4";

/// This build's own version, published beside [`PATRONI_VERSION`].
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

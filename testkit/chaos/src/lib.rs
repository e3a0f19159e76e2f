//! The chaos table: what clients feel, and what is lost, when processes, hosts and networks fail.
//!
//! Three members, three etcd members, a proxy and the clients are each on a host of their own: network namespaces on a
//! switch. Each case lets one thing happen under load, and is judged by what clients were told: the longest time without an
//! acknowledgement, acknowledged rows that the last leader does not hold, and acknowledgements by a former leader after the
//! next one's first.

pub mod book;
pub mod case;
pub mod clients;
pub mod cost;
pub mod fault;
pub mod judge;
pub mod load;
pub mod record;
pub mod stage;
pub mod table;
pub mod verdict;

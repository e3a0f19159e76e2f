//! Real parts for tests and benches: etcd, PostgreSQL, agents and proxies on one machine, faults, and the records by
//! which a test knows what its faults have done.
//!
//! A test takes a [`Site`], or a [`Cluster`] that has one, does what it does, and calls `pass`. Whatever it started is
//! ended in any case; what it wrote is kept, and the ends of the logs are printed, unless it passed.
//!
//! | variable | meaning |
//! |---|---|
//! | `PGHERD_BIN` | the binary to test, instead of `target/debug/pgherd` |
//! | `ETCD_BIN` | the etcd to run, instead of the one on `PATH` |
//! | `PGHERD_TEST_PG_BIN` | the directory of PostgreSQL's programs, instead of the newest that is installed |
//! | `PGHERD_TEST_PYTHON` | the Python environment with Patroni, instead of the one that `scripts/deps.sh tests` makes |
//! | `PGHERD_TEST_DRIVERS` | the Python environment with the drivers, likewise |
//! | `PGHERD_TEST_JDBC` | the jar of PostgreSQL's JDBC driver, instead of Debian's |
//! | `PGHERD_TEST_KEEP` | keep what passing tests wrote, too |
//! | `PGHERD_TEST_GAPS` | a file to which each ledger appends its line |

pub mod address;
pub mod certificates;
pub mod client;
pub mod cluster;
pub mod config;
pub mod drivers;
mod ending;
pub mod etcd;
pub mod haproxy;
pub mod holders;
pub mod http;
pub mod landing;
pub mod ledger;
pub mod load;
pub mod maintenance;
pub mod member;
pub mod mixed;
pub mod network;
pub mod patroni;
pub mod postgres;
pub mod process;
pub mod program;
#[cfg(test)]
mod scenarios;
pub mod site;
pub mod sql;
pub mod synchronous;
pub mod volume;
pub mod wait;
pub mod watch;
pub mod yaml;

pub use cluster::{Cluster, ClusterBuilder};
pub use etcd::Etcd;
pub use haproxy::HaProxy;
pub use holders::HolderWatch;
pub use landing::Landing;
pub use ledger::{Ledger, LedgerReport};
pub use load::Load;
pub use member::Member;
pub use mixed::{Mixed, MixedBuilder};
pub use network::Network;
pub use patroni::Patroni;
pub use postgres::Postgres;
pub use site::{Outcome, Site};
pub use sql::{Sql, SqlFailure};
pub use synchronous::{Commit, Promotions, SyncLoad, SyncRecord};
pub use volume::{Volume, VolumeKind};
pub use wait::{Seen, eventually, throughout};
pub use watch::{WatchReport, WriterWatch};

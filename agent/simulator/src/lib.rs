//! A whole cluster in one thread and in virtual time, from one seed: the real decisions, the real lease and the real fence of
//! up to five members, over models of etcd, network, clocks, processes and PostgreSQL.
//!
//! [`run`] draws a schedule of faults, lets them rage while an oracle that knows the rules looks on, makes everything whole,
//! and asks whether the cluster is well again. The same seed is the same run, to the last step. [`run_pair`] is for the
//! search of a small world: nothing is drawn, and two faults strike at given moments.
//!
//! What runs as it is shipped: `pgherd_agent::{decide, memory, lease::core, sync, failsafe}`, `observe::lease_seen`,
//! `pgherd_keeper::fence` and the keeper's steps of ending. The glue around them ([`act`], [`jobs`], [`upkeep`], [`lease`],
//! [`source`], [`health`]) does what the agent's own does, at the level of the models, and is where bugs are [`Planted`].

mod act;
mod agent;
mod client;
mod executor;
mod faults;
mod fitting;
mod health;
mod host;
mod jobs;
mod lease;
mod network;
mod observe;
mod oracle;
mod physics;
mod postgres;
mod queue;
mod random;
mod rpc;
mod run;
mod source;
mod store;
mod time;
mod upkeep;
mod world;

/// The keeper's own source: how PostgreSQL is ended is pure, and runs here as it is shipped.
#[path = "../../keeper/src/ending.rs"]
#[allow(dead_code, reason = "what the keeper alone asks for is no part of the model")]
mod ending;

/// The clock that it counts by.
mod clock {
    pub(crate) use pgherd_keeper::clock::Boottime;
}

pub use self::oracle::Violation;
pub use self::run::{Planted, Report, Setup, alphabet_len, run, run_pair};

//! One member of a cluster: observes, decides, acts; runs PostgreSQL; answers REST.
//!
//! [`run`] is the agent, a child of the keeper. [`decide`] is pure; [`lease`] renews on a thread of its own; [`jobs`] is
//! the long work; [`rest`] is what others ask.

pub mod config;
pub mod context;
pub mod cycle;
pub mod decide;
pub mod failsafe;
pub mod health;
pub mod jobs;
pub mod journal;
pub mod keeper;
pub mod lease;
pub mod live;
pub mod memory;
pub mod observation;
pub mod observe;
pub mod peers;
pub mod postgres;
pub mod record;
pub mod rest;
pub mod restart;
pub mod scripts;
pub mod slots;
pub mod status;
pub mod sync;
pub mod topology;
pub mod vigil;

mod run;

pub use self::run::{AgentError, run};

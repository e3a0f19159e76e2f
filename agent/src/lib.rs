//! One member of a cluster: observes, decides, acts; runs PostgreSQL; answers REST.

pub mod config;
pub mod status;

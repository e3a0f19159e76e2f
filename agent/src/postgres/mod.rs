//! All that touches PostgreSQL: its programs, its files, its configuration, SQL on it. Processes are the keeper's.

pub mod bootstrap;
pub mod clone;
pub mod control;
pub mod files;
pub mod forecast;
pub mod libraries;
mod linked;
pub mod locks;
pub mod passwords;
pub mod pending;
pub mod place;
pub mod programs;
pub mod rewind;
mod secure;
pub mod settings;
pub mod sql;
mod target;
pub mod upstream;

pub use self::control::{Control, ControlState, DataDir};
pub use self::programs::{Programs, ToolError};
pub use self::upstream::Upstream;

//! The keeper: a small process that holds the fence. PostgreSQL may be writable only while a deadline lies ahead, and
//! the keeper ends it when that passes, whatever has become of the agent that set it.
//!
//! Four processes take part. The **keeper** ([`run`]) is the parent of the others and of the postmaster, has one thread
//! and never waits for any of them. The **agent** decides, and speaks to the keeper through a [`KeeperLink`]. The
//! **postmaster** is PostgreSQL; all that descends from it is the instance. The **sentinel** ([`run_sentinel`]) knows
//! the deadline too, for the case that the keeper itself is frozen or killed.
//!
//! All times are moments on CLOCK_BOOTTIME ([`clock::Boottime`]), which go on while the machine is suspended.

pub mod clock;
pub mod protocol;

mod child;
mod ending;
mod error;
mod fence;
mod instance;
mod keeper;
mod leaving;
mod link;
mod log;
mod memo;
mod process;
mod requests;
mod seat;
mod sentinel;
mod signals;
mod wire;
mod word;

pub use error::KeeperError;
pub use keeper::{KeeperConfig, KeeperOutcome, run};
pub use link::{KeeperLink, LINK_ENV};
pub use sentinel::{SENTINEL_ENV, keeper_of_sentinel, run_sentinel};

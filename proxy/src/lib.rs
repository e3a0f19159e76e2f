//! From a client's socket to a member's socket: listeners, startup, routing, hold, relay, fence, cancel; page and metrics.
//!
//! Knows nothing of how a leader is made: it reads a view of the cluster, and the proof of how current that is.
//! [`route`], [`balance`], [`experience`], [`lag`], [`settle`], [`warrant`] and [`wire`] are pure: no clock, no socket, no log.

pub mod balance;
mod cancel;
pub mod config;
mod connect;
mod connection;
mod counters;
mod dial;
mod draw;
mod events;
pub mod experience;
mod fence;
mod handshake;
pub mod lag;
mod leaving;
mod listener;
mod look;
mod proxy;
mod refusal;
mod relay;
mod reload;
pub mod route;
mod sessions;
pub mod settle;
mod shared;
mod silence;
mod socket;
mod stats;
#[cfg(test)]
mod testing;
mod timer;
mod usher;
mod vouch;
pub mod warrant;
pub mod wire;
mod worker;

pub use config::{
    HoldConfig, LimitsConfig, ListenerConfig, ListenerRole, OnChange, ProxyConfig, ReadRules, SLOW_START, StatsConfig,
};
pub use listener::BindError;
pub use proxy::{Addresses, Proxy, ProxyError};
pub use reload::{ReloadError, Reloaded, Reloader};

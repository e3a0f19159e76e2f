//! From a client's socket to a member's socket: listeners, startup, routing, hold, relay, fence, cancel; page, metrics and
//! console.
//!
//! Knows nothing of how a leader is made: it reads a view of the cluster, and the proof of how current that is.
//! [`route`], [`balance`], [`experience`], [`lag`], [`settle`], [`warrant`] and [`wire`] are pure: no clock, no socket, no log.

mod admission;
pub mod balance;
mod cancel;
mod carrier;
mod client;
pub mod config;
mod connect;
mod connection;
mod console;
mod counters;
mod dial;
mod draw;
mod entrance;
mod events;
pub mod experience;
mod fence;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
mod gate;
mod handshake;
mod histogram;
mod label;
pub mod lag;
mod leaving;
mod listener;
mod listening;
mod look;
mod network;
mod panics;
mod peer;
mod proxy;
mod refusal;
mod relay;
mod reload;
pub mod route;
mod secure;
mod seldom;
mod sessions;
pub mod settle;
mod shared;
mod silence;
mod stats;
mod stream;
#[cfg(test)]
mod testing;
mod timer;
pub mod tls;
mod turn;
mod unix;
mod usher;
mod vouch;
mod waiting;
pub mod warrant;
pub mod wire;
mod worker;

pub use config::{
    CARRIED_AFTER, CompatMetrics, ConsoleConfig, ConsoleUser, HoldConfig, LimitsConfig, ListenerConfig, ListenerRole,
    OnChange, ProxyConfig, QueueConfig, ReadRules, SLOW_START, StatsConfig,
};
pub use console::{BadVerifier, ReloadAsked, ReloadRequests, Verifier};
pub use label::{ApplicationName, ApplicationNameError};
pub use listener::{BindError, Inherited};
pub use network::{Network, NetworkError};
pub use panics::watch_panics;
pub use pgherd_page::login::PageLogin;
pub use proxy::{Addresses, Proxy, ProxyError};
pub use reload::{ReloadError, Reloaded, Reloader};
pub use unix::{SOCKET_MODE, probe_unix};
pub use worker::FILES_PER_WORKER;

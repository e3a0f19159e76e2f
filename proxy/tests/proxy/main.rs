//! The proxy between real sockets: clients of the test, servers of the test, a view that the test publishes.

mod admission;
mod agents_tls;
mod balance;
mod cancel;
mod certificates;
mod fake;
mod fence;
mod hearsay;
mod hold;
mod hosts_tls;
mod leaving;
mod limits;
mod not_now;
mod page_tls;
mod relay;
mod reload;
mod roles;
mod server_tls;
mod silence;
mod startup;
mod surfaces;
mod tls;
mod tls_handshake;
mod turns;
mod unix;
mod vouch;

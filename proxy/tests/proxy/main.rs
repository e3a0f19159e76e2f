//! The proxy between real sockets: clients of the test, servers of the test, a view that the test publishes.

mod admission;
mod agents_tls;
mod balance;
mod browser;
mod cancel;
mod certificates;
#[allow(dead_code, reason = "each of the crates that share it uses a part")]
#[path = "../../../page/tests/browser/chromium.rs"]
mod chromium;
mod console;
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
mod scene;
mod server_tls;
mod silence;
mod startup;
mod surfaces;
mod tls;
mod tls_handshake;
#[allow(dead_code, reason = "each of the crates that share it uses a part")]
#[path = "../../../page/tests/browser/told.rs"]
mod told;
mod turns;
mod unix;
mod vouch;

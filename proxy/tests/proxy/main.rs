//! The proxy between real sockets: clients of the test, servers of the test, a view that the test publishes.

mod balance;
mod cancel;
mod fake;
mod fence;
mod hold;
mod leaving;
mod limits;
mod not_now;
mod relay;
mod reload;
mod roles;
mod silence;
mod startup;
mod surfaces;
mod vouch;

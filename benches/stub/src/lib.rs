//! A PostgreSQL server that costs almost nothing: no data, no processes, fixed answers. What is measured before it is then
//! what stands before it.
//!
//! Everybody is let in without a password. A query is answered by its text, simple or extended:
//!
//! | text | answer |
//! |---|---|
//! | `select ...` | one row of one column, `1` |
//! | `bulk MIB [ROW]` | rows of `ROW` bytes (1000 unless said), at least `MIB` MiB of them, in large writes |
//! | `bulk8k MIB [ROW]` | the same in writes of 8 KiB, as PostgreSQL does |
//! | `copy ... from stdin` | takes whatever comes until the client ends it |
//! | anything else | done, no rows |
//!
//! One thread, level-triggered epoll. A client that does not read is not read from either: it costs at most one chunk of
//! rows and what one read may ask for.

mod connection;
mod protocol;
mod server;

use std::net::TcpListener;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};

/// Listens on `address` and answers, for ever.
///
/// # Errors
/// When it cannot listen, or the kernel gives no epoll.
pub fn run(address: &str) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("listening on {address}"))?;
    serve(&listener, &AtomicBool::new(false))
}

/// Answers on `listener` until `stop` is set, which is looked at twenty times a second.
///
/// # Errors
/// When the kernel gives no epoll.
pub fn serve(listener: &TcpListener, stop: &AtomicBool) -> Result<()> {
    server::Server::new(listener)?.serve(stop)
}

#[cfg(test)]
mod tests;

//! Every reader of bytes from outside, as a function that takes any bytes at all and panics when a promise is broken: by a
//! panic of the reader itself, by reading too far, by an answer that depends on how the bytes were cut into pieces, or by
//! one that the wire crate, or the next proxy on the way, would not give.
//!
//! `make fuzz` lets libFuzzer look for such bytes. The tests here need no nightly compiler: they take the inputs that are
//! kept in `fuzz/corpus`, one file each, and mutations of them.

mod client;
mod cluster;
mod console;
#[cfg(test)]
mod mutation;
mod page;
mod server;
#[cfg(test)]
mod tests;
mod tls;

use std::cell::LazyCell;
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::{Builder, Runtime};

/// Far more than any reader takes for what is there already.
const PATIENCE: Duration = Duration::from_secs(10);

/// One reader and what it promises.
pub type Target = fn(&[u8]);

/// All of them, by the name of the directory that keeps their inputs.
pub const TARGETS: [(&str, Target); 15] = [
    ("first_packet", client::first_packet),
    ("opening", client::opening),
    ("opening_tls", tls::opening),
    ("application_name", client::application_name),
    ("proxy_header", client::proxy_header),
    ("certificate", client::certificate),
    ("refusal", client::refusal),
    ("startup_watch", server::startup_watch),
    ("tail", server::tail),
    ("first_answer", server::first_answer),
    ("channel_binding", server::channel_binding),
    ("view", cluster::view),
    ("agent", cluster::agent),
    ("page", page::request),
    ("console", console::messages),
];

/// Gives `input` to the target called `name`.
///
/// # Panics
/// When the target does, and when there is none of that name.
pub fn run(name: &str, input: &[u8]) {
    let found = TARGETS.iter().find(|(target, _)| *target == name);
    let Some((_, target)) = found else {
        panic!("there is no fuzz target {name:?}")
    };
    target(input);
}

/// The first byte, which says how a target is to take the rest.
fn choice(input: &[u8]) -> (usize, &[u8]) {
    input
        .split_first()
        .map_or((0, input), |(first, rest)| (usize::from(*first), rest))
}

/// A message of the server's: type, length and body.
fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    [&[kind][..], &length(4 + body.len()), body].concat()
}

/// A client's first packet: length, then the rest of it.
fn packet(rest: &[u8]) -> Bytes {
    [&length(4 + rest.len())[..], rest].concat().into()
}

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes()
}

/// Waits for what needs sockets. A reader that still waits after all there will ever be has come breaks a promise too.
fn wait<T>(future: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: LazyCell<Option<Runtime>> = const {
            LazyCell::new(|| Builder::new_current_thread().enable_all().build().ok())
        };
    }
    RUNTIME.with(|runtime| {
        let Some(runtime) = runtime.as_ref() else {
            panic!("no runtime")
        };
        match runtime.block_on(async { tokio::time::timeout(PATIENCE, future).await }) {
            Ok(output) => output,
            Err(_) => panic!("it still waits for more than there is"),
        }
    })
}

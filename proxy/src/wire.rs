//! The PostgreSQL protocol as far as the proxy speaks it. Nothing else imports the wire crate.
//!
//! Framing is ours: the wire crate's decoders read past a packet's declared end, and panic on some malformed messages, so
//! each gets exactly one whole packet, and only of the kinds that are known not to panic.

pub mod backend;
pub mod console;
pub mod error_response;
pub mod first_answer;
pub mod proxy_header;
pub mod sasl;
pub mod startup;

//! The operator's page: what it shows, how it looks, how it stays live, and who may act on it. Proxies serve it at
//! `/stats`, agents at `/ui`.
//!
//! Whoever serves it makes a [`model::State`]; everything here is made of that. Someone is paged at night and asks, in this
//! order: is it writable and for how long is that certain; who is suffering; what happened and whose fault is it; what may I
//! safely do. The page answers from top to bottom, without a script, and follows with one.
//!
//! Markup is written with maud, which is checked when it is compiled and escapes every text that is put into it.

pub mod acting;
pub mod headers;
pub mod live;
pub mod login;
pub mod model;
pub mod of_view;
mod picture;
pub mod render;
pub mod ring;
pub mod words;

#[cfg(test)]
mod fixtures;

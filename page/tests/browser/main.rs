//! The page in a browser. Who serves it has tests of its own; these modules serve them too.

#[allow(dead_code, reason = "each of the crates that share it uses a part")]
mod chromium;
mod looks;
#[allow(dead_code, reason = "each of the crates that share it uses a part")]
mod told;

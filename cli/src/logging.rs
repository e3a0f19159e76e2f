//! Log lines to standard error.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;

use crate::failure::Failure;

/// The variable that sets the level.
pub(crate) const LEVEL_VARIABLE: &str = "PGHERD_LOG";

/// Starts logging, at the level that the environment asks for.
///
/// # Errors
/// When it asks for something that is no level.
pub(crate) fn start() -> Result<(), Failure> {
    let wanted = std::env::var(LEVEL_VARIABLE).ok().filter(|wanted| !wanted.is_empty());
    let filter = EnvFilter::try_new(wanted.as_deref().unwrap_or("info")).map_err(|_| {
        Failure::configuration(format!(
            "{LEVEL_VARIABLE}: {:?} is not a log level; write error, warn, info, debug or trace",
            wanted.unwrap_or_default()
        ))
    })?;
    let started = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .with_target(false)
        .try_init();
    started.map_err(|error| Failure::Defect(format!("logging was started twice: {error}")))
}

//! Log lines to standard error.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::failure::Failure;

/// The variable that sets the level.
pub(crate) const LEVEL_VARIABLE: &str = "PGHERD_LOG";

/// Starts logging, at the level that the environment asks for.
///
/// # Errors
/// When it asks for something that is no level.
pub(crate) fn start() -> Result<(), Failure> {
    let wanted = std::env::var(LEVEL_VARIABLE).ok().filter(|wanted| !wanted.is_empty());
    let filter = targets(wanted.as_deref().unwrap_or("info")).ok_or_else(|| {
        Failure::configuration(format!(
            "{LEVEL_VARIABLE}: {:?} is not a log level; write error, warn, info, debug or trace",
            wanted.unwrap_or_default()
        ))
    })?;
    let lines = fmt::layer()
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .with_target(false);
    let started = tracing_subscriber::registry().with(filter).with(lines).try_init();
    started.map_err(|error| Failure::Defect(format!("logging was started twice: {error}")))
}

/// A level for everything, or for parts of the program, such as `info,pgherd_proxy=debug`. A word alone is a level: as a part's
/// name it would silence all the others.
fn targets(wanted: &str) -> Option<Targets> {
    let is_level = |word: &str| !word.is_empty() && word.parse::<LevelFilter>().is_ok();
    let is_meant = wanted
        .split(',')
        .all(|word| word.contains('=') || is_level(word.trim()));
    wanted.parse().ok().filter(|_| is_meant)
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::filter::LevelFilter;

    use super::*;

    #[test]
    fn levels_are_read_and_a_misspelt_one_silences_nothing() {
        for (wanted, level) in [
            ("info", Some(LevelFilter::INFO)),
            ("DEBUG", Some(LevelFilter::DEBUG)),
            ("warn,pgherd_proxy=debug", Some(LevelFilter::WARN)),
            ("inof", None),
            ("proxy=loud", None),
            ("", None),
        ] {
            assert_eq!(
                targets(wanted).and_then(|targets| targets.default_level()),
                level,
                "{wanted:?}"
            );
        }
    }
}

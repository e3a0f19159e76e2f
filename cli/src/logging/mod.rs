//! Log lines: to standard error, to journald where that is what standard error is, or to the files of the `log` section.

mod file;
pub(crate) mod format;
mod journald;

use std::io::{IsTerminal, stderr};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::{self, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

pub(crate) use self::file::Flush;
use self::file::Turns;
use self::format::{Format, Lines};
use self::journald::Journald;
use crate::failure::Failure;

/// The variable that sets the level.
pub(crate) const LEVEL_VARIABLE: &str = "PGHERD_LOG";

/// The `log` section.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct LogConfig {
    /// In our words.
    pub(crate) level: Option<&'static str>,
    /// Levels of single parts.
    pub(crate) loggers: Vec<(String, &'static str)>,
    /// Where the files are; standard error when there is none.
    pub(crate) dir: Option<PathBuf>,
    /// The files' mode.
    pub(crate) mode: Option<u32>,
    /// How many older files are kept.
    pub(crate) file_num: usize,
    /// How long a file gets, in bytes.
    pub(crate) file_size: u64,
    /// How many lines may wait to be written to a file.
    pub(crate) queue: usize,
    /// Whether a line is a JSON object.
    pub(crate) json: bool,
    /// What a line consists of.
    pub(crate) format: Option<Format>,
    /// How a time is written, in `strftime`'s words.
    pub(crate) dateformat: Option<String>,
    /// What every JSON line has besides.
    pub(crate) static_fields: Map<String, Value>,
}

/// What changes the level while a process runs.
pub(crate) type Levels = Box<dyn Fn(&LogConfig) -> Result<(), Failure> + Send + Sync>;

/// Whether the environment asks for a level that there is: it is told before anything is read.
///
/// # Errors
/// When it is none.
pub(crate) fn check_variable() -> Result<(), Failure> {
    filter(&LogConfig::default()).map(|_| ())
}

/// Starts logging to standard error, as configured but for the files: for a process that may not have threads.
///
/// # Errors
/// When the environment asks for something that is no level.
pub(crate) fn start_without_files(config: &LogConfig) -> Result<(), Failure> {
    let on_terminal = LogConfig {
        dir: None,
        ..config.clone()
    };
    start(&on_terminal).map(|_| ())
}

/// Starts logging. Lines are written for as long as the first of what is given lives; the second changes the level.
///
/// # Errors
/// When the environment asks for something that is no level, or the file cannot be opened.
pub(crate) fn start(config: &LogConfig) -> Result<(Flush, Levels), Failure> {
    let filter = filter(config)?;
    let Some(dir) = &config.dir else {
        let levels = to(config, filter, stderr, stderr().is_terminal())?;
        return Ok((Flush::nothing(), levels));
    };
    let turns = Turns {
        dir: dir.clone(),
        keep: config.file_num,
        bytes_max: config.file_size,
        mode: config.mode,
    };
    let opened = file::start(turns, config.queue.max(1)).map_err(|error| {
        Failure::configuration(format!(
            "log.dir: {:?} cannot be written to ({error}); write a directory that this user may write to",
            dir.display().to_string()
        ))
    });
    let (queue, flush) = opened?;
    let levels = to(config, filter, queue, false)?;
    Ok((flush, levels))
}

fn to<W>(config: &LogConfig, filter: Targets, writer: W, colours: bool) -> Result<Levels, Failure>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let (filter, handle) = reload::Layer::new(filter);
    let filtered = tracing_subscriber::registry().with(filter);
    let base = fmt::layer().with_writer(writer).with_ansi(colours).with_target(false);
    let is_ours = !config.json && config.format.is_none() && config.dateformat.is_none() && config.dir.is_none();
    let journald = if is_ours && journald::has_stderr() {
        Journald::connect(Path::new(journald::SOCKET)).ok()
    } else {
        None
    };
    let started = if let Some(journald) = journald {
        filtered.with(journald).try_init()
    } else if is_ours {
        filtered.with(base).try_init()
    } else {
        let format = config.format.clone();
        let lines = Lines {
            format: format.unwrap_or_else(|| Format::patronis(config.json)),
            dateformat: config.dateformat.clone(),
            static_fields: config.static_fields.clone(),
        };
        filtered.with(base.event_format(lines)).try_init()
    };
    started.map_err(started_twice)?;
    Ok(Box::new(move |config: &LogConfig| {
        handle.reload(self::filter(config)?).map_err(cannot_change)
    }))
}

fn started_twice(error: impl std::fmt::Display) -> Failure {
    Failure::Defect(format!("logging was started twice: {error}"))
}

fn cannot_change(error: impl std::fmt::Display) -> Failure {
    Failure::Defect(format!("changing the log level: {error}"))
}

/// The environment's level goes over the configuration's.
fn filter(config: &LogConfig) -> Result<Targets, Failure> {
    let wanted = std::env::var(LEVEL_VARIABLE).ok().filter(|wanted| !wanted.is_empty());
    let Some(wanted) = wanted else {
        return Ok(configured(config));
    };
    targets(&wanted).ok_or_else(|| {
        Failure::configuration(format!(
            "{LEVEL_VARIABLE}: {wanted:?} is not a log level; write error, warn, info, debug or trace"
        ))
    })
}

/// The `log` section's levels; its reader has refused words that are none.
fn configured(config: &LogConfig) -> Targets {
    let level = |word: &str| word.parse().unwrap_or(LevelFilter::INFO);
    let parts = config.loggers.iter().map(|(name, word)| (name.clone(), level(word)));
    Targets::new()
        .with_default(level(config.level.unwrap_or("info")))
        .with_targets(parts)
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
    use tracing::Level;

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

    #[test]
    fn a_parts_own_level_goes_over_that_of_all() {
        let targets = configured(&LogConfig {
            level: Some("warn"),
            loggers: vec![("pgherd_proxy".to_owned(), "debug")],
            ..LogConfig::default()
        });
        assert!(targets.would_enable("pgherd_proxy::session", &Level::DEBUG));
        assert!(!targets.would_enable("pgherd_agent", &Level::INFO));
        assert!(configured(&LogConfig::default()).would_enable("pgherd_agent", &Level::INFO));
    }
}

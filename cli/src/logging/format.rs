//! What a log line looks like, in the words of Patroni's `log.format`.

use std::fmt::{self, Write};
use std::time::SystemTime;

use pgherd_cluster::clock::wall_now;
use serde_json::{Map, Value};
use tracing::field::{Field as EventField, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// A part of a line that differs from line to line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    Time,
    Level,
    Message,
    Name,
    Process,
    Thread,
    File,
    Line,
}

impl Field {
    /// By Python's name.
    pub(crate) fn of(name: &str) -> Option<Self> {
        Some(match name {
            "asctime" => Self::Time,
            "levelname" => Self::Level,
            "message" => Self::Message,
            "name" | "module" => Self::Name,
            "process" => Self::Process,
            "threadName" | "thread" => Self::Thread,
            "filename" | "pathname" => Self::File,
            "lineno" => Self::Line,
            _ => return None,
        })
    }

    /// Python's name.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Time => "asctime",
            Self::Level => "levelname",
            Self::Message => "message",
            Self::Name => "name",
            Self::Process => "process",
            Self::Thread => "threadName",
            Self::File => "filename",
            Self::Line => "lineno",
        }
    }
}

/// A part of a line of text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    Text(String),
    /// With its least width, to the left when negative.
    Field(Field, i32),
}

/// What lines consist of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Pieces(Vec<Piece>),
    /// Fields of a JSON object with the names that they have there.
    Fields(Vec<(Field, String)>),
}

impl Format {
    /// Patroni's own.
    pub(crate) fn patronis(json: bool) -> Self {
        let text = |text: &str| Piece::Text(text.to_owned());
        let named = |field: Field| (field, field.name().to_owned());
        if json {
            return Self::Fields([Field::Time, Field::Level, Field::Message].map(named).to_vec());
        }
        Self::Pieces(vec![
            Piece::Field(Field::Time, 0),
            text(" "),
            Piece::Field(Field::Level, 0),
            text(": "),
            Piece::Field(Field::Message, 0),
        ])
    }
}

/// Writes lines.
pub(super) struct Lines {
    pub(super) format: Format,
    pub(super) dateformat: Option<String>,
    pub(super) static_fields: Map<String, Value>,
}

/// A time as UTC, in `strftime`'s words, or as Python's logging shows it; nothing when the words cannot be used.
pub(crate) fn time(at: SystemTime, format: Option<&str>) -> Option<String> {
    let at = jiff::Timestamp::try_from(at).ok()?.to_zoned(jiff::tz::TimeZone::UTC);
    match format {
        Some(format) => jiff::fmt::strtime::format(format, &at).ok(),
        None => {
            let seconds = jiff::fmt::strtime::format("%Y-%m-%d %H:%M:%S", &at).ok()?;
            Some(format!("{seconds},{:03}", at.millisecond()))
        }
    }
}

fn level_name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "ERROR",
        Level::WARN => "WARNING",
        Level::INFO => "INFO",
        Level::DEBUG | Level::TRACE => "DEBUG",
    }
}

/// The message of an event, with its other fields after it.
#[derive(Default)]
struct Said {
    message: String,
    rest: String,
}

impl Visit for Said {
    fn record_debug(&mut self, field: &EventField, value: &dyn fmt::Debug) {
        // Writing to a text cannot fail.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.rest, " {}={value:?}", field.name())
        };
    }
}

impl Lines {
    fn value(&self, field: Field, event: &Event<'_>) -> String {
        let meta = event.metadata();
        match field {
            Field::Time => time(wall_now(), self.dateformat.as_deref()).unwrap_or_default(),
            Field::Level => level_name(*meta.level()).to_owned(),
            Field::Message => {
                let mut said = Said::default();
                event.record(&mut said);
                said.message + &said.rest
            }
            Field::Name => meta.target().to_owned(),
            Field::Process => std::process::id().to_string(),
            Field::Thread => std::thread::current().name().unwrap_or_default().to_owned(),
            Field::File => meta.file().unwrap_or_default().to_owned(),
            Field::Line => meta.line().map(|line| line.to_string()).unwrap_or_default(),
        }
    }

    fn line(&self, event: &Event<'_>) -> String {
        match &self.format {
            Format::Pieces(pieces) => {
                let mut line = String::new();
                for piece in pieces {
                    match piece {
                        Piece::Text(text) => line.push_str(text),
                        Piece::Field(field, width) => padded(&mut line, &self.value(*field, event), *width),
                    }
                }
                line
            }
            Format::Fields(fields) => {
                let mut object = Map::new();
                for (field, name) in fields {
                    object.insert(name.clone(), self.value(*field, event).into());
                }
                object.extend(self.static_fields.clone());
                Value::Object(object).to_string()
            }
        }
    }
}

fn padded(line: &mut String, value: &str, width: i32) {
    let missing = usize::try_from(width.unsigned_abs())
        .unwrap_or_default()
        .saturating_sub(value.chars().count());
    let blanks = " ".repeat(missing);
    let (before, after) = if width < 0 {
        ("", blanks.as_str())
    } else {
        (blanks.as_str(), "")
    };
    line.push_str(before);
    line.push_str(value);
    line.push_str(after);
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        writeln!(writer, "{}", self.line(event))
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn times_are_pythons_unless_said_otherwise() {
        let at = UNIX_EPOCH + Duration::from_millis(1_795_322_013_007);
        assert_eq!(time(at, None).as_deref(), Some("2026-11-22 04:33:33,007"));
        assert_eq!(time(at, Some("%H:%M")).as_deref(), Some("04:33"));
        assert_eq!(time(at, Some("%!")), None);
    }

    #[test]
    fn fields_are_padded_as_asked() {
        let mut line = String::new();
        padded(&mut line, "INFO", -6);
        padded(&mut line, "x", 3);
        padded(&mut line, "long", 2);
        assert_eq!(line, "INFO    xlong");
    }
}

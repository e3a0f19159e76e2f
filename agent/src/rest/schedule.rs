//! A time that somebody schedules something for, and why not. Pure.

use jiff::civil::DateTime;
use jiff::fmt::temporal::Pieces;
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};

/// Why not, for the one who asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) code: u16,
    pub(super) text: String,
}

impl Refusal {
    pub(super) fn new(code: u16, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
        }
    }
}

/// A time in the future, and the same with its offset as ISO 8601. `what` is to be done then.
pub(super) fn parse(text: &str, what: &str, now: Timestamp) -> Result<(Timestamp, String), Refusal> {
    let garbage = || {
        let text = "Unable to parse scheduled timestamp. It should be in an unambiguous format, e.g. ISO 8601";
        Refusal::new(422, text)
    };
    let pieces = Pieces::parse(text.trim()).map_err(|_| garbage())?;
    let Some(offset) = pieces.to_numeric_offset() else {
        return Err(Refusal::new(
            400,
            format!("Timezone information is mandatory for the scheduled {what}"),
        ));
    };
    let civil = DateTime::from_parts(pieces.date(), pieces.time().unwrap_or_default());
    let at = civil.to_zoned(TimeZone::fixed(offset)).map_err(|_| garbage())?;
    if at.timestamp() < now {
        return Err(Refusal::new(422, format!("Cannot schedule {what} in the past")));
    }
    Ok((at.timestamp(), iso(&at)))
}

/// As Python writes it: microseconds only when there are any.
fn iso(at: &Zoned) -> String {
    let format = match at.subsec_nanosecond() / 1000 {
        0 => "%Y-%m-%dT%H:%M:%S%:z",
        _ => "%Y-%m-%dT%H:%M:%S.%6f%:z",
    };
    at.strftime(format).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schedule_keeps_its_offset() {
        let now = "2026-11-21T00:00:00Z".parse().expect("a time");
        let stored = |text: &str| parse(text, "restart", now).map(|(_, text)| text);
        assert_eq!(
            stored("2040-01-01T00:00:00+00:00").as_deref(),
            Ok("2040-01-01T00:00:00+00:00")
        );
        assert_eq!(
            stored("2040-01-01T00:00:00Z").as_deref(),
            Ok("2040-01-01T00:00:00+00:00")
        );
        assert_eq!(
            stored("2040-01-01 12:30+02:00").as_deref(),
            Ok("2040-01-01T12:30:00+02:00")
        );
        assert_eq!(
            stored("2040-01-01T00:00:00.25-0330").as_deref(),
            Ok("2040-01-01T00:00:00.250000-03:30")
        );
    }
}

//! Times that an operator types. Pure.

use jiff::Zoned;
use jiff::civil::DateTime;
use jiff::fmt::temporal::Pieces;
use jiff::tz::TimeZone;

use crate::failure::Failure;

/// Nothing for now; else ISO 8601 with an offset: the one given, or that of `zone`.
///
/// # Errors
/// When it is no time.
pub(crate) fn parse(text: &str, zone: &TimeZone) -> Result<Option<String>, Failure> {
    let text = text.trim();
    if text.is_empty() || text.eq_ignore_ascii_case("now") {
        return Ok(None);
    }
    let read = || {
        let pieces = Pieces::parse(text).ok()?;
        let civil = DateTime::from_parts(pieces.date(), pieces.time().unwrap_or_default());
        let zone = pieces.to_numeric_offset().map_or_else(|| zone.clone(), TimeZone::fixed);
        civil.to_zoned(zone).ok()
    };
    let at = read().ok_or_else(|| {
        Failure::Refused(format!(
            "Unable to parse scheduled timestamp ({text}). It should be in an unambiguous format (e.g. ISO 8601)"
        ))
    })?;
    Ok(Some(iso(&at)))
}

/// As Python writes it: microseconds only when there are any.
fn iso(at: &Zoned) -> String {
    let format = match at.subsec_nanosecond() / 1000 {
        0 => "%Y-%m-%dT%H:%M:%S%:z",
        _ => "%Y-%m-%dT%H:%M:%S.%6f%:z",
    };
    at.strftime(format).to_string()
}

/// An hour from now, to the minute, as an example in a question.
pub(crate) fn example() -> String {
    let now = jiff::Timestamp::try_from(pgherd_cluster::clock::wall_now()).unwrap_or_default();
    let then = now.to_zoned(TimeZone::system());
    let then = then.checked_add(jiff::Span::new().hours(1)).unwrap_or(then);
    then.strftime("%Y-%m-%dT%H:%M").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_without_an_offset_is_this_machines() {
        let zone = TimeZone::fixed(jiff::tz::offset(2));
        for (text, expected) in [
            ("", None),
            ("now", None),
            ("2040-01-01T00:00", Some("2040-01-01T00:00:00+02:00")),
            ("2040-01-01 00:00:30", Some("2040-01-01T00:00:30+02:00")),
            ("2040-01-01T00:00Z", Some("2040-01-01T00:00:00+00:00")),
            ("2040-01-01T00:00:00.25-03:30", Some("2040-01-01T00:00:00.250000-03:30")),
        ] {
            assert_eq!(parse(text, &zone).expect(text).as_deref(), expected, "{text}");
        }
        let error = parse("tomorrow", &zone).expect_err("no time");
        assert!(
            error
                .to_string()
                .starts_with("Unable to parse scheduled timestamp (tomorrow).")
        );
    }
}

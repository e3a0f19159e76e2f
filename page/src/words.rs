//! Numbers as people say them.

use std::time::{Duration, SystemTime};

/// As `2026-01-02T03:04:05.678Z`.
#[must_use]
pub fn utc(time: SystemTime) -> String {
    match jiff::Timestamp::try_from(time) {
        Ok(time) => format!("{time:.3}"),
        Err(_) => "unknown".to_owned(), // A clock set to a year that no calendar has.
    }
}

/// A duration in its two largest units.
#[must_use]
pub fn span(seconds: f64) -> String {
    if seconds < 10.0 {
        return format!("{seconds:.1} s");
    }
    let whole = Duration::from_secs_f64(seconds.min(1e12)).as_secs();
    match (whole / 86_400, whole / 3600 % 24, whole / 60 % 60, whole % 60) {
        (0, 0, 0, seconds) => format!("{seconds} s"),
        (0, 0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (0, hours, minutes, _) => format!("{hours} h {minutes} min"),
        (days, hours, _, _) => format!("{days} d {hours} h"),
    }
}

/// How long ago something was, in its largest unit: it changes seldom, so that a page with many of these does too.
#[must_use]
pub fn ago(seconds: f64) -> String {
    let whole = Duration::from_secs_f64(seconds.clamp(0.0, 1e12)).as_secs();
    match whole {
        0..5 => "just now".to_owned(),
        5..60 => format!("{} s ago", whole / 5 * 5),
        60..3600 => format!("{} min ago", whole / 60),
        3600..86_400 => format!("{} h ago", whole / 3600),
        _ => format!("{} d ago", whole / 86_400),
    }
}

/// A size with three digits at least, such as `1.25 MB`; thousands, as in PostgreSQL's tools for the log.
#[must_use]
pub fn bytes(bytes: f64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = match value {
        _ if unit == 0 => 0,
        value if value < 9.995 => 2,
        value if value < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {}", units.get(unit).copied().unwrap_or_default())
}

/// The same of a whole number.
#[must_use]
pub fn size(count: u64) -> String {
    bytes(as_f64(count))
}

/// Exact up to 2^53, which is beyond what anybody reads in three digits or sees in a picture.
pub(crate) const fn as_f64(value: u64) -> f64 {
    value as f64
}

/// `1 client`, `2 clients`.
#[must_use]
pub fn counted(count: impl Into<u64>, one: &str) -> String {
    match count.into() {
        1 => format!("1 {one}"),
        count => format!("{count} {one}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_told_in_their_two_largest_units() {
        let cases = [
            (0.04, "0.0 s"),
            (9.96, "10.0 s"),
            (59.0, "59 s"),
            (61.0, "1 min 1 s"),
            (7_384.0, "2 h 3 min"),
            (273_600.0, "3 d 4 h"),
        ];
        for (seconds, text) in cases {
            assert_eq!(span(seconds), text);
        }
    }

    #[test]
    fn the_past_is_told_in_one_unit() {
        let cases = [
            (0.0, "just now"),
            (13.0, "10 s ago"),
            (61.0, "1 min ago"),
            (7_384.0, "2 h ago"),
            (273_600.0, "3 d ago"),
        ];
        for (seconds, text) in cases {
            assert_eq!(ago(seconds), text);
        }
    }

    #[test]
    fn sizes_have_the_unit_that_leaves_few_digits() {
        let cases = [
            (0.0, "0 B"),
            (999.0, "999 B"),
            (1_000.0, "1.00 kB"),
            (999_600.0, "1.00 MB"),
            (16_777_216.0, "16.8 MB"),
            (5.4e15, "5400 TB"),
        ];
        for (size, text) in cases {
            assert_eq!(bytes(size), text);
        }
    }

    #[test]
    fn times_are_utc() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_767_323_045_678);
        assert_eq!(utc(time), "2026-01-02T03:04:05.678Z");
    }
}

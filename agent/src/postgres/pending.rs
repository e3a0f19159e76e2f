//! Which parameters only a restart puts in force: what is configured, compared with what runs. Pure, but for the questions.
//!
//! PostgreSQL itself flags what it found in its files and could not change. What is passed on the command line it does not
//! look for there, so those are compared here, in the units that PostgreSQL keeps them in.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::programs::ToolError;
use super::sql::{Row, Sql, ask_once, literal};

const ANSWER_MAX: Duration = Duration::from_secs(2);

/// Tells one state of the server's parameters from another: when its files were last read, and when it was started.
///
/// # Errors
/// When the server does not answer.
pub async fn print(sql: &Sql) -> Result<String, ToolError> {
    let rows = sql
        .ask("asking when the configuration was read", PRINT, ANSWER_MAX)
        .await?;
    Ok(first(rows))
}

/// The same for sessions that begin now: ours may have read the files a moment before the server itself.
///
/// # Errors
/// When the server does not answer.
pub async fn print_anew(sql: &Sql) -> Result<String, ToolError> {
    let what = "asking when the configuration was read";
    Ok(first(ask_once(&sql.target(), what, PRINT, ANSWER_MAX).await?))
}

const PRINT: &str = "SELECT pg_conf_load_time()::text || ' ' || pg_postmaster_start_time()::text";

fn first(rows: Vec<Row>) -> String {
    rows.into_iter().flatten().flatten().next().unwrap_or_default()
}

/// The parameters whose value waits for a restart, as members publish them: `{name: {old_value, new_value}}`.
///
/// # Errors
/// When the server does not answer.
pub async fn ask(sql: &Sql, wanted: &BTreeMap<String, String>) -> Result<Map<String, Value>, ToolError> {
    let question = "SELECT name, setting, coalesce(unit, ''), vartype, pending_restart, current_setting(name) \
                    FROM pg_settings WHERE context = 'postmaster'";
    let rows = sql.ask("asking for pending changes", question, ANSWER_MAX).await?;
    let mut found = Map::new();
    for parameter in rows.iter().filter_map(Parameter::of) {
        let ours = wanted.get(parameter.name);
        let new = match ours {
            Some(value) if parameter.is(value) => continue,
            Some(value) => value.clone(),
            None if parameter.flagged => in_files(sql, parameter.name).await?,
            None => continue,
        };
        // One that a file no longer sets is flagged, also where it was set to its default.
        if parameter.is(&new) {
            continue;
        }
        found.insert(
            parameter.name.to_owned(),
            json!({"old_value": parameter.shown, "new_value": new}),
        );
    }
    Ok(found)
}

/// What the files say, the last one to say so; PostgreSQL's default when they say it no more.
async fn in_files(sql: &Sql, name: &str) -> Result<String, ToolError> {
    let question = format!(
        "SELECT coalesce((SELECT setting FROM pg_file_settings WHERE name = {name} ORDER BY seqno DESC LIMIT 1), \
         (SELECT boot_val FROM pg_settings WHERE name = {name}))",
        name = literal(name)
    );
    let rows = sql.ask("asking for a pending value", &question, ANSWER_MAX).await?;
    Ok(first(rows))
}

/// Values that stand for what PostgreSQL chooses itself, which is what it then shows.
const AUTOMATIC: [(&str, &str); 4] = [
    ("wal_buffers", "-1"),
    ("commit_timestamp_buffers", "0"),
    ("subtransaction_buffers", "0"),
    ("transaction_buffers", "0"),
];

/// A row of `pg_settings`.
struct Parameter<'a> {
    name: &'a str,
    /// In `unit`.
    setting: &'a str,
    unit: &'a str,
    kind: &'a str,
    flagged: bool,
    /// As a person reads it.
    shown: &'a str,
}

impl<'a> Parameter<'a> {
    fn of(row: &'a Row) -> Option<Self> {
        let text = |index: usize| row.get(index).and_then(Option::as_deref);
        Some(Self {
            name: text(0)?,
            setting: text(1)?,
            unit: text(2)?,
            kind: text(3)?,
            flagged: text(4) == Some("t"),
            shown: text(5)?,
        })
    }

    /// Whether it has this value, as written in a configuration.
    fn is(&self, wanted: &str) -> bool {
        let wanted = wanted.trim();
        if AUTOMATIC.contains(&(self.name, wanted)) {
            return true;
        }
        match self.kind {
            "bool" => boolean(wanted).is_none_or(|wanted| Some(wanted) == boolean(self.setting)),
            "integer" | "real" => {
                let (wanted, setting) = (number(wanted, self.unit), self.setting.parse::<f64>());
                match (wanted, setting) {
                    (Some(wanted), Ok(setting)) => (wanted - setting).abs() <= f64::EPSILON * setting.abs().max(1.0),
                    // What cannot be read is PostgreSQL's to refuse.
                    _ => true,
                }
            }
            // Those that are more than yes and no know these words all the same.
            "enum" => {
                let same = boolean(wanted).is_some() && boolean(wanted) == boolean(self.setting);
                same || wanted.eq_ignore_ascii_case(self.setting)
            }
            _ if self.name == "listen_addresses" => addresses(wanted).eq(addresses(self.setting)),
            _ if self.name.ends_with("_file") => Path::new(wanted) == Path::new(self.setting),
            _ => wanted == self.setting,
        }
    }
}

fn addresses(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').map(str::trim)
}

/// PostgreSQL takes any beginning of these words that is not the beginning of another.
fn boolean(text: &str) -> Option<bool> {
    let text = text.to_ascii_lowercase();
    let begins = |word: &str, least: usize| text.len() >= least && word.starts_with(text.as_str());
    if text == "1" || begins("true", 1) || begins("yes", 1) || begins("on", 2) {
        Some(true)
    } else if text == "0" || begins("false", 1) || begins("no", 1) || begins("off", 2) {
        Some(false)
    } else {
        None
    }
}

/// A number as PostgreSQL keeps it: in `unit`, which may be several of one, such as `8kB`.
fn number(text: &str, unit: &str) -> Option<f64> {
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return i32::from_str_radix(hex, 16).ok().map(f64::from);
    }
    let end = text
        .find(|c: char| !c.is_ascii_digit() && !matches!(c, '.' | '-' | '+'))
        .unwrap_or(text.len());
    let (digits, written) = text.split_at(end);
    let octal = digits
        .strip_prefix('0')
        .filter(|rest| !rest.is_empty() && !rest.contains('.'));
    let value: f64 = match octal {
        Some(rest) => f64::from(i32::from_str_radix(rest, 8).ok()?),
        None => digits.parse().ok()?,
    };
    let written = written.trim();
    if written.is_empty() {
        return Some(value);
    }
    let times = unit.find(|c: char| !c.is_ascii_digit()).unwrap_or(0);
    let (count, name) = unit.split_at(times);
    let count: f64 = if count.is_empty() { 1.0 } else { count.parse().ok()? };
    let (family, size) = size_of(written)?;
    let (own_family, own_size) = size_of(name)?;
    // Rounded to whole ones of the unit, as PostgreSQL does for whole numbers; where it keeps fractions, it keeps these.
    let converted = value * size / (own_size * count);
    (family == own_family).then(|| if converted > 16.0 { converted.round() } else { converted })
}

/// Units of memory in bytes, of time in microseconds.
fn size_of(unit: &str) -> Option<(char, f64)> {
    Some(match unit {
        "B" => ('m', 1.0),
        "kB" => ('m', 1024.0),
        "MB" => ('m', 1024.0 * 1024.0),
        "GB" => ('m', 1024.0 * 1024.0 * 1024.0),
        "TB" => ('m', 1024.0 * 1024.0 * 1024.0 * 1024.0),
        "us" => ('t', 1.0),
        "ms" => ('t', 1e3),
        "s" => ('t', 1e6),
        "min" => ('t', 60e6),
        "h" => ('t', 3600e6),
        "d" => ('t', 86400e6),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is(kind: &str, unit: &str, setting: &str, wanted: &str) -> bool {
        let parameter = Parameter {
            name: "x",
            setting,
            unit,
            kind,
            flagged: false,
            shown: setting,
        };
        parameter.is(wanted)
    }

    #[test]
    fn values_are_compared_in_the_units_that_postgresql_keeps_them_in() {
        for (kind, unit, setting, same, other) in [
            ("integer", "", "100", "100", "101"),
            ("integer", "8kB", "16384", "128MB", "129MB"),
            ("integer", "8kB", "16384", "16384", "128"),
            ("integer", "kB", "1048576", "1GB", "1MB"),
            ("integer", "MB", "80", "80MB", "80kB"),
            ("integer", "s", "300", "5min", "5s"),
            ("integer", "", "511", "0777", "777"),
            ("integer", "", "255", "0xff", "255kB"),
            ("integer", "ms", "-1", "-1", "0"),
            ("real", "ms", "0.5", "500us", "0.6"),
            ("bool", "", "on", "true", "off"),
            ("bool", "", "off", "no", "1"),
            ("enum", "", "logical", "LOGICAL", "replica"),
            ("enum", "", "on", "true", "always"),
            ("string", "", "a,b", "a,b", "a"),
        ] {
            assert!(is(kind, unit, setting, same), "{setting} {unit} is {same}");
            // A unit that does not fit is PostgreSQL's to refuse, and no reason for a restart.
            let differs = !is(kind, unit, setting, other);
            assert_eq!(differs, other != "255kB", "{setting} {unit} is not {other}");
        }
    }

    #[test]
    fn addresses_are_the_same_however_their_list_is_written() {
        let parameter = Parameter {
            name: "listen_addresses",
            setting: "10.0.0.1, ::1",
            unit: "",
            kind: "string",
            flagged: false,
            shown: "",
        };
        assert!(parameter.is("10.0.0.1,::1") && !parameter.is("10.0.0.1"));
    }

    #[test]
    fn a_file_is_the_same_however_its_path_is_written() {
        let parameter = Parameter {
            name: "hba_file",
            setting: "/data//pg_hba.conf",
            unit: "",
            kind: "string",
            flagged: false,
            shown: "",
        };
        assert!(parameter.is("/data/pg_hba.conf") && !parameter.is("/data/other.conf"));
    }
}

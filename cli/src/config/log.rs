//! The `log` section: where log lines go, which ones, and what they look like.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::section::Section;
use super::value;
use crate::logging::LogConfig;
use crate::logging::format::{Field, Format, Piece};

/// Patroni's words for levels, and ours.
const LEVELS: [(&str, &str); 7] = [
    ("debug", "debug"),
    ("info", "info"),
    ("warning", "warn"),
    ("warn", "warn"),
    ("error", "error"),
    ("critical", "error"),
    ("trace", "trace"),
];
/// How long a file gets before the next is begun, and how many older ones are kept: Patroni's.
const FILE_SIZE: u64 = 25_000_000;
const FILE_NUM: usize = 4;
/// How many lines may wait to be written.
const QUEUE: usize = 1000;

/// Reads the section.
pub(crate) fn read(section: &Section<'_>) -> LogConfig {
    let number = |key: &str, least: i64| {
        section
            .integer(key, least)
            .and_then(|number| usize::try_from(number).ok())
    };
    section.text("traceback_level"); // For its finding: there are no tracebacks.
    let (json, format) = format(section);
    LogConfig {
        level: section.text("level").and_then(|word| level(section, "level", &word)),
        loggers: loggers(section),
        dir: section.text("dir").map(PathBuf::from),
        mode: mode(section),
        file_num: number("file_num", 0).unwrap_or(FILE_NUM),
        file_size: section.size("file_size").unwrap_or(FILE_SIZE),
        queue: number("max_queue_size", 1).unwrap_or(QUEUE),
        json,
        format,
        dateformat: dateformat(section),
        static_fields: static_fields(section),
    }
}

fn level(section: &Section<'_>, key: &str, word: &str) -> Option<&'static str> {
    let known = LEVELS.iter().find(|(known, _)| known.eq_ignore_ascii_case(word));
    if known.is_none() {
        section.error(
            key,
            format!("{word:?} is not a log level; write DEBUG, INFO, WARNING, ERROR or CRITICAL"),
        );
    }
    known.map(|(_, ours)| *ours)
}

/// Levels of single parts. Patroni's parts are modules of Python; ours that one may know by name are our crates.
fn loggers(section: &Section<'_>) -> Vec<(String, &'static str)> {
    let loggers = section.section("loggers");
    let mut read = Vec::new();
    for (name, found) in loggers.entries() {
        let Some(level) = found.as_str().and_then(|word| level(&loggers, name, word)) else {
            continue;
        };
        if name.starts_with("pgherd") {
            read.push((name.clone(), level));
        } else {
            loggers.warn(
                name,
                "has no effect: pgherd's parts are pgherd_agent, pgherd_proxy, pgherd_cluster and pgherd",
            );
        }
    }
    read
}

/// YAML reads 0644 as a number in octal; a text is taken for octal too.
fn mode(section: &Section<'_>) -> Option<u32> {
    let found = section.get("mode")?;
    let read = match found {
        Value::Number(number) => number.as_u64().and_then(|number| u32::try_from(number).ok()),
        Value::String(text) => u32::from_str_radix(text.trim_start_matches("0o"), 8).ok(),
        _ => None,
    };
    let read = read.filter(|mode| *mode <= 0o777);
    if read.is_none() {
        section.unusable("mode", found, "a file's mode", "one such as 0644");
    }
    read
}

fn format(section: &Section<'_>) -> (bool, Option<Format>) {
    let json = match section.text("type").as_deref() {
        None | Some("plain") => false,
        Some("json") => true,
        Some(other) => {
            section.error("type", format!("{other:?} is not known; write plain or json"));
            false
        }
    };
    let format = match section.get("format") {
        None => None,
        Some(Value::String(text)) if json => Some(Format::Fields(names(section, text))),
        Some(Value::String(text)) => Some(Format::Pieces(pieces(section, text))),
        Some(Value::Array(items)) if json => Some(Format::Fields(
            items.iter().flat_map(|item| field(section, item)).collect(),
        )),
        Some(other) => {
            let fix = if json {
                "a list of fields"
            } else {
                "one text, such as '%(asctime)s %(levelname)s: %(message)s'"
            };
            section.unusable("format", other, "a format", fix);
            None
        }
    };
    (json, format)
}

/// A field of a JSON line: its name, or `{name: as what}`.
fn field(section: &Section<'_>, item: &Value) -> Vec<(Field, String)> {
    let named = |name: &str, shown: &str| {
        let field = Field::of(name);
        if field.is_none() {
            section.warn("format", format!("{name:?} is not known, and left out"));
        }
        field.map(|field| (field, shown.to_owned()))
    };
    match item {
        Value::String(name) => named(name, name).into_iter().collect(),
        Value::Object(map) => map
            .iter()
            .filter_map(|(name, shown)| named(name, &value::text(shown)?))
            .collect(),
        other => {
            section.unusable("format", other, "a field", "- asctime, or - asctime: '@timestamp'");
            Vec::new()
        }
    }
}

fn names(section: &Section<'_>, text: &str) -> Vec<(Field, String)> {
    let fields = pieces(section, text).into_iter().filter_map(|piece| match piece {
        Piece::Field(field, _) => Some((field, field.name().to_owned())),
        Piece::Text(_) => None,
    });
    fields.collect()
}

/// Python's `%(name)s`, with a width as in `%(levelname)-8s`, and `%%`.
fn pieces(section: &Section<'_>, text: &str) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('%') {
        let (before, after) = rest.split_at(at);
        if !before.is_empty() {
            pieces.push(Piece::Text(before.to_owned()));
        }
        if let Some(after) = after.strip_prefix("%%") {
            pieces.push(Piece::Text("%".to_owned()));
            rest = after;
            continue;
        }
        let parsed = after.strip_prefix("%(").and_then(|inner| {
            let (name, tail) = inner.split_once(')')?;
            let kind = tail.find(|c: char| c.is_ascii_alphabetic())?;
            let (width, tail) = tail.split_at(kind);
            Some((name, width.parse::<i32>().unwrap_or(0), tail.get(1..)?))
        });
        let Some((name, width, tail)) = parsed else {
            section.error(
                "format",
                format!("{after:?} is not a field; write one such as %(message)s, and %% for a percent sign"),
            );
            return pieces;
        };
        match Field::of(name) {
            Some(field) => pieces.push(Piece::Field(field, width)),
            None => section.warn("format", format!("%({name})s is not known, and left out")),
        }
        rest = tail;
    }
    if !rest.is_empty() {
        pieces.push(Piece::Text(rest.to_owned()));
    }
    pieces
}

fn dateformat(section: &Section<'_>) -> Option<String> {
    let format = section.text("dateformat")?;
    if crate::logging::format::time(std::time::UNIX_EPOCH, Some(&format)).is_none() {
        section.error(
            "dateformat",
            format!("{format:?} cannot be used; write one such as '%Y-%m-%d %H:%M:%S'"),
        );
        return None;
    }
    Some(format)
}

fn static_fields(section: &Section<'_>) -> Map<String, Value> {
    section.map("static_fields")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::section::Findings;

    fn read_from(section: &Value) -> (LogConfig, Vec<String>, Vec<String>) {
        let tree = json!({ "log": section });
        let findings = Findings::default();
        let config = read(&Section::root(tree.as_object().expect("a map"), &findings).section("log"));
        (config, findings.errors(), findings.warnings())
    }

    #[test]
    fn patronis_section_means_what_it_means_there() {
        let (config, errors, warnings) = read_from(&json!({
            "level": "WARNING", "dir": "/var/log/patroni", "file_num": 7, "file_size": "5MB", "mode": 0o640,
            "format": "%(asctime)s %(levelname)-8s [%%] %(message)s", "loggers": {"pgherd_proxy": "DEBUG"},
        }));
        assert_eq!((errors, warnings), (vec![], vec![]));
        assert_eq!(config.level, Some("warn"));
        assert_eq!(
            (config.file_num, config.file_size, config.mode),
            (7, 5 << 20, Some(0o640))
        );
        assert_eq!(config.loggers, [("pgherd_proxy".to_owned(), "debug")]);
        let text = |text: &str| Piece::Text(text.to_owned());
        let expected = vec![
            Piece::Field(Field::Time, 0),
            text(" "),
            Piece::Field(Field::Level, -8),
            text(" ["),
            text("%"),
            text("] "),
            Piece::Field(Field::Message, 0),
        ];
        assert_eq!(config.format, Some(Format::Pieces(expected)));
    }

    #[test]
    fn fields_of_a_json_line_may_have_other_names() {
        let (config, errors, _) = read_from(&json!({
            "type": "json", "format": ["message", {"asctime": "@timestamp"}], "static_fields": {"app": "db"},
        }));
        assert_eq!(errors, Vec::<String>::new());
        let fields = [(Field::Message, "message"), (Field::Time, "@timestamp")];
        let fields = fields.map(|(field, name)| (field, name.to_owned()));
        assert_eq!(
            (config.json, config.format),
            (true, Some(Format::Fields(fields.to_vec())))
        );
    }

    #[test]
    fn mistakes_are_told_with_key_value_and_fix() {
        for (section, expected) in [
            (
                json!({"level": "LOUD"}),
                "log.level: \"LOUD\" is not a log level; write DEBUG, INFO, WARNING, ERROR or CRITICAL",
            ),
            (
                json!({"type": "xml"}),
                "log.type: \"xml\" is not known; write plain or json",
            ),
            (
                json!({"mode": "rw"}),
                "log.mode: \"rw\" is not a file's mode; write one such as 0644",
            ),
            (
                json!({"format": "%d"}),
                "log.format: \"%d\" is not a field; write one such as %(message)s, and %% for a percent sign",
            ),
            (
                json!({"file_size": "big"}),
                "log.file_size: \"big\" is not a size; write one such as 16MB, or a number of bytes",
            ),
        ] {
            assert_eq!(read_from(&section).1, [expected]);
        }
    }
}

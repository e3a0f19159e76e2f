//! YAML as Patroni writes it for people: keys sorted, two spaces a level, lists not indented, texts quoted only where
//! they would be read as something else. Pure.

use serde_json::{Map, Value};

use super::output::spaced_json;

/// A document, with its last newline.
pub(crate) fn document(value: &Value) -> String {
    let mut text = String::new();
    match value {
        Value::Object(map) if !map.is_empty() => block(map, 0, &mut text),
        Value::Array(items) if !items.is_empty() => list(items, 0, &mut text),
        other => {
            text.push_str(&scalar(other));
            text.push('\n');
        }
    }
    text
}

fn block(map: &Map<String, Value>, indent: usize, text: &mut String) {
    for (key, value) in sorted(map) {
        text.push_str(&" ".repeat(indent));
        entry(key, value, indent, text);
    }
}

/// `key: value`, what is below it on lines of its own.
fn entry(key: &str, value: &Value, indent: usize, text: &mut String) {
    text.push_str(&scalar_text(key));
    text.push(':');
    match value {
        Value::Object(map) if !map.is_empty() => {
            text.push('\n');
            block(map, indent + 2, text);
        }
        Value::Array(items) if !items.is_empty() => {
            text.push('\n');
            list(items, indent, text);
        }
        other => {
            text.push(' ');
            text.push_str(&scalar(other));
            text.push('\n');
        }
    }
}

fn list(items: &[Value], indent: usize, text: &mut String) {
    for item in items {
        text.push_str(&" ".repeat(indent));
        text.push_str("- ");
        match item {
            Value::Object(map) if !map.is_empty() => {
                for (index, (key, value)) in sorted(map).into_iter().enumerate() {
                    if index > 0 {
                        text.push_str(&" ".repeat(indent + 2));
                    }
                    entry(key, value, indent + 2, text);
                }
            }
            Value::Array(items) if !items.is_empty() => {
                let mut inner = String::new();
                list(items, indent + 2, &mut inner);
                text.push_str(inner.trim_start());
            }
            other => {
                text.push_str(&scalar(other));
                text.push('\n');
            }
        }
    }
}

pub(crate) fn sorted(map: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let mut entries: Vec<_> = map.iter().collect();
    entries.sort_by_key(|(key, _)| *key);
    entries
}

/// A value on one line.
pub(crate) fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => scalar_text(text),
        Value::Array(items) => format!("[{}]", items.iter().map(in_flow).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            let entries = sorted(map).into_iter();
            let entries = entries.map(|(key, value)| format!("{}: {}", scalar_text(key), in_flow(value)));
            format!("{{{}}}", entries.collect::<Vec<_>>().join(", "))
        }
        other => spaced_json(other),
    }
}

/// Between brackets, where some signs end a text.
fn in_flow(value: &Value) -> String {
    match value {
        Value::String(text) if text.contains([',', '[', ']', '{', '}']) && !text.chars().any(char::is_control) => {
            quoted(text)
        }
        value => scalar(value),
    }
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

fn scalar_text(text: &str) -> String {
    if text.chars().any(|c| c.is_control()) {
        return Value::from(text).to_string(); // JSON's escapes are YAML's too.
    }
    let begins = |c: char| "!&*|>@`\"'%{}[],#".contains(c);
    let indicator = text.starts_with(begins)
        || ["-", "?", ":"].contains(&text)
        || ["- ", "? ", ": ", "---", "..."]
            .iter()
            .any(|start| text.starts_with(start));
    let breaks = text.contains(": ") || text.contains(" #") || text.ends_with(':') || text.trim() != text;
    if text.is_empty() || indicator || breaks || is_taken(text) {
        quoted(text)
    } else {
        text.to_owned()
    }
}

/// Whether YAML 1.1 reads it as something else than a text.
fn is_taken(text: &str) -> bool {
    const WORDS: [&str; 10] = ["true", "false", "yes", "no", "on", "off", "null", "~", "=", "<<"];
    if WORDS.contains(&text.to_lowercase().as_str()) {
        return true;
    }
    let rest = text.trim_start_matches(['-', '+']);
    let radix = ["0x", "0b", "0o"].iter().any(|radix| rest.starts_with(radix));
    let lower = rest.to_lowercase();
    if [".inf", ".nan"].contains(&lower.as_str()) || radix {
        return true;
    }
    if !rest.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return false;
    }
    let plain = rest.replace('_', "");
    // Base 60, and dates.
    let parts_are_numbers = |by: char| {
        let parts: Vec<&str> = plain.split(by).collect();
        parts.len() > 1 && parts.iter().all(|part| part.parse::<f64>().is_ok())
    };
    let date = plain.get(..10).is_some_and(|day| {
        let digits = day.chars().filter(char::is_ascii_digit).count();
        digits == 8 && day.chars().filter(|c| *c == '-').count() == 2
    });
    plain.parse::<f64>().is_ok() || parts_are_numbers(':') || date
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_document_is_laid_out_as_patronis() {
        let config = json!({
            "ttl": 30, "loop_wait": 10, "pause": null, "slots": {},
            "postgresql": {
                "use_pg_rewind": true,
                "parameters": {"max_connections": 50, "wal_keep_size": "64MB", "work_mem": "4 MB", "x": ""},
                "pg_hba": ["local all all trust", {"b": [1, 2], "a": "x"}, []],
            },
        });
        let expected = "\
loop_wait: 10
pause: null
postgresql:
  parameters:
    max_connections: 50
    wal_keep_size: 64MB
    work_mem: 4 MB
    x: ''
  pg_hba:
  - local all all trust
  - a: x
    b:
    - 1
    - 2
  - []
  use_pg_rewind: true
slots: {}
ttl: 30
";
        assert_eq!(document(&config), expected);
        assert_eq!(document(&json!({})), "{}\n");
        assert_eq!(document(&json!([{"b": 1, "a": 2}])), "- a: 2\n  b: 1\n");
    }

    #[test]
    fn texts_that_look_like_something_else_are_quoted_and_read_back() {
        for (text, quoted) in [
            ("abc", false),
            ("on", true),
            ("Off", true),
            ("50", true),
            ("1_000", true),
            ("0x1F", true),
            ("1e3", true),
            ("12:30:45", true),
            ("2026-11-20", true),
            ("2026-11-20T23:47:37.317976+00:00", true),
            ("127.0.3.1:23432", false),
            ("64MB", false),
            ("0/4000060", false),
            ("- x", true),
            ("-x", false),
            ("a: b", true),
            ("a #b", true),
            ("'x", true),
            ("it's", false),
            ("", true),
            ("~", true),
            ("host all all 0.0.0.0/0 md5", false),
        ] {
            let written = scalar(&json!(text));
            assert_eq!(written.starts_with('\''), quoted, "{written}");
            let read = crate::config::yaml::parse(&format!("k: {written}\n")).expect("YAML");
            assert_eq!(read.get("k"), Some(&json!(text)), "{written}");
        }
        assert_eq!(
            scalar(&json!({"a": "x, y", "b": ["[z", 1]})),
            "{a: 'x, y', b: ['[z', 1]}"
        );
        let lines = scalar(&json!("a\nb"));
        assert_eq!(lines, r#""a\nb""#);
    }
}

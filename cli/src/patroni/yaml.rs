//! A configuration as YAML text: plain where it may be, in quotes where it must.

use serde_json::{Map, Value};

/// The text of a configuration, section by section.
pub(super) fn write(tree: &Map<String, Value>) -> String {
    let mut text = String::new();
    put_map(&mut text, tree, 0);
    text
}

fn put_map(text: &mut String, map: &Map<String, Value>, depth: usize) {
    for (key, value) in map {
        let indent = "  ".repeat(depth);
        match value {
            Value::Object(inner) if !inner.is_empty() => {
                text.push_str(&format!("{indent}{}:\n", scalar(key)));
                put_map(text, inner, depth + 1);
            }
            Value::Array(items) if !items.is_empty() => {
                text.push_str(&format!("{indent}{}:\n", scalar(key)));
                for item in items {
                    // Whatever an item is, YAML takes JSON for it.
                    let item = item.as_str().map_or_else(|| item.to_string(), scalar);
                    text.push_str(&format!("{indent}- {item}\n"));
                }
            }
            Value::String(value) => text.push_str(&format!("{indent}{}: {}\n", scalar(key), scalar(value))),
            other => text.push_str(&format!("{indent}{}: {other}\n", scalar(key))),
        }
    }
}

/// Plain only where no reader of YAML can take it for something else.
fn scalar(text: &str) -> String {
    let begins = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/' || c == '_');
    let plain = |c: char| c.is_ascii_alphanumeric() || "/_-.,@+= ".contains(c);
    let words = ["true", "false", "yes", "no", "on", "off", "null", "y", "n"];
    let is_word = words.iter().any(|word| word.eq_ignore_ascii_case(text));
    if begins && !is_word && !text.ends_with(' ') && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "''"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::parse_yaml;

    #[test]
    fn what_is_written_is_read_as_it_was() {
        let tree = json!({
            "scope": "main", "pause": false, "ttl": 30, "empty": {}, "none": [],
            "postgresql": {
                "listen": "10.0.0.1:5432", "word": "on", "quote": "it's", "space": " x ", "number": "17", "comment": "a # b",
                "pg_hba": ["host all all all md5", "local all all peer"],
                "initdb": [{"encoding": "UTF8"}, "data-checksums"],
            },
        });
        let map = tree.as_object().cloned().unwrap_or_default();
        let text = write(&map);
        assert_eq!(parse_yaml(&text).map(Value::Object), Ok(tree), "{text}");
        assert!(
            text.contains("scope: main\n") && text.contains("  word: 'on'\n"),
            "{text}"
        );
    }
}

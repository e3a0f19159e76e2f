//! Writes a JSON value as the block-style YAML that an operator would write.

use serde_json::Value;

/// The document, with a final newline.
#[must_use]
pub fn write(document: &Value) -> String {
    let mut text = String::new();
    write_block(document, 0, &mut text);
    text
}

fn write_block(value: &Value, indent: usize, text: &mut String) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                text.push_str(&format!("{:indent$}{}:", "", key_text(key)));
                write_nested(value, indent + 2, text);
            }
        }
        Value::Array(list) => {
            for value in list {
                text.push_str(&format!("{:indent$}-", ""));
                write_nested(value, indent + 2, text);
            }
        }
        scalar => text.push_str(&format!("{:indent$}{scalar}\n", "")),
    }
}

/// What stands behind `key:` or `-`: a scalar or something empty on the same line, all else on lines of its own.
fn write_nested(value: &Value, indent: usize, text: &mut String) {
    let is_block = match value {
        Value::Object(map) => !map.is_empty(),
        Value::Array(list) => !list.is_empty(),
        _ => false,
    };
    if is_block {
        text.push('\n');
        write_block(value, indent, text);
    } else {
        text.push_str(&format!(" {value}\n")); // A JSON scalar is a YAML scalar; strings stay in double quotes.
    }
}

fn key_text(key: &str) -> String {
    let is_plain = key.starts_with(|c: char| c.is_ascii_alphabetic())
        && key
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'));
    if is_plain {
        key.to_owned()
    } else {
        Value::from(key).to_string()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nesting_becomes_indentation() {
        let document = json!({
            "scope": "demo",
            "etcd3": {"hosts": ["127.0.0.1:2379"]},
            "bootstrap": {"initdb": [{"encoding": "UTF8"}, "data-checksums"], "dcs": {}},
            "listeners": [{"address": "a:1", "role": "write"}],
            "9lives": null,
        });
        let text = "scope: \"demo\"\netcd3:\n  hosts:\n    - \"127.0.0.1:2379\"\nbootstrap:\n  initdb:\n    -\n      \
                    encoding: \"UTF8\"\n    - \"data-checksums\"\n  dcs: {}\nlisteners:\n  -\n    address: \"a:1\"\n    \
                    role: \"write\"\n\"9lives\": null\n";
        assert_eq!(write(&document), text);
    }
}

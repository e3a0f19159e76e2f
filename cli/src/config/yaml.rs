//! YAML text into a tree, read as Patroni's users expect it: YAML 1.1 booleans and octal numbers, merge keys, last but not
//! least one document per file. The only user of the YAML crate.

use serde_json::{Map, Value};

/// Reads one document. An empty one is an empty map.
///
/// # Errors
/// One sentence with line and column. No excerpt of the text: it may hold a password.
pub(crate) fn parse(text: &str) -> Result<Map<String, Value>, String> {
    let options = serde_saphyr::options! {
        legacy_octal_numbers: true,
        with_snippet: false,
    };
    match serde_saphyr::from_str_with_options::<Value>(text, options) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(Value::Null) => Ok(Map::new()),
        Ok(other) => Err(format!(
            "holds {}, not keys and values; write `scope: NAME` and so on",
            kind(&other)
        )),
        Err(error) => Err(format!(
            "is not YAML that can be read: {}",
            error.to_string().replace('\n', " ")
        )),
    }
}

/// What a value is, for messages.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a yes or no",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a section",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn scalars_mean_what_they_mean_to_patroni() {
        let cases = [
            ("on", json!(true)),
            ("yes", json!(true)),
            ("off", json!(false)),
            ("No", json!(false)),
            ("'on'", json!("on")),
            ("0640", json!(416)),
            ("1_000", json!(1000)),
            ("5432", json!(5432)),
            ("'5432'", json!("5432")),
            ("128MB", json!("128MB")),
            ("12:30:45", json!("12:30:45")),
            ("127.0.0.1:5432", json!("127.0.0.1:5432")),
            ("~", json!(null)),
            ("", json!(null)),
        ];
        for (text, expected) in cases {
            let parsed = parse(&format!("key: {text}\n"));
            assert_eq!(
                parsed.as_ref().ok().and_then(|map| map.get("key")),
                Some(&expected),
                "{text}"
            );
        }
    }

    #[test]
    fn anchors_and_merge_keys_are_followed_and_order_is_kept() {
        let parsed = parse("base: &base {b: 1, a: 2}\nuse:\n  <<: *base\n  c: 3\n").expect("valid");
        assert_eq!(parsed["use"]["a"], json!(2));
        assert_eq!(
            parsed["base"]
                .as_object()
                .map(|map| map.keys().cloned().collect::<Vec<_>>()),
            Some(vec!["b".into(), "a".into()])
        );
    }

    #[test]
    fn an_error_tells_the_place_and_never_the_text() {
        let error = parse("a: 1\npassword: \"hunter2\n").expect_err("an open quote");
        assert!(error.contains("line") && !error.contains("hunter2"), "{error}");
        let error = parse("a: 1\na: 2\n").expect_err("a key twice");
        assert!(error.contains("line 2") && !error.contains('\n'), "{error}");
        assert!(parse("- a\n- b\n").is_err_and(|error| error.contains("a list")));
    }

    #[test]
    fn an_empty_document_is_an_empty_map() {
        assert_eq!(parse("# nothing\n"), Ok(Map::new()));
    }
}

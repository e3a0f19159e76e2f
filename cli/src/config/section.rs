//! A reader over the tree that knows where it is: each value that cannot be used becomes a finding with key, value and
//! fix, and reading goes on, so that all findings are told at once.

use std::cell::RefCell;
use std::fmt::Display;
use std::time::Duration;

use pgherd_cluster::record::Address;
use serde_json::{Map, Value};

use super::{value, yaml};

/// What was found while reading.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    errors: RefCell<Vec<String>>,
    warnings: RefCell<Vec<String>>,
}

impl Findings {
    /// Something that must be mended before anything runs.
    pub(crate) fn error(&self, finding: String) {
        push_once(&mut self.errors.borrow_mut(), finding);
    }

    /// Something that the operator should know.
    pub(crate) fn warn(&self, finding: String) {
        push_once(&mut self.warnings.borrow_mut(), finding);
    }

    /// All errors, in the order of reading.
    pub(crate) fn errors(&self) -> Vec<String> {
        self.errors.borrow().clone()
    }

    /// All warnings, in the order of reading.
    pub(crate) fn warnings(&self) -> Vec<String> {
        self.warnings.borrow().clone()
    }
}

// The agent's and the proxy's readers both pass over what they share.
fn push_once(list: &mut Vec<String>, finding: String) {
    if !list.contains(&finding) {
        list.push(finding);
    }
}

/// One section of the tree; an absent one reads as empty.
#[derive(Clone, Debug)]
pub(crate) struct Section<'a> {
    path: String,
    map: Option<&'a Map<String, Value>>,
    findings: &'a Findings,
}

impl<'a> Section<'a> {
    /// The whole tree.
    pub(crate) fn root(map: &'a Map<String, Value>, findings: &'a Findings) -> Self {
        Self {
            path: String::new(),
            map: Some(map),
            findings,
        }
    }

    /// An element of a list, with a path such as `proxy.listeners[0]`.
    pub(crate) fn element(&self, key: &str, index: usize, element: &'a Value) -> Self {
        let path = format!("{}[{index}]", self.path_of(key));
        let map = element.as_object();
        if map.is_none() {
            self.findings.error(format!(
                "{path}: {} is not a section; write {{ key: value, ... }}",
                shown(element)
            ));
        }
        Self {
            path,
            map,
            findings: self.findings,
        }
    }

    /// The full name of `key` here.
    pub(crate) fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    /// The value of `key`; an explicit nothing counts as absent.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map?.get(key).filter(|value| !value.is_null())
    }

    /// Whether `key` has a value.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// The keys and values here.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.map.into_iter().flatten()
    }

    /// The section under `key`.
    pub(crate) fn section(&self, key: &str) -> Self {
        if let Some(found) = self.get(key).filter(|found| !found.is_object()) {
            self.unusable(key, found, "a section", "keys and values, indented, below it");
        }
        self.quiet_section(key)
    }

    /// The section under `key`, empty without a word when it is something else.
    pub(crate) fn quiet_section(&self, key: &str) -> Self {
        Self {
            path: self.path_of(key),
            map: self.get(key).and_then(Value::as_object),
            findings: self.findings,
        }
    }

    /// A finding about `key`, which has a value that cannot be used.
    pub(crate) fn unusable(&self, key: &str, found: &Value, what: &str, fix: &str) {
        self.findings.error(format!(
            "{}: {} is not {what}; write {fix}",
            self.path_of(key),
            shown(found)
        ));
    }

    /// A finding about `key`, in free words after its name.
    pub(crate) fn error(&self, key: &str, finding: impl Display) {
        self.findings.error(format!("{}: {finding}", self.path_of(key)));
    }

    /// A warning about `key`, in free words after its name.
    pub(crate) fn warn(&self, key: &str, finding: impl Display) {
        self.findings.warn(format!("{}: {finding}", self.path_of(key)));
    }

    /// A finding about `key`, which is missing.
    pub(crate) fn missing(&self, key: &str, fix: &str) {
        self.findings
            .error(format!("{}: missing; write {fix}", self.path_of(key)));
    }

    fn read<T>(&self, key: &str, what: &str, fix: &str, read: impl Fn(&Value) -> Option<T>) -> Option<T> {
        let found = self.get(key)?;
        let value = read(found);
        if value.is_none() {
            self.unusable(key, found, what, fix);
        }
        value
    }

    /// A text that is not empty.
    pub(crate) fn text(&self, key: &str) -> Option<String> {
        let read = |found: &Value| value::text(found).filter(|text| !text.is_empty());
        self.read(
            key,
            "a text",
            "a text, in quotes if YAML takes it for something else",
            read,
        )
    }

    /// A text that must be there.
    pub(crate) fn required_text(&self, key: &str, fix: &str) -> Option<String> {
        if !self.has(key) {
            self.missing(key, fix);
        }
        self.text(key)
    }

    /// A text that no message may show.
    pub(crate) fn secret(&self, key: &str) -> Option<String> {
        let found = self.get(key)?;
        let text = value::text(found);
        if text.is_none() {
            self.error(
                key,
                format!("YAML takes it for {}; put it in quotes", yaml::kind(found)),
            );
        }
        text
    }

    /// Yes or no.
    pub(crate) fn boolean(&self, key: &str) -> Option<bool> {
        self.read(key, "a yes or no", "true or false", value::boolean)
    }

    /// A whole number of at least `min`.
    pub(crate) fn integer(&self, key: &str, min: i64) -> Option<i64> {
        let read = |found: &Value| value::integer(found).filter(|number| *number >= min);
        self.read(key, "such a number", &format!("a whole number from {min} up"), read)
    }

    /// A time.
    pub(crate) fn duration(&self, key: &str) -> Option<Duration> {
        self.read(key, "a duration", "one such as 10s, 500ms or 2min", value::duration)
    }

    /// A number of bytes.
    pub(crate) fn size(&self, key: &str) -> Option<u64> {
        self.read(key, "a size", "one such as 16MB, or a number of bytes", value::size)
    }

    /// A list of texts.
    pub(crate) fn texts(&self, key: &str) -> Option<Vec<String>> {
        self.read(key, "a list of texts", "a list, one `- text` per line", value::texts)
    }

    /// A copy of this section.
    pub(crate) fn as_map(&self) -> Map<String, Value> {
        self.map.cloned().unwrap_or_default()
    }

    /// A copy of the section under `key`, empty when absent.
    pub(crate) fn map(&self, key: &str) -> Map<String, Value> {
        self.section(key).map.cloned().unwrap_or_default()
    }

    /// `addr[,addr]:port`. A text whose port alone is wrong is told so.
    pub(crate) fn listen(&self, key: &str, port_default: u16) -> Option<(Vec<String>, u16)> {
        let text = self.text(key)?;
        let parsed = value::listen(&text, port_default);
        if parsed.is_none() {
            match text.rsplit_once(':') {
                Some((hosts, port)) if value::listen(hosts, 1).is_some() => self.error(
                    key,
                    format!("{text:?}: {port:?} is not a port; write a number from 1 to 65535 after the last colon"),
                ),
                _ => self.error(
                    key,
                    format!("{text:?} is not an address; write HOST:PORT, such as 10.0.0.1:{port_default}"),
                ),
            }
        }
        parsed
    }

    /// `host:port`.
    pub(crate) fn address(&self, key: &str, port_default: u16) -> Option<Address> {
        let (mut hosts, port) = self.listen(key, port_default)?;
        if hosts.len() > 1 {
            self.error(key, format!("{:?} has several hosts; write one", hosts.join(",")));
            return None;
        }
        hosts.pop().map(|host| Address { host, port })
    }
}

/// A value as messages show it: short, on one line.
pub(crate) fn shown(value: &Value) -> String {
    const SHOWN_CHARS_MAX: usize = 60;
    match value {
        Value::Array(items) if items.is_empty() => "an empty list".to_owned(),
        Value::Array(_) | Value::Object(_) => yaml::kind(value).to_owned(),
        other => {
            let text = other.to_string();
            if text.chars().count() <= SHOWN_CHARS_MAX {
                return text;
            }
            format!("{}...", text.chars().take(SHOWN_CHARS_MAX).collect::<String>())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn findings_of(tree: &Value, read: impl Fn(&Section<'_>)) -> Vec<String> {
        let findings = Findings::default();
        read(&Section::root(tree.as_object().expect("a map"), &findings));
        findings.errors()
    }

    #[test]
    fn each_reader_names_key_value_and_fix() {
        let tree = json!({"s": {
            "text": true, "flag": "maybe", "number": "x", "small": 0, "time": "10 parsecs", "size": "1XB",
            "list": 5, "map": 7, "port": "db:54x2", "address": ":", "two": "a,b:1", "empty": "",
        }});
        let found = findings_of(&tree, |root| {
            let section = root.section("s");
            section.text("text");
            section.boolean("flag");
            section.integer("number", 0);
            section.integer("small", 1);
            section.duration("time");
            section.size("size");
            section.texts("list");
            section.section("map");
            section.listen("port", 5432);
            section.listen("address", 5432);
            section.address("two", 5432);
            section.text("empty");
            section.required_text("absent", "a name");
        });
        let expected = [
            "s.text: true is not a text; write a text, in quotes if YAML takes it for something else",
            "s.flag: \"maybe\" is not a yes or no; write true or false",
            "s.number: \"x\" is not such a number; write a whole number from 0 up",
            "s.small: 0 is not such a number; write a whole number from 1 up",
            "s.time: \"10 parsecs\" is not a duration; write one such as 10s, 500ms or 2min",
            "s.size: \"1XB\" is not a size; write one such as 16MB, or a number of bytes",
            "s.list: 5 is not a list of texts; write a list, one `- text` per line",
            "s.map: 7 is not a section; write keys and values, indented, below it",
            "s.port: \"db:54x2\": \"54x2\" is not a port; write a number from 1 to 65535 after the last colon",
            "s.address: \":\" is not an address; write HOST:PORT, such as 10.0.0.1:5432",
            "s.two: \"a,b\" has several hosts; write one",
            "s.empty: \"\" is not a text; write a text, in quotes if YAML takes it for something else",
            "s.absent: missing; write a name",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_secret_is_never_shown() {
        let tree = json!({"password": true, "other": {"hunter2": 1}});
        let found = findings_of(&tree, |root| {
            root.secret("password");
            root.secret("other");
        });
        assert_eq!(
            found,
            [
                "password: YAML takes it for a yes or no; put it in quotes",
                "other: YAML takes it for a section; put it in quotes"
            ]
        );
    }

    #[test]
    fn numbers_are_texts_where_texts_are_wanted_and_texts_numbers() {
        let tree = json!({"name": 1, "number": "7", "flag": "on"});
        let findings = Findings::default();
        let root = Section::root(tree.as_object().expect("a map"), &findings);
        assert_eq!(root.text("name").as_deref(), Some("1"));
        assert_eq!(root.integer("number", 0), Some(7));
        assert_eq!(root.boolean("flag"), Some(true));
        assert!(findings.errors().is_empty());
    }

    #[test]
    fn a_long_value_is_cut() {
        assert_eq!(shown(&json!("x".repeat(500))).len(), 63);
    }
}

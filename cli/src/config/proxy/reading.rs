//! What a listener promises its readers.

use std::collections::BTreeMap;
use std::time::Duration;

use pgherd_proxy::{ListenerRole, OnChange, ReadRules};
use serde_json::Value;

use super::one_of;
use crate::config::section::{Section, shown};

/// The keys that are for roles whose clients are spread over members.
const FOR_READERS: &[&str] = &[
    "tags",
    "max_lag",
    "max_lag_time",
    "fallback",
    "fallback_max",
    "on_promoted",
    "on_stale",
    "rebalance",
    "max_session_age",
];
/// Of those, the keys that have no meaning where the leader is one of the members.
const NOT_FOR_ANY: &[&str] = &["fallback", "fallback_max"];
const ON_CHANGE: [(&str, OnChange); 3] = [
    ("keep", OnChange::Keep),
    ("end_when_idle", OnChange::EndWhenIdle),
    ("end", OnChange::End),
];
/// How old sessions are that may be moved, unless told: by then it is no short one that would have ended anyway.
const SESSION_AGE: Duration = Duration::from_secs(300);

/// Reads the rules of a listener, whose role may not have been understood.
pub(super) fn read(section: &Section<'_>, role: Option<ListenerRole>) -> Option<ReadRules> {
    let without_meaning = match role {
        Some(role @ (ListenerRole::Write | ListenerRole::StandbyLeader)) => Some((role, FOR_READERS)),
        Some(ListenerRole::Any) => Some((ListenerRole::Any, NOT_FOR_ANY)),
        _ => None,
    };
    if let Some((role, keys)) = without_meaning {
        for key in keys.iter().filter(|key| section.has(key)) {
            let role = role.as_str();
            section.error(key, format!("has no meaning for role: {role}; remove it here"));
        }
    }
    let tags = tags(&section.section("tags"));
    let max_lag_bytes = section.size("max_lag");
    let max_lag_time = section.duration("max_lag_time");
    let fallback = one_of(section, "fallback", &["leader", "none", "off"], &[]);
    Some(ReadRules {
        tags: tags?,
        max_lag_bytes,
        max_lag_time,
        fallback_to_leader: fallback == Some("leader"),
        fallback_max: fallback_max(section, fallback == Some("leader"), role),
        on_promoted: on_change(section, "on_promoted"),
        on_stale: on_change(section, "on_stale").unwrap_or(OnChange::Keep),
        rebalance_after: rebalance_after(section),
    })
}

fn fallback_max(section: &Section<'_>, has_fallback: bool, role: Option<ListenerRole>) -> Option<usize> {
    let max = section.integer("fallback_max", 1)?;
    let takes_it = matches!(
        role,
        Some(ListenerRole::Read | ListenerRole::Sync | ListenerRole::Async)
    );
    if !has_fallback && takes_it {
        section.error(
            "fallback_max",
            "has a meaning with fallback: leader only; add that, or remove it",
        );
    }
    usize::try_from(max).ok()
}

fn on_change(section: &Section<'_>, key: &str) -> Option<OnChange> {
    let word = one_of(section, key, &ON_CHANGE.map(|(word, _)| word), &[])?;
    ON_CHANGE
        .into_iter()
        .find(|(known, _)| *known == word)
        .map(|(_, what)| what)
}

fn rebalance_after(section: &Section<'_>) -> Option<Duration> {
    let is_on = section.boolean("rebalance").unwrap_or_default();
    let age = section.duration("max_session_age");
    if age.is_some() && !is_on {
        section.error(
            "max_session_age",
            "has a meaning with rebalance: true only; add that, or remove it",
        );
    }
    is_on.then(|| age.unwrap_or(SESSION_AGE))
}

/// Tags and the values that they must have. YAML takes some values for yes or no, as it does in the member's own file.
fn tags(section: &Section<'_>) -> Option<BTreeMap<String, String>> {
    let text = |(key, value): (&String, &Value)| match value {
        Value::String(text) => Some((key.clone(), text.clone())),
        Value::Bool(_) | Value::Number(_) => Some((key.clone(), value.to_string())),
        Value::Null | Value::Array(_) | Value::Object(_) => {
            let found = shown(value);
            section.error(
                key,
                format!("{found} is no value of a tag; write a text, a number, true or false"),
            );
            None
        }
    };
    let read: Vec<Option<(String, String)>> = section.entries().map(text).collect(); // All of them, for their findings.
    read.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::section::Findings;

    fn read_as(role: ListenerRole, listener: &Value) -> (Option<ReadRules>, Vec<String>) {
        let findings = Findings::default();
        let rules = read(
            &Section::root(listener.as_object().expect("a map"), &findings),
            Some(role),
        );
        (rules, findings.errors())
    }

    #[test]
    fn tags_are_compared_as_they_are_written() {
        let (rules, errors) = read_as(
            ListenerRole::Async,
            &json!({"tags": {"dc": "a", "fast": true, "size": 2}, "fallback": "leader"}),
        );
        assert_eq!(errors, Vec::<String>::new());
        let rules = rules.expect("no errors");
        let expected = [("dc", "a"), ("fast", "true"), ("size", "2")];
        let expected = expected.map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!((rules.tags, rules.fallback_to_leader), (expected.into(), true));
    }

    #[test]
    fn a_lag_is_limited_in_bytes_and_in_time() {
        let (rules, errors) = read_as(ListenerRole::Any, &json!({"max_lag": "16MB", "max_lag_time": "10s"}));
        assert_eq!(errors, Vec::<String>::new());
        let rules = rules.expect("no errors");
        assert_eq!(
            (rules.max_lag_bytes, rules.max_lag_time),
            (Some(16 << 20), Some(Duration::from_secs(10)))
        );
    }

    #[test]
    fn what_becomes_of_sessions_is_read() {
        let (rules, errors) = read_as(
            ListenerRole::Read,
            &json!({
                "fallback": "leader", "fallback_max": 20, "on_promoted": "end_when_idle", "on_stale": "end",
                "rebalance": true, "max_session_age": "1min",
            }),
        );
        assert_eq!(errors, Vec::<String>::new());
        let rules = rules.expect("no errors");
        assert_eq!(rules.fallback_max, Some(20));
        assert_eq!(
            (rules.on_promoted, rules.on_stale),
            (Some(OnChange::EndWhenIdle), OnChange::End)
        );
        assert_eq!(rules.rebalance_after, Some(Duration::from_secs(60)));
        let (plain, _) = read_as(ListenerRole::Read, &json!({"rebalance": true}));
        let plain = plain.expect("no errors");
        assert_eq!((plain.on_promoted, plain.on_stale), (None, OnChange::Keep));
        assert_eq!(plain.rebalance_after, Some(SESSION_AGE));
    }

    #[test]
    fn what_has_no_meaning_and_what_is_no_value_is_refused() {
        for (role, listener, expected) in [
            (
                ListenerRole::Write,
                json!({"tags": {"a": "b"}}),
                "tags: has no meaning for role: write; remove it here",
            ),
            (
                ListenerRole::StandbyLeader,
                json!({"max_lag": "1MB"}),
                "max_lag: has no meaning for role: standby_leader; remove it here",
            ),
            (
                ListenerRole::Read,
                json!({"fallback_max": 5}),
                "fallback_max: has a meaning with fallback: leader only; add that, or remove it",
            ),
            (
                ListenerRole::Read,
                json!({"max_session_age": "1h"}),
                "max_session_age: has a meaning with rebalance: true only; add that, or remove it",
            ),
            (
                ListenerRole::Read,
                json!({"on_stale": "stop"}),
                "on_stale: \"stop\" is not known here; write keep or end_when_idle or end",
            ),
            (
                ListenerRole::Read,
                json!({"max_lag_time": "16MB"}),
                "max_lag_time: \"16MB\" is not a duration; write one such as 10s, 500ms or 2min",
            ),
            (
                ListenerRole::Any,
                json!({"fallback": "leader"}),
                "fallback: has no meaning for role: any; remove it here",
            ),
            (
                ListenerRole::Read,
                json!({"tags": {"a": ["b"]}}),
                "tags.a: a list is no value of a tag; write a text, a number, true or false",
            ),
            (
                ListenerRole::Read,
                json!({"tags": "a=b"}),
                "tags: \"a=b\" is not a section; write keys and values, indented, below it",
            ),
        ] {
            let (_, errors) = read_as(role, &listener);
            assert_eq!(errors.first().map(String::as_str), Some(expected), "{listener}");
        }
    }
}

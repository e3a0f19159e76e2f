//! The `proxy.limits` section.

use pgherd_proxy::{LimitsConfig, Network, QueueConfig};

use super::section::Section;

/// Reads the section; an absent one gives the defaults. In it 0 stands for no limit.
pub(crate) fn read(section: &Section<'_>) -> LimitsConfig {
    let connections = count(section, "connections", 1).unwrap_or(LimitsConfig::default().connections);
    let usual = LimitsConfig::of(connections);
    let queue = section.section("queue");
    let reserved = count(section, "reserved", 0).unwrap_or(usual.reserved);
    let operators = section.texts("operators").unwrap_or_default();
    if reserved > 0 && operators.is_empty() {
        let fix = "name in proxy.limits.operators who may have these places, or remove it";
        section.error("reserved", format!("{reserved} places are for nobody; {fix}"));
    }
    if reserved == 0 && !operators.is_empty() {
        let fix = "write in proxy.limits.reserved how many, such as 3, or remove it";
        section.error("operators", format!("no places are kept for them; {fix}"));
    }
    LimitsConfig {
        connections,
        per_user: limit(section, "per_user", usual.per_user),
        per_database: limit(section, "per_database", usual.per_database),
        per_client_address: limit(section, "per_client_address", usual.per_client_address),
        per_member: limit(section, "per_member", usual.per_member),
        queue: QueueConfig {
            clients: count(&queue, "clients", 0).unwrap_or(usual.queue.clients),
            timeout: queue.duration("timeout").unwrap_or(usual.queue.timeout),
        },
        startups: limit(section, "startups", usual.startups),
        startups_per_member: limit(section, "startups_per_member", usual.startups_per_member),
        reserved,
        operators,
        startups_per_client_address: limit(
            section,
            "startups_per_client_address",
            usual.startups_per_client_address,
        ),
    }
}

/// The networks under `key`; none when it is absent.
pub(crate) fn networks(section: &Section<'_>, key: &str) -> Vec<Network> {
    let Some(texts) = section.texts(key) else {
        return Vec::new();
    };
    if texts.is_empty() {
        section.error(
            key,
            "an empty list; write addresses or networks such as 10.0.0.0/8, or remove it",
        );
    }
    let read = |text: &String| match text.parse() {
        Ok(network) => Some(network),
        Err(error) => {
            section.error(key, format!("{text:?} {error}"));
            None
        }
    };
    texts.iter().filter_map(read).collect()
}

/// A number of at least `min`.
pub(crate) fn count(section: &Section<'_>, key: &str, min: i64) -> Option<usize> {
    section.integer(key, min).and_then(|count| usize::try_from(count).ok())
}

fn limit(section: &Section<'_>, key: &str, usual: Option<usize>) -> Option<usize> {
    match count(section, key, 0) {
        Some(0) => None,
        Some(limit) => Some(limit),
        None => usual,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;
    use crate::config::section::Findings;

    fn read_from(section: Value) -> (LimitsConfig, Vec<String>) {
        let tree = json!({ "proxy": { "limits": section } });
        let findings = Findings::default();
        let root = Section::root(tree.as_object().expect("a map"), &findings);
        let limits = read(&root.section("proxy").section("limits"));
        (limits, findings.errors())
    }

    #[test]
    fn nothing_and_zero_are_no_limit() {
        let (usual, errors) = read_from(Value::Null);
        assert_eq!((usual, errors), (LimitsConfig::default(), Vec::new()));
        let (limits, errors) = read_from(json!({
            "connections": 7, "per_user": 3, "per_database": 0, "per_client_address": "5", "per_member": 90,
            "queue": {"clients": 0, "timeout": "2s"}, "reserved": 3, "operators": "postgres,dba", "startups_per_member": 0,
        }));
        assert_eq!(errors, Vec::<String>::new());
        assert_eq!(
            (limits.connections, limits.per_user, limits.per_database),
            (7, Some(3), None)
        );
        assert_eq!((limits.per_client_address, limits.per_member), (Some(5), Some(90)));
        assert_eq!(
            (limits.reserved, limits.operators.len(), limits.startups_per_member),
            (3, 2, None)
        );
        assert_eq!(
            (limits.queue.clients, limits.queue.timeout),
            (0, Duration::from_secs(2))
        );
    }

    #[test]
    fn mistakes_are_told_with_key_value_and_fix() {
        for (section, expected) in [
            (
                json!({"per_user": -1}),
                "proxy.limits.per_user: -1 is not such a number; write a whole number from 0 up",
            ),
            (
                json!({"connections": 0}),
                "proxy.limits.connections: 0 is not such a number; write a whole number from 1 up",
            ),
            (
                json!({"reserved": 2}),
                "proxy.limits.reserved: 2 places are for nobody; name in proxy.limits.operators who may have these places, or remove it",
            ),
            (
                json!({"operators": ["postgres"]}),
                "proxy.limits.operators: no places are kept for them; write in proxy.limits.reserved how many, such as 3, or remove it",
            ),
            (
                json!({"queue": 5}),
                "proxy.limits.queue: 5 is not a section; write keys and values, indented, below it",
            ),
            (
                json!({"queue": {"timeout": "soon"}}),
                "proxy.limits.queue.timeout: \"soon\" is not a duration; write one such as 10s, 500ms or 2min",
            ),
        ] {
            let found = read_from(section.clone()).1;
            assert_eq!(found.first().map(String::as_str), Some(expected), "{section}");
        }
    }
}

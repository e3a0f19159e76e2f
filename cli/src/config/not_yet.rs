//! Keys of Patroni's that are understood and do nothing in this version. Each is said where leaving it out in silence
//! would surprise.

use serde_json::Value;

use super::section::Section;
use super::value;

/// When a key is worth a word.
enum When {
    /// Whenever it has a value.
    Set,
    /// When it is switched on, or is neither yes nor no.
    On,
}

/// Section, key, when, and what that means for the operator.
const NOT_YET: &[(&str, &str, When, &str)] = &[
    (
        "bootstrap",
        "users",
        When::Set,
        "Patroni 4 has removed it too; create users in SQL",
    ),
    (
        "",
        "thread_pool_size",
        When::Set,
        "members are asked without a thread for each",
    ),
    (
        "",
        "thread_stack_size",
        When::Set,
        "there are no threads whose stacks could be short of room",
    ),
    (
        "postgresql",
        "use_slots",
        When::Set,
        "it is dynamic only, as with Patroni; write it as bootstrap.dcs.postgresql.use_slots, or change it with PATCH /config",
    ),
    (
        "log",
        "deduplicate_heartbeat_logs",
        When::On,
        "what repeats is not logged in any case",
    ),
];

/// The times that are dynamic only, and that many put at the top of the file.
const DYNAMIC_ONLY: [&str; 3] = ["ttl", "loop_wait", "retry_timeout"];

/// Warns of what is set and does nothing.
pub(crate) fn report(root: &Section<'_>) {
    for (path, key, when, meaning) in NOT_YET {
        let section = path
            .split('.')
            .filter(|part| !part.is_empty())
            .fold(root.clone(), |section, part| section.section(part));
        let Some(found) = section.get(key) else { continue };
        let applies = match when {
            When::Set => true,
            When::On => value::boolean(found) != Some(false),
        };
        if applies {
            section.warn(key, format!("has no effect: {meaning}"));
        }
    }
    for key in DYNAMIC_ONLY.iter().filter(|key| root.has(key)) {
        root.warn(
            key,
            format!("has no effect here; write it as bootstrap.dcs.{key}, or change it with PATCH /config"),
        );
    }
    if root.get("citus").is_some_and(|citus| *citus != Value::Bool(false)) {
        root.error(
            "citus",
            "Citus clusters are not supported; remove the section, or stay with Patroni for this cluster",
        );
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::section::Findings;

    fn warnings(tree: &Value) -> (Vec<String>, Vec<String>) {
        let findings = Findings::default();
        report(&Section::root(tree.as_object().expect("a map"), &findings));
        (findings.warnings(), findings.errors())
    }

    #[test]
    fn what_is_off_or_usual_or_done_is_not_worth_a_word() {
        let tree = json!({
            "bootstrap": {"dcs": {"synchronous_mode": "quorum", "failsafe_mode": true}},
            "postgresql": {"create_replica_methods": ["basebackup"], "callbacks": {"on_stop": "x"}, "use_unix_socket": false},
        });
        assert_eq!(warnings(&tree), (vec![], vec![]));
    }

    #[test]
    fn what_would_surprise_is_said() {
        let tree = json!({
            "ttl": 30, "thread_pool_size": 5, "postgresql": {"use_slots": false},
            "bootstrap": {"users": {"admin": {"password": "x"}}},
            "citus": {"group": 0},
        });
        let (warnings, errors) = warnings(&tree);
        let starts = [
            "bootstrap.users: has no effect",
            "thread_pool_size: has no effect: ",
            "postgresql.use_slots: has no effect: it is dynamic only",
            "ttl: has no effect here; write it as bootstrap.dcs.ttl",
        ];
        assert_eq!(warnings.len(), starts.len(), "{warnings:?}");
        for (warning, start) in warnings.iter().zip(starts) {
            assert!(warning.starts_with(start), "{warning}");
        }
        assert!(errors.len() == 1 && errors[0].starts_with("citus: "), "{errors:?}");
    }
}

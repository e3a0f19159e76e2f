//! Whether any of some members could take over, asked of themselves, all at once.

use std::time::Duration;

use pgherd_cluster::http::Ask;
use pgherd_cluster::record::MemberRecord;
use pgherd_cluster::view::Member;
use serde_json::{Map, Value};
use tokio::task::JoinSet;

use crate::peers::Peers;

/// Patroni's limit for such a question.
const ASK_MAX: Duration = Duration::from_secs(2);

/// Whether one of `members` says so; the first that does is enough.
pub(super) async fn anyone_fit(peers: &Peers, members: Vec<&Member>) -> bool {
    let mut asked = JoinSet::new();
    for member in members {
        asked.spawn(is_fit(peers.clone(), member.record.clone()));
    }
    while let Some(fit) = asked.join_next().await {
        if matches!(fit, Ok(true)) {
            return true;
        }
    }
    false
}

async fn is_fit(peers: Peers, record: MemberRecord) -> bool {
    let Some(endpoint) = record.api_endpoint() else {
        return false;
    };
    let answer = peers.ask(&endpoint, Ask::get(path_of(&record.api_url)), ASK_MAX).await;
    let status = answer.ok().and_then(|answer| answer.json());
    status.is_some_and(|status| allows_failover(&status))
}

fn path_of(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/patroni")
}

/// What a member's own status says. One without positions has no PostgreSQL that answers and counts as unreachable.
fn allows_failover(status: &Value) -> bool {
    let is_there = |name: &str| status.get(name).is_some_and(|value| !value.is_null());
    let tags = status.get("tags").and_then(Value::as_object).cloned();
    let record = MemberRecord {
        tags: tags.unwrap_or_else(Map::new),
        ..MemberRecord::new(String::new(), String::new())
    };
    let watchdog_failed = status.get("watchdog_failed").and_then(Value::as_bool).unwrap_or(false);
    (is_there("xlog") || is_there("wal")) && !record.nofailover() && !watchdog_failed
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_candidate_must_answer_with_positions_and_be_allowed() {
        for (status, fit) in [
            (json!({"state": "running", "xlog": {"replayed_location": 1}}), true),
            (json!({"xlog": {}, "tags": {"failover_priority": 2}}), true),
            (json!({"wal": {"replayed_location": 1}}), true),
            (json!({"state": "stopped"}), false),
            (json!({"xlog": {}, "tags": {"nofailover": true}}), false),
            (json!({"xlog": {}, "tags": {"failover_priority": 0}}), false),
            (json!({"xlog": {}, "watchdog_failed": true}), false),
            (json!("xlog"), false),
        ] {
            assert_eq!(allows_failover(&status), fit, "{status}");
        }
    }

    #[test]
    fn the_path_is_the_urls() {
        assert_eq!(path_of("http://127.0.0.1:8008/patroni"), "/patroni");
        assert_eq!(path_of("http://127.0.0.1:8008/behind/a/prefix"), "/behind/a/prefix");
        assert_eq!(path_of("http://127.0.0.1:8008"), "/patroni");
    }
}

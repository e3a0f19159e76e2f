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

/// Whether one of `members` says so; the first that does is enough. If none does, why each of them does not, in the order of
/// their names.
pub(super) async fn anyone_fit(peers: &Peers, members: Vec<&Member>) -> Result<(), String> {
    let mut asked = JoinSet::new();
    for member in members {
        let (peers, name, record) = (peers.clone(), member.name.to_string(), member.record.clone());
        asked.spawn(async move { is_fit(peers, record).await.map_err(|why| format!("{name} {why}")) });
    }
    let mut unfit = Vec::new();
    while let Some(fit) = asked.join_next().await {
        match fit {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(why)) => unfit.push(why),
            Err(_) => {} // A defect, which says nothing of the member.
        }
    }
    unfit.sort();
    Err(unfit.join(", "))
}

async fn is_fit(peers: Peers, record: MemberRecord) -> Result<(), String> {
    let Some(endpoint) = record.api_endpoint() else {
        return Err("tells no address of its REST interface".to_owned());
    };
    let answer = peers.ask(&endpoint, Ask::get(path_of(&record.api_url)), ASK_MAX).await;
    match answer.ok().and_then(|answer| answer.json()) {
        Some(status) => allows_failover(&status),
        None => Err(format!("has not answered within {} s", ASK_MAX.as_secs())),
    }
}

fn path_of(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/patroni")
}

/// What a member's own status says. One without positions has no PostgreSQL that answers and counts as unreachable.
fn allows_failover(status: &Value) -> Result<(), String> {
    let is_there = |name: &str| status.get(name).is_some_and(|value| !value.is_null());
    let tags = status.get("tags").and_then(Value::as_object).cloned();
    let record = MemberRecord {
        tags: tags.unwrap_or_else(Map::new),
        ..MemberRecord::new(String::new(), String::new())
    };
    let watchdog_failed = status.get("watchdog_failed").and_then(Value::as_bool).unwrap_or(false);
    let state = status.get("state").and_then(Value::as_str).unwrap_or("unknown");
    if !is_there("xlog") && !is_there("wal") {
        Err(format!("is {state} and tells no position in the log"))
    } else if record.nofailover() {
        Err("has the tag nofailover, or the failover_priority 0".to_owned())
    } else if watchdog_failed {
        Err("has no watchdog that works, which watchdog.mode asks for".to_owned())
    } else {
        Ok(())
    }
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
            assert_eq!(allows_failover(&status).is_ok(), fit, "{status}");
        }
    }

    #[test]
    fn the_path_is_the_urls() {
        assert_eq!(path_of("http://127.0.0.1:8008/patroni"), "/patroni");
        assert_eq!(path_of("http://127.0.0.1:8008/behind/a/prefix"), "/behind/a/prefix");
        assert_eq!(path_of("http://127.0.0.1:8008"), "/patroni");
    }
}

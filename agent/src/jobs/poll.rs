//! Asking the other members, all at once, with one short deadline: a silent one delays nobody.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::http::{Ask, ask};
use pgherd_cluster::name::{Lsn, MemberName, Timeline};
use pgherd_cluster::record::{Address, MemberRecord};
use serde_json::Value;
use tokio::task::JoinSet;

use super::JobError;
use crate::context::Context;
use crate::observation::{Peer, Poll};

/// Twice what a loaded member needs; a frozen one costs no more than this.
const ANSWER_MAX: Duration = Duration::from_millis(400);

/// Asks every member but ourselves.
pub(super) async fn ask_all(context: &Context, asked_at: Boottime) -> Result<Poll, JobError> {
    let view = context.view();
    let mut asking = JoinSet::new();
    let mut asked = 0;
    for member in view
        .members
        .values()
        .filter(|member| member.name != context.config.name)
    {
        asked += 1;
        if let Some(address) = member.record.api_address() {
            asking.spawn(ask_one(member.name.clone(), address));
        }
    }
    let peers: Vec<Peer> = asking.join_all().await.into_iter().flatten().collect();
    let own = context.sql.status().await?;
    Ok(Poll {
        asked_at,
        answered_at: Boottime::now(),
        own_position: own.wal.position(),
        own_timeline: own.timeline,
        silent: asked - peers.len(),
        peers,
    })
}

/// Asks one member for its status; nothing when it does not answer in time.
pub(super) async fn ask_one(name: MemberName, address: Address) -> Option<Peer> {
    let answer = ask(&address, Ask::get("/patroni"), ANSWER_MAX).await.ok()?;
    Some(parse(name, &answer.json()?))
}

fn parse(name: MemberName, status: &Value) -> Peer {
    let xlog = status.get("xlog").or_else(|| status.get("wal"));
    let number = |field: &str| xlog.and_then(|xlog| xlog.get(field)).and_then(Value::as_u64);
    let location = number("location").filter(|location| *location > 0);
    let standby_position = number("received_location").max(number("replayed_location"));
    let role = status.get("role").and_then(Value::as_str).unwrap_or_default();
    let running = xlog.is_some();
    let tags = status
        .get("tags")
        .and_then(Value::as_object)
        .cloned()
        .unwrap_or_default();
    let record = MemberRecord {
        tags,
        ..MemberRecord::new(String::new(), String::new())
    };
    Peer {
        name,
        primary: running && (location.is_some() || role == "primary" || role == "master"),
        position: location.or(standby_position).map(Lsn),
        timeline: status
            .get("timeline")
            .and_then(Value::as_u64)
            .and_then(|timeline| u32::try_from(timeline).ok())
            .map(Timeline),
        nofailover: record.nofailover() || status.get("watchdog_failed").is_some_and(|failed| failed == true),
        failover_priority: record.failover_priority(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn peer(status: Value) -> Peer {
        parse(MemberName::new("n2").expect("a plain name"), &status)
    }

    #[test]
    fn patronis_answers_are_understood() {
        let replica = peer(json!({"state": "running", "role": "replica", "timeline": 3,
            "xlog": {"received_location": 10, "replayed_location": 20}, "tags": {"nofailover": true}}));
        assert_eq!(
            (replica.primary, replica.position, replica.nofailover),
            (false, Some(Lsn(20)), true)
        );
        assert_eq!(replica.timeline, Some(Timeline(3)));
        let primary = peer(json!({"state": "running", "role": "primary", "xlog": {"location": 30}}));
        assert_eq!((primary.primary, primary.position), (true, Some(Lsn(30))));
        let stopped = peer(json!({"state": "stopped", "role": "primary"}));
        assert_eq!((stopped.primary, stopped.position), (false, None));
        assert!(peer(json!({"watchdog_failed": true})).nofailover);
    }
}

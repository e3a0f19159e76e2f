//! Asking the other members, all at once, with one short deadline: a silent one delays nobody.

use std::collections::BTreeMap;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::http::{Ask, Endpoint};
use pgherd_cluster::name::{Lsn, MemberName, Scope, Timeline};
use pgherd_cluster::record::MemberRecord;
use serde_json::Value;
use tokio::task::JoinSet;

use super::JobError;
use crate::context::Context;
use crate::observation::{Peer, Poll};
use crate::peers::Peers;

/// Twice what a loaded member needs; a frozen one costs no more than this.
const ANSWER_MAX: Duration = Duration::from_millis(400);
/// For the one whose key has ended, as a leader's has that is being replaced: most likely it has gone with it, and an election is
/// kept waiting by no more than a loaded member needs. Where several keys have ended it was etcd that was away, and not they.
const ENDED_ANSWER_MAX: Duration = Duration::from_millis(200);

/// Asks every other member that is or was a member, as far as it is known where.
pub(super) async fn ask_all(
    context: &Context,
    whom: BTreeMap<MemberName, Endpoint>,
    asked_at: Boottime,
) -> Result<Poll, JobError> {
    let asked = whom.len();
    let view = context.view();
    let ended = whom.keys().filter(|name| !view.members.contains_key(*name)).count();
    let mut asking = JoinSet::new();
    for (name, endpoint) in whom {
        let limit = match view.members.contains_key(&name) || ended > 1 {
            true => ANSWER_MAX,
            false => ENDED_ANSWER_MAX,
        };
        let (peers, scope) = (context.peers.clone(), context.config.scope.clone());
        asking.spawn(ask_within(limit, peers, scope, name, endpoint));
    }
    let peers: Vec<Peer> = asking.join_all().await.into_iter().flatten().collect();
    let own = match context.sql.status().await {
        Ok(own) => Some(own),
        // One whose PostgreSQL is down asks who could lead; it has no position, and is behind everybody.
        Err(_) if is_down_or_armed(context) => None,
        Err(error) => return Err(error.into()),
    };
    Ok(Poll {
        asked_at,
        answered_at: Boottime::now(),
        own_position: own.as_ref().map_or(Lsn(0), |own| own.wal.position()),
        own_timeline: own.and_then(|own| own.timeline),
        silent: asked - peers.len(),
        peers,
    })
}

fn is_down_or_armed(context: &Context) -> bool {
    let instance = context.keeper.instance().borrow().clone();
    instance.armed || instance.postmaster.is_none()
}

/// Asks one member for its status; nothing when it does not answer in time, or somebody else does in its place.
pub(super) async fn ask_one(peers: Peers, scope: Scope, name: MemberName, endpoint: Endpoint) -> Option<Peer> {
    ask_within(ANSWER_MAX, peers, scope, name, endpoint).await
}

async fn ask_within(limit: Duration, peers: Peers, scope: Scope, name: MemberName, endpoint: Endpoint) -> Option<Peer> {
    let answer = peers.ask(&endpoint, Ask::get("/patroni"), limit).await.ok()?;
    let status = answer.json()?;
    is_of(&status, &scope, &name).then(|| parse(name, &status))
}

/// Whether who answers is who was asked: an address may have been given to another.
fn is_of(status: &Value, scope: &Scope, name: &MemberName) -> bool {
    let says = |field: &str, expected: &str| {
        let said = status.get("patroni").and_then(|patroni| patroni.get(field));
        said.is_none_or(|said| said == expected)
    };
    says("scope", scope.as_str()) && says("name", name.as_str())
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
    fn who_answers_in_anothers_place_is_not_listened_to() {
        let (scope, name) = (
            Scope::new("main").expect("plain"),
            MemberName::new("n2").expect("plain"),
        );
        let of = |scope_said: &str, name_said: &str| {
            let status = json!({"patroni": {"version": "4.1.4", "scope": scope_said, "name": name_said}});
            is_of(&status, &scope, &name)
        };
        assert!(of("main", "n2") && !of("main", "n3") && !of("other", "n2"));
        assert!(
            is_of(&json!({"state": "running"}), &scope, &name),
            "an old one does not say"
        );
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

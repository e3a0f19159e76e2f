//! `pgherd restart --rolling`: the replicas one after another, each until it streams again; then a switchover; then the
//! former leader, which is a replica by then. Writes stand still for the switchover alone.

use std::time::Duration;

use pgherd_cluster::view::{Member, View};
use serde_json::{Map, Value};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::answer::Outcomes;
use super::restart::{note, restart, version_number};
use super::site::{ANSWER_MAX, Site};
use super::switchover::{self, Request};
use crate::failure::Failure;
use crate::terminal::say;

/// For a replica that was restarted to stream again.
const STREAMS_MAX: Duration = Duration::from_secs(300);
/// For a synchronous standby to be listed again, and for whatever else makes a switchover impossible for a moment.
const WILLING_MAX: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Restarts `members`, those of `view`.
///
/// # Errors
/// At the first that fails: the others are left as they are.
pub(crate) async fn run(
    site: &Site,
    view: &View,
    members: &[&Member],
    conditions: &Map<String, Value>,
    limit: Duration,
) -> Result<(), Failure> {
    let mut older = Vec::with_capacity(members.len());
    for member in members {
        if is_older(site, member, conditions).await {
            older.push(*member);
        }
    }
    let plan = Plan::of(view, &older)?;
    if plan.is_empty() {
        say("No member is to be restarted");
        return Ok(());
    }
    // A replica that has been elected meanwhile is not restarted in the middle of its clients' writes.
    let mut of_replicas = conditions.clone();
    of_replicas.insert("role".to_owned(), "replica".into());
    for replica in plan.replicas {
        if leads_now(site, replica).await? {
            return Err(Failure::TryAgain(format!(
                "{} has become the leader meanwhile; it and the rest were not restarted",
                replica.name
            )));
        }
        one(site, replica, &of_replicas, limit).await?;
    }
    let Some(leader) = plan.leader else { return Ok(()) };
    let before = started(site, leader).await;
    let to = hand_over(site, leader).await?;
    say(format!("{to} leads; {} is the last", leader.name));
    streams(site, leader).await?;
    // To become a standby it was stopped and started: that was its restart.
    if before.is_some() && started(site, leader).await != before {
        say(format!("Success: restart on member {}, by the switchover", leader.name));
        return Ok(());
    }
    one(site, leader, conditions, limit).await
}

/// Whether a member is to be restarted for its version, which it would refuse otherwise: a run that was interrupted goes on
/// where it was.
async fn is_older(site: &Site, member: &Member, conditions: &Map<String, Value>) -> bool {
    let wanted = conditions.get("postgres_version").and_then(Value::as_str);
    let Some(wanted) = wanted.and_then(version_number) else {
        return true;
    };
    let status = site.get(member, "/patroni", ANSWER_MAX).await.unwrap_or_default();
    let older = status["server_version"].as_u64().is_none_or(|runs| runs < wanted);
    if !older {
        say(format!("{} runs that version already, or a newer one", member.name));
    }
    older
}

async fn leads_now(site: &Site, member: &Member) -> Result<bool, Failure> {
    let view = site.view().await?;
    Ok(view.epoch().is_some_and(|epoch| epoch.holder == member.name))
}

/// When a member's postmaster was started, by its own word.
async fn started(site: &Site, member: &Member) -> Option<String> {
    let status = site.get(member, "/patroni", ANSWER_MAX).await?;
    status["postmaster_start_time"].as_str().map(str::to_owned)
}

/// Who is restarted, and in which order.
#[derive(Debug, PartialEq)]
struct Plan<'a> {
    replicas: Vec<&'a Member>,
    leader: Option<&'a Member>,
}

impl<'a> Plan<'a> {
    fn of(view: &View, members: &[&'a Member]) -> Result<Self, Failure> {
        let Some(epoch) = view.epoch() else {
            return Err(Failure::Refused("This cluster has no leader".to_owned()));
        };
        let leads = |member: &&&Member| member.name == epoch.holder;
        let plan = Self {
            replicas: members.iter().filter(|member| !leads(member)).copied().collect(),
            leader: members.iter().find(leads).copied(),
        };
        let able = |member: &Member| member.name != epoch.holder && !member.record.nofailover();
        if let Some(leader) = plan.leader
            && !view.members.values().any(able)
        {
            return Err(Failure::Refused(format!(
                "no member can take over from {}, so that restarting it stops writes until it is up again; restart it without --rolling",
                leader.name
            )));
        }
        Ok(plan)
    }

    fn is_empty(&self) -> bool {
        self.replicas.is_empty() && self.leader.is_none()
    }
}

async fn one(site: &Site, member: &Member, conditions: &Map<String, Value>, limit: Duration) -> Result<(), Failure> {
    let mut outcomes = Outcomes::default();
    let answer = restart(site, member, conditions, limit).await;
    note(&mut outcomes, member.name.as_str(), &answer);
    outcomes.end()?;
    streams(site, member).await
}

/// Waits until a member streams, by its own word.
async fn streams(site: &Site, member: &Member) -> Result<(), Failure> {
    let until = Instant::now() + STREAMS_MAX;
    let mut tick = interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let status = site.get(member, "/patroni", ANSWER_MAX).await.unwrap_or_default();
        if status["state"] == "running" && status["replication_state"] == "streaming" {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(Failure::TryAgain(format!(
                "{} does not stream {} s after its restart; the rest was not restarted",
                member.name,
                STREAMS_MAX.as_secs()
            )));
        }
    }
}

/// Hands over to whoever can take over; a refusal may be of the moment, while a synchronous standby is coming back.
async fn hand_over(site: &Site, leader: &Member) -> Result<String, Failure> {
    let until = Instant::now() + WILLING_MAX;
    let mut tick = interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if !leads_now(site, leader).await? {
            return Err(Failure::TryAgain(format!(
                "{} does not lead any more; it was not restarted",
                leader.name
            )));
        }
        let view = site.view().await?;
        let request = Request {
            leader: Some(leader.name.to_string()),
            candidate: None,
            scheduled_at: None,
        };
        match switchover::carry_out(site, &view, &request).await {
            Err(Failure::Refused(_)) if Instant::now() < until => {}
            Err(failure) => return Err(failure),
            Ok(()) => {
                let view = site.view().await?;
                return Ok(view
                    .epoch()
                    .map_or_else(|| "nobody".to_owned(), |epoch| epoch.holder.to_string()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::members::tests::view_with;
    use super::*;

    #[test]
    fn the_leader_is_the_last_and_only_where_somebody_can_take_over() {
        let view = view_with(Some("node2"), &[]);
        let all: Vec<&Member> = view.members.values().collect();
        let plan = Plan::of(&view, &all).expect("a plan");
        let names: Vec<&str> = plan.replicas.iter().map(|member| member.name.as_str()).collect();
        assert_eq!(names, ["node1", "node3", "node4"]);
        assert_eq!(plan.leader.map(|member| member.name.as_str()), Some("node2"));
        let without: Vec<&Member> = view
            .members
            .values()
            .filter(|member| member.name.as_str() != "node2")
            .collect();
        assert_eq!(Plan::of(&view, &without).expect("a plan").leader, None);

        let never =
            json!({"conn_url": "postgres://h:1/p", "api_url": "http://h:2/patroni", "tags": {"nofailover": true}});
        let alone = view_with(
            Some("node2"),
            &[("members/node1", never.clone()), ("members/node3", never)],
        );
        let all: Vec<&Member> = alone.members.values().collect();
        assert!(Plan::of(&alone, &all).is_err());
        assert!(Plan::of(&view_with(None, &[]), &[]).is_err());
    }
}

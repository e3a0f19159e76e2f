//! What was asked for, and whether the cluster allows it. Pure.

use jiff::Timestamp;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::view::{Member, View};
use serde_json::{Map, Value};

use super::super::facts::{SyncMode, sync_mode};
use super::super::schedule::{self, Refusal};

pub(super) const LEADER_DIFFERS: &str = "leader name does not match";

/// Which of the two was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::rest) enum Action {
    /// From a leader that works.
    Switchover,
    /// To a candidate, whatever the leader does.
    Failover,
}

impl Action {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Switchover => "switchover",
            Self::Failover => "failover",
        }
    }

    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Switchover => "Switchover",
            Self::Failover => "Failover",
        }
    }

    pub(super) const fn past(self) -> &'static str {
        match self {
            Self::Switchover => "switched",
            Self::Failover => "failed",
        }
    }

    pub(super) const fn past_title(self) -> &'static str {
        match self {
            Self::Switchover => "Switched",
            Self::Failover => "Failed",
        }
    }
}

/// A request that makes sense in itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Order {
    pub(super) action: Action,
    pub(super) leader: Option<String>,
    pub(super) candidate: Option<String>,
    /// ISO 8601.
    pub(super) scheduled_at: Option<String>,
}

impl Order {
    /// Reads the body of a request; the first thing that is wrong is told.
    pub(super) fn parse(
        asked: Action,
        body: &Map<String, Value>,
        paused: bool,
        now: Timestamp,
    ) -> Result<Self, Refusal> {
        let text = |name: &str| body.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
        let leader = text("leader");
        let candidate = text("candidate").or_else(|| text("member"));
        let bad = |text: &str| Err(Refusal::new(400, text));
        match asked {
            Action::Failover if candidate.is_none() => {
                return bad("Failover could be performed only to a specific candidate");
            }
            Action::Switchover if leader.is_none() => {
                return bad("Switchover could be performed only from a specific leader");
            }
            Action::Failover | Action::Switchover => {}
        }
        let scheduled_at = match body.get("scheduled_at") {
            None | Some(Value::Null | Value::Bool(false)) => None,
            Some(Value::String(text)) if text.is_empty() => None,
            Some(_) if asked == Action::Failover => return bad("Failover can't be scheduled"),
            Some(_) if paused => return bad("Can't schedule switchover in the paused state"),
            Some(value) => Some(schedule::parse(value.as_str().unwrap_or_default(), "switchover", now)?.1),
        };
        if paused && candidate.is_none() {
            return bad("Switchover is possible only to a specific candidate in a paused state");
        }
        let action = if leader.is_some() { Action::Switchover } else { asked };
        if leader == candidate {
            return bad("Switchover target and source are the same");
        }
        Ok(Self {
            action,
            leader: leader.map(str::to_owned),
            candidate: candidate.map(str::to_owned),
            scheduled_at,
        })
    }

    /// The members of which one must be fit to take over.
    pub(super) fn considered<'a>(&self, view: &'a View) -> Result<Vec<&'a Member>, Refusal> {
        let holder = view.epoch().map(|epoch| epoch.holder.as_str());
        if self.leader.is_some() && self.leader.as_deref() != holder {
            return Err(Refusal::new(412, LEADER_DIFFERS));
        }
        let by_list = sync_mode(view) == SyncMode::Priority;
        let listed = |name: &MemberName| view.sync.value.is_active() && view.sync.value.lists(name);
        if let Some(candidate) = &self.candidate {
            let name = MemberName::new(candidate.as_str()).ok();
            if by_list && self.action == Action::Switchover && !name.as_ref().is_some_and(listed) {
                return Err(Refusal::new(412, "candidate name does not match with sync_standby"));
            }
            let member = name.and_then(|name| view.members.get(&name));
            return Ok(vec![
                member.ok_or_else(|| Refusal::new(412, "candidate does not exists"))?,
            ]);
        }
        let others = view
            .members
            .values()
            .filter(|member| Some(member.name.as_str()) != holder);
        let considered: Vec<&Member> = others.filter(|member| !by_list || listed(&member.name)).collect();
        if !considered.is_empty() {
            return Ok(considered);
        }
        Err(self.impossible(if by_list {
            "can not find sync_standby"
        } else {
            "cluster does not have members except leader"
        }))
    }

    pub(super) fn impossible(&self, why: &str) -> Refusal {
        Refusal::new(412, format!("{} is not possible: {why}", self.action.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::super::fixtures::{entry, object, view, view_with};
    use super::*;

    fn now() -> Timestamp {
        "2026-11-21T00:00:00Z".parse().expect("a time")
    }

    fn refused(action: Action, body: Value, paused: bool) -> (u16, String) {
        let refusal = Order::parse(action, &object(body), paused, now()).expect_err("a refusal");
        (refusal.code, refusal.text)
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_patronis_order() {
        let (switchover, failover) = (Action::Switchover, Action::Failover);
        let no_candidate = "Failover could be performed only to a specific candidate";
        let no_leader = "Switchover could be performed only from a specific leader";
        let paused_when = "Can't schedule switchover in the paused state";
        let paused_whom = "Switchover is possible only to a specific candidate in a paused state";
        let same = "Switchover target and source are the same";
        for (action, body, paused, text) in [
            (
                failover,
                json!({"leader": "a", "scheduled_at": "x"}),
                true,
                no_candidate,
            ),
            (switchover, json!({"candidate": "b", "leader": ""}), false, no_leader),
            (
                failover,
                json!({"candidate": "b", "scheduled_at": "x"}),
                true,
                "Failover can't be scheduled",
            ),
            (
                switchover,
                json!({"leader": "a", "scheduled_at": "x"}),
                true,
                paused_when,
            ),
            (switchover, json!({"leader": "a"}), true, paused_whom),
            (switchover, json!({"leader": "a", "candidate": "a"}), false, same),
            (
                switchover,
                json!({"leader": "a", "member": "a", "scheduled_at": "2040-01-01T00:00Z"}),
                false,
                same,
            ),
        ] {
            assert_eq!(refused(action, body.clone(), paused), (400, text.to_owned()), "{body}");
        }
    }

    #[test]
    fn a_schedule_must_be_a_time_to_come_with_its_offset() {
        let garbage = "Unable to parse scheduled timestamp. It should be in an unambiguous format, e.g. ISO 8601";
        let no_offset = "Timezone information is mandatory for the scheduled switchover";
        let past = "Cannot schedule switchover in the past";
        for (at, code, text) in [
            (json!("2026-11-22T00:00:00"), 400, no_offset),
            (json!("2026-11-22"), 400, no_offset),
            (json!("2026-11-20T00:00:00Z"), 422, past),
            (json!("2026-11-21T01:00:00+02:00"), 422, past),
            (json!("soon"), 422, garbage),
            (json!(7), 422, garbage),
        ] {
            let body = json!({"leader": "a", "scheduled_at": at});
            assert_eq!(
                refused(Action::Switchover, body, false),
                (code, text.to_owned()),
                "{at}"
            );
        }
    }

    #[test]
    fn a_failover_with_a_leader_is_a_switchover() {
        let body = object(json!({"leader": "node1", "candidate": "node2"}));
        let order = Order::parse(Action::Failover, &body, false, now()).expect("a whole order");
        assert_eq!(order.action, Action::Switchover);
    }

    #[test]
    fn the_cluster_must_allow_it() {
        let sync = |listed: &str| {
            vec![entry(
                "sync",
                json!({"leader": "node1", "quorum": 0, "sync_standby": listed}),
                48,
            )]
        };
        let priority = |listed: &str| view_with(Some("node1"), json!({"synchronous_mode": true}), sync(listed));
        let quorum = view_with(Some("node1"), json!({"synchronous_mode": "quorum"}), sync("node2"));
        let mut alone = view();
        alone.members.retain(|name, _| name.as_str() == "node1");
        let (free, plain) = (view_with(None, json!({}), vec![]), view());
        let switch = |leader: &str, candidate: Option<&str>| {
            (
                Action::Switchover,
                Some(leader.to_owned()),
                candidate.map(str::to_owned),
            )
        };
        let fail = |candidate: &str| (Action::Failover, None, Some(candidate.to_owned()));
        let differs = "candidate name does not match with sync_standby";
        for (asked, view, expected) in [
            (switch("node1", None), &plain, Ok(vec!["node2", "node3"])),
            (switch("node2", None), &plain, Err(LEADER_DIFFERS)),
            (switch("node1", None), &free, Err(LEADER_DIFFERS)),
            (switch("node1", Some("node3")), &plain, Ok(vec!["node3"])),
            (switch("node1", Some("node3")), &priority("node2"), Err(differs)),
            (switch("node1", Some("nobody")), &priority("node2"), Err(differs)),
            (switch("node1", Some("node3")), &quorum, Ok(vec!["node3"])),
            (fail("node3"), &priority("node2"), Ok(vec!["node3"])),
            (fail("node3"), &free, Ok(vec!["node3"])),
            (fail("nobody"), &plain, Err("candidate does not exists")),
            (fail("a/b"), &plain, Err("candidate does not exists")),
            (switch("node1", None), &priority("node2"), Ok(vec!["node2"])),
            (
                switch("node1", None),
                &priority("gone"),
                Err("switchover is not possible: can not find sync_standby"),
            ),
            (
                switch("node1", None),
                &alone,
                Err("switchover is not possible: cluster does not have members except leader"),
            ),
        ] {
            let (action, leader, candidate) = asked;
            let order = Order {
                action,
                leader,
                candidate,
                scheduled_at: None,
            };
            let names = order
                .considered(view)
                .map(|members| members.iter().map(|member| member.name.as_str()).collect());
            let expected = expected.map_err(|text| Refusal::new(412, text));
            assert_eq!(names, expected, "{order:?}");
        }
    }
}

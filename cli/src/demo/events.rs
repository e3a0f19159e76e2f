//! What happened between two views, in words. Pure.

use std::collections::BTreeSet;

use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::DynamicConfig;
use pgherd_cluster::view::View;

/// One line for each thing that is different.
pub(crate) fn events(old: &View, new: &View) -> Vec<String> {
    let mut events = Vec::new();
    leader(old, new, &mut events);
    let names: BTreeSet<&MemberName> = old.members.keys().chain(new.members.keys()).collect();
    for name in names {
        member(name, old, new, &mut events);
    }
    let paused = |view: &View| view.config.value.as_ref().is_some_and(DynamicConfig::is_paused);
    match (paused(old), paused(new)) {
        (false, true) => events.push("paused: nobody is promoted or demoted until it is resumed".to_owned()),
        (true, false) => events.push("resumed".to_owned()),
        _ => {}
    }
    if let Some(request) = new.failover.value.as_ref().filter(|_| old.failover.value.is_none()) {
        let from = request.leader.as_deref().unwrap_or("whoever leads");
        let to = request.member.as_deref().unwrap_or("the best candidate");
        events.push(format!("asked to hand the lead from {from} to {to}"));
    }
    events
}

fn leader(old: &View, new: &View, events: &mut Vec<String>) {
    match (old.epoch(), new.epoch()) {
        (was, Some(is)) if was != Some(is) => events.push(match was {
            Some(was) if was.holder != is.holder => format!("{} holds the lease (before: {})", is.holder, was.holder),
            Some(_) => format!("{} holds the lease again", is.holder),
            None => format!("{} holds the lease", is.holder),
        }),
        (Some(was), None) => events.push(format!("nobody holds the lease (before: {})", was.holder)),
        _ => {}
    }
    let writable = |view: &View| view.writable_leader().map(|member| member.name.clone());
    if let Some(name) = writable(new).filter(|_| writable(old).is_none() || old.epoch() != new.epoch()) {
        events.push(format!("{name} takes writes"));
    }
}

fn member(name: &MemberName, old: &View, new: &View, events: &mut Vec<String>) {
    let (before, after) = match (old.members.get(name), new.members.get(name)) {
        (None, Some(after)) => {
            events.push(format!("{name} is there: {}", new.shown_state(after)));
            return;
        }
        (Some(_), None) => {
            events.push(format!("{name} is gone"));
            return;
        }
        (Some(before), Some(after)) => (before, after),
        (None, None) => return,
    };
    let (was, is) = (old.shown_state(before), new.shown_state(after));
    if was != is {
        events.push(format!("{name}: {was} -> {is}"));
    }
    if before.record.role != after.record.role {
        events.push(format!(
            "{name}: {} -> {}",
            before.record.role.as_str(),
            after.record.role.as_str()
        ));
    }
    if let (Some(was), Some(is)) = (before.record.timeline, after.record.timeline)
        && was != is
    {
        events.push(format!("{name}: timeline {was} -> {is}"));
    }
}

/// Which members are not what they should be in a whole cluster, and why.
pub(crate) fn missing<'a>(view: &View, names: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut missing = Vec::new();
    if view.writable_leader().is_none() {
        missing.push("a leader that takes writes".to_owned());
    }
    let leads = |name: &str| view.epoch().is_some_and(|epoch| epoch.holder.as_str() == name);
    for name in names.into_iter().filter(|name| !leads(name)) {
        match view.members.values().find(|member| member.name.as_str() == name) {
            None => missing.push(format!("{name} (no sign of it yet)")),
            Some(member) if view.shown_state(member) != "streaming" => {
                missing.push(format!("{name} ({})", view.shown_state(member)));
            }
            Some(_) => {}
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::key::Keys;
    use pgherd_cluster::name::Scope;
    use pgherd_cluster::view::Entry;
    use serde_json::{Value, json};

    use super::*;

    fn view(values: &[(&str, Value, i64)]) -> View {
        let scope = Scope::new("demo").expect("a plain name");
        let keys = Keys::new("service", &scope);
        let entries = values.iter().map(|(key, value, revision)| Entry {
            key: format!("{}{key}", keys.prefix()),
            value: value.as_str().map_or_else(|| value.to_string(), str::to_owned),
            create_revision: *revision,
            mod_revision: *revision,
            lease: 0,
        });
        View::from_entries(scope.clone(), &keys, entries.collect::<Vec<_>>(), 1)
    }

    fn primary(timeline: u32) -> Value {
        json!({"conn_url": "postgres://h:1/p", "api_url": "http://h:2/", "state": "running", "role": "primary", "timeline": timeline})
    }

    fn replica(state: &str) -> Value {
        json!({
            "conn_url": "postgres://h:1/p", "api_url": "http://h:2/", "state": "running", "role": "replica", "timeline": 1,
            "replication_state": state,
        })
    }

    #[test]
    fn a_failover_is_told_step_by_step() {
        let before = view(&[
            ("leader", json!("n1"), 5),
            ("members/n1", primary(1), 6),
            ("members/n2", replica("streaming"), 7),
        ]);
        let lost = view(&[("members/n2", replica("in archive recovery"), 8)]);
        let won = view(&[
            ("leader", json!("n2"), 9),
            ("members/n2", replica("in archive recovery"), 8),
        ]);
        let done = view(&[("leader", json!("n2"), 9), ("members/n2", primary(2), 10)]);
        assert_eq!(
            events(&before, &lost),
            [
                "nobody holds the lease (before: n1)",
                "n1 is gone",
                "n2: streaming -> in archive recovery"
            ]
        );
        assert_eq!(
            events(&lost, &won),
            ["n2 holds the lease", "n2: in archive recovery -> running"]
        );
        assert_eq!(
            events(&won, &done),
            ["n2 takes writes", "n2: replica -> primary", "n2: timeline 1 -> 2"]
        );
    }

    #[test]
    fn a_hand_over_within_one_view_names_both() {
        let before = view(&[("leader", json!("n1"), 5), ("members/n1", primary(1), 6)]);
        let after = view(&[
            ("leader", json!("n2"), 8),
            ("members/n1", primary(1), 6),
            ("failover", json!({"leader": "n1"}), 7),
        ]);
        assert_eq!(
            events(&before, &after),
            [
                "n2 holds the lease (before: n1)",
                "asked to hand the lead from n1 to the best candidate"
            ]
        );
    }

    #[test]
    fn positions_that_move_are_no_events() {
        let at = |lsn: u64| {
            view(&[
                ("leader", json!("n1"), 5),
                ("members/n1", primary(1), 6),
                ("status", json!({"optime": lsn}), 9),
            ])
        };
        assert_eq!(events(&at(1), &at(2)), Vec::<String>::new());
    }

    #[test]
    fn a_pause_is_told() {
        let with = |paused: bool| view(&[("config", json!({"pause": paused}), 1)]);
        assert_eq!(events(&with(false), &with(true)).len(), 1);
        assert_eq!(events(&with(true), &with(false)), ["resumed"]);
    }

    #[test]
    fn what_is_missing_is_named_until_all_is_there() {
        let names = ["n1", "n2"];
        assert_eq!(
            missing(&view(&[]), names),
            [
                "a leader that takes writes",
                "n1 (no sign of it yet)",
                "n2 (no sign of it yet)"
            ]
        );
        let half = view(&[
            ("leader", json!("n1"), 5),
            ("members/n1", primary(1), 6),
            ("members/n2", replica("starting"), 7),
        ]);
        assert_eq!(missing(&half, names), ["n2 (starting)"]);
        let whole = view(&[
            ("leader", json!("n1"), 5),
            ("members/n1", primary(1), 6),
            ("members/n2", replica("streaming"), 7),
        ]);
        assert_eq!(missing(&whole, names), Vec::<String>::new());
    }
}

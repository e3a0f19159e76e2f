//! What a view alone tells, for whoever makes a state. Pure.

use pgherd_cluster::name::Lsn;
use pgherd_cluster::record::{PgState, Role};
use pgherd_cluster::view::{Member, View};
use serde_json::Value;

use crate::model::{AskedFor, MemberState, Safety, Timeline};

/// Ended timelines that are shown.
const TIMELINES_SHOWN: usize = 10;

/// A member as its key shows it; what only a proxy knows is left empty.
#[must_use]
pub fn member(view: &View, member: &Member) -> MemberState {
    let record = &member.record;
    let leads = view.epoch().is_some_and(|epoch| epoch.holder == member.name);
    MemberState {
        name: member.name.to_string(),
        role: view.shown_role(member).as_str(),
        state: view.shown_state(member).to_owned(),
        timeline: record.timeline.map(|timeline| timeline.0),
        lsn: record.replay_lsn.or(record.xlog_location).map(|lsn| lsn.to_string()),
        received_lsn: record.receive_lsn.map(|lsn| lsn.to_string()),
        lag_bytes: lag_bytes(view, member),
        address: record.postgres_address().map(|address| address.to_string()),
        upstream: if leads { None } else { upstream(view, member) },
        zone: text(record.tags.get("zone")),
        tags: record
            .tags
            .iter()
            .filter_map(|(name, value)| Some(format!("{name}: {}", text(Some(value))?)))
            .collect(),
        agent: match (&record.pgherd, &record.version) {
            (Some(pgherd), _) => Some(format!("pgherd {pgherd}")),
            (None, Some(patroni)) => Some(format!("Patroni {patroni}")),
            (None, None) => None,
        },
        pending_restart: pending(member),
        ..MemberState::default()
    }
}

fn text(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

fn pending(member: &Member) -> Vec<String> {
    let record = &member.record;
    match &record.pending_restart_reason {
        Some(Value::Object(parameters)) if !parameters.is_empty() => parameters.keys().cloned().collect(),
        _ if record.pending_restart == Some(true) => vec!["changed parameters".to_owned()],
        _ => Vec::new(),
    }
}

/// Whom a member is told to stream from.
fn upstream(view: &View, member: &Member) -> Option<String> {
    let leader = view.epoch().map(|epoch| epoch.holder.to_string());
    let told = text(member.record.tags.get("replicatefrom")).filter(|told| {
        let is_member = |other: &Member| other.name.as_str() == told && other.name != member.name;
        view.members.values().any(is_member)
    });
    told.or(leader)
}

fn leader_position(view: &View) -> Option<Lsn> {
    let leader = view.leader_member().map(|member| &member.record);
    let leads = leader.filter(|record| matches!(record.role, Role::Primary | Role::StandbyLeader));
    view.status.optime.max(leads.and_then(|record| record.xlog_location))
}

/// How far a member is behind what the leader last said; nothing while either is not known.
fn lag_bytes(view: &View, member: &Member) -> Option<u64> {
    let at = member.record.replay_lsn.or(member.record.xlog_location)?;
    Some(at.behind(leader_position(view)?))
}

/// What would be lost if the leader were.
#[must_use]
pub fn safety(view: &View) -> Safety {
    let sync = &view.sync.value;
    let mode = match (sync.is_active(), sync.quorum) {
        (false, _) => "asynchronous",
        (true, 0) => "synchronous",
        (true, _) => "quorum",
    };
    let leader = view.epoch().map(|epoch| &epoch.holder);
    let may_lead = |member: &&Member| {
        let record = &member.record;
        let streams = record.replication_state.as_deref() == Some("streaming");
        let listed = !sync.is_active() || sync.lists(&member.name);
        record.state == PgState::Running
            && streams
            && listed
            && !record.tag("nofailover")
            && leader != Some(&member.name)
    };
    let received = |member: &Member| {
        let at = member.record.receive_lsn.or(member.record.xlog_location)?;
        Some(at.behind(leader_position(view)?))
    };
    let successors = || view.members.values().filter(may_lead);
    Safety {
        mode,
        at_risk_bytes: successors().filter_map(received).min().filter(|_| !sync.is_active()),
        successors: successors().count(),
    }
}

/// A hand-over that was asked for and has not happened.
#[must_use]
pub fn asked(view: &View) -> Option<AskedFor> {
    let request = view.failover.value.as_ref()?;
    Some(AskedFor {
        from: request.leader.clone(),
        to: request.member.clone(),
        at: request.scheduled_at.clone(),
    })
}

/// The last ended timelines, newest first.
#[must_use]
pub fn history(view: &View) -> Vec<Timeline> {
    let ended = view.history.iter().flat_map(|history| history.0.iter().rev());
    let row = |ended: &pgherd_cluster::record::HistoryEntry| Timeline {
        timeline: ended.timeline.0,
        lsn: ended.lsn.to_string(),
        reason: ended.reason.clone(),
        at: ended.timestamp.clone(),
        new_leader: ended.new_leader.clone(),
    };
    ended.take(TIMELINES_SHOWN).map(row).collect()
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::key::Keys;
    use pgherd_cluster::name::Scope;
    use pgherd_cluster::view::Entry;

    use super::*;

    fn view(entries: &[(&str, &str)]) -> View {
        let scope = Scope::new("c").expect("a plain name");
        let keys = Keys::new("service", &scope);
        let entry = |(key, value): &(&str, &str)| Entry {
            key: format!("{}{key}", keys.prefix()),
            value: (*value).to_owned(),
            create_revision: 7,
            mod_revision: 8,
            lease: 1,
        };
        let entries: Vec<Entry> = entries.iter().map(entry).collect();
        View::from_entries(scope, &keys, entries, 10)
    }

    const LEADER: (&str, &str) = (
        "members/n1",
        r#"{"role":"primary","state":"running","xlog_location":1000,"conn_url":"","api_url":""}"#,
    );

    #[test]
    fn what_may_be_lost_is_what_the_best_replica_lacks() {
        let replica = r#"{"role":"replica","state":"running","replication_state":"streaming","receive_lsn":900,"replay_lsn":800,
            "conn_url":"","api_url":""}"#;
        let behind = replica.replace("900", "400");
        let never = replica
            .replace("\"conn_url\"", r#""tags":{"nofailover":true},"conn_url""#)
            .replace("900", "1000");
        let members = [
            ("leader", "n1"),
            LEADER,
            ("members/n2", replica),
            ("members/n3", behind.as_str()),
            ("members/n4", never.as_str()),
        ];
        let safety = safety(&view(&members));
        assert_eq!(
            (safety.mode, safety.at_risk_bytes, safety.successors),
            ("asynchronous", Some(100), 2)
        );

        let record = ("sync", r#"{"leader":"n1","quorum":0,"sync_standby":"n3"}"#);
        let members: Vec<_> = members.into_iter().chain([record]).collect();
        let safety = super::safety(&view(&members));
        assert_eq!(
            (safety.mode, safety.at_risk_bytes, safety.successors),
            ("synchronous", None, 1)
        );
    }

    #[test]
    fn a_cascade_is_told_by_its_tag_while_the_member_is_there() {
        let below = r#"{"role":"replica","state":"running","tags":{"replicatefrom":"n1b","zone":"a"},"conn_url":"","api_url":""}"#;
        let there = view(&[
            ("leader", "n1"),
            LEADER,
            ("members/n1b", LEADER.1),
            ("members/n2", below),
        ]);
        let shown = |view: &View| {
            let found = view
                .members
                .values()
                .find(|member| member.name.as_str() == "n2")
                .expect("there");
            member(view, found)
        };
        assert_eq!(shown(&there).upstream.as_deref(), Some("n1b"));
        assert_eq!(
            (shown(&there).zone.as_deref(), shown(&there).tags.len()),
            (Some("a"), 2)
        );
        let gone = view(&[("leader", "n1"), LEADER, ("members/n2", below)]);
        assert_eq!(shown(&gone).upstream.as_deref(), Some("n1"));
    }
}

//! What `list` tells of each member, before it is drawn: Patroni's columns and their meaning. Pure.

use std::collections::HashSet;

use pgherd_cluster::name::Lsn;
use pgherd_cluster::record::Address;
use pgherd_cluster::view::{Member, ShownRole, View};
use serde_json::{Map, Value};

/// A lag or a position of a member that does not lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Position {
    /// Of the leader nothing is told.
    Leads,
    /// The member does not say.
    Unknown,
    /// Where it is, and how many bytes behind the leader's last known position.
    At { lsn: Lsn, lag_bytes: Option<u64> },
}

/// One member.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) host: String,
    pub(crate) role: &'static str,
    pub(crate) state: String,
    pub(crate) timeline: Option<u32>,
    pub(crate) received: Position,
    pub(crate) replayed: Position,
    pub(crate) pending_restart: bool,
    pub(crate) pending_restart_reason: Vec<(String, String)>,
    pub(crate) scheduled_restart: Option<String>,
    pub(crate) tags: Map<String, Value>,
}

/// All members that have an address, by name.
pub(crate) fn rows(view: &View) -> Vec<Row> {
    let members: Vec<(&Member, Address)> = view
        .members
        .values()
        .filter_map(|member| Some((member, member.record.postgres_address()?)))
        .collect();
    let hosts: HashSet<&str> = members.iter().map(|(_, address)| address.host.as_str()).collect();
    // Ports are told for all as soon as they tell somebody apart.
    let with_ports = hosts.len() < members.len() || members.iter().any(|(_, address)| address.port != 5432);
    members
        .iter()
        .map(|(member, address)| row(view, member, address, with_ports))
        .collect()
}

fn row(view: &View, member: &Member, address: &Address, with_ports: bool) -> Row {
    let record = &member.record;
    let role = view.shown_role(member);
    let leads = matches!(role, ShownRole::Leader | ShownRole::StandbyLeader);
    let position = |lsn: Option<Lsn>| match lsn {
        _ if leads => Position::Leads,
        None => Position::Unknown,
        Some(lsn) => Position::At {
            lsn,
            lag_bytes: view.status.optime.map(|leader| lsn.behind(leader)),
        },
    };
    Row {
        name: member.name.to_string(),
        host: if with_ports {
            format!("{}:{}", address.host, address.port)
        } else {
            address.host.clone()
        },
        role: role_title(role),
        state: view.shown_state(member).to_owned(),
        timeline: record.timeline.map(|timeline| timeline.0),
        received: position(record.receive_lsn),
        replayed: position(record.replay_lsn),
        pending_restart: record.pending_restart == Some(true),
        pending_restart_reason: pending_reason(record.pending_restart_reason.as_ref()),
        scheduled_restart: record.scheduled_restart.as_ref().and_then(scheduled),
        tags: record.tags.clone(),
    }
}

fn role_title(role: ShownRole) -> &'static str {
    match role {
        ShownRole::Leader => "Leader",
        ShownRole::StandbyLeader => "Standby Leader",
        ShownRole::SyncStandby => "Sync Standby",
        ShownRole::QuorumStandby => "Quorum Standby",
        ShownRole::Replica => "Replica",
    }
}

/// `{"max_connections": {"old_value": "50", "new_value": "60"}}` as parameter and `50->60`.
fn pending_reason(reason: Option<&Value>) -> Vec<(String, String)> {
    let text = |change: &Value, key: &str| match change.get(key) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => String::new(),
        Some(other) => other.to_string(),
    };
    let parameters = reason.and_then(Value::as_object).into_iter().flatten();
    parameters
        .map(|(name, change)| {
            (
                name.clone(),
                format!("{}->{}", text(change, "old_value"), text(change, "new_value")),
            )
        })
        .collect()
}

fn scheduled(restart: &Value) -> Option<String> {
    let at = restart.get("schedule")?.as_str()?;
    Some(match restart.get("postgres_version").and_then(Value::as_str) {
        Some(version) => format!("{at} if version < {version}"),
        None => at.to_owned(),
    })
}

/// Bytes in whole mebibytes, rounded as Patroni rounds: halves to the even neighbour.
pub(crate) fn mebibytes(bytes: u64) -> u64 {
    let (whole, rest, half) = (bytes >> 20, bytes & 0xF_FFFF, 1 << 19);
    match rest.cmp(&half) {
        std::cmp::Ordering::Less => whole,
        std::cmp::Ordering::Greater => whole + 1,
        std::cmp::Ordering::Equal => whole + whole % 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mebibytes_round_as_python_does() {
        for (bytes, expected) in [
            (0, 0),
            (524_287, 0),
            (524_288, 0),
            (524_289, 1),
            (1_572_864, 2),
            (2_621_440, 2),
            (16 << 20, 16),
        ] {
            assert_eq!(mebibytes(bytes), expected, "{bytes}");
        }
    }

    #[test]
    fn a_pending_restart_says_what_from_what_to() {
        let reason = serde_json::json!({"max_connections": {"old_value": "50", "new_value": 60}});
        assert_eq!(
            pending_reason(Some(&reason)),
            [("max_connections".to_owned(), "50->60".to_owned())]
        );
        assert!(pending_reason(None).is_empty() && pending_reason(Some(&Value::Bool(true))).is_empty());
    }
}

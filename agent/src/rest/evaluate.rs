//! Which code a health path answers. Pure: path and facts in, code out.
//!
//! HAProxy's checks rest on these codes, oddities included: paths match by substring in a fixed order, and `/primary`
//! tests the leader key alone, so a holder whose PostgreSQL is dead answers 200. Who needs more asks for a warrant.

use pgherd_cluster::record::{DynamicConfig, PgState, Role};
use serde_json::Value;

use super::facts::{Facts, SyncStanding};
use super::query::Query;
use crate::record::is_set;

use crate::status::WalStatus;

/// What Patroni assumes while the configuration does not say, in bytes.
const LAG_BYTES_MAX: u64 = 1_048_576;

/// The code of the generic health check, for `path` and `query`.
pub(super) fn evaluate(path: &str, query: &Query, facts: &Facts) -> u16 {
    let bases = Bases::of(query, facts);
    let (passes, tags_count) = match_path(path, &bases, facts);
    code(passes && (!tags_count || tags_match(query, facts)))
}

/// The code of `GET /liveness`: whether the agent's loop still turns.
pub(super) fn liveness(facts: &Facts) -> u16 {
    let ttl = facts.view.timing().ttl();
    // A primary whose loop is stuck is about to be replaced, so it gets less patience.
    let primary_runs = facts.role() == Role::Primary && facts.state() == PgState::Running;
    let patience = if primary_runs { ttl } else { 2 * ttl };
    code(facts.is_paused() || facts.now < facts.status.next_cycle_at + patience)
}

/// The code of `GET /readiness`: leads, or streams and is not far behind.
pub(super) fn readiness(query: &Query, facts: &Facts) -> u16 {
    code(facts.leads() || streams_closely(query, facts).unwrap_or(false))
}

fn streams_closely(query: &Query, facts: &Facts) -> Option<bool> {
    let server = facts.server()?;
    let streams = server.replication_state.as_deref() == Some("streaming");
    let leader_is_known = facts.known_view().is_some() || facts.latest_end().is_some();
    if facts.state() != PgState::Running || !streams || !leader_is_known {
        return Some(false);
    }
    let WalStatus::Standby { received, replayed, .. } = &server.wal else {
        return Some(false);
    };
    let reached = match query.first("mode") {
        Some("write") => received,
        _ => replayed,
    };
    let configured = facts
        .config()
        .map_or(LAG_BYTES_MAX, DynamicConfig::maximum_lag_on_failover);
    let limit = query.lag().unwrap_or(i128::from(configured));
    Some(i128::from(facts.leader_position()) - i128::from(reached.0) <= limit)
}

/// Answers that several paths share.
struct Bases {
    leader: bool,
    primary: bool,
    standby_leader: bool,
    replica: bool,
}

impl Bases {
    fn of(query: &Query, facts: &Facts) -> Self {
        let role = facts.role();
        let replica = role == Role::Replica
            && facts.state() == PgState::Running
            && !is_set(&facts.status.tags, "noloadbalance")
            && replicates_as_wanted(query, facts)
            && !is_lagging(query, facts);
        if facts.known_view().is_none() && facts.is_paused() {
            // Nobody renews the leader key in a paused cluster without a store, and nobody is demoted either.
            return Self {
                leader: matches!(role, Role::Primary | Role::StandbyLeader),
                primary: role == Role::Primary,
                standby_leader: role == Role::StandbyLeader,
                replica,
            };
        }
        let leads = facts.leads();
        let in_standby_cluster = facts.is_standby_cluster();
        Self {
            leader: leads,
            primary: leads && !in_standby_cluster,
            standby_leader: leads && in_standby_cluster && matches!(role, Role::Replica | Role::StandbyLeader),
            replica: replica && !(leads && in_standby_cluster),
        }
    }

    const fn leads_or_standby_leads(&self) -> bool {
        self.primary || self.standby_leader
    }
}

/// Whether the path passes, and whether tags in the query count for it.
fn match_path(path: &str, bases: &Bases, facts: &Facts) -> (bool, bool) {
    let has = |part: &str| path.contains(part);
    if has("standby_leader") || has("standby-leader") {
        (bases.standby_leader, false)
    } else if has("leader") {
        (bases.leader, false)
    } else if has("master") || has("primary") || has("read-write") || path == "/" {
        (bases.primary, false)
    } else if has("replica") {
        (bases.replica, true)
    } else if has("read-only") && !has("sync") && !has("quorum") {
        (bases.leads_or_standby_leads() || bases.replica, true)
    } else if has("health") {
        (facts.state() == PgState::Running, true)
    } else {
        (
            facts.known_view().is_some() && match_sync_path(path, bases, facts),
            true,
        )
    }
}

fn match_sync_path(path: &str, bases: &Bases, facts: &Facts) -> bool {
    let standing = facts.sync_standing();
    let sync = bases.replica && standing == Some(SyncStanding::Sync);
    let quorum = bases.replica && standing == Some(SyncStanding::Quorum);
    match path {
        "/sync" | "/synchronous" => sync,
        "/quorum" => quorum,
        "/async" | "/asynchronous" => bases.replica && standing.is_none(),
        "/read-only-sync" | "/read-only-synchronous" => bases.leads_or_standby_leads() || sync,
        "/read-only-quorum" => bases.leads_or_standby_leads() || quorum,
        _ => false,
    }
}

/// Whether the member gets its log in the way that `replication_state=` asks for, as Patroni's development branch has it.
fn replicates_as_wanted(query: &Query, facts: &Facts) -> bool {
    let is = facts.server().and_then(|server| server.replication_state.as_deref());
    query.first("replication_state").is_none_or(|wanted| is == Some(wanted))
}

fn is_lagging(query: &Query, facts: &Facts) -> bool {
    let (Some(lag_max), Some(server)) = (query.lag(), facts.server()) else {
        return false;
    };
    let WalStatus::Standby { replayed, .. } = &server.wal else {
        return false;
    };
    let leader_position = facts.leader_position();
    leader_position > 0 && i128::from(leader_position) > i128::from(replayed.0) + lag_max
}

fn tags_match(query: &Query, facts: &Facts) -> bool {
    query.tags().all(|(name, wanted)| match facts.status.tags.get(name) {
        None | Some(Value::Null) => false,
        Some(Value::String(text)) => text == wanted,
        Some(other) => other.to_string().to_lowercase() == wanted,
    })
}

const fn code(passes: bool) -> u16 {
    if passes { 200 } else { 503 }
}

#[cfg(test)]
mod tests;

//! One look at our own slots, and what can be done about them in a moment.

use std::sync::Arc;
use std::time::Duration;

use pgherd_cluster::source::SourceHealth;
use pgherd_cluster::view::Epoch;

use super::plan::{Action, Seat, Slot, plan};
use super::syncs_by_itself;
use crate::context::Context;
use crate::observation::{LeaseSeen, Observation, Postgres};
use crate::postgres::ToolError;
use crate::postgres::sql::{Row, Target, literal, tell_in_order};
use crate::record::own_tags;
use crate::status::WalStatus;
use crate::topology::Place;

const ASK_MAX: Duration = Duration::from_secs(2);
/// Each is a matter of milliseconds; a promotion does not wait longer for it.
const END_MAX: Duration = Duration::from_millis(300);
/// The first release whose PostgreSQL copies slots by itself.
const SYNCS_SINCE: u32 = 170_000;
/// What connections that do long work on slots are called.
pub(super) const WORKER: &str = "pgherd slots";

/// What a round has found, and left to do.
#[derive(Debug)]
pub struct Round {
    /// Where it was made.
    pub seat: Seat,
    /// The slots, as they were before it.
    pub slots: Vec<Slot>,
    /// What takes longer.
    pub rest: Vec<Action>,
}

/// Where this member stands; nothing while PostgreSQL does not answer.
#[must_use]
pub fn seat(context: &Context, seen: &Observation) -> Option<Seat> {
    let Postgres::Running(server) = &seen.postgres else {
        return None;
    };
    let in_touch = *context.view.health().borrow() == SourceHealth::Following;
    let (leader, certain) = match &seen.lease {
        LeaseSeen::Mine(epoch) => (Some(epoch.holder.clone()), true),
        LeaseSeen::Theirs(epoch) => (Some(epoch.holder.clone()), true),
        LeaseSeen::Unknown | LeaseSeen::Free | LeaseSeen::MineUnproven(_) | LeaseSeen::Stale { .. } => {
            let last = seen.view.epoch().map(|epoch| epoch.holder.clone());
            (last.filter(|last| *last != seen.me), false)
        }
    };
    let (writable, position) = match &server.wal {
        WalStatus::Primary { location } => (true, *location),
        WalStatus::Standby { replayed, .. } => (false, *replayed),
    };
    let mut leaders = seen.view.status.slots.clone();
    if !in_touch {
        for (name, position) in context.slots.told() {
            let known = leaders.entry(name).or_insert(position);
            *known = position.max(*known);
        }
    }
    let dynamic = context.dynamic();
    Some(Seat {
        view: Arc::clone(&seen.view),
        me: seen.me.clone(),
        place: seen.place.clone(),
        leader,
        settled: certain && in_touch,
        retained: seen.view.status.retain_slots.iter().cloned().collect(),
        writable,
        position,
        leaders,
        syncs_by_itself: server.server_version >= SYNCS_SINCE && syncs_by_itself(&dynamic, &context.live().postgresql),
    })
}

/// Where a member stands that has just been promoted.
///
/// # Errors
/// When PostgreSQL does not tell its position.
pub async fn seat_of_new_leader(context: &Context, epoch: &Epoch) -> Result<Seat, ToolError> {
    let server = context.sql.status().await?;
    let view = context.view();
    let live = context.live();
    Ok(Seat {
        me: context.config.name.clone(),
        place: Place::of(&own_tags(&live)),
        leader: Some(epoch.holder.clone()),
        settled: true,
        retained: view.status.retain_slots.iter().cloned().collect(),
        writable: true,
        position: server.wal.position(),
        leaders: view.status.slots.clone(),
        syncs_by_itself: server.server_version >= SYNCS_SINCE && syncs_by_itself(&context.dynamic(), &live.postgresql),
        view,
    })
}

/// Looks at the slots, and does what can be done at once. What fails is said and tried again in the next round.
///
/// # Errors
/// When the slots cannot be listed.
pub async fn round(context: &Context, seat: Seat) -> Result<Round, ToolError> {
    let slots = list(context).await?;
    let mut rest = Vec::new();
    for refused in seat
        .view
        .config
        .value
        .iter()
        .flat_map(|config| config.permanent_slots().refused)
    {
        if let Some((key, why)) = refused.split_once(": ") {
            context.slots.complain("passing over", key, why);
        }
    }
    for action in plan(&seat, &slots) {
        let Some((what, sql)) = statement(&action) else {
            rest.push(action);
            continue;
        };
        if let Err(error) = context.slot_sql.ask(what, &sql, ASK_MAX).await {
            context.slots.complain(what, action.slot(), &error.chain());
            continue;
        }
        match &action {
            Action::Drop(slot) => tracing::info!(slot, "dropped a slot that nobody is to use here any more"),
            Action::Renew(slot) => tracing::info!(slot, "made an unused slot anew"),
            Action::Create(slot) => tracing::debug!(slot, "made a slot"),
            Action::Advance { .. } | Action::AdvanceLogical { .. } | Action::CreateLogical { .. } | Action::Copy(_) => {
            }
        }
    }
    Ok(Round { seat, slots, rest })
}

/// What is done by one question; nothing for what takes longer.
fn statement(action: &Action) -> Option<(&'static str, String)> {
    let create = |name: &str| format!("SELECT pg_create_physical_replication_slot({}, true)", literal(name));
    let drop = |name: &str| format!("SELECT pg_drop_replication_slot({})", literal(name));
    Some(match action {
        // Reserves WAL at once: the member may connect a moment too late otherwise.
        Action::Create(name) => ("making a slot", create(name)),
        Action::Drop(name) => ("dropping a slot", drop(name)),
        Action::Renew(name) => ("making a slot anew", format!("{}; {}", drop(name), create(name))),
        Action::Advance { name, to } => (
            "moving a slot forward",
            format!("SELECT pg_replication_slot_advance({}, '{to}')", literal(name)),
        ),
        Action::CreateLogical { .. } | Action::AdvanceLogical { .. } | Action::Copy(_) => return None,
    })
}

/// Columns that not every release has are read from the row as JSON.
const LIST: &str = "SELECT slot_name, database, plugin, active, \
    pg_wal_lsn_diff(restart_lsn, '0/0')::bigint, pg_wal_lsn_diff(confirmed_flush_lsn, '0/0')::bigint, \
    xmin IS NOT NULL OR catalog_xmin IS NOT NULL, catalog_xmin, \
    coalesce(wal_status = 'lost', false) OR coalesce((to_jsonb(s) ->> 'conflicting')::bool, false) \
      OR to_jsonb(s) ->> 'invalidation_reason' IS NOT NULL, \
    coalesce((to_jsonb(s) ->> 'failover')::bool, false), coalesce((to_jsonb(s) ->> 'synced')::bool, false) \
    FROM pg_replication_slots AS s WHERE NOT temporary";

async fn list(context: &Context) -> Result<Vec<Slot>, ToolError> {
    let rows = context.slot_sql.ask("listing the slots", LIST, ASK_MAX).await?;
    Ok(rows.iter().filter_map(parse).collect())
}

fn parse(row: &Row) -> Option<Slot> {
    let text = |index: usize| row.get(index).and_then(Option::as_deref);
    let is = |index: usize| text(index) == Some("t");
    let lsn = |index: usize| {
        text(index)
            .and_then(|number| number.parse().ok())
            .map(pgherd_cluster::name::Lsn)
    };
    Some(Slot {
        name: text(0)?.to_owned(),
        logical: text(1)
            .zip(text(2))
            .map(|(database, plugin)| (database.to_owned(), plugin.to_owned())),
        active: is(3),
        restart: lsn(4),
        confirmed: lsn(5),
        pins_rows: is(6),
        catalog_xmin: text(7).and_then(|number| number.parse().ok()),
        lost: is(8),
        failover: is(9),
        synced: is(10),
    })
}

/// Ends the long work on slots that a server may still be at, before it is promoted: a consumer that comes to the new leader
/// finds its slot free.
pub async fn end_work(target: &Target) {
    let sql = format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = {} AND state = 'active'",
        literal(WORKER)
    );
    if let Err(error) = tell_in_order(target, "ending the work on slots", &[&sql], END_MAX).await {
        tracing::debug!(error = error.chain(), "the work on slots could not be ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_read() {
        let row = |values: [Option<&str>; 11]| values.iter().map(|value| value.map(str::to_owned)).collect::<Row>();
        let (t, f) = (Some("t"), Some("f"));
        let physical = [Some("n2"), None, None, t, Some("256"), None, f, None, f, f, f];
        let slot = parse(&row(physical)).expect("a name");
        assert_eq!((slot.name.as_str(), slot.active, slot.logical), ("n2", true, None));
        assert_eq!(
            (slot.restart, slot.confirmed),
            (Some(pgherd_cluster::name::Lsn(256)), None)
        );
        let logical = [
            Some("a"),
            Some("d"),
            Some("p"),
            f,
            Some("1"),
            Some("2"),
            t,
            Some("733"),
            t,
            t,
            t,
        ];
        let slot = parse(&row(logical)).expect("a name");
        assert_eq!(slot.logical, Some(("d".to_owned(), "p".to_owned())));
        assert_eq!(slot.catalog_xmin, Some(733));
        assert!(slot.lost && slot.failover && slot.synced && slot.pins_rows);
    }
}

//! The slot that our standby streams by, as its source tells of it.

use std::time::Duration;

use pgherd_cluster::name::MemberName;

use crate::context::Context;
use crate::decide::upstream_address;
use crate::postgres::sql::{Row, Target, ask_once, literal};
use crate::record::own_tags;
use crate::topology::{Place, source};

const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Why a standby cannot stream that lacks nothing but its slot.
const TAKEN: &str = "another connection holds it, which may be our own of before";
const MISSING: &str = "it is not there; max_replication_slots may leave no room for it";

/// Whether our standby could have the slot that it asks its source for, while `leader` leads. Where it cannot, it waits for
/// that and for no log, and a copy of all data would wait in the same way. Who cannot be asked is taken to have it.
pub(super) async fn can_be_had(context: &Context, leader: &MemberName) -> bool {
    let (live, view) = (context.live(), context.view());
    let (me, place) = (&context.config.name, Place::of(&own_tags(&live)));
    // Whoever leads a standby cluster has a slot of the other cluster, which nobody here can ask.
    let by_slot = leader != me && context.dynamic().use_slots();
    let Some(from) = source(&view, me, &place, leader).filter(|_| by_slot) else {
        return true;
    };
    let Some(address) = upstream_address(&view, &from) else {
        return true;
    };
    let postgresql = &live.postgresql;
    let options = postgresql.connections.superuser.preferring_tls();
    let target = Target::new(&address, &postgresql.database, &postgresql.superuser).with_options(&options);
    let what = "asking who holds our slot";
    let slot = me.slot_name();
    match ask_once(&target, what, &question(&slot), ANSWER_MAX).await {
        Ok(rows) => match obstacle(&rows) {
            None => true,
            Some(why) => {
                tracing::warn!(slot, source = %from, "the standby cannot stream by its slot: {why}");
                false
            }
        },
        Err(error) => {
            tracing::debug!(error = error.chain(), "who holds our slot is not known");
            true
        }
    }
}

/// One row where the slot is: whether somebody has held it for longer than one try of our standby's to stream takes.
fn question(slot: &str) -> String {
    format!(
        "SELECT coalesce((SELECT backend_start < clock_timestamp() - interval '1 second' FROM pg_stat_activity \
         WHERE pid = active_pid), false) FROM pg_replication_slots WHERE slot_name = {}",
        literal(slot)
    )
}

/// What keeps the slot from us.
fn obstacle(rows: &[Row]) -> Option<&'static str> {
    let Some(row) = rows.first() else {
        return Some(MISSING);
    };
    (row.first().and_then(Option::as_deref) == Some("t")).then_some(TAKEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_can_be_had_where_it_is_there_and_nobody_has_held_it_for_long() {
        let row = |held: &str| vec![vec![Some(held.to_owned())]];
        assert_eq!(obstacle(&row("f")), None);
        assert_eq!(obstacle(&row("t")), Some(TAKEN));
        assert_eq!(obstacle(&[]), Some(MISSING));
    }
}

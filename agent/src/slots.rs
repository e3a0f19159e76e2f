//! Physical replication slots: a leader keeps one for every other member, so that a member that was away for a while
//! still finds its WAL.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pgherd_cluster::name::{Lsn, MemberName};
use pgherd_cluster::view::View;

use crate::context::Context;
use crate::postgres::ToolError;
use crate::postgres::settings::use_slots;
use crate::postgres::sql::literal;

const ASK_MAX: Duration = Duration::from_secs(2);

/// A slot of our own server.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Slot {
    name: String,
    physical: bool,
    active: bool,
    position: Option<Lsn>,
}

/// Makes the slots that are missing, drops those of members that are gone and no longer retained, and tells the
/// positions of what is there.
///
/// # Errors
/// When the server does not answer or refuses.
pub async fn ensure(context: &Context) -> Result<BTreeMap<String, Lsn>, ToolError> {
    let view = context.view();
    let slots = list(context).await?;
    let change = plan(
        &view,
        &context.config.name.slot_name(),
        &slots,
        use_slots(&context.dynamic()),
    );
    for name in &change.create {
        // Reserves WAL at once: the member may connect a moment too late otherwise.
        let sql = format!("SELECT pg_create_physical_replication_slot({}, true)", literal(name));
        context.sql.ask("making a member's slot", &sql, ASK_MAX).await?;
    }
    for name in &change.drop {
        tracing::info!(slot = name, "dropping the slot of a member that is gone");
        let sql = format!("SELECT pg_drop_replication_slot({})", literal(name));
        context
            .sql
            .ask("dropping a slot that nobody uses", &sql, ASK_MAX)
            .await?;
    }
    Ok(slots
        .into_iter()
        .filter_map(|slot| Some((slot.name, slot.position?)))
        .collect())
}

/// Drops the slots of members on a standby: left from when it led, they would keep WAL for ever.
///
/// # Errors
/// When the server does not answer or refuses.
pub async fn drop_on_standby(context: &Context) -> Result<(), ToolError> {
    let view = context.view();
    for slot in left_from_leading(&view, list(context).await?) {
        tracing::info!(slot = slot.name, "dropping a slot from when this member led");
        let sql = format!("SELECT pg_drop_replication_slot({})", literal(&slot.name));
        context
            .sql
            .ask("dropping a slot that nobody uses", &sql, ASK_MAX)
            .await?;
    }
    Ok(())
}

/// Of the slots of a standby those that it made for other members when it led. An operator's own stay.
fn left_from_leading(view: &View, slots: Vec<Slot>) -> Vec<Slot> {
    let members = view.members.keys().map(MemberName::slot_name);
    let ours: BTreeSet<String> = members.chain(view.status.retain_slots.iter().cloned()).collect();
    let permanent = permanent_slots(view);
    let left =
        |slot: &Slot| slot.physical && !slot.active && ours.contains(&slot.name) && !permanent.contains(&slot.name);
    slots.into_iter().filter(left).collect()
}

async fn list(context: &Context) -> Result<Vec<Slot>, ToolError> {
    let sql = "SELECT slot_name, slot_type = 'physical', active, \
               pg_wal_lsn_diff(coalesce(confirmed_flush_lsn, restart_lsn), '0/0')::bigint \
               FROM pg_replication_slots WHERE NOT temporary";
    let rows = context.sql.ask("listing the slots", sql, ASK_MAX).await?;
    let slot = |row: &Vec<Option<String>>| {
        let text = |index: usize| row.get(index).and_then(Option::as_deref);
        Some(Slot {
            name: text(0)?.to_owned(),
            physical: text(1) == Some("t"),
            active: text(2) == Some("t"),
            position: text(3).and_then(|number| number.parse().ok()).map(Lsn),
        })
    };
    Ok(rows.iter().filter_map(slot).collect())
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Change {
    create: Vec<String>,
    drop: Vec<String>,
}

/// What has to change. Pure. Logical slots are never touched.
fn plan(view: &View, own_slot: &str, slots: &[Slot], use_slots: bool) -> Change {
    let mut wanted: BTreeSet<String> = BTreeSet::new();
    if use_slots {
        let streams = view.members.values().filter(|member| !member.record.tag("nostream"));
        wanted.extend(streams.map(|member| member.name.slot_name()));
        // Members that were here lately keep theirs.
        wanted.extend(view.status.retain_slots.iter().cloned());
        wanted.remove(own_slot);
    }
    let there: BTreeSet<&str> = slots.iter().map(|slot| slot.name.as_str()).collect();
    let permanent = permanent_slots(view);
    Change {
        create: wanted
            .iter()
            .filter(|name| !there.contains(name.as_str()))
            .cloned()
            .collect(),
        drop: slots
            .iter()
            .filter(|slot| {
                slot.physical && !slot.active && !wanted.contains(&slot.name) && !permanent.contains(&slot.name)
            })
            .map(|slot| slot.name.clone())
            .collect(),
    }
}

/// Slots that an operator has asked to keep are not ours to drop, under any of the key's names.
fn permanent_slots(view: &View) -> BTreeSet<String> {
    let Some(config) = &view.config.value else {
        return BTreeSet::new();
    };
    let mut names = BTreeSet::new();
    for key in ["permanent_replication_slots", "permanent_slots", "slots"] {
        if let Some(serde_json::Value::Object(slots)) = config.document().get(key) {
            names.extend(slots.keys().cloned());
        }
    }
    if let Some(serde_json::Value::Array(ignored)) = config.document().get("ignore_slots") {
        names.extend(
            ignored
                .iter()
                .filter_map(|slot| slot.get("name")?.as_str().map(str::to_owned)),
        );
    }
    names
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::name::Scope;
    use pgherd_cluster::record::{DynamicConfig, MemberRecord, Status};
    use pgherd_cluster::view::{Member, Revised};
    use serde_json::json;

    use super::*;

    fn view(members: &[&str], retain: &[&str]) -> View {
        let mut view = View::empty(Scope::new("c").expect("a plain name"));
        for name in members {
            let name = MemberName::new(*name).expect("a plain name");
            let record = MemberRecord::new(String::new(), String::new());
            view.members.insert(
                name.clone(),
                Member {
                    name,
                    record,
                    mod_revision: 1,
                },
            );
        }
        view.status = Status {
            retain_slots: retain.iter().map(|&name| name.to_owned()).collect(),
            ..Status::default()
        };
        view
    }

    fn slot(name: &str, active: bool) -> Slot {
        Slot {
            name: name.to_owned(),
            physical: true,
            active,
            position: None,
        }
    }

    #[test]
    fn every_other_member_has_a_slot_and_the_gone_ones_lose_theirs() {
        let slots = [slot("n2", true), slot("gone", false), slot("gone_but_active", true)];
        let change = plan(&view(&["n1", "n2", "N-3"], &[]), "n1", &slots, true);
        assert_eq!(
            change,
            Change {
                create: vec!["n_3".into()],
                drop: vec!["gone".into()]
            }
        );
    }

    #[test]
    fn a_member_that_was_here_lately_keeps_its_slot() {
        let change = plan(&view(&["n1"], &["n1", "n2"]), "n1", &[slot("n2", false)], true);
        assert_eq!(change, Change::default());
    }

    #[test]
    fn a_standby_drops_only_what_it_made_when_it_led() {
        let mut view = view(&["n1", "n2", "n3"], &["gone"]);
        let config = DynamicConfig::parse(r#"{"slots":{"n3":{"type":"physical"}}}"#);
        view.config = Revised {
            value: Some(config),
            mod_revision: 1,
        };
        let slots = ["n2", "n3", "gone", "backup"].map(|name| slot(name, false)).to_vec();
        let dropped: Vec<String> = left_from_leading(&view, slots)
            .into_iter()
            .map(|slot| slot.name)
            .collect();
        assert_eq!(dropped, ["n2", "gone"]);
    }

    #[test]
    fn logical_and_permanent_slots_are_left_alone() {
        let mut view = view(&["n1"], &[]);
        let config = json!({"slots": {"keep": {"type": "physical"}}, "ignore_slots": [{"name": "other"}]});
        let config = DynamicConfig::new(config.as_object().cloned().unwrap_or_default());
        view.config = Revised {
            value: Some(config),
            mod_revision: 1,
        };
        let logical = Slot {
            physical: false,
            ..slot("logical", false)
        };
        assert_eq!(
            plan(&view, "n1", &[logical, slot("keep", false), slot("other", false)], true),
            Change::default()
        );
    }
}

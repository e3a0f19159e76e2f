//! Which slots a member should have, and what is to be done about those that it has. Pure. Patroni's rules, but for
//! logical slots on the leader that nobody asked for: they are left alone, since their consumers would lose their place.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use pgherd_cluster::name::{Lsn, MemberName};
use pgherd_cluster::record::PermanentSlot;
use pgherd_cluster::view::View;

use crate::topology::{Place, keeps_logical, source};

/// How far a copy of a logical slot is moved at once: what is interrupted begins again from where it was.
pub(super) const STRIDE_BYTES: u64 = 64 << 20;

/// A slot of our own server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// Its database and output plugin; nothing for a physical one.
    pub logical: Option<(String, String)>,
    /// Whether somebody uses it at the moment.
    pub active: bool,
    /// The oldest position that it keeps; nothing while it keeps none.
    pub restart: Option<Lsn>,
    /// How far a logical slot's consumer has come.
    pub confirmed: Option<Lsn>,
    /// Whether it keeps old rows from being removed.
    pub pins_rows: bool,
    /// The oldest transaction whose catalog rows it needs.
    pub catalog_xmin: Option<u32>,
    /// Whether what it needs is gone.
    pub lost: bool,
    /// Whether PostgreSQL copies it to standbys by itself, since 17.
    pub failover: bool,
    /// Whether it is such a copy.
    pub synced: bool,
}

/// Where the plan is made.
#[derive(Clone, Debug)]
pub struct Seat {
    /// The cluster.
    pub view: Arc<View>,
    /// This member.
    pub me: MemberName,
    /// What its tags say.
    pub place: Place,
    /// Who leads, or was last known to.
    pub leader: Option<MemberName>,
    /// Whether that is certain, and the view current: else positions move, and nothing is made or dropped.
    pub settled: bool,
    /// The slots of members that were here lately, also where a store that was wiped does not say so any more.
    pub retained: BTreeSet<String>,
    /// Whether our server takes writes.
    pub writable: bool,
    /// How far our server has flushed, or replayed.
    pub position: Lsn,
    /// Where the leader's slots are, by its own word.
    pub leaders: BTreeMap<String, Lsn>,
    /// Whether PostgreSQL copies failover slots from its primary by itself (`sync_replication_slots`, since 17).
    pub syncs_by_itself: bool,
}

/// What a slot is wanted for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    /// A member's that streams from here.
    InUse,
    /// A member's that streams from elsewhere, or of one that is away; to be at this position.
    Spare(Option<Lsn>),
    /// Asked for by the configuration.
    Permanent(PermanentSlot),
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Make a physical slot that reserves WAL at once.
    Create(String),
    /// Make a logical slot on the leader.
    CreateLogical {
        /// Its name.
        name: String,
        /// Its database.
        database: String,
        /// Its output plugin.
        plugin: String,
        /// Whether PostgreSQL is to copy it to the standbys.
        failover: bool,
        /// Whether the leader before this one had it: what its consumer has not read there it will not find here.
        had: bool,
    },
    /// Drop one that nobody wants, or that is of another kind than is wanted.
    Drop(String),
    /// Make it anew: what it needs is gone, it reserves nothing, or it keeps old rows for nobody.
    Renew(String),
    /// Move an unused physical slot forward.
    Advance {
        /// Its name.
        name: String,
        /// To here.
        to: Lsn,
    },
    /// Move a copy of a logical slot forward.
    AdvanceLogical {
        /// Its name.
        name: String,
        /// From here, as far as its consumer has come on the leader or our server has replayed.
        to: Lsn,
        /// The first step on the way.
        stride: Lsn,
    },
    /// Copy a logical slot from the leader.
    Copy(String),
}

impl Action {
    /// The slot that it is about.
    #[must_use]
    pub fn slot(&self) -> &str {
        match self {
            Self::Create(name)
            | Self::CreateLogical { name, .. }
            | Self::Drop(name)
            | Self::Renew(name)
            | Self::Advance { name, .. }
            | Self::AdvanceLogical { name, .. }
            | Self::Copy(name) => name,
        }
    }
}

/// What is wanted here, by name.
fn wanted(seat: &Seat, leader: &MemberName) -> BTreeMap<String, Wanted> {
    let (view, me) = (&*seat.view, &seat.me);
    let config = view.config.value.clone().unwrap_or_default();
    let mut wanted = BTreeMap::new();
    if !config.use_slots() {
        return wanted;
    }
    let leads = me == leader;
    let may_lead = leads || !seat.place.nofailover;
    // A member that may lead one day has a slot ready for everybody.
    let spares = may_lead && !config.member_slots_ttl().is_zero();
    if spares {
        for name in &seat.retained {
            // The leader keeps for those that are away what they still need; a copy of that moves with it.
            let to = if leads { None } else { seat.leaders.get(name).copied() };
            wanted.insert(name.clone(), Wanted::Spare(to));
        }
    }
    for member in view.members.values().filter(|member| member.name != *me) {
        let place = Place::of(&member.record);
        let slot = member.name.slot_name();
        let streams_from = source(view, &member.name, &place, leader);
        if streams_from.as_ref() == Some(me) {
            wanted.insert(slot, Wanted::InUse);
            continue;
        }
        // While its source is not up it streams from the leader, and comes back.
        let tagged = place.replicatefrom.as_deref() == Some(me.as_str());
        if place.nostream || !(spares || tagged) {
            continue;
        }
        // Whoever streams from another replica is known by its own word only.
        let own = member
            .record
            .xlog_location
            .filter(|_| streams_from.is_some_and(|source| source != *leader));
        let to = own.max(seat.leaders.get(&slot).copied().filter(|_| !leads));
        wanted.insert(slot, Wanted::Spare(to));
    }
    if may_lead {
        let logical_too = keeps_logical(view, me, &seat.place, leader) && !config.is_standby_cluster();
        for (name, slot) in config.permanent_slots().slots {
            let kept = slot == PermanentSlot::Physical || logical_too;
            if kept && !matches!(wanted.get(&name), Some(Wanted::InUse)) && !is_members(view, &name) {
                wanted.insert(name, Wanted::Permanent(slot));
            }
        }
    }
    wanted.remove(&me.slot_name());
    wanted
}

fn is_members(view: &View, slot: &str) -> bool {
    view.members.keys().any(|name| name.slot_name() == slot)
}

/// What the leader tells of its slots: those that are wanted of it, and where they are.
#[must_use]
pub fn told(seat: &Seat, slots: &[Slot]) -> BTreeMap<String, Lsn> {
    let Some(leader) = &seat.leader else {
        return BTreeMap::new();
    };
    let config = seat.view.config.value.clone().unwrap_or_default();
    let mut wanted = wanted(seat, leader);
    if config.member_slots_ttl().is_zero() {
        wanted.retain(|_, wanted| matches!(wanted, Wanted::Permanent(_)));
    }
    let here = slots
        .iter()
        .filter(|slot| wanted.contains_key(&slot.name) && !slot.lost);
    here.filter_map(|slot| Some((slot.name.clone(), slot.confirmed.or(slot.restart)?)))
        .collect()
}

/// What is to be done. In maintenance nothing is dropped; while nobody is known to lead, positions move and nothing else is
/// done.
#[must_use]
pub fn plan(seat: &Seat, slots: &[Slot]) -> Vec<Action> {
    // Without a configuration, as in a store that was wiped, nothing is known to be unwanted.
    let (Some(leader), Some(config)) = (&seat.leader, &seat.view.config.value) else {
        return Vec::new();
    };
    let wanted = wanted(seat, leader);
    let ignored = config.ignored_slots();
    let may_drop = seat.settled && !config.is_paused();
    let mut actions = Vec::new();
    let mut here = BTreeSet::new();
    for slot in slots {
        here.insert(slot.name.as_str());
        let (kind, database, plugin) = match &slot.logical {
            Some((database, plugin)) => ("logical", Some(database.as_str()), Some(plugin.as_str())),
            None => ("physical", None, None),
        };
        let is_ignored = ignored.iter().any(|one| one.means(&slot.name, kind, database, plugin));
        // Whoever uses it moves it, and it cannot be dropped; PostgreSQL looks after its own copies.
        if is_ignored || slot.active || slot.synced {
            continue;
        }
        let action = match wanted.get(&slot.name) {
            _ if is_in_the_way(seat, slot) => may_drop.then(|| Action::Drop(slot.name.clone())),
            None => (may_drop && is_ours_to_drop(seat, slot, leader)).then(|| Action::Drop(slot.name.clone())),
            Some(wanted) => look_after(seat, slot, wanted, may_drop),
        };
        actions.extend(action);
    }
    if seat.settled {
        let missing = wanted.iter().filter(|(name, _)| !here.contains(name.as_str()));
        actions.extend(missing.filter_map(|(name, wanted)| make(seat, name, wanted)));
    }
    actions
}

/// A failover slot from when this member led keeps PostgreSQL from copying the leader's of that name, for ever.
fn is_in_the_way(seat: &Seat, slot: &Slot) -> bool {
    let leaders = &seat.view.status.pgherd.failover_slots;
    let copied = seat.syncs_by_itself && !seat.writable && leaders.contains(&slot.name);
    copied && slot.failover && !slot.synced
}

/// Failover slots are PostgreSQL's own affair. A logical slot on the leader is dropped only if a leader has kept it as a
/// permanent one; on a replica it is of no use, and would keep its WAL for ever.
fn is_ours_to_drop(seat: &Seat, slot: &Slot, leader: &MemberName) -> bool {
    if slot.failover {
        return false;
    }
    slot.logical.is_none() || seat.me != *leader || seat.leaders.contains_key(&slot.name)
}

fn look_after(seat: &Seat, slot: &Slot, wanted: &Wanted, may_drop: bool) -> Option<Action> {
    let name = slot.name.clone();
    let physical_to = match wanted {
        Wanted::Permanent(PermanentSlot::Logical { database, plugin }) => {
            let same = slot.logical.as_ref().is_some_and(|(d, p)| d == database && p == plugin);
            if !same {
                return (may_drop && !slot.failover).then_some(Action::Drop(name));
            }
            return advance_logical(seat, slot, may_drop).filter(|_| !seat.writable);
        }
        Wanted::InUse => None,
        Wanted::Spare(to) => *to,
        Wanted::Permanent(PermanentSlot::Physical) => seat.leaders.get(&slot.name).copied().filter(|_| !seat.writable),
    };
    if slot.logical.is_some() {
        return (may_drop && !slot.failover).then_some(Action::Drop(name));
    }
    if slot.lost || slot.restart.is_none() {
        return may_drop.then_some(Action::Renew(name));
    }
    // A standby that is away for a moment goes on to need its rows; one that streams elsewhere says so there.
    let pins_for_nobody = match wanted {
        Wanted::InUse => false,
        Wanted::Spare(_) => !is_away(seat, &slot.name),
        Wanted::Permanent(_) => !seat.writable,
    };
    if slot.pins_rows && pins_for_nobody && may_drop {
        return Some(Action::Renew(name));
    }
    let to = physical_to?.min(seat.position);
    (slot.restart < Some(to)).then_some(Action::Advance { name, to })
}

/// Whether a slot on the leader is of a member that has no key, and may come back.
fn is_away(seat: &Seat, slot: &str) -> bool {
    seat.writable && !is_members(&seat.view, slot)
}

fn advance_logical(seat: &Seat, slot: &Slot, may_drop: bool) -> Option<Action> {
    let name = slot.name.clone();
    if slot.lost {
        return (may_drop && !slot.failover).then_some(Action::Drop(name));
    }
    let from = slot.confirmed?;
    let to = seat.leaders.get(&slot.name).copied()?.min(seat.position);
    let stride = to.min(Lsn(from.0.saturating_add(STRIDE_BYTES)));
    (from < to).then_some(Action::AdvanceLogical { name, to, stride })
}

fn make(seat: &Seat, name: &str, wanted: &Wanted) -> Option<Action> {
    let name = name.to_owned();
    let Wanted::Permanent(PermanentSlot::Logical { database, plugin }) = wanted else {
        return Some(Action::Create(name));
    };
    if !seat.writable {
        // The leader marks them for PostgreSQL to copy where that is switched on.
        return (!seat.syncs_by_itself && seat.leaders.contains_key(&name)).then_some(Action::Copy(name));
    }
    Some(Action::CreateLogical {
        had: seat.leaders.contains_key(&name),
        failover: seat.syncs_by_itself,
        name,
        database: database.clone(),
        plugin: plugin.clone(),
    })
}

/// The failover slots that the leader has and this member lacks.
#[must_use]
pub fn lacking(leaders: &[String], here: &BTreeSet<String>) -> Vec<String> {
    leaders.iter().filter(|name| !here.contains(*name)).cloned().collect()
}

/// The failover slots that are of use here.
#[must_use]
pub fn failover_slots(slots: &[Slot]) -> BTreeSet<String> {
    let usable = slots.iter().filter(|slot| slot.failover && !slot.lost);
    usable.map(|slot| slot.name.clone()).collect()
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;

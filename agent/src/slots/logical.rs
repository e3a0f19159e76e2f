//! What takes longer with logical slots: making one waits for every transaction that runs, moving a copy reads the log, and
//! a copy comes from the leader.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::{Lsn, MemberName};
use pgherd_cluster::record::PermanentSlot;
use pgherd_cluster::view::Epoch;
use tokio::time::{Instant, timeout_at};

use super::plan::{Action, STRIDE_BYTES, Seat, Slot};
use super::round::{Round, WORKER};
use super::segments::{self, Segment, bytes, missing};
use super::state_file::{Copies, is_whole};
use super::{COPYING, TAKES_NONE, lock, syncs_by_itself, takes};
use crate::context::Context;
use crate::decide::upstream_address;
use crate::postgres::ToolError;
use crate::postgres::sql::{Target, ask_once, literal, tell_in_order};
use crate::topology::{Place, keeps_logical, way_up};

/// A slot whose making waits for a transaction that long is tried again later.
const CREATE_MAX: Duration = Duration::from_secs(60);
/// One stride of a copy.
const STRIDE_MAX: Duration = Duration::from_secs(20);
/// All strides of a round.
const ADVANCE_MAX: Duration = Duration::from_secs(60);
const LEADER_MAX: Duration = Duration::from_secs(3);
/// All of the log that is fetched before a start.
const FETCH_MAX: Duration = Duration::from_secs(15);
/// SQLSTATE `undefined_file`: the log that a slot begins in is not here any more.
const NO_FILE: &str = "58P01";

/// Which copies of logical slots can be used after a promotion, under one holding of a leader. Until the leader keeps the
/// rows that a copy needs, it may have removed some that are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    leader: Option<Epoch>,
    /// The oldest transaction whose rows were still there when the leader first kept what the copy needs.
    guarded_from: BTreeMap<String, u32>,
    ready: BTreeSet<String>,
}

/// What the leader says of the rows that it keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Kept {
    /// For this member: `catalog_xmin` of the physical slot on the way to it.
    for_us: Option<u32>,
    /// For each logical slot of its own.
    by_slot: BTreeMap<String, u32>,
}

/// Whether transaction `a` is `b` or came before it; their numbers go round.
const fn not_after(a: u32, b: u32) -> bool {
    a == b || a.wrapping_sub(b) > u32::MAX / 2
}

impl Readiness {
    /// What was found of another holding says nothing of this one.
    fn under(self, leader: Option<&Epoch>) -> Self {
        if self.leader.as_ref() == leader {
            return self;
        }
        Self {
            leader: leader.cloned(),
            ..Self::default()
        }
    }

    fn is_ready(&self, name: &str) -> bool {
        self.ready.contains(name)
    }

    /// The copies here that may not be usable.
    #[must_use]
    pub fn unsure<'a>(&self, seat: &Seat, slots: &'a [Slot]) -> Vec<&'a str> {
        let config = seat.view.config.value.clone().unwrap_or_default();
        let permanent = config.permanent_slots().slots;
        let is_permanent = |slot: &Slot| matches!(permanent.get(&slot.name), Some(PermanentSlot::Logical { .. }));
        let unsure = |slot: &&Slot| is_permanent(slot) && !slot.synced && !self.is_ready(&slot.name);
        slots.iter().filter(unsure).map(|slot| slot.name.as_str()).collect()
    }

    /// Takes in what the leader keeps.
    fn note(&mut self, slots: &[Slot], kept: &Kept) {
        for slot in slots.iter().filter(|slot| slot.logical.is_some()) {
            let Some(needs) = slot.catalog_xmin else { continue };
            if !self.guarded_from.contains_key(&slot.name)
                && let (Some(for_us), Some(on_leader)) = (kept.for_us, kept.by_slot.get(&slot.name))
                && not_after(for_us, needs)
            {
                self.guarded_from.insert(slot.name.clone(), *on_leader);
            }
            if self
                .guarded_from
                .get(&slot.name)
                .is_some_and(|from| not_after(*from, needs))
            {
                self.ready.insert(slot.name.clone());
            }
        }
    }
}

/// What came of the work.
#[derive(Debug, Default)]
pub struct Report {
    /// Which copies can be used.
    pub readiness: Readiness,
    /// Slots whose copies the standby finds when it is started again.
    pub to_copy: Vec<String>,
}

/// Does what a round has left to do. What fails is said, and comes up again in a later round.
pub async fn work(context: &Context, round: Round, readiness: Readiness) -> Report {
    let Round { seat, slots, rest } = round;
    let mut report = Report {
        readiness: readiness.under(seat.view.epoch()),
        to_copy: Vec::new(),
    };
    context.slots.arrived(slots.iter().map(|slot| slot.name.as_str()));
    let copies: Vec<String> = rest.iter().filter_map(copied).collect();
    if !seat.writable && seat.settled {
        let unsure = report.readiness.unsure(&seat, &slots);
        if !unsure.is_empty() || !copies.is_empty() {
            match ask_leader(context, &seat, &unsure, &copies).await {
                Ok((kept, states)) => {
                    report.readiness.note(&slots, &kept);
                    report.to_copy = can_be_had(context, &states);
                }
                Err(error) => context
                    .slots
                    .complain("asking the leader for logical slots", "", &error.chain()),
            }
        }
    }
    let until = Instant::now() + ADVANCE_MAX;
    for action in rest {
        match action {
            Action::CreateLogical { .. } => create(context, &action).await,
            Action::AdvanceLogical { name, to, stride } if Instant::now() < until => {
                let slot = slots.iter().find(|slot| slot.name == name);
                if let Some((database, _)) = slot.and_then(|slot| slot.logical.as_ref()) {
                    advance(context, database, &name, (stride, to), until).await;
                }
            }
            _ => {}
        }
    }
    report
}

fn copied(action: &Action) -> Option<String> {
    match action {
        Action::Copy(name) => Some(name.clone()),
        _ => None,
    }
}

/// Our own server, in a database: a logical slot is looked after from its own only.
fn local(context: &Context, database: &str) -> Target {
    context.sql.target().to_database(database).named(WORKER)
}

/// The server itself ends what takes too long, also where nobody waits for it any more.
fn limited(limit: Duration) -> String {
    format!("SET statement_timeout = {}", limit.as_millis())
}

async fn create(context: &Context, action: &Action) {
    let Action::CreateLogical {
        name,
        database,
        plugin,
        failover,
        had,
    } = action
    else {
        return;
    };
    let failover = if *failover { ", false, false, true" } else { "" };
    let (slot, plugin) = (literal(name), literal(plugin));
    let sql = format!("SELECT pg_create_logical_replication_slot({slot}, {plugin}{failover})");
    let what = "making a logical slot";
    let limit = CREATE_MAX + LEADER_MAX;
    match tell_in_order(&local(context, database), what, &[&limited(CREATE_MAX), &sql], limit).await {
        Ok(()) if *had => tracing::warn!(
            slot = name,
            "a logical slot that the leader before this one had was not here and is made anew: its consumer finds no change \
             from before now"
        ),
        Ok(()) => tracing::info!(slot = name, "made a logical slot"),
        Err(error) => context.slots.complain(what, name, &error.chain()),
    }
}

/// Moves a copy forward, in strides: what is interrupted has come as far as its last one.
async fn advance(context: &Context, database: &str, name: &str, (stride, to): (Lsn, Lsn), until: Instant) {
    let what = "moving a copy of a logical slot forward";
    let target = local(context, database);
    let mut next = stride;
    loop {
        let sql = format!("SELECT pg_replication_slot_advance({}, '{next}')", literal(name));
        let limit = STRIDE_MAX + LEADER_MAX;
        match tell_in_order(&target, what, &[&limited(STRIDE_MAX), &sql], limit).await {
            Ok(()) => {}
            Err(error) if error.sqlstate() == Some(NO_FILE) => return give_up(context, &target, name).await,
            Err(error) => return context.slots.complain(what, name, &error.chain()),
        }
        if next >= to || Instant::now() >= until {
            return;
        }
        next = to.min(Lsn(next.0.saturating_add(STRIDE_BYTES)));
    }
}

/// The log that it begins in is gone here: it is of no use, and is copied again once its consumer has come further.
async fn give_up(context: &Context, target: &Target, name: &str) {
    let why = "the log that it begins in is not here: it is copied again later";
    context.slots.complain("giving up a copy of a logical slot", name, why);
    let (what, sql) = (
        "dropping a copy of a logical slot",
        format!("SELECT pg_drop_replication_slot({})", literal(name)),
    );
    if let Err(error) = tell_in_order(target, what, &[&sql], LEADER_MAX).await {
        context.slots.complain(what, name, &error.chain());
    }
}

/// A slot's state on the leader, and where the log that it begins in lies there.
struct State {
    name: String,
    first: Segment,
    state: Vec<u8>,
}

async fn ask_leader(
    context: &Context,
    seat: &Seat,
    unsure: &[&str],
    copies: &[String],
) -> Result<(Kept, Vec<State>), ToolError> {
    let nobody = || ToolError::Unexpected {
        program: "the leader".to_owned(),
        what: "no address in its key".to_owned(),
    };
    let leader = seat.leader.as_ref().ok_or_else(nobody)?;
    let target = leaders_server(context, seat).ok_or_else(nobody)?;
    let physical = slot_on_leader(seat, leader);
    let array = |names: &mut dyn Iterator<Item = &str>| {
        let names: Vec<String> = names.map(literal).collect();
        format!("ARRAY[{}]::text[]", names.join(", "))
    };
    let copied = array(&mut copies.iter().map(String::as_str));
    let asked = array(
        &mut unsure
            .iter()
            .copied()
            .chain(copies.iter().map(String::as_str))
            .chain([physical.as_str()]),
    );
    let sql = format!(
        "SELECT slot_name, catalog_xmin, pg_walfile_name(restart_lsn), \
         CASE WHEN slot_name::text = ANY ({copied}) AND slot_type = 'logical' \
           THEN encode(pg_read_binary_file('pg_replslot/' || slot_name || '/state'), 'hex') END, \
           pg_size_bytes(current_setting('wal_segment_size')) \
         FROM pg_replication_slots WHERE NOT pg_is_in_recovery() AND coalesce(wal_status <> 'lost', true) \
         AND restart_lsn IS NOT NULL AND slot_name::text = ANY ({asked})"
    );
    let rows = ask_once(&target, "asking the leader for its logical slots", &sql, LEADER_MAX).await?;
    let (mut kept, mut states) = (Kept::default(), Vec::new());
    for row in rows {
        let text = |index: usize| row.get(index).and_then(Option::as_deref);
        let xmin = text(1).and_then(|number| number.parse().ok());
        let Some(name) = text(0) else { continue };
        if name == physical {
            kept.for_us = xmin;
        } else if let Some(xmin) = xmin {
            kept.by_slot.insert(name.to_owned(), xmin);
        }
        let first = text(2).zip(text(4).and_then(|bytes| bytes.parse().ok()));
        let first = first.and_then(|(name, bytes)| Segment::named(name, bytes));
        if let (Some(first), Some(state)) = (first, text(3).and_then(bytes)) {
            let name = name.to_owned();
            states.push(State { name, first, state });
        }
    }
    Ok((kept, states))
}

/// Whose slot on the leader passes on what we need: our own, or that of the member that we stream through.
fn slot_on_leader(seat: &Seat, leader: &MemberName) -> String {
    let way = way_up(&seat.view, &seat.me, &seat.place, leader);
    let below = way.iter().rev().nth(1);
    below.unwrap_or(&seat.me).slot_name()
}

/// The leader's server, as whoever may read its files.
fn leaders_server(context: &Context, seat: &Seat) -> Option<Target> {
    let address = upstream_address(&seat.view, seat.leader.as_ref()?)?;
    let live = context.live();
    let postgresql = &live.postgresql;
    let (user, options) = postgresql.rewinds_as();
    Some(Target::new(&address, &postgresql.database, user).with_options(&options.preferring_tls()))
}

/// Those that a start would bring, and that are worth one.
fn can_be_had(context: &Context, states: &[State]) -> Vec<String> {
    let board = &context.slots;
    let data_dir = &context.config.postgresql.data_dir;
    let mut names = Vec::new();
    for State { name, first, state } in states {
        if !is_whole(state) {
            board.complain(COPYING, name, "the leader's file is not whole");
        } else if missing(data_dir, first).is_none() {
            let why = format!("its consumer needs the log from {first} on, and too much of that is not here yet");
            board.complain(COPYING, name, &why);
        } else {
            names.push(name.clone());
        }
    }
    let parameters = context.wanted();
    // All that can be had come with one start.
    if !names.is_empty() && !takes(data_dir, names.len(), |name| parameters.get(name).map(String::as_str)) {
        board.complain(COPYING, "", TAKES_NONE);
        return Vec::new();
    }
    board.ask_for(names, Boottime::now())
}

/// Gets what PostgreSQL is to find when it starts: the states, and the log that they begin in.
async fn fetch(context: &Context, target: &Target, states: Vec<State>) -> Result<(), ToolError> {
    let data_dir = &context.config.postgresql.data_dir;
    let until = Instant::now() + FETCH_MAX;
    let mut copies = Copies::new();
    for State { name, first, state } in states {
        let Some(segments) = missing(data_dir, &first).filter(|_| is_whole(&state)) else {
            continue;
        };
        for segment in segments {
            // One that is not whole by then is not kept.
            match timeout_at(until, segments::fetch(target, data_dir, &segment)).await {
                Ok(fetched) => fetched?,
                Err(_) => return Ok(()),
            }
        }
        copies.insert(name, state);
        *lock(&context.slots.copies) = copies.clone();
    }
    Ok(())
}

/// Before a standby is started: has it find copies of the logical slots that it lacks. One that cannot be had comes later.
pub async fn bring(context: &Context, leader: &MemberName) {
    let view = context.view();
    let config = context.dynamic();
    let place = Place::of(&crate::record::own_tags(&context.live()));
    let logical = config
        .permanent_slots()
        .slots
        .into_iter()
        .filter_map(|(name, slot)| match slot {
            PermanentSlot::Logical { .. } => Some(name),
            PermanentSlot::Physical => None,
        });
    let dir = context.config.postgresql.data_dir.join("pg_replslot");
    let lacks: Vec<String> = logical.filter(|name| !dir.join(name).exists()).collect();
    let keeps = config.use_slots()
        && !config.is_standby_cluster()
        && !syncs_by_itself(&config, &context.live().postgresql)
        && keeps_logical(&view, &context.config.name, &place, leader);
    if lacks.is_empty() || !keeps || view.writable_leader().is_none() {
        return;
    }
    let seat = Seat {
        me: context.config.name.clone(),
        place,
        leader: Some(leader.clone()),
        settled: true,
        retained: BTreeSet::new(),
        writable: false,
        position: Lsn(0),
        leaders: BTreeMap::new(),
        syncs_by_itself: false,
        view,
    };
    let Some(target) = leaders_server(context, &seat) else {
        return;
    };
    let fetched = match ask_leader(context, &seat, &[], &lacks).await {
        Ok((_, states)) => fetch(context, &target, states).await,
        Err(error) => Err(error),
    };
    if let Err(error) = fetched {
        tracing::info!(
            error = error.chain(),
            "not every logical slot could be copied before this start"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(needs: u32) -> [Slot; 1] {
        [Slot {
            name: "a".to_owned(),
            logical: Some(("d".to_owned(), "p".to_owned())),
            catalog_xmin: Some(needs),
            ..Slot::default()
        }]
    }

    fn kept(for_us: Option<u32>, on_leader: u32) -> Kept {
        Kept {
            for_us,
            by_slot: [("a".to_owned(), on_leader)].into(),
        }
    }

    #[test]
    fn a_copy_can_be_used_once_the_leader_keeps_all_that_it_needs() {
        let mut readiness = Readiness::default();
        readiness.note(&copy(100), &kept(None, 100));
        assert!(!readiness.is_ready("a"), "the leader keeps nothing for us");
        readiness.note(&copy(100), &kept(Some(110), 120));
        assert!(!readiness.is_ready("a"), "what it keeps begins too late");
        // From here on it keeps what the copy needs; what lay before its own slot's 120 may be gone already.
        readiness.note(&copy(100), &kept(Some(100), 120));
        assert!(!readiness.is_ready("a"));
        readiness.note(&copy(119), &kept(Some(119), 130));
        assert!(!readiness.is_ready("a"));
        readiness.note(&copy(120), &kept(Some(119), 140));
        assert!(readiness.is_ready("a"));
    }

    #[test]
    fn a_copy_of_what_the_leader_still_keeps_can_be_used_at_once() {
        let mut readiness = Readiness::default();
        readiness.note(&copy(100), &kept(Some(100), 100));
        assert!(readiness.is_ready("a"));
        let epoch = Epoch {
            holder: MemberName::new("n2").expect("a plain name"),
            create_revision: 9,
        };
        assert!(
            !readiness.under(Some(&epoch)).is_ready("a"),
            "another leader keeps other rows"
        );
    }

    #[test]
    fn transaction_numbers_go_round() {
        assert!(not_after(5, 5) && not_after(5, 6) && !not_after(6, 5));
        assert!(not_after(u32::MAX - 5, 3) && !not_after(3, u32::MAX - 5));
    }
}

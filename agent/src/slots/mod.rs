//! Replication slots. A leader keeps one for every other member, so that a member that was away for a while still finds its
//! WAL; every member that may lead keeps the same ones ready, moved forward with the leader's, and copies of the permanent
//! logical slots. Nothing here is waited for by the loop: rounds run beside it, on a connection of their own, and each
//! question in them has an end.

mod logical;
pub mod plan;
mod round;
mod segments;
pub mod state_file;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::Lsn;
use pgherd_cluster::record::DynamicConfig;

pub use self::logical::{Readiness, Report, bring, work};
pub use self::plan::{Action, Seat, Slot};
pub use self::round::{Round, end_work, round, seat, seat_of_new_leader};
use self::state_file::Copies;
use crate::config::PostgresConfig;
use crate::postgres::ToolError;
use crate::postgres::settings::Settings;
use crate::record::is_set;

/// What the parts of a member tell each other of slots.
#[derive(Debug, Default)]
pub struct Board {
    /// Where the slots are that this member keeps while it leads, itself among them.
    kept: Mutex<BTreeMap<String, Lsn>>,
    /// What a leader that etcd does not answer has said of its own.
    told: Mutex<BTreeMap<String, Lsn>>,
    /// What the next start of the standby is to find.
    copies: Mutex<Copies>,
    /// Of which copies a start was asked for that was to find them.
    asked_for: Mutex<BTreeMap<String, Asked>>,
    /// Which the start under way is to find.
    placed_last: Mutex<Vec<String>>,
    /// Whether our server may be at long work on slots.
    at_work: AtomicBool,
    /// What has been complained of, and when.
    complaints: Mutex<BTreeMap<String, Boottime>>,
}

/// A start was asked for that was to find a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Asked {
    /// When that last was.
    at: Boottime,
    /// How often in vain.
    vain: u32,
}

/// Each try costs a restart.
const ASK_AGAIN: Duration = Duration::from_secs(600);
/// What a start did not bring again and again is tried some twice a day.
const DOUBLINGS_MAX: u32 = 6;

impl Asked {
    /// When it is worth a restart again: each that was in vain doubles the time.
    fn again_at(self) -> Boottime {
        self.at + ASK_AGAIN * (1 << self.vain.min(DOUBLINGS_MAX))
    }
}

/// What is wrong and stays so is said again after this.
const SAID_AGAIN: Duration = Duration::from_secs(600);
const COPYING: &str = "copying a logical slot";
const TAKES_NONE: &str =
    "postgresql.parameters.wal_level must be logical, and max_replication_slots leave room for them";

/// Whether PostgreSQL starts with so many more logical slots in this directory. With one too many it does not start at all.
fn takes<'a>(data_dir: &Path, more: usize, setting: impl Fn(&str) -> Option<&'a str>) -> bool {
    let room = setting("max_replication_slots").and_then(|number| number.parse::<usize>().ok());
    let fits = room.is_some_and(|room| state_file::count(data_dir) + more <= room);
    fits && setting("wal_level") == Some("logical")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Board {
    /// Where the slots of this leader are.
    #[must_use]
    pub fn kept(&self) -> BTreeMap<String, Lsn> {
        lock(&self.kept).clone()
    }

    /// Notes where they are.
    pub fn keep(&self, slots: BTreeMap<String, Lsn>) {
        *lock(&self.kept) = slots;
    }

    /// Notes what a leader has said of its slots. A later word may be of fewer.
    pub fn hear(&self, slots: BTreeMap<String, Lsn>) {
        *lock(&self.told) = slots;
    }

    /// What a leader has said of its slots while etcd did not answer.
    #[must_use]
    pub fn told(&self) -> BTreeMap<String, Lsn> {
        lock(&self.told).clone()
    }

    /// Puts the copies that were fetched where PostgreSQL finds them, before it is started with these settings as a standby.
    ///
    /// # Errors
    /// When one cannot be written.
    pub fn place(&self, data_dir: &Path, settings: &Settings) -> Result<(), ToolError> {
        let mut copies = std::mem::take(&mut *lock(&self.copies));
        let setting = |name: &str| {
            let found = settings.controlled.iter().find(|(found, _)| found == name);
            found.map(|(_, value)| value.as_str())
        };
        if !copies.is_empty() && !takes(data_dir, copies.len(), setting) {
            self.complain(COPYING, "", TAKES_NONE);
            copies.clear();
        }
        let names = state_file::place(data_dir, copies)?;
        for slot in &names {
            tracing::info!(slot, "copied a logical slot from the leader");
        }
        *lock(&self.placed_last) = names;
        Ok(())
    }

    /// Of these copies those that are worth a restart now, which is noted: one that a start was asked for and did not bring
    /// is not asked for again so soon.
    fn ask_for(&self, names: Vec<String>, now: Boottime) -> Vec<String> {
        let mut asked_for = lock(&self.asked_for);
        let mut worth = Vec::new();
        for name in names {
            let before = asked_for.get(&name).copied();
            if before.is_some_and(|before| now < before.again_at()) {
                let why = "a start was to bring it and did not; it is tried again later";
                self.complain(COPYING, &name, why);
                continue;
            }
            let vain = before.map_or(0, |before| before.vain.saturating_add(1));
            asked_for.insert(name.clone(), Asked { at: now, vain });
            worth.push(name);
        }
        worth
    }

    /// What is here was not asked for in vain.
    fn arrived<'a>(&self, names: impl Iterator<Item = &'a str>) {
        let mut asked_for = lock(&self.asked_for);
        for name in names {
            if let Some(asked) = asked_for.get_mut(name) {
                asked.vain = 0;
            }
        }
    }

    /// Takes back what was placed for a start that failed: whatever its cause, it is not to fail by that again.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn take_back(&self, data_dir: &Path) -> Result<(), ToolError> {
        state_file::take_back(data_dir, &std::mem::take(&mut *lock(&self.placed_last)))
    }

    /// Whether our server may be at long work on slots.
    #[must_use]
    pub fn is_at_work(&self) -> bool {
        self.at_work.load(Ordering::Acquire)
    }

    /// Notes whether it is.
    pub fn set_at_work(&self, at_work: bool) {
        self.at_work.store(at_work, Ordering::Release);
    }

    /// Says what is wrong with a slot, not more often than once in a while.
    pub(crate) fn complain(&self, what: &str, slot: &str, why: &str) {
        let now = Boottime::now();
        let mut complaints = lock(&self.complaints);
        complaints.retain(|_, said_at| now.since(*said_at) < SAID_AGAIN);
        complaints.entry(format!("{what} {slot}")).or_insert_with(|| {
            tracing::warn!(slot, "{what}: {why}");
            now
        });
    }
}

/// Whether PostgreSQL copies failover slots by itself: `sync_replication_slots`, since 17.
#[must_use]
pub fn syncs_by_itself(dynamic: &DynamicConfig, local: &PostgresConfig) -> bool {
    const SYNC: &str = "sync_replication_slots";
    if local.parameters.contains_key(SYNC) {
        return is_set(&local.parameters, SYNC);
    }
    is_set(&dynamic.parameters(), SYNC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_takes_as_many_slots_as_there_is_room_for_and_only_while_the_log_is_logical() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::create_dir_all(dir.path().join("pg_replslot/here")).expect("made");
        let takes = |more, level: &'static str| {
            takes(dir.path(), more, |name| match name {
                "wal_level" => Some(level),
                "max_replication_slots" => Some("4"),
                _ => None,
            })
        };
        assert!(takes(3, "logical"));
        assert!(!takes(4, "logical"), "one is here");
        assert!(!takes(1, "replica"));
    }

    #[test]
    fn what_a_restart_did_not_bring_is_worth_another_less_and_less_often() {
        let board = Board::default();
        let asks = |at| !board.ask_for(vec!["a".to_owned()], at).is_empty();
        let second = Duration::from_secs(1);
        let mut at = Boottime::default();
        assert!(asks(at));
        for wait in [ASK_AGAIN, ASK_AGAIN * 2, ASK_AGAIN * 4] {
            assert!(!asks(at + (wait - second)));
            at = at + wait;
            assert!(asks(at), "{wait:?}");
        }
        board.arrived(["a"].into_iter());
        at = at + ASK_AGAIN;
        assert!(asks(at), "it was here in between");
    }
}

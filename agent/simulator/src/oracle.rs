//! Knows the rules, and nothing of the code that is to keep them.

mod restored;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use pgherd_cluster::etcd::{Compare, Op, Txn};
use pgherd_cluster::key::{Key, Keys};

use self::restored::Restored;
use crate::store::Store;
use crate::time::Time;
use crate::world::World;

/// How long a keeper's first agent may take to find what was left running in maintenance, and to end it.
const ADOPTED_WITHIN: Duration = Duration::from_secs(1);

/// A rule that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which rule: `S1` and so on.
    pub rule: &'static str,
    /// What was seen.
    pub what: String,
    pub(crate) at: Time,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.at, self.rule, self.what)
    }
}

/// A commit that a client was told of.
#[derive(Clone, Copy, Debug)]
struct Acknowledged {
    /// Whether a standby had to confirm it.
    confirmed: bool,
    at: Time,
}

/// The last acknowledgement of a member.
#[derive(Clone, Copy, Debug)]
struct Last {
    at: Time,
    run: u64,
    /// In maintenance, by its own keeper's knowledge, or left running by it.
    unwatched: bool,
}

/// A member's word that it does not bid.
#[derive(Clone, Copy, Debug)]
struct Vouch {
    leader: usize,
    until: Time,
}

/// The judge of one run.
pub(crate) struct Oracle {
    pub(crate) violations: Vec<Violation>,
    commits: BTreeMap<u64, Acknowledged>,
    last: Vec<Option<Last>>,
    vouches: BTreeMap<(usize, usize), Vouch>,
    /// Commits that were lost without breaking a rule: an asynchronous failover may.
    pub(crate) lost: usize,
    lost_ids: BTreeSet<u64>,
    restored: Restored,
    pub(crate) promotions: usize,
    pub(crate) last_acknowledged: Option<Time>,
}

impl Oracle {
    pub(crate) fn new(members: usize) -> Self {
        Self {
            violations: Vec::new(),
            commits: BTreeMap::new(),
            last: vec![None; members],
            vouches: BTreeMap::new(),
            lost: 0,
            lost_ids: BTreeSet::new(),
            restored: Restored::default(),
            promotions: 0,
            last_acknowledged: None,
        }
    }

    pub(crate) fn commits(&self) -> usize {
        self.commits.len()
    }

    /// How many of them may not be lost.
    pub(crate) fn confirmed(&self) -> usize {
        self.commits.values().filter(|commit| commit.confirmed).count()
    }

    /// Whether a restore has brought back another record of who may lead, or another mode.
    pub(crate) const fn another_record_came_back(&self) -> bool {
        self.restored.differed()
    }

    /// How many confirmed commits were lost because another `/sync` or another mode was brought back.
    pub(crate) const fn lost_by_restore(&self) -> usize {
        self.restored.lost
    }

    pub(crate) fn violate(&mut self, rule: &'static str, at: Time, what: String) {
        self.violations.push(Violation { rule, what, at });
    }

    /// A member has said that it does not bid until then.
    pub(crate) fn vouched(&mut self, by: usize, leader: usize, until: Time) {
        let vouch = self.vouches.entry((by, leader)).or_insert(Vouch { leader, until });
        vouch.until = vouch.until.max(until);
    }

    /// A member has taken back what it said: the leader must have ended PostgreSQL.
    pub(crate) fn withdrawn(&mut self, by: usize, leader: usize) {
        self.vouches.remove(&(by, leader));
    }

    /// Nobody overwrites or deletes another's key, but by naming exactly the holding that is to end.
    pub(crate) fn before_commit(
        &mut self,
        keys: &Keys,
        store: &Store,
        txn: &Txn,
        names: &[String],
        author: usize,
        now: Time,
    ) {
        let key = keys.of(&Key::Leader);
        let Some(entry) = store.get(&key) else { return };
        let outcome = store.state().holds_all(txn);
        let ops = if outcome { txn.then_ops() } else { txn.otherwise_ops() };
        let names_it = |test: fn(&Compare) -> bool| {
            let of_key = |compare: &&Compare| compared_key(compare) == key;
            outcome && txn.conditions().iter().filter(of_key).any(test)
        };
        let exact = names_it(|compare| matches!(compare, Compare::Value(..)))
            && names_it(|compare| matches!(compare, Compare::CreateRevision(..)))
            && names_it(|compare| matches!(compare, Compare::Lease(..)));
        let author_name = names.get(author).cloned().unwrap_or_default();
        for op in ops {
            match op {
                Op::Put { key: put, value, .. } if *put == key && (*value != entry.value || !exact) => {
                    let what = format!("{author_name} writes {value} over the leader key of {}", entry.value);
                    self.violate("key", now, what);
                }
                Op::Delete(deleted) if *deleted == key && !exact => {
                    let what = format!(
                        "{author_name} deletes the leader key of {} without naming it",
                        entry.value
                    );
                    self.violate("key", now, what);
                }
                Op::Put { .. } | Op::Delete(_) | Op::Get(_) => {}
            }
        }
    }
}

fn compared_key(compare: &Compare) -> &str {
    match compare {
        Compare::Absent(key)
        | Compare::Value(key, _)
        | Compare::CreateRevision(key, _)
        | Compare::ModRevision(key, _)
        | Compare::Lease(key, _) => key,
    }
}

impl World {
    /// Whether a member may truly take writes now: its key stands and its lease lives, or everybody who could lead has
    /// given his word.
    pub(crate) fn is_entitled(&self, member: usize, now: Time) -> bool {
        let Some(host) = self.hosts.get(member) else {
            return false;
        };
        if self.is_paused(member) || now < host.excused_until {
            return true;
        }
        self.holds_by_lease(member, now) || self.holds_by_vouches(member, now) || self.was_left_in_pause(member, now)
    }

    /// What a keeper left running in maintenance nobody watches until the next one has adopted it and has a deadline for it.
    /// That is no harm while nobody else leads; when somebody does it is ended, as soon as the agent is there.
    fn was_left_in_pause(&self, member: usize, now: Time) -> bool {
        let Some(host) = self.hosts.get(member) else {
            return false;
        };
        let holder = self.store.get(&self.key(&Key::Leader));
        let nobody_else = holder.is_none_or(|holder| self.names.get(member) == Some(&holder.value));
        let just = now.since(host.keeper_since) < ADOPTED_WITHIN;
        self.is_left_over(member) && (nobody_else || just)
    }

    fn is_left_over(&self, member: usize) -> bool {
        let Some(host) = self.hosts.get(member) else {
            return false;
        };
        let left = |run: u64| host.left_in_pause == Some(run);
        let runs = host.server.run.as_ref().is_some_and(|run| left(run.id));
        let unwatched = host
            .keeper
            .as_ref()
            .is_none_or(|keeper| keeper.fence.deadline().is_none());
        unwatched && (runs || host.server.orphans.is_some_and(|orphans| left(orphans.run)))
    }

    fn is_unwatched(&self, member: usize) -> bool {
        self.is_paused(member) || self.is_left_over(member)
    }

    /// Whether a member's fence is off for maintenance, as far as its own keeper knows.
    fn is_paused(&self, member: usize) -> bool {
        self.hosts.get(member).is_some_and(|host| {
            host.word == crate::host::Word::Paused
                || host.keeper.as_ref().is_some_and(|keeper| keeper.fence.is_paused())
        })
    }

    fn holds_by_lease(&self, member: usize, now: Time) -> bool {
        let Some(entry) = self.store.get(&self.key(&Key::Leader)) else {
            return false;
        };
        let names_it = self.names.get(member).is_some_and(|name| *name == entry.value);
        names_it
            && !self.oracle.restored.is_void(entry)
            && self
                .store
                .state()
                .expires(entry.lease)
                .is_some_and(|expires| now < expires)
    }

    fn holds_by_vouches(&self, member: usize, now: Time) -> bool {
        // Once somebody else holds the key, no word helps.
        let holder = self
            .store
            .get(&self.key(&Key::Leader))
            .filter(|entry| !self.oracle.restored.is_void(entry))
            .map(|entry| entry.value.as_str());
        if holder.is_some_and(|holder| self.names.get(member).is_none_or(|name| name != holder)) {
            return false;
        }
        let stands = self.store.get(&self.key(&Key::Failsafe));
        let lists = [
            stands.map(|entry| entry.value.as_str()),
            self.oracle.restored.failsafe_before(stands),
        ];
        lists
            .into_iter()
            .flatten()
            .any(|list| self.all_vouch(list, member, now))
    }

    fn all_vouch(&self, list: &str, member: usize, now: Time) -> bool {
        let list: BTreeMap<String, serde_json::Value> = serde_json::from_str(list).unwrap_or_default();
        let named = self.names.get(member).is_some_and(|name| list.contains_key(name));
        let agrees = |name: &String| {
            let Some(other) = self.number(name) else { return true };
            let vouch = self.oracle.vouches.get(&(other, member));
            other == member || vouch.is_some_and(|vouch| vouch.leader == member && now < vouch.until)
        };
        named && list.keys().all(agrees)
    }

    /// S1, when a server takes a write and when it tells a client that it is done.
    pub(crate) fn judge_write(&mut self, member: usize, id: u64, now: Time, what: &str) {
        if self.is_entitled(member, now) {
            return;
        }
        let holder = self.store.get(&self.key(&Key::Leader));
        let expires = holder.and_then(|entry| self.store.state().expires(entry.lease));
        let holder = holder.map_or_else(
            || "nobody".to_owned(),
            |entry| format!("{} (lease {})", entry.value, entry.lease),
        );
        let until = expires.map_or_else(String::new, |expires| format!(", until {expires}"));
        let what = format!("n{} {what} ({id}) and the key is {holder}'s{until}", member + 1);
        self.oracle.violate("S1", now, what);
    }

    /// A client is told that its commit is done.
    pub(crate) fn judge_acknowledgement(&mut self, member: usize, run: u64, id: u64, now: Time) {
        self.judge_write(member, id, now, "acknowledges a commit");
        let confirmed = self.hosts.get(member).and_then(|host| host.server.run.as_ref());
        // While the record is in force only who is listed may lead, and has the commit; when nobody is, nobody else may.
        let record = self.store.get(&self.key(&Key::Sync));
        let record = record.filter(|entry| !self.oracle.restored.is_older_sync(entry));
        let listed = record.is_some_and(|entry| {
            let state: pgherd_cluster::record::SyncState = serde_json::from_str(&entry.value).unwrap_or_default();
            state.leader.as_ref() == self.names.get(member)
        });
        let confirmed = listed || confirmed.is_some_and(|run| run.waits);
        self.oracle.commits.insert(id, Acknowledged { confirmed, at: now });
        self.oracle.last_acknowledged = Some(now);
        let previous = self.oracle.last.get(member).copied().flatten();
        if let Some(previous) = previous.filter(|previous| previous.run == run) {
            let between = |other: &Option<Last>| other.is_some_and(|other| other.at > previous.at);
            let other = self
                .oracle
                .last
                .iter()
                .enumerate()
                .find(|(other, last)| *other != member && between(last));
            if let Some((other, _)) = other
                && !self.is_unwatched(member)
                && !previous.unwatched
                && self
                    .oracle
                    .last
                    .get(other)
                    .copied()
                    .flatten()
                    .is_none_or(|last| !last.unwatched)
                && now >= self.hosts.get(member).map_or(now, |host| host.excused_until)
            {
                let what = format!("n{} and n{} acknowledge commits in turns", member + 1, other + 1);
                self.oracle.violate("S1", now, what);
            }
        }
        let unwatched = self.is_unwatched(member);
        if let Some(last) = self.oracle.last.get_mut(member) {
            *last = Some(Last {
                at: now,
                run,
                unwatched,
            });
        }
    }

    /// S2 and S5, when a standby has become a primary.
    pub(crate) fn judge_promotion(&mut self, member: usize, now: Time) {
        self.oracle.promotions += 1;
        self.judge_loss(member, now, "is promoted");
        let Some(data) = self.hosts.get(member).and_then(|host| host.server.data.as_ref()) else {
            return;
        };
        let system_id = data.system_id;
        let initialize = self
            .store
            .get(&self.key(&Key::Initialize))
            .map(|entry| entry.value.clone());
        if initialize
            .as_ref()
            .is_some_and(|value| !value.is_empty() && *value != system_id.to_string())
        {
            let what = format!("n{} is promoted with another system identifier", member + 1);
            self.oracle.violate("S5", now, what);
        }
        if !self.is_entitled(member, now) {
            let what = format!("n{} becomes primary without a lease", member + 1);
            self.oracle.violate("S1", now, what);
        }
    }

    /// S2, when a server takes writes that another took before it.
    pub(crate) fn judge_loss(&mut self, member: usize, now: Time, how: &str) {
        let Some(data) = self.hosts.get(member).and_then(|host| host.server.data.as_ref()) else {
            return;
        };
        let held: BTreeSet<u64> = data.log.iter().map(|record| record.id).collect();
        let missing = self.oracle.commits.iter().filter(|(id, _)| !held.contains(id));
        let missing: Vec<(u64, Acknowledged)> = missing.map(|(id, commit)| (*id, *commit)).collect();
        let before = self.oracle.violations.len();
        for (id, commit) in missing {
            if !self.oracle.lost_ids.insert(id) {
                continue;
            }
            if !commit.confirmed {
                self.oracle.lost += 1;
            } else if self.oracle.restored.excuses(commit.at) {
                self.judge_excused(member, id, now, how);
            } else {
                let what = format!(
                    "n{} {how} without commit {id}, which a standby had confirmed",
                    member + 1
                );
                self.oracle.violate("S2", now, what);
            }
        }
        // One of them tells as much as all.
        self.oracle.violations.truncate(before + 1);
    }

    /// S4: what was in a data directory before is somewhere still.
    pub(crate) fn judge_replacement(&mut self, member: usize, before: Option<(usize, u64)>, now: Time) {
        let Some((length, last)) = before else { return };
        let host = self.host(member);
        let kept = host
            .server
            .aside
            .iter()
            .any(|old| old.log.len() == length && old.holds(last));
        if !kept {
            let what = format!("n{} has destroyed a data directory", member + 1);
            self.oracle.violate("S4", now, what);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::Setup;

    fn world() -> World {
        World::new(&Setup::quiet(3))
    }

    fn put(world: &World, key: &Key, value: &str, lease: i64) -> Txn {
        let key = world.key(key);
        Txn::new().then(Op::Put {
            key,
            value: value.to_owned(),
            lease,
        })
    }

    fn led(world: &mut World) -> i64 {
        let lease = world.store.grant(Duration::from_secs(5), Time(0), &mut world.random);
        let txn = put(world, &Key::Leader, "n1", lease);
        world.store.commit(&txn, Time(0)).expect("the lease lives");
        lease
    }

    #[test]
    fn only_the_holder_of_a_living_lease_may_write() {
        let mut world = world();
        led(&mut world);
        assert!(world.is_entitled(0, Time::millis(4999)));
        assert!(
            !world.is_entitled(0, Time::millis(5000)),
            "though the key is still there"
        );
        assert!(!world.is_entitled(1, Time::millis(1)));
        world.judge_write(1, 7, Time::millis(1), "accepts a write");
        assert_eq!(
            world.oracle.violations.first().map(|violation| violation.rule),
            Some("S1")
        );
    }

    #[test]
    fn the_word_of_all_others_is_as_good_as_a_lease() {
        let mut world = world();
        let list = put(&world, &Key::Failsafe, r#"{"n1":"","n2":"","n3":""}"#, 0);
        world.store.commit(&list, Time(0)).expect("no lease");
        world.oracle.vouched(1, 0, Time::millis(100));
        assert!(!world.is_entitled(0, Time::millis(50)));
        world.oracle.vouched(2, 0, Time::millis(80));
        assert!(world.is_entitled(0, Time::millis(79)) && !world.is_entitled(0, Time::millis(80)));
    }

    #[test]
    fn a_key_is_deleted_only_by_naming_its_holding() {
        let mut world = world();
        let lease = led(&mut world);
        let key = world.key(&Key::Leader);
        let blunt = Txn::new()
            .when(Compare::Value(key.clone(), "n1".into()))
            .then(Op::Delete(key.clone()));
        let over = put(&world, &Key::Leader, "n2", lease);
        let exact = Txn::new()
            .when(Compare::Value(key.clone(), "n1".into()))
            .when(Compare::CreateRevision(key.clone(), 2))
            .when(Compare::Lease(key.clone(), lease))
            .then(Op::Delete(key));
        for (txn, violations) in [(exact, 0), (blunt, 1), (over, 2)] {
            let names = world.names.clone();
            world
                .oracle
                .before_commit(&world.keys, &world.store, &txn, &names, 1, Time(0));
            assert_eq!(world.oracle.violations.len(), violations);
        }
    }

    #[test]
    fn two_that_acknowledge_in_turns_are_seen() {
        let mut world = world();
        for (member, at) in [(0, 1), (1, 2), (0, 3)] {
            world.host(member).excused_until = Time(0);
            world.judge_acknowledgement(member, 9, at, Time::millis(at));
        }
        assert!(
            world
                .oracle
                .violations
                .iter()
                .any(|violation| violation.what.contains("in turns"))
        );
    }
}

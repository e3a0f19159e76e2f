//! What the oracle makes of a restore of etcd: a state from before comes back, and with it facts that are no longer so.
//!
//! # What holds all the same, without exception
//! * **S1.** A key that comes back gives nobody a right whom another has followed since: it is void until somebody writes it
//!   anew. So it takes no right away either: a leader who lives by vouches may go on while a void key names another, until its
//!   deadline, for it cannot know of the moment. Whoever bids in the restored etcd holds the key, and from then on no vouch
//!   helps anybody else. The vouches that count are those of the list that stood when the outage began, or of the one that
//!   came back. Nobody acknowledges commits in turns with another, whatever came back.
//! * **S4, S5, L1 and L2.** No key that comes back is an order to destroy data, and everything is well in the end.
//! * **S2**, for commits that are acknowledged after the restore, and for all where the record that comes back says what
//!   the one before said: only `/sync` and the mode say who has what was acknowledged.
//!
//! # What is excused
//! * **S2**, for commits from before the restore, when another `/sync` comes back, or another mode: whoever is elected by the
//!   record of then keeps its rules, and may lack what was acknowledged since. But only where nobody could have told: when
//!   no other member that ran and could be reached when the winner bid has the commit. Where a record came back, only whom it
//!   names is asked: what others have beyond it was acknowledged to nobody, as far as anybody can know. What is excused is
//!   counted.
//! * A `/sync` of before that names the present leader promises nothing for the commits that it acknowledges before it has
//!   looked, unless they wait for a standby: when the outage began the mode was another, or it had given its standbys up.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pgherd_cluster::key::Key;
use pgherd_cluster::record::SyncState;
use pgherd_cluster::view::Entry;
use serde_json::Value;

use crate::network::Site;
use crate::postgres::Mode;
use crate::time::Time;
use crate::world::World;

/// How old what a candidate knows of the others may be when it wins.
const HEARD_WITHIN: Duration = Duration::from_secs(2);

/// What is remembered of restores.
#[derive(Debug, Default)]
pub(super) struct Restored {
    /// Who held the leader key last, in whatever state of etcd, and its create revision.
    holding: Option<(String, i64)>,
    /// The leader key that came back after another had held it.
    void: Option<Entry>,
    /// The list that stood when the outage began, and the revision of the one that came back.
    failsafe: Option<(String, i64)>,
    /// The record that came back and says something else than the one before.
    sync: Option<Entry>,
    /// When another record or mode came back last.
    excused_until: Option<Time>,
    /// Whom the record that came back names; nothing where none did.
    named: Option<BTreeSet<String>>,
    /// Who ran and could be asked when each member won its last lease.
    asked: BTreeMap<usize, BTreeSet<usize>>,
    /// Commits that were lost by it.
    pub(super) lost: usize,
}

impl Restored {
    pub(super) fn is_void(&self, leader: &Entry) -> bool {
        self.void.as_ref() == Some(leader)
    }

    /// The failsafe list from before the outage, while nobody has written another.
    pub(super) fn failsafe_before(&self, stands: Option<&Entry>) -> Option<&str> {
        let (list, revision) = self.failsafe.as_ref()?;
        (stands.map_or(0, |entry| entry.mod_revision) == *revision).then_some(list)
    }

    pub(super) const fn differed(&self) -> bool {
        self.excused_until.is_some()
    }

    pub(super) fn is_older_sync(&self, record: &Entry) -> bool {
        self.sync.as_ref() == Some(record)
    }

    pub(super) fn excuses(&self, acknowledged_at: Time) -> bool {
        self.excused_until.is_some_and(|until| acknowledged_at <= until)
    }
}

/// What S2 rests on: the record and the mode.
fn promises(world: &World) -> (SyncState, Option<Value>) {
    let value = |key: &Key| world.store.get(&world.key(key)).map(|entry| entry.value.as_str());
    let state = value(&Key::Sync).and_then(|text| serde_json::from_str(text).ok());
    let config: Option<Value> = value(&Key::Config).and_then(|text| serde_json::from_str(text).ok());
    let mode = config.and_then(|config| config.get("synchronous_mode").cloned());
    (
        state.unwrap_or_default(),
        mode.filter(|mode| *mode != Value::Bool(false)),
    )
}

impl World {
    /// Somebody may have won the leader key.
    pub(crate) fn note_leader(&mut self, now: Time, is_frozen: impl Fn(usize) -> bool) {
        let entry = self.store.get(&self.key(&Key::Leader));
        let Some(entry) = entry.filter(|entry| !self.oracle.restored.is_void(entry)) else {
            return;
        };
        let holding = Some((entry.value.clone(), entry.create_revision));
        if self.oracle.restored.holding == holding {
            return;
        }
        if let Some(winner) = self.number(&entry.value) {
            let answers = |other: &usize| *other != winner && !is_frozen(*other) && self.answered(*other, winner, now);
            let asked = (0..self.hosts.len()).filter(answers).collect();
            self.oracle.restored.asked.insert(winner, asked);
        }
        self.oracle.restored.holding = holding;
    }

    /// An operator brings a backup of etcd back that is so much older than the outage.
    pub(crate) fn restore(&mut self, age: Duration, now: Time) {
        let failsafe_key = self.key(&Key::Failsafe);
        let before = promises(self);
        // Restored twice before anybody has written anything: what counts is still what stood before the first.
        let stands = self.store.get(&failsafe_key);
        let failsafe = self.oracle.restored.failsafe_before(stands);
        let failsafe = failsafe.or(stands.map(|entry| entry.value.as_str())).map(str::to_owned);
        let older = self
            .store
            .get(&self.key(&Key::Sync))
            .is_some_and(|entry| self.oracle.restored.is_older_sync(entry));
        self.store.restore(age, now, &mut self.random);
        let differs = older || promises(self) != before;
        let leader = self.store.get(&self.key(&Key::Leader)).cloned();
        let sync = self.store.get(&self.key(&Key::Sync)).cloned();
        let revision = self.store.get(&failsafe_key).map_or(0, |entry| entry.mod_revision);
        let restored = &mut self.oracle.restored;
        let holder = restored.holding.as_ref().map(|(holder, _)| holder);
        restored.void = leader.filter(|entry| holder != Some(&entry.value));
        restored.failsafe = failsafe.map(|list| (list, revision));
        restored.sync = sync.filter(|_| differs);
        if differs {
            restored.excused_until = Some(now);
            let record: Option<SyncState> = restored
                .sync
                .as_ref()
                .and_then(|entry| serde_json::from_str(&entry.value).ok());
            restored.named = record.filter(SyncState::is_active).map(|record| {
                let standbys = record.standbys().map(str::to_owned);
                standbys.chain(record.leader.clone()).collect()
            });
        }
    }

    /// A confirmed commit is gone that the record of before did not protect: could somebody have told?
    pub(super) fn judge_excused(&mut self, member: usize, id: u64, now: Time, how: &str) {
        let asked = self.oracle.restored.asked.get(&member).cloned().unwrap_or_default();
        let holds = |other: &usize| {
            let data = self.hosts.get(*other).and_then(|host| host.server.data.as_ref());
            data.is_some_and(|data| data.holds(id))
        };
        let named = self.oracle.restored.named.as_ref();
        let counts = |other: &usize| {
            let name = self.names.get(*other);
            named.is_none_or(|named| name.is_some_and(|name| named.contains(name)))
        };
        let told = asked.into_iter().filter(counts).find(holds);
        let Some(told) = told else {
            self.oracle.restored.lost += 1;
            return;
        };
        let what = format!(
            "n{} {how} without commit {id}, which n{} has and could have told",
            member + 1,
            told + 1
        );
        self.oracle.violate("S2", now, what);
    }

    /// Whether a member ran and answered another, for so long that whoever has won by now has heard it.
    fn answered(&self, member: usize, asks: usize, now: Time) -> bool {
        let Some(host) = self.hosts.get(member) else {
            return false;
        };
        let run = host.server.run.as_ref();
        let long_up = run
            .and_then(|run| run.up_since)
            .is_some_and(|since| now.since(since) >= HEARD_WITHIN);
        let up = long_up
            && run.is_some_and(|run| !run.hung && matches!(run.mode, Mode::Standby | Mode::Promoting | Mode::Primary));
        let (here, there) = (Site::Member(asks), Site::Member(member));
        let reached = self.network.talks_surely(here, there);
        host.agent.is_some() && host.drowsy_millis == 0 && up && reached
    }
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::etcd::{Op, Txn};

    use super::*;
    use crate::oracle::Acknowledged;
    use crate::postgres::Data;
    use crate::run::Setup;

    fn world() -> World {
        World::new(&Setup::quiet(3))
    }

    fn put(world: &mut World, key: &Key, value: &str, lease: i64) {
        let (key, value) = (world.key(key), value.to_owned());
        let txn = Txn::new().then(Op::Put { key, value, lease });
        world.store.commit(&txn, Time(0)).expect("the lease lives");
        world.note_leader(Time::millis(5000), |_| false);
    }

    fn lead(world: &mut World, name: &str) {
        let lease = world.store.grant(Duration::from_secs(5), Time(0), &mut world.random);
        put(world, &Key::Leader, name, lease);
    }

    /// The first of two states comes back, half a second after the second was left.
    fn restore(world: &mut World) {
        world.store.back_up(Time::millis(1000));
        world.restore(Duration::from_millis(500), Time::millis(1500));
    }

    #[test]
    fn a_key_that_another_has_followed_since_gives_no_right_and_takes_none() {
        let mut world = world();
        lead(&mut world, "n2");
        world.store.back_up(Time(0));
        put(&mut world, &Key::Failsafe, r#"{"n1":"","n2":""}"#, 0);
        lead(&mut world, "n1");
        restore(&mut world);
        let later = Time::millis(1600);
        assert!(!world.is_entitled(1, later) && !world.is_entitled(0, later));
        world.oracle.vouched(1, 0, Time::millis(2000));
        assert!(
            world.is_entitled(0, later),
            "by the list that stood, though the key names n2"
        );
        lead(&mut world, "n2");
        assert!(world.is_entitled(1, later) && !world.is_entitled(0, later));
    }

    #[test]
    fn the_key_of_the_last_holder_is_its_own() {
        let mut world = world();
        lead(&mut world, "n1");
        world.store.back_up(Time(0));
        put(&mut world, &Key::Failover, "{}", 0);
        restore(&mut world);
        assert!(world.is_entitled(0, Time::millis(1600)));
    }

    /// n1 has acknowledged a commit that n3 has too, and n2 takes over without it.
    fn lose(sync_then: &str, n3_answers: bool) -> World {
        let mut world = world();
        put(&mut world, &Key::Sync, sync_then, 0);
        world.store.back_up(Time(0));
        put(&mut world, &Key::Sync, r#"{"leader":"n1","sync_standby":"n3"}"#, 0);
        let mut data = Data::made(7, 1);
        world.server(1).data = Some(data.copied());
        data.append(2);
        world.server(2).data = Some(data.copied());
        let (confirmed, at) = (true, Time::millis(900));
        world.oracle.commits.insert(2, Acknowledged { confirmed, at });
        restore(&mut world);
        world.oracle.restored.asked = BTreeMap::from([(1, n3_answers.then_some(2).into_iter().collect())]);
        world.judge_loss(1, Time::millis(1700), "is promoted");
        world
    }

    #[test]
    fn a_loss_is_excused_by_another_record_only_and_only_where_nobody_could_tell() {
        let (same, other, both) = (
            r#"{"leader":"n1","sync_standby":"n3"}"#,
            r#"{"leader":"n1","sync_standby":"n2"}"#,
            r#"{"leader":"n1","sync_standby":"n2,n3"}"#,
        );
        for (sync_then, n3_answers, lost, violations) in [
            (both, false, 1, 0),
            (both, true, 0, 1),
            (other, true, 1, 0),
            (same, false, 0, 1),
        ] {
            let world = lose(sync_then, n3_answers);
            let seen = (world.oracle.lost_by_restore(), world.oracle.violations.len());
            assert_eq!(seen, (lost, violations), "{sync_then}, n3 answers: {n3_answers}");
        }
    }
}

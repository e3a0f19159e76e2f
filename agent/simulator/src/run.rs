//! One run: a cluster, a schedule of faults, and what is to be so when they are over.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use pgherd_cluster::etcd::{Op, Txn};
use pgherd_cluster::key::Key;
use serde_json::{Value, json};

use crate::executor::Owner;
use crate::faults::{self, Fault, Planned, configure, inject};
use crate::fitting::pattern;
use crate::oracle::Violation;
use crate::physics;
use crate::postgres::{Data, Mode};
use crate::random::Random;
use crate::time::Time;
use crate::world::{Shared, Sim, World};

/// A bug that the glue around the decisions is given, to see whether the schedules find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// A deadline is counted from the answer of the question that it rests on, not from before the question.
    DeadlineFromReply,
    /// A renewed lease is taken for a proof of the leader key.
    KeepaliveProves,
    /// The keeper takes a deadline for a term that is final.
    PassedDeadlineExtended,
    /// The steps of synchronous replication are taken in the wrong order.
    SyncOrderSwapped,
    /// An election rests on a `/sync` that was read long before, and its bid does not compare it.
    StaleSync,
    /// An election does not look at timelines.
    NoTimelineCheck,
    /// A member vouches, and bids all the same.
    VouchWhileBidding,
    /// The lease is given up while a backend lives.
    ReleaseWhileBackendLives,
    /// Commits are taken to wait for a standby as soon as the setting names one.
    TakenOverAtOnce,
}

/// What a run is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The seed of everything.
    pub seed: u64,
    /// How many members, two to five.
    pub members: usize,
    /// The dynamic configuration.
    pub config: BTreeMap<String, Value>,
    /// Whether the cluster is there from the start, or has to be made.
    pub exists: bool,
    /// Whether the run writes down what happens.
    pub trace: bool,
    /// A bug in the glue.
    pub planted: Option<Planted>,
    /// The bug whose run of faults is part of the schedule. It need not be planted.
    pub favours: Option<Planted>,
    /// Whether times are drawn, or always the same.
    pub steady: bool,
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its seed.
    pub seed: u64,
    /// What was broken.
    pub violations: Vec<Violation>,
    /// Commits that clients were told of.
    pub commits: usize,
    /// How many of those synchronous replication keeps.
    pub confirmed: usize,
    /// How many of them were lost without breaking a rule, as asynchronous replication may.
    pub lost: usize,
    /// How many confirmed ones were lost because an operator restored an etcd that knew nothing of them.
    pub lost_by_restore: usize,
    /// How many standbys became primary.
    pub promotions: usize,
    /// How many steps of tasks were run.
    pub steps: u64,
    /// What happened, when it was to be written down.
    pub lines: Vec<String>,
}

/// Until a cluster has a leader that has acknowledged a commit.
const START_MAX: Duration = Duration::from_secs(60);
const FAULTS: Duration = Duration::from_secs(40);
/// After everything is whole again: the longest lease, etcd's own election, an election, a promotion, a clone, and time to
/// try some of it twice.
const QUIET: Duration = Duration::from_secs(60);
/// How long everything has to stay well before a run is over.
const WELL_FOR: Duration = Duration::from_secs(5);

impl Setup {
    /// A setup as the seed draws it.
    #[must_use]
    pub fn drawn(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0x5EED);
        let mut config = BTreeMap::new();
        let (ttl, loop_wait, retry_timeout) = [(5, 1, 2), (5, 1, 2), (10, 2, 3)][random.index(3)];
        config.insert("ttl".to_owned(), json!(ttl));
        config.insert("loop_wait".to_owned(), json!(loop_wait));
        config.insert("retry_timeout".to_owned(), json!(retry_timeout));
        match random.index(4) {
            0 => config.insert("synchronous_mode".to_owned(), json!(true)),
            1 => config.insert("synchronous_mode".to_owned(), json!("quorum")),
            _ => None,
        };
        if random.chance(200) {
            config.insert("synchronous_node_count".to_owned(), json!(2));
        }
        if random.chance(500) {
            config.insert("failsafe_mode".to_owned(), json!(true));
        }
        if random.chance(150) {
            config.insert("maximum_lag_on_failover".to_owned(), json!(2400));
        }
        Self {
            seed,
            members: [3, 3, 3, 3, 2, 4, 5][random.index(7)],
            config,
            exists: !random.chance(120),
            trace: false,
            planted: None,
            favours: None,
            steady: false,
        }
    }

    /// A setup without chance.
    #[must_use]
    pub fn quiet(members: usize) -> Self {
        let times = [("ttl", 5), ("loop_wait", 1), ("retry_timeout", 2)];
        Self {
            seed: 0,
            members,
            config: times
                .into_iter()
                .map(|(name, time)| (name.to_owned(), json!(time)))
                .collect(),
            exists: true,
            trace: false,
            planted: None,
            favours: None,
            steady: true,
        }
    }

    pub(crate) fn random(&self) -> Random {
        if self.steady {
            Random::steady()
        } else {
            Random::new(self.seed)
        }
    }
}

/// Runs the schedule that the seed draws.
#[must_use]
pub fn run(setup: &Setup) -> Report {
    let sim = Sim::new(setup);
    begin(&sim, setup);
    if settle(&sim) {
        let from = sim.now();
        let until = from + FAULTS;
        let members = setup.members;
        let planned = sim.with(|world| match setup.favours {
            Some(planted) => pattern(planted, &mut world.random, from),
            None => faults::schedule(&mut world.random, members, from, until),
        });
        // What synchronous replication has promised the cluster itself, another one that it follows may not know.
        let is_synchronous = |name: &str| name == "synchronous_mode";
        let synchronous = setup.config.keys().any(|name| is_synchronous(name))
            || planned
                .iter()
                .any(|planned| matches!(planned.fault, Fault::Configure(name, _) if is_synchronous(name)));
        let apart = setup.favours.is_none() && !setup.steady && !synchronous;
        let mut random = Random::new(setup.seed ^ 0x5354_414E_4442_5953);
        let follows = faults::following_another(&mut random, from, until).filter(|_| apart);
        for planned in planned.into_iter().chain(follows) {
            sim.spawn(Owner::World, inject(sim.clone(), planned));
        }
        advance(&sim, until + Duration::from_millis(100));
        heal(&sim);
    }
    conclude(&sim, setup)
}

/// Makes the models, and the cluster where it is there already.
pub(crate) fn begin(sim: &Shared, setup: &Setup) {
    if setup.exists {
        sim.with(|world| {
            let config = serde_json::to_string(&setup.config).unwrap_or_default();
            world.next_system_id += 1;
            let system_id = world.next_system_id;
            let keys = [(Key::Initialize, system_id.to_string()), (Key::Config, config)];
            for (key, value) in keys {
                let key = world.key(&key);
                // Nothing can be refused: no lease is named.
                let _ = world
                    .store
                    .commit(&Txn::new().then(Op::Put { key, value, lease: 0 }), Time(0));
            }
            let record = world.record();
            let mut data = Data::made(system_id, record);
            data.unfinished = false;
            for member in 1..setup.members {
                world.server(member).data = Some(data.copied());
            }
            world.server(0).data = Some(data);
        });
    }
    physics::begin(sim);
}

fn broken(sim: &Shared) -> bool {
    if sim.exec.spins() {
        let now = sim.now();
        sim.with(|world| {
            world
                .oracle
                .violate("L3", now, "something runs for ever without waiting".to_owned())
        });
    }
    sim.with(|world| !world.oracle.violations.is_empty())
}

pub(crate) fn advance(sim: &Shared, until: Time) {
    sim.exec.run_until(until, || broken(sim));
}

/// Runs until a commit has been acknowledged; a cluster that never gets there breaks L1.
pub(crate) fn settle(sim: &Shared) -> bool {
    let until = Time(0) + START_MAX;
    let acknowledged = || sim.with(|world| world.oracle.last_acknowledged.is_some());
    sim.exec.run_until(until, || broken(sim) || acknowledged());
    if !acknowledged() {
        let now = sim.now();
        sim.with(|world| {
            world
                .oracle
                .violate("L1", now, "the cluster never takes a write".to_owned())
        });
        return false;
    }
    advance(sim, sim.now() + Duration::from_secs(3));
    !broken(sim)
}

/// Everything is whole again, and nobody asks for anything any more.
pub(crate) fn heal(sim: &Shared) {
    if broken(sim) {
        return;
    }
    sim.trace(|| "=== everything is whole".to_owned());
    sim.with(|world| {
        world.network.heal();
        world.store.heal();
    });
    let members = sim.with(|world| world.hosts.len());
    for member in 0..members {
        for owner in [
            Owner::Agent(member),
            Owner::Keeper(member),
            Owner::Sentinel(member),
            Owner::Postgres(member),
        ] {
            sim.exec.unfreeze(owner);
        }
        sim.with(|world| world.host(member).drowsy_millis = 0);
        physics::power_on(sim, member);
    }
    // etcd may need a moment to elect before it takes the word that any pause is over.
    advance(sim, sim.now() + Duration::from_secs(5));
    configure(sim, "pause", json!(false));
    configure(sim, "standby_cluster", serde_json::Value::Null);
    let healed_at = sim.now();
    // Once all is well, and stays so for a while, nothing more is to be seen.
    let mut well_since = None;
    while sim.now() < healed_at + QUIET && !broken(sim) {
        advance(sim, sim.now() + Duration::from_secs(1));
        let now = sim.now();
        let since = sim.with(|world| {
            ailing(world, healed_at, now)
                .is_empty()
                .then(|| well_since.unwrap_or(now))
        });
        if since.is_some_and(|since| now.since(since) >= WELL_FOR) {
            return;
        }
        if now >= healed_at + OPERATOR_AFTER {
            faults::order_a_leader_after_a_restore(sim);
        }
        well_since = since;
    }
    if broken(sim) {
        return;
    }
    let now = sim.now();
    sim.with(|world| {
        for (rule, what) in ailing(world, healed_at, now) {
            world.oracle.violate(rule, now, what);
        }
    });
}

/// What of L1 and L2 is not so.
fn ailing(world: &mut World, healed_at: Time, now: Time) -> Vec<(&'static str, String)> {
    let mut ails = Vec::new();
    let last = world.oracle.last_acknowledged.unwrap_or(Time(0));
    if last <= healed_at || now.since(last) > Duration::from_secs(10) {
        ails.push(("L1", format!("no write since {last}, all was whole at {healed_at}")));
    }
    for member in 0..world.hosts.len() {
        let host = world.host(member);
        let well = host.server.run.as_ref().is_some_and(|run| match run.mode {
            Mode::Primary => true,
            Mode::Standby => run.streaming,
            Mode::Starting { .. } | Mode::Promoting | Mode::Stopping => false,
        });
        if !well {
            let reason = host.agent.as_ref().and_then(|agent| agent.reason.as_ref());
            let (reason, mode) = (reason.map(ToString::to_string), host.server.mode());
            ails.push(("L2", format!("n{} is {mode:?} and says {reason:?}", member + 1)));
        }
    }
    ails
}

/// How long nobody leads before an operator looks, where he has restored etcd himself.
const OPERATOR_AFTER: Duration = Duration::from_secs(20);

pub(crate) fn conclude(sim: &Shared, setup: &Setup) -> Report {
    let steps = sim.exec.polls.get();
    sim.exec.clear();
    sim.with(|world| Report {
        seed: setup.seed,
        violations: std::mem::take(&mut world.oracle.violations),
        commits: world.oracle.commits(),
        confirmed: world.oracle.confirmed(),
        lost: world.oracle.lost,
        lost_by_restore: world.oracle.lost_by_restore(),
        promotions: world.oracle.promotions,
        steps,
        lines: std::mem::take(&mut world.trace.lines),
    })
}

impl Report {
    /// What is printed of a run that broke a rule.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut text = format!("seed {}:", self.seed);
        for violation in &self.violations {
            let _ = write!(text, "\n  {violation}");
        }
        text
    }
}

/// The faults that the exhaustive search tries, with how long each lasts.
#[must_use]
pub fn alphabet_len() -> usize {
    ALPHABET.len()
}

const ALPHABET: [(Fault, u64); 7] = [
    (Fault::KillAgent(0), 0),
    (Fault::KillPostmaster(0), 0),
    (Fault::FreezeAgent(0), 7000),
    (Fault::CutFromEtcd(0), 8000),
    (Fault::PowerOff(0), 3000),
    (Fault::EtcdLost { frozen: false }, 7000),
    (Fault::FreezeKeeper(0), 6000),
];

/// A run without chance in which two faults strike, each at a moment that is counted in passed points after the cluster
/// has settled. Gives the report and how many points the first part of the run passed.
#[must_use]
pub fn run_pair(setup: &Setup, strikes: &[(usize, usize)]) -> (Report, usize) {
    let sim = Sim::new(setup);
    begin(&sim, setup);
    let mut passed = 0;
    if settle(&sim) {
        let before = sim.with(|world| {
            let before = world.points.passed;
            world.points.strikes = strikes.iter().map(|(point, _)| before + point).collect();
            before
        });
        let until = sim.now() + Duration::from_secs(9);
        let mut pending = strikes.iter().map(|(_, fault)| *fault);
        while sim.now() < until && !broken(&sim) {
            let due = || sim.with(|world| world.points.due > 0);
            sim.exec.run_until(until, || broken(&sim) || due());
            if sim.with(|world| std::mem::take(&mut world.points.due)) == 0 {
                continue;
            }
            if let Some((fault, lasts)) = pending.next().and_then(|fault| ALPHABET.get(fault)) {
                let planned = Planned {
                    at: sim.now(),
                    lasts: Duration::from_millis(*lasts),
                    fault: fault.clone(),
                };
                sim.spawn(Owner::World, inject(sim.clone(), planned));
            }
        }
        passed = sim.with(|world| world.points.passed) - before;
        advance(&sim, sim.now() + Duration::from_secs(9));
        heal(&sim);
    }
    (conclude(&sim, setup), passed)
}

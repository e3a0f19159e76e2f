//! What goes wrong, and what operators ask for: a schedule of it, drawn from the seed.

use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use pgherd_cluster::etcd::{Op, Txn};
use pgherd_cluster::key::Key;
use serde_json::{Value, json};

use crate::agent;
use crate::executor::{Owner, Topic};
use crate::network::Site;
use crate::physics::{self, kill_keeper, kill_postmaster, power_off, power_on, revive_keeper, start_keeper};
use crate::postgres::Mode;
use crate::random::Random;
use crate::store::NODES;
use crate::time::Time;
use crate::world::Shared;

/// One thing that goes wrong, or that an operator asks for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Fault {
    KillPostmaster(usize),
    KillAgent(usize),
    KillKeeper(usize),
    KillSentinel(usize),
    FreezeAgent(usize),
    FreezeKeeper(usize),
    FreezeHost(usize),
    Hang(usize),
    PowerOff(usize),
    StuckBackend(usize),
    Drowsy(usize),
    CutOff(usize),
    CutFromEtcd(usize),
    CutOneWay { member: usize, to_etcd: bool },
    CutPair(usize, usize),
    Degrade(usize),
    EtcdDown(usize),
    EtcdFrozen(usize),
    EtcdIsolated(usize),
    EtcdLost { frozen: bool },
    EtcdLags(usize),
    Compact,
    Restore { age: Duration },
    ClockJumps(usize),
    StopService(usize),
    Switchover(usize),
    Pause,
    FollowAnother,
    Configure(&'static str, Value),
    LoseData(usize),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// A fault, when, and for how long.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    pub(crate) at: Time,
    pub(crate) lasts: Duration,
    pub(crate) fault: Fault,
}

type Kind = fn(&mut Random, usize) -> Fault;

fn member(random: &mut Random, members: usize) -> usize {
    random.index(members)
}

const KINDS: [(u64, Kind); 30] = [
    (5, |random, members| Fault::KillPostmaster(member(random, members))),
    (6, |random, members| Fault::KillAgent(member(random, members))),
    (3, |random, members| Fault::KillKeeper(member(random, members))),
    (1, |random, members| Fault::KillSentinel(member(random, members))),
    (6, |random, members| Fault::FreezeAgent(member(random, members))),
    (4, |random, members| Fault::FreezeKeeper(member(random, members))),
    (2, |random, members| Fault::FreezeHost(member(random, members))),
    (2, |random, members| Fault::Hang(member(random, members))),
    (3, |random, members| Fault::PowerOff(member(random, members))),
    (3, |random, members| Fault::StuckBackend(member(random, members))),
    (5, |random, members| Fault::Drowsy(member(random, members))),
    (4, |random, members| Fault::CutOff(member(random, members))),
    (6, |random, members| Fault::CutFromEtcd(member(random, members))),
    (4, |random, members| Fault::CutOneWay {
        member: member(random, members),
        to_etcd: random.chance(500),
    }),
    (4, |random, members| {
        let one = member(random, members);
        Fault::CutPair(one, (one + 1 + random.index(members - 1)) % members)
    }),
    (4, |random, members| Fault::Degrade(member(random, members))),
    (3, |random, _| Fault::EtcdDown(random.index(NODES))),
    (3, |random, _| Fault::EtcdFrozen(random.index(NODES))),
    (3, |random, _| Fault::EtcdIsolated(random.index(NODES))),
    (5, |random, _| Fault::EtcdLost {
        frozen: random.chance(500),
    }),
    (2, |random, _| Fault::EtcdLags(random.index(NODES))),
    (1, |_, _| Fault::Compact),
    (1, |_, _| Fault::Restore { age: Duration::ZERO }),
    (OLDER_RESTORES, |random, _| Fault::Restore {
        age: backup_age(random),
    }),
    (1, |random, members| Fault::ClockJumps(member(random, members))),
    (3, |random, members| Fault::StopService(member(random, members))),
    (5, |random, members| Fault::Switchover(member(random, members))),
    (2, |_, _| Fault::Pause),
    (4, |random, _| {
        let mode = [json!(true), json!(false), json!("quorum")];
        match random.index(3) {
            0 => Fault::Configure("synchronous_mode", mode[random.index(3)].clone()),
            1 => Fault::Configure("ttl", json!(if random.chance(500) { 5 } else { 9 })),
            _ => Fault::Configure("failsafe_mode", json!(random.chance(500))),
        }
    }),
    (1, |random, members| Fault::LoseData(member(random, members))),
];

/// How often a backup of etcd comes back that is older than the outage. Rare, as what it shows is rarely what the other faults
/// show; to press on it, 60 puts one into most schedules.
const OLDER_RESTORES: u64 = 3;

/// How much older than the outage the state is that comes back: hardly, seconds, or as much as the run is old.
fn backup_age(random: &mut Random) -> Duration {
    let (least, most) = [(1, 4_000), (4_000, 15_000), (15_000, 45_000), (1, 90_000)][random.index(4)];
    random.millis(least, most)
}

/// How long a restore of etcd takes at least: longer than any lease that is granted here. Times that do not fit each other,
/// as when `ttl` alone is changed, are made to: 20 seconds are the longest.
const RESTORE_MIN: Duration = Duration::from_secs(21);

/// A schedule for the time between `from` and `until`.
pub(crate) fn schedule(random: &mut Random, members: usize, from: Time, until: Time) -> Vec<Planned> {
    let span = u64::try_from(until.since(from).as_millis()).unwrap_or(0);
    let kinds: Vec<(u64, Kind)> = KINDS.to_vec();
    let mut planned = Vec::new();
    for _ in 0..random.between(2, 9) {
        let Some(kind) = random.weighted(&kinds) else { continue };
        let fault = kind(random, members);
        let at = from + random.millis(0, span.saturating_sub(2000));
        // Most are short or of the length of a lease, some are long.
        let longest = [800, 6_000, 15_000][random.index(3)];
        let lasts = random.millis(50, longest).min(until.since(at));
        // Nobody restores etcd while it serves, or sooner than in the time of any lease.
        let (at, lasts) = if matches!(fault, Fault::Restore { .. }) {
            let at = at.min(until - RESTORE_MIN);
            let lasts = RESTORE_MIN + random.millis(0, 6_000);
            (at, lasts.min(until.since(at)))
        } else {
            (at, lasts)
        };
        planned.push(Planned { at, lasts, fault });
    }
    planned
}

/// In some schedules the cluster is told to follow another one for a while, and then not to any more. Drawn apart from the
/// rest, so that a seed goes on to mean what it has meant.
pub(crate) fn following_another(random: &mut Random, from: Time, until: Time) -> Option<Planned> {
    if !random.chance(150) {
        return None;
    }
    let span = u64::try_from(until.since(from).as_millis()).unwrap_or(0);
    let at = from + random.millis(0, span.saturating_sub(2000));
    Some(Planned {
        at,
        lasts: random.millis(50, 20_000).min(until.since(at)),
        fault: Fault::FollowAnother,
    })
}

/// Lets it happen, and undoes it when its time is over.
pub(crate) async fn inject(sim: Shared, planned: Planned) {
    sim.exec.sleep_until(planned.at).await;
    sim.trace(|| format!("--- {} for {:?}", planned.fault, planned.lasts));
    begin(&sim, &planned.fault);
    sim.exec.sleep(planned.lasts).await;
    if end(&sim, &planned.fault) {
        sim.trace(|| format!("--- over: {}", planned.fault));
    }
}

fn each_link(sim: &Shared, links: impl Fn(Site) -> Vec<(Site, Site)>, cut: bool) {
    sim.with(|world| {
        for other in world.network.sites() {
            for (from, to) in links(other) {
                if from == to {
                    continue;
                }
                if cut {
                    world.network.cut(from, to);
                } else {
                    world.network.mend(from, to);
                }
            }
        }
    });
}

/// Cuts or mends what a fault of the network is about.
fn rewire(sim: &Shared, fault: &Fault, cut: bool) {
    match *fault {
        Fault::CutOff(member) => {
            let here = Site::Member(member);
            each_link(sim, |other| vec![(here, other), (other, here)], cut);
        }
        Fault::CutFromEtcd(member) => {
            let here = Site::Member(member);
            let links = |other| match other {
                Site::Etcd(_) => vec![(here, other), (other, here)],
                Site::Member(_) => Vec::new(),
            };
            each_link(sim, links, cut);
        }
        Fault::CutOneWay { member, to_etcd } => {
            let here = Site::Member(member);
            let links = |other| match other {
                Site::Etcd(_) if to_etcd => vec![(here, other)],
                Site::Etcd(_) => vec![(other, here)],
                Site::Member(_) => Vec::new(),
            };
            each_link(sim, links, cut);
        }
        Fault::CutPair(one, two) => {
            let (one, two) = (Site::Member(one), Site::Member(two));
            let links = |other| {
                if other == two {
                    vec![(one, two), (two, one)]
                } else {
                    Vec::new()
                }
            };
            each_link(sim, links, cut);
        }
        Fault::EtcdIsolated(node) => {
            let here = Site::Etcd(node);
            let links = |other| match other {
                Site::Etcd(_) => vec![(here, other), (other, here)],
                Site::Member(_) => Vec::new(),
            };
            each_link(sim, links, cut);
        }
        _ => {}
    }
}

const HOST: fn(usize) -> [Owner; 4] = |member| {
    [
        Owner::Agent(member),
        Owner::Keeper(member),
        Owner::Sentinel(member),
        Owner::Postgres(member),
    ]
};

fn begin(sim: &Shared, fault: &Fault) {
    rewire(sim, fault, true);
    match *fault {
        Fault::KillPostmaster(member) => kill_postmaster(sim, member),
        Fault::KillAgent(member) => agent::kill(sim, member),
        // On a machine that stands still nothing is killed or started.
        Fault::KillKeeper(member) if sim.exec.is_frozen(Owner::Sentinel(member)) => {}
        Fault::KillKeeper(member) => {
            kill_keeper(sim, member);
            sim.spawn(Owner::World, revive_keeper(Rc::clone(sim), member));
        }
        Fault::KillSentinel(member) => physics::kill_sentinel(sim, member),
        Fault::FreezeAgent(member) => sim.exec.freeze(Owner::Agent(member)),
        Fault::FreezeKeeper(member) => {
            physics::see_to_sentinel(sim, member);
            sim.exec.freeze(Owner::Keeper(member));
        }
        Fault::FreezeHost(member) => HOST(member).into_iter().for_each(|owner| sim.exec.freeze(owner)),
        Fault::Hang(member) => set_hung(sim, member, true),
        Fault::PowerOff(member) => power_off(sim, member),
        Fault::StuckBackend(member) => {
            let until = sim.now() + Duration::from_millis(240);
            sim.with(|world| world.server(member).stuck_until = until);
            kill_postmaster(sim, member);
        }
        Fault::Drowsy(member) => {
            sim.with(|world| world.host(member).drowsy_millis = world.random.between(20, 1500));
        }
        Fault::Degrade(member) => degrade(sim, member),
        Fault::EtcdDown(node) => sim.with(|world| world.store.stop(node)),
        Fault::EtcdFrozen(node) => sim.with(|world| world.store.freeze(node)),
        Fault::EtcdLost { frozen: true } => sim.with(|world| (0..NODES).for_each(|node| world.store.freeze(node))),
        Fault::EtcdLost { frozen: false } => sim.with(|world| (0..NODES).for_each(|node| world.store.stop(node))),
        Fault::Restore { .. } => sim.with(|world| (0..NODES).for_each(|node| world.store.stop(node))),
        Fault::EtcdLags(node) => {
            sim.with(|world| {
                let lag = world.random.millis(50, 2500);
                world.store.set_lag(node, lag);
            });
        }
        Fault::Compact => sim.with(|world| world.store.compact()),
        Fault::ClockJumps(member) => {
            sim.with(|world| world.host(member).clocks.wall_millis += 3_600_000);
        }
        Fault::StopService(member) => stop_service(sim, member),
        Fault::Switchover(member) => ask_for_switchover(sim, member),
        Fault::Pause => configure(sim, "pause", json!(true)),
        Fault::FollowAnother => configure(sim, "standby_cluster", json!({"host": "elsewhere"})),
        Fault::Configure(name, ref value) => configure(sim, name, value.clone()),
        Fault::LoseData(member) => lose_data(sim, member),
        Fault::CutOff(_)
        | Fault::CutFromEtcd(_)
        | Fault::CutOneWay { .. }
        | Fault::CutPair(..)
        | Fault::EtcdIsolated(_) => {}
    }
}

/// Undoes a fault that has an end; says whether it has.
fn end(sim: &Shared, fault: &Fault) -> bool {
    rewire(sim, fault, false);
    match *fault {
        Fault::FreezeAgent(member) => sim.exec.thaw(Owner::Agent(member)),
        Fault::FreezeKeeper(member) => sim.exec.thaw(Owner::Keeper(member)),
        Fault::FreezeHost(member) => thaw_host(sim, member),
        Fault::Hang(member) => set_hung(sim, member, false),
        Fault::PowerOff(member) => power_on(sim, member),
        Fault::Drowsy(member) => sim.with(|world| world.host(member).drowsy_millis = 0),
        Fault::Degrade(_) => {
            let sites = sim.with(|world| world.network.sites());
            sim.with(|world| {
                for from in &sites {
                    for to in &sites {
                        world.network.degrade(*from, *to, 0, Duration::ZERO);
                    }
                }
            });
        }
        Fault::EtcdDown(node) => sim.with(|world| world.store.resume(node)),
        Fault::EtcdFrozen(node) => sim.with(|world| world.store.thaw(node)),
        Fault::EtcdLost { frozen: true } => sim.with(|world| (0..NODES).for_each(|node| world.store.thaw(node))),
        Fault::EtcdLost { frozen: false } => sim.with(|world| (0..NODES).for_each(|node| world.store.resume(node))),
        Fault::Restore { age } => {
            let now = sim.now();
            let revisions = sim.with(|world| {
                let before = world.store.state().revision;
                world.restore(age, now);
                (0..NODES).for_each(|node| world.store.resume(node));
                (before, world.store.state().revision)
            });
            sim.trace(|| format!("etcd: restored from revision {} to {}", revisions.0, revisions.1));
            sim.notify(Topic::Store);
        }
        Fault::EtcdLags(node) => sim.with(|world| world.store.set_lag(node, Duration::ZERO)),
        Fault::StopService(member) => start_service(sim, member),
        Fault::Pause => configure(sim, "pause", json!(false)),
        Fault::FollowAnother => configure(sim, "standby_cluster", Value::Null),
        Fault::CutOff(_)
        | Fault::CutFromEtcd(_)
        | Fault::CutOneWay { .. }
        | Fault::CutPair(..)
        | Fault::EtcdIsolated(_) => {}
        Fault::KillPostmaster(_)
        | Fault::KillAgent(_)
        | Fault::KillKeeper(_)
        | Fault::KillSentinel(_)
        | Fault::StuckBackend(_)
        | Fault::Compact
        | Fault::ClockJumps(_)
        | Fault::Switchover(_)
        | Fault::Configure(..)
        | Fault::LoseData(_) => return false,
    }
    true
}

/// A machine that stood still cannot have acted meanwhile; what its keeper finds late it does at once.
fn thaw_host(sim: &Shared, member: usize) {
    let now = sim.now();
    sim.with(|world| world.host(member).excused_until = now + Duration::from_millis(300));
    HOST(member).into_iter().for_each(|owner| sim.exec.thaw(owner));
}

fn set_hung(sim: &Shared, member: usize, hung: bool) {
    sim.with(|world| {
        if let Some(run) = &mut world.server(member).run {
            run.hung = hung;
        }
    });
    physics::server_changed(sim, member);
}

fn degrade(sim: &Shared, member: usize) {
    sim.with(|world| {
        let (loss, slow) = (world.random.between(0, 300), world.random.millis(0, 150));
        for other in world.network.sites() {
            world.network.degrade(Site::Member(member), other, loss, slow);
            world.network.degrade(other, Site::Member(member), loss, slow);
        }
    });
}

fn stop_service(sim: &Shared, member: usize) {
    let running = sim.with(|world| {
        let host = world.host(member);
        host.service_stopped = true;
        let agent = host.agent.is_some();
        let keeper = host.keeper.as_mut()?;
        keeper.stopping = true;
        if agent {
            keeper.outbox.push(crate::host::Report::Stop);
        } else {
            keeper.agent_gone();
        }
        Some(())
    });
    sim.notify(Topic::Reports(member));
    sim.notify(Topic::Keeper(member));
    if running.is_none() {
        return;
    }
    let inner = Rc::clone(sim);
    sim.spawn(Owner::World, async move {
        // The service manager waits, and then kills all that is left.
        let until = inner.now() + Duration::from_secs(20);
        let left = || inner.with(|world| world.host(member).keeper.as_ref().and_then(|keeper| keeper.left));
        inner.exec.wait_for(Topic::Keeper(member), until, left).await;
        let gone = || inner.with(|world| (!world.server(member).is_left()).then_some(()));
        inner
            .exec
            .wait_for(Topic::Postgres(member), inner.now() + Duration::from_secs(2), gone)
            .await;
        if inner.with(|world| world.host(member).service_stopped) {
            let paused = inner.with(|world| world.host(member).word == crate::host::Word::Paused);
            kill_keeper(&inner, member);
            inner.exec.kill_owner(Owner::Sentinel(member));
            if !paused {
                inner.with(|world| world.server(member).kill_all(Time(u64::MAX)));
                physics::server_changed(&inner, member);
            }
        }
    });
}

fn start_service(sim: &Shared, member: usize) {
    let inner = Rc::clone(sim);
    sim.spawn(Owner::World, async move {
        // It is started when it has stopped.
        let until = inner.now() + Duration::from_secs(25);
        let gone = || inner.with(|world| world.host(member).keeper.is_none().then_some(()));
        inner.exec.wait_for(Topic::Keeper(member), until, gone).await;
        let powered = inner.with(|world| {
            let host = world.host(member);
            host.service_stopped = false;
            host.powered && host.keeper.is_none()
        });
        if powered {
            start_keeper(&inner, member);
        }
    });
}

/// Writes a key as an operator's command does.
fn command(sim: &Shared, key: &Key, value: String) {
    let now = sim.now();
    let done = sim.with(|world| {
        if !world.store.is_serving(&world.network) {
            return false;
        }
        let key = world.key(key);
        world
            .store
            .commit(&Txn::new().then(Op::Put { key, value, lease: 0 }), now)
            .is_ok()
    });
    if done {
        sim.notify(Topic::Store);
    }
}

fn ask_for_switchover(sim: &Shared, to: usize) {
    let names = sim.with(|world| {
        let leader = world
            .store
            .get(&world.key(&Key::Leader))
            .map(|entry| entry.value.clone())?;
        Some((leader, world.names.get(to)?.clone()))
    });
    if let Some((leader, to)) = names.filter(|(leader, to)| leader != to) {
        command(sim, &Key::Failover, json!({"leader": leader, "member": to}).to_string());
    }
}

/// A record that came back may name nobody who has what was acknowledged since, and whoever has it may not lead by it. Then
/// nobody leads, and who restored it says who is to: the member that is furthest.
pub(crate) fn order_a_leader_after_a_restore(sim: &Shared) {
    let furthest = sim.with(|world| {
        let led = world.store.get(&world.key(&Key::Leader)).is_some();
        if led || !world.oracle.another_record_came_back() {
            return None;
        }
        let data = |member: &usize| {
            let server = &world.hosts.get(*member)?.server;
            let data = server.data.as_ref().filter(|_| server.mode() == Some(Mode::Standby))?;
            Some((data.timeline, data.log.len()))
        };
        let members = (0..world.hosts.len()).filter(|member| data(member).is_some());
        world.names.get(members.max_by_key(data)?).cloned()
    });
    if let Some(member) = furthest {
        command(sim, &Key::Failover, json!({"member": member}).to_string());
    }
}

/// Changes one setting of the dynamic configuration.
pub(crate) fn configure(sim: &Shared, name: &str, value: Value) {
    let document = sim.with(|world| {
        let entry = world.store.get(&world.key(&Key::Config))?;
        let mut document: serde_json::Map<String, Value> = serde_json::from_str(&entry.value).ok()?;
        document.insert(name.to_owned(), value);
        Some(Value::Object(document).to_string())
    });
    if let Some(document) = document {
        command(sim, &Key::Config, document);
    }
}

/// The disk of a standby is lost, and replaced by an empty one.
fn lose_data(sim: &Shared, member: usize) {
    sim.with(|world| {
        let leads = world
            .store
            .get(&world.key(&Key::Leader))
            .is_some_and(|entry| entry.value == world.names[member]);
        let server = world.server(member);
        if !leads && server.mode() != Some(crate::postgres::Mode::Primary) && server.data.is_some() {
            server.kill_all(Time(u64::MAX));
            let lost = server.data.take();
            server.aside.extend(lost);
        }
    });
    physics::server_changed(sim, member);
}

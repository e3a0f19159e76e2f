//! Everything that a run consists of, in one place.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::key::{Key, Keys};
use pgherd_cluster::name::{MemberName, Scope};

use crate::agent::Agent;
use crate::executor::{Executor, Owner, Topic};
use crate::host::{Keeper, Word};
use crate::network::Network;
use crate::oracle::Oracle;
use crate::postgres::Server;
use crate::random::Random;
use crate::run::{Planted, Setup};
use crate::store::{NODES, Store};
use crate::time::{Clocks, Time};

/// One member's machine.
pub(crate) struct Host {
    pub(crate) clocks: Clocks,
    pub(crate) powered: bool,
    pub(crate) server: Server,
    pub(crate) keeper: Option<Keeper>,
    /// What the keeper wrote last where its sentinel reads it.
    pub(crate) word: Word,
    /// The file in the runtime directory.
    pub(crate) memo: Vec<u8>,
    pub(crate) agent: Option<Agent>,
    /// Whether an operator stopped the service.
    pub(crate) service_stopped: bool,
    /// The longest time that the agent is not scheduled for, in milliseconds.
    pub(crate) drowsy_millis: u64,
    /// Until when writes are excused: the whole machine stood still, and no process of it could have acted.
    pub(crate) excused_until: Time,
    /// When its keeper was started.
    pub(crate) keeper_since: Time,
    /// The postmaster that a keeper left running when it died in maintenance.
    pub(crate) left_in_pause: Option<u64>,
}

/// The lines of one run.
#[derive(Default)]
pub(crate) struct Trace {
    pub(crate) on: bool,
    pub(crate) lines: Vec<String>,
}

/// Counts the moments at which a fault could strike, for the search that tries them all.
#[derive(Default)]
pub(crate) struct Points {
    pub(crate) passed: usize,
    /// At which to strike, in order.
    pub(crate) strikes: Vec<usize>,
    /// Those that are due now.
    pub(crate) due: usize,
}

/// The state of a run.
pub(crate) struct World {
    pub(crate) random: Random,
    pub(crate) network: Network,
    pub(crate) store: Store,
    pub(crate) hosts: Vec<Host>,
    pub(crate) names: Vec<String>,
    pub(crate) members: Vec<MemberName>,
    pub(crate) scope: Scope,
    pub(crate) keys: Keys,
    pub(crate) oracle: Oracle,
    pub(crate) trace: Trace,
    pub(crate) points: Points,
    pub(crate) planted: Option<Planted>,
    /// The configuration of a cluster that is made.
    pub(crate) bootstrap: BTreeMap<String, serde_json::Value>,
    next_record: u64,
    pub(crate) next_run: u64,
    pub(crate) next_system_id: u64,
}

/// A run: its state and its tasks.
pub(crate) struct Sim {
    pub(crate) exec: Executor,
    world: RefCell<World>,
}

pub(crate) type Shared = Rc<Sim>;

impl World {
    pub(crate) fn new(setup: &Setup) -> Self {
        let mut random = setup.random();
        let count = setup.members;
        let names: Vec<String> = (1..=count).map(|number| format!("n{number}")).collect();
        let members = names
            .iter()
            .filter_map(|name| MemberName::new(name.clone()).ok())
            .collect();
        // The name is plain, so it is taken.
        let scope = Scope::new("sim").unwrap_or_else(|_| unreachable!("a plain name"));
        let hosts = (0..count).map(|_| Host::new(random.millis(1_000, 900_000))).collect();
        Self {
            network: Network::new(count, NODES),
            store: Store::new(),
            hosts,
            members,
            keys: Keys::new("service", &scope),
            scope,
            oracle: Oracle::new(count),
            names,
            trace: Trace {
                on: setup.trace,
                lines: Vec::new(),
            },
            points: Points::default(),
            planted: setup.planted,
            bootstrap: setup.config.clone(),
            next_record: 0,
            next_run: 0,
            next_system_id: 7_700_000_000_000_000_000,
            random,
        }
    }

    /// A number for a record that no other has.
    pub(crate) fn record(&mut self) -> u64 {
        self.next_record += 1;
        self.next_record
    }

    pub(crate) fn key(&self, key: &Key) -> String {
        self.keys.of(key)
    }

    pub(crate) fn host(&mut self, member: usize) -> &mut Host {
        let last = self.hosts.len() - 1;
        &mut self.hosts[member.min(last)]
    }

    pub(crate) fn agent(&mut self, member: usize) -> Option<&mut Agent> {
        self.host(member).agent.as_mut()
    }

    pub(crate) fn server(&mut self, member: usize) -> &mut Server {
        &mut self.host(member).server
    }

    pub(crate) fn name(&self, member: usize) -> &MemberName {
        &self.members[member]
    }

    /// Which member that is.
    pub(crate) fn number(&self, name: &str) -> Option<usize> {
        self.names.iter().position(|known| known == name)
    }

    pub(crate) fn is_planted(&self, bug: Planted) -> bool {
        self.planted == Some(bug)
    }
}

impl Host {
    fn new(age: std::time::Duration) -> Self {
        Self {
            clocks: Clocks::new(age),
            powered: true,
            server: Server::default(),
            keeper: None,
            word: Word::Disarmed,
            memo: Vec::new(),
            agent: None,
            service_stopped: false,
            drowsy_millis: 0,
            excused_until: Time(0),
            keeper_since: Time(0),
            left_in_pause: None,
        }
    }
}

impl Sim {
    pub(crate) fn new(setup: &Setup) -> Shared {
        Rc::new(Self {
            exec: Executor::new(),
            world: RefCell::new(World::new(setup)),
        })
    }

    pub(crate) fn with<T>(&self, work: impl FnOnce(&mut World) -> T) -> T {
        work(&mut self.world.borrow_mut())
    }

    pub(crate) fn now(&self) -> Time {
        self.exec.now()
    }

    /// What a member's clock says.
    pub(crate) fn clock(&self, member: usize) -> Boottime {
        let now = self.now();
        self.with(|world| world.host(member).clocks.boottime(now))
    }

    /// Writes a line when the run is told.
    pub(crate) fn trace(&self, line: impl FnOnce() -> String) {
        let now = self.now();
        self.with(|world| {
            if world.trace.on {
                let line = format!("{now} {}", line());
                world.trace.lines.push(line);
            }
        });
    }

    /// The same with the member's name before it.
    pub(crate) fn say(&self, member: usize, line: impl FnOnce() -> String) {
        self.trace(|| format!("n{} {}", member + 1, line()));
    }

    /// A moment at which a fault may strike.
    pub(crate) fn point(&self) {
        self.with(|world| {
            let points = &mut world.points;
            points.passed += 1;
            if points.strikes.first() == Some(&points.passed) {
                points.strikes.remove(0);
                points.due += 1;
            }
        });
    }

    /// The agent's process may not be scheduled for a while.
    pub(crate) async fn drowse(&self, member: usize) {
        self.point();
        let nap = self.with(|world| {
            let longest = world.host(member).drowsy_millis;
            if longest > 0 && world.random.chance(200) {
                world.random.millis(0, longest)
            } else {
                world.random.millis(0, 1)
            }
        });
        self.exec.sleep(nap).await;
    }

    pub(crate) fn notify(&self, topic: Topic) {
        self.exec.notify(topic);
    }

    pub(crate) fn spawn(&self, owner: Owner, work: impl Future<Output = ()> + 'static) -> usize {
        self.exec.spawn(owner, work)
    }
}

//! The agent of one member: the real decisions and the real lease, and around them what its tasks do, over models.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use pgherd_agent::decide::{Reason, decide};
use pgherd_agent::failsafe;
use pgherd_agent::health::Health;
use pgherd_agent::jobs::Outcome;
use pgherd_agent::keeper::Instance;
use pgherd_agent::lease::core::{BidLoss, Input, LeaseCore};
use pgherd_agent::lease::{Resumed, Voucher};
use pgherd_agent::memory::Memory;
use pgherd_agent::observation::{JobKind, LeaseSeen, Observation, Postgres};
use pgherd_agent::postgres::{DataDir, Upstream};
use pgherd_agent::status::ServerStatus;
use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::{MemberRecord, PgState, Role, Status, SyncState};
use pgherd_cluster::timing::LeaseTiming;
use pgherd_cluster::view::{Epoch, Initialize, Revised, View};

use crate::act::{Acted, act, let_go};
use crate::executor::{Owner, Slot, TaskId, Topic};
use crate::health;
use crate::host::Report;
use crate::lease;
use crate::observe::observe;
use crate::rpc::Client;
use crate::run::Planted;
use crate::source;
use crate::upkeep::upkeep;
use crate::world::{Shared, World};

/// After a step that failed.
const AFTER_FAILURE: Duration = Duration::from_millis(200);
/// After a step whose effect is yet to be seen.
const SETTLING: Duration = Duration::from_millis(50);

/// What the loop knows that no question tells.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    pub(crate) upstream: Option<Upstream>,
    pub(crate) last_held: Option<Epoch>,
    pub(crate) writable: bool,
    pub(crate) data: Option<DataDir>,
}

/// What was last written.
#[derive(Clone, Debug, Default)]
pub(crate) struct Written {
    pub(crate) record: Option<(MemberRecord, i64, Boottime)>,
    pub(crate) status: Option<(Status, Boottime)>,
    pub(crate) slots_seen: BTreeMap<String, Boottime>,
    pub(crate) timing: Option<LeaseTiming>,
    pub(crate) memo: Resumed,
    pub(crate) failsafe: Option<(Option<u64>, Option<Vec<Voucher>>)>,
    pub(crate) failsafe_sent: Option<failsafe::Sent>,
}

/// Long work under way.
pub(crate) struct Work {
    pub(crate) kind: JobKind,
    task: TaskId,
}

/// The state of an agent's process, which dies with it.
pub(crate) struct Agent {
    pub(crate) view: Arc<View>,
    pub(crate) in_touch: bool,
    pub(crate) core: LeaseCore,
    pub(crate) inputs: VecDeque<Input>,
    pub(crate) bid: Option<Rc<Slot<Result<Epoch, BidLoss>>>>,
    pub(crate) let_go: Vec<Rc<Slot<()>>>,
    pub(crate) instance: Instance,
    pub(crate) memory: Memory,
    pub(crate) known: Known,
    pub(crate) written: Written,
    pub(crate) work: Option<Work>,
    pub(crate) ended: VecDeque<(JobKind, Result<Outcome, String>)>,
    pub(crate) checkpoint: Option<TaskId>,
    pub(crate) client: Client,
    pub(crate) lease_client: Client,
    pub(crate) reason: Option<Reason>,
    pub(crate) health: Health,
    /// What the keeper last confirmed, and the term that it was last sent a deadline of.
    arming: (u64, Boottime),
    pub(crate) last_term: u64,
    /// What other members are told while the loop has no time to look: what it saw last.
    pub(crate) shown: Option<ServerStatus>,
    /// For a planted bug.
    old_sync: Option<(Revised<SyncState>, Boottime)>,
    /// Whether the loop waits, and looks anew for whoever asks.
    pub(crate) waits: bool,
}

/// A keeper starts an agent.
pub(crate) fn start(sim: &Shared, member: usize) {
    sim.exec.unfreeze(Owner::Agent(member));
    let now = sim.clock(member);
    sim.with(|world| {
        let agent = greeted(world, member, now);
        world.host(member).agent = Some(agent);
    });
    sim.spawn(Owner::Agent(member), reader(Rc::clone(sim), member));
    sim.spawn(Owner::Agent(member), source::run(Rc::clone(sim), member));
    sim.spawn(Owner::Agent(member), lease::run(Rc::clone(sim), member));
    sim.spawn(Owner::Agent(member), health::probe(Rc::clone(sim), member));
    sim.spawn(Owner::Agent(member), cycle(Rc::clone(sim), member));
}

fn greeted(world: &mut World, member: usize, now: Boottime) -> Agent {
    let node = world.random.index(crate::store::NODES);
    let name = world.name(member).clone();
    let (keys, scope) = (world.keys.clone(), world.scope.clone());
    let host = world.host(member);
    let mut instance = Instance::default();
    let mut resumed = Resumed::default();
    if let Some(keeper) = &mut host.keeper {
        // What was said to the agent before this one died with its socket.
        keeper.outbox.clear();
        let deadline = keeper.fence.armed().map(|armed| armed.deadline);
        resumed = Resumed {
            armed_until: deadline.map(|deadline| Boottime::from_nanos(deadline.as_nanos())),
            ..Resumed::from_memo(&keeper.memo)
        };
        instance.postmaster = keeper.postmaster().and_then(|id| i32::try_from(id).ok());
        instance.left = keeper.instance_left(&host.server);
        keeper.left_told = instance.left;
        instance.stranger = keeper.stranger(&host.server).and_then(|id| i32::try_from(id).ok());
        instance.armed = keeper.fence.armed().is_some();
        instance.armed_term = keeper.fence.armed().map(|armed| armed.term);
        instance.fenced = keeper.fence.last_final_term();
        instance.stopping = keeper.stopping;
        instance.paused = keeper.fence.is_paused();
    }
    let proven = resumed.epoch.clone().filter(|_| resumed.proven);
    let mut memory = Memory {
        began_at: Some(now),
        ..Memory::default()
    };
    if let Some(epoch) = proven {
        memory.prove(epoch, resumed.term);
    }
    Agent {
        view: Arc::new(View::empty(scope)),
        in_touch: false,
        core: LeaseCore::new(name, keys, LeaseTiming::DEFAULT, &resumed),
        inputs: VecDeque::new(),
        bid: None,
        let_go: Vec::new(),
        instance,
        memory,
        known: Known {
            last_held: resumed.epoch.clone(),
            ..Known::default()
        },
        written: Written::default(),
        work: None,
        ended: VecDeque::new(),
        checkpoint: None,
        client: Client::new(member, node),
        lease_client: Client::new(member, node),
        reason: None,
        health: Health::default(),
        arming: (0, Boottime::default()),
        last_term: 0,
        shown: None,
        old_sync: None,
        waits: false,
    }
}

/// The process is killed; its keeper starts another.
pub(crate) fn kill(sim: &Shared, member: usize) {
    sim.exec.kill_owner(Owner::Agent(member));
    sim.exec.unfreeze(Owner::Agent(member));
    let now = sim.now();
    sim.with(|world| {
        let soon = now + world.random.millis(5, 60);
        let host = world.host(member);
        host.agent = None;
        // What the dead one has said is heard all the same.
        if let Some(keeper) = &mut host.keeper {
            keeper.agent_due = Some(soon);
            keeper.agent_gone();
        }
    });
    sim.notify(Topic::Keeper(member));
}

/// Takes what the keeper says, as the thread at the link's end does.
async fn reader(sim: Shared, member: usize) {
    loop {
        let heard = sim.with(|world| {
            let host = world.host(member);
            let (Some(agent), Some(keeper)) = (&mut host.agent, &mut host.keeper) else {
                return 0;
            };
            let reports = std::mem::take(&mut keeper.outbox);
            for report in &reports {
                agent.hear(*report);
            }
            reports.len()
        });
        if heard > 0 {
            sim.notify(Topic::Agent(member));
            sim.notify(Topic::Lease(member));
        }
        let until = sim.now() + Duration::from_secs(3600);
        sim.exec.changed(Topic::Reports(member), until).await;
    }
}

impl Agent {
    fn hear(&mut self, report: Report) {
        let instance = &mut self.instance;
        match report {
            Report::Armed { term, deadline } => {
                instance.armed = true;
                instance.armed_term = Some(term);
                instance.paused = false;
                let deadline = Boottime::from_nanos(deadline.as_nanos());
                self.arming = (term, deadline);
                self.inputs.push_back(Input::Armed { term, deadline });
            }
            Report::Disarmed => {
                instance.armed = false;
                instance.armed_term = None;
                instance.paused = false;
            }
            Report::Paused => {
                instance.armed = false;
                instance.armed_term = None;
                instance.paused = true;
            }
            Report::Started(id) => {
                instance.postmaster = i32::try_from(id).ok();
                instance.left = true;
                instance.adopted = false;
                instance.starts += 1;
            }
            Report::Refused(what, why) => {
                instance.refused = Some((what, why));
                instance.refusals += 1;
                if what == pgherd_keeper::protocol::RequestKind::Arm {
                    let (term, deadline) = self.arming;
                    self.inputs.push_back(Input::Refused { term: self.last_term });
                    self.inputs.push_back(Input::Armed { term, deadline });
                }
            }
            Report::PostmasterExited(status) => {
                instance.postmaster = None;
                instance.adopted = false;
                instance.last_exit = Some(status);
                instance.exits += 1;
            }
            Report::Ended => {
                instance.left = false;
                instance.postmaster = None;
            }
            Report::Fenced(term) => {
                instance.fenced = Some(term);
                instance.armed = false;
                instance.armed_term = None;
            }
            Report::Stop => instance.stopping = true,
            Report::Stranger(id) => {
                instance.stranger = id.and_then(|id| i32::try_from(id).ok());
                instance.left |= id.is_some();
            }
            Report::Adopted(id) => {
                instance.postmaster = i32::try_from(id).ok();
                instance.stranger = None;
                instance.adopted = true;
                instance.left = true;
            }
        }
    }

    pub(crate) fn timing(&self) -> LeaseTiming {
        self.view.timing()
    }
}

/// The facts that a cycle starts from; it is woken when they are no longer so.
#[derive(PartialEq)]
struct Facts {
    leader: Option<Epoch>,
    initialize: Option<Initialize>,
    guarded: [i64; 4],
    members: Vec<(MemberName, Role, PgState)>,
    lease: (Option<i64>, Option<Epoch>, bool),
    instance: Instance,
    in_touch: bool,
    jobs: usize,
}

impl Facts {
    fn of(agent: &Agent) -> Self {
        let (view, state) = (&agent.view, agent.core.state());
        let held = state.holding.as_ref();
        Self {
            leader: view.epoch().cloned(),
            initialize: view.initialize,
            guarded: [
                view.sync.mod_revision,
                view.failsafe_revision,
                view.failover.mod_revision,
                view.config.mod_revision,
            ],
            members: view
                .members
                .values()
                .map(|member| (member.name.clone(), member.record.role, member.record.state))
                .collect(),
            lease: (
                state.lease,
                held.map(|held| held.epoch.clone()),
                held.is_some_and(|held| held.deadline.is_some()),
            ),
            instance: agent.instance.clone(),
            in_touch: agent.in_touch,
            jobs: agent.ended.len(),
        }
    }
}

async fn cycle(sim: Shared, member: usize) {
    loop {
        let Some(before) = sim.with(|world| world.agent(member).map(|agent| Facts::of(agent))) else {
            return;
        };
        give_up_what_was_fenced(&sim, member).await;
        let seen = observe(&sim, member).await;
        sim.drowse(member).await;
        let Some(mut seen) = seen else { return };
        let now = sim.clock(member);
        sim.with(|world| spoil(world, member, &mut seen, now));
        let Some(decision) = sim.with(|world| world.agent(member).map(|agent| decide_on(agent, &mut seen, now))) else {
            return;
        };
        tell(&sim, member, &decision.reason, &seen);
        sim.drowse(member).await;
        let acted = match decision.step {
            None => None,
            Some(step) => Some(act(&sim, member, &seen, step).await),
        };
        if acted == Some(Acted::Leave) {
            return;
        }
        sim.drowse(member).await;
        upkeep(&sim, member, &seen).await;
        let again_after = match acted {
            Some(Acted::Done) => Some(Duration::ZERO),
            Some(Acted::Settling) => Some(SETTLING),
            Some(Acted::Failed) => Some(AFTER_FAILURE),
            Some(Acted::Leave | Acted::Started) | None => decision.again_after,
        };
        wait(&sim, member, &before, again_after).await;
    }
}

/// A holding whose end the keeper has enforced is over, whatever the key says.
async fn give_up_what_was_fenced(sim: &Shared, member: usize) {
    let over = sim.with(|world| {
        world.agent(member).is_some_and(|agent| {
            let held = agent.core.state().holding.as_ref();
            held.is_some_and(|held| Some(held.term) == agent.instance.fenced)
        })
    });
    if over {
        let_go(sim, member).await;
    }
}

/// A planted bug: who may lead is decided on what `/sync` was a while ago.
fn spoil(world: &mut World, member: usize, seen: &mut Observation, now: Boottime) {
    if !world.is_planted(Planted::StaleSync) {
        return;
    }
    let Some(agent) = world.agent(member) else { return };
    if seen.view.sync.value.lists(&seen.me) {
        agent.old_sync = Some((seen.view.sync.clone(), now));
    }
    let still = |at: Boottime| now.since(at) < Duration::from_secs(30);
    if let Some((known, _)) = agent.old_sync.as_ref().filter(|(_, at)| still(*at))
        && seen.lease == LeaseSeen::Free
    {
        Arc::make_mut(&mut seen.view).sync = known.clone();
    }
}

fn decide_on(agent: &mut Agent, seen: &mut Observation, now: Boottime) -> pgherd_agent::decide::Decision {
    agent.known.data = Some(seen.data.clone());
    if let Some(held) = &agent.core.state().holding {
        agent.known.last_held = Some(held.epoch.clone());
    }
    agent.memory.note(seen, now);
    decide(seen, &agent.memory, now)
}

fn tell(sim: &Shared, member: usize, reason: &Reason, seen: &Observation) {
    let new = sim.with(|world| {
        let agent = world.agent(member)?;
        agent.shown = match &seen.postgres {
            Postgres::Running(server) => Some((**server).clone()),
            Postgres::Down | Postgres::Ending | Postgres::Silent { .. } => None,
        };
        (agent.reason.as_ref() != Some(reason)).then(|| agent.reason = Some(reason.clone()))
    });
    if new.is_some() {
        let lease = match &seen.lease {
            LeaseSeen::Mine(epoch) => format!("mine {epoch}"),
            LeaseSeen::MineUnproven(epoch) => format!("unproven {epoch}"),
            LeaseSeen::Stale { epoch, .. } => format!("stale {epoch}"),
            LeaseSeen::Theirs(epoch) => format!("{epoch}"),
            LeaseSeen::Free => "free".to_owned(),
            LeaseSeen::Unknown => "unknown".to_owned(),
        };
        sim.say(member, || format!("{reason} [{lease}]"));
    }
}

/// While the loop waits it answers those who ask for a fresh status.
fn look_for_others(sim: &Shared, member: usize, waits: bool) {
    sim.with(|world| {
        if let Some(agent) = world.agent(member) {
            agent.waits = waits;
        }
    });
    if waits {
        sim.notify(Topic::Refresh(member));
    }
}

/// Waits for a fact, a job, or the next period.
async fn wait(sim: &Shared, member: usize, before: &Facts, again_after: Option<Duration>) {
    let Some(period) = sim.with(|world| world.agent(member).map(|agent| agent.timing().loop_wait())) else {
        return;
    };
    let until = sim.now() + again_after.unwrap_or(period).min(period);
    let moved = || {
        sim.with(|world| {
            let agent = world.agent(member)?;
            (Facts::of(agent) != *before || !agent.ended.is_empty()).then_some(())
        })
    };
    look_for_others(sim, member, true);
    sim.exec.wait_for(Topic::Agent(member), until, moved).await;
    look_for_others(sim, member, false);
    let now = sim.clock(member);
    sim.with(|world| {
        let Some(agent) = world.agent(member) else { return };
        while let Some((kind, outcome)) = agent.ended.pop_front() {
            agent.work = None;
            let proven = matches!(outcome, Ok(Outcome::Proven(_)));
            agent.memory.job_ended(kind, outcome, now);
            if proven {
                agent.checkpoint = None;
            }
        }
    });
}

/// Starts long work.
pub(crate) fn start_work(
    sim: &Shared,
    member: usize,
    kind: JobKind,
    work: impl Future<Output = Result<Outcome, String>> + 'static,
) {
    let inner = Rc::clone(sim);
    let task = sim.spawn(Owner::Agent(member), async move {
        let outcome = work.await;
        inner.say(member, || match &outcome {
            Ok(Outcome::Polled(poll)) => format!("polled: {} answered, {} silent", poll.peers.len(), poll.silent),
            Ok(outcome) => format!("{kind} ended: {outcome:?}"),
            Err(why) => format!("{kind} failed: {why}"),
        });
        inner.with(|world| {
            if let Some(agent) = world.agent(member) {
                agent.ended.push_back((kind, outcome));
            }
        });
        inner.notify(Topic::Agent(member));
    });
    sim.with(|world| {
        if let Some(agent) = world.agent(member) {
            agent.work = Some(Work { kind, task });
        }
    });
}

/// Drops long work, with the programs that it runs.
pub(crate) fn drop_work(sim: &Shared, member: usize) {
    let task = sim.with(|world| {
        let agent = world.agent(member)?;
        let work = agent.work.take();
        agent.ended.clear();
        work.map(|work| work.task)
    });
    if let Some(task) = task {
        sim.exec.kill(task);
    }
}

/// Where the data directory would be.
pub(crate) fn data_dir() -> PathBuf {
    PathBuf::from("/data")
}

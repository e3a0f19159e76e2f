//! The loop: woken by facts, it observes, decides, and acts; then it does the upkeep that needs no decision.

mod act;
mod configuration;
mod events;
mod remembered;
mod restart;
mod slots;
mod upkeep;

use std::sync::Arc;
use std::time::Duration;

use pgherd_cluster::clock::{Boottime, wall_now};
use pgherd_cluster::etcd::StoreError;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::{PgState, Role};
use pgherd_cluster::source::SourceHealth;
use pgherd_cluster::view::{Epoch, View};
use serde_json::{Map, Value};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};

pub use self::act::Left;
use self::configuration::{Pending, Roles, fresh};
use self::restart::Orders;
use self::slots::SlotCare;
use self::upkeep::Upkeep;
use crate::context::Context;
use crate::decide::{Decision, Reason, decide, published_role};
use crate::jobs::{Job, JobError, Outcome};
use crate::journal::News;
use crate::lease::{LeaseState, Resumed, term_of};
use crate::live::{Fresh, Reload};
use crate::memory::Memory;
use crate::observation::{JobKind, LeaseSeen, Observation, Postgres, WatchdogSeen};
use crate::observe::{Known, observe};
use crate::postgres::DataDir;
use crate::postgres::passwords::Passwords;
use crate::record::published_state;
use crate::restart::{Order, Restarted};
use crate::scripts::{Facts, Told};
use crate::status::{Holding, MemberStatus};
use crate::sync::SyncReason;

/// After a step that failed: long enough not to hammer, short enough not to be what an outage waits for.
const AFTER_FAILURE: Duration = Duration::from_millis(200);
/// After a step whose effect the view does not show yet.
const SETTLING: Duration = Duration::from_millis(50);

/// Somebody asks for a fresh observation.
pub type Refresh = oneshot::Sender<Arc<MemberStatus>>;

/// The loop and what it owns.
pub struct Cycle {
    context: Arc<Context>,
    memory: Memory,
    known: Known,
    job: JoinSet<(JobKind, Result<Outcome, JobError>)>,
    checkpoint: JoinSet<Option<Epoch>>,
    upkeep: Upkeep,
    slots: SlotCare,
    orders: Orders,
    order: mpsc::Receiver<Order>,
    reload: Reload,
    pending: Pending,
    roles: Roles,
    /// The superuser's password before the last change of it.
    former_password: Option<String>,
    status: Arc<watch::Sender<Arc<MemberStatus>>>,
    refresh: mpsc::Receiver<Refresh>,
    last_reason: Option<Reason>,
    reloads_seen: u64,
    ever_in_touch: bool,
    told: Told,
    news: News,
}

/// What others tell the loop.
pub struct Heard {
    /// Who asks for a fresh observation.
    pub refresh: mpsc::Receiver<Refresh>,
    /// What operators order.
    pub order: mpsc::Receiver<Order>,
    /// The configuration, read anew.
    pub reload: Reload,
}

/// What ends a wait.
enum Woken {
    /// Something to look at.
    Fact,
    /// A job has ended.
    Job(Result<(JobKind, Result<Outcome, JobError>), JoinError>),
    /// The first checkpoint of a holding is done.
    Checkpointed(Option<Epoch>),
    /// A piece of the care of slots is done.
    Slots(Result<slots::Done, JoinError>),
    /// Somebody waits for a fresh status.
    Refresh(Refresh),
    /// An operator's order.
    Order(Order),
    /// The configuration, read anew.
    Configuration(Box<Fresh>),
}

impl Cycle {
    /// A loop that has not begun. What the agent before this one had proven is proven.
    #[must_use]
    pub fn new(
        context: Arc<Context>,
        resumed: &Resumed,
        status: Arc<watch::Sender<Arc<MemberStatus>>>,
        heard: Heard,
    ) -> Self {
        let Heard { refresh, order, reload } = heard;
        let roles = Roles::new(Passwords::of(&context.config.postgresql));
        let proven = resumed.epoch.clone().filter(|_| resumed.proven);
        let memory = Memory {
            proven_term: proven
                .as_ref()
                .map(|epoch| resumed.term.unwrap_or_else(|| term_of(epoch))),
            // Whether its first checkpoint was done the agent before this one may not have lived to see: it is written again.
            proven,
            began_at: Some(Boottime::now()),
            ..Memory::default()
        };
        let known = Known {
            last_held: resumed.epoch.clone(),
            last_config: remembered::load(&context.config.postgresql.data_dir),
            ..Known::default()
        };
        Self {
            context,
            memory,
            known,
            job: JoinSet::new(),
            checkpoint: JoinSet::new(),
            upkeep: Upkeep::default(),
            slots: SlotCare::default(),
            orders: Orders::default(),
            order,
            reload,
            pending: Pending::default(),
            roles,
            former_password: None,
            status,
            refresh,
            last_reason: None,
            reloads_seen: 0,
            ever_in_touch: false,
            told: Told::default(),
            news: News::default(),
        }
    }

    /// Runs until a decision is to leave; says how.
    pub async fn run(mut self) -> Left {
        loop {
            let before = Woke::now(&self.context);
            self.context.vigil.turns.note(Boottime::now());
            self.give_up_what_was_fenced().await;
            let (seen, decision) = match observe(&self.context, &self.known).await {
                Ok(mut seen) => {
                    self.take_note(&mut seen);
                    self.look_at_schedule(seen.is_paused()).await;
                    let decision = decide(&seen, &self.memory, Boottime::now());
                    (seen, decision)
                }
                Err(error) => {
                    tracing::error!("observing: {}", error.chain());
                    self.wait(before, Some(AFTER_FAILURE)).await;
                    continue;
                }
            };
            self.say(&decision);
            self.publish_status(&seen, &decision.reason);
            let acted = match decision.step {
                None => None,
                Some(step) => Some(self.act(&seen, step).await),
            };
            if let Some(act::Acted::Leave(left)) = acted {
                return left;
            }
            self.upkeep(&seen).await;
            self.conclude_change(&seen);
            let again_after = match acted {
                Some(act::Acted::Done) => Some(Duration::ZERO),
                Some(act::Acted::Settling) => Some(SETTLING),
                Some(act::Acted::Failed) => Some(AFTER_FAILURE),
                // What takes hours is published when it begins.
                Some(act::Acted::Started) if self.known.job.is_some_and(JobKind::makes_data) => Some(SETTLING),
                Some(act::Acted::Leave(_) | act::Acted::Started) | None => decision.again_after,
            };
            self.wait(before, sooner(again_after, self.look_again_after())).await;
        }
    }

    /// A holding whose end the keeper has enforced is over, whatever the key says: no deadline of it counts any more.
    async fn give_up_what_was_fenced(&mut self) {
        let fenced = self.context.keeper.instance().borrow().fenced;
        let held = self.context.lease.state().borrow().holding.clone();
        if held.is_some_and(|held| Some(held.term) == fenced) {
            self.let_go().await;
        }
    }

    fn say(&mut self, decision: &Decision) {
        if self.last_reason.as_ref() == Some(&decision.reason) {
            return;
        }
        let event = self.tell_reason(&decision.reason);
        let event = event.as_ref().map(tracing::field::display);
        // What repeats by itself while something is awaited would only fill the log.
        match &decision.reason {
            Reason::Polling | Reason::Busy(JobKind::Poll) => {}
            reason @ (Reason::Fatal(_) | Reason::ForeignFiles(_)) => {
                tracing::error!(event, "{} {reason}", self.context.config.name);
            }
            // What commits were promised is over for a while.
            reason @ Reason::Synchronous(SyncReason::Relaxed) => {
                tracing::warn!(event, "{} {reason}", self.context.config.name);
            }
            reason => tracing::info!(event, "{} {reason}", self.context.config.name),
        }
        self.last_reason = Some(decision.reason.clone());
    }

    /// Carries facts over from cycle to cycle.
    fn take_note(&mut self, seen: &mut Observation) {
        self.known.data = Some(seen.data.clone());
        self.known.note(&seen.postgres);
        if let Some(config) = &seen.view.config.value {
            self.known.last_config = Some(config.clone());
        }
        if let Some(held) = &self.context.lease.state().borrow().holding {
            self.known.last_held = Some(held.epoch.clone());
        }
        self.memory.note(seen, Boottime::now());
        self.look_for_news(seen);
        self.tell_callbacks(seen);
        if self.memory.restart.is_none() {
            self.orders.ended(Restarted::Failed); // It was given up for something else.
        }
        let health = self.context.view.health().borrow().clone();
        match health {
            SourceHealth::Following => self.ever_in_touch = true,
            SourceHealth::Failing(StoreError::Auth { what }) if !self.ever_in_touch => {
                self.memory.fatal = Some(format!(
                    "etcd refuses the credentials ({what}): set etcd3.username and etcd3.password to those of an etcd user"
                ));
            }
            SourceHealth::Failing(_) | SourceHealth::Starting => {}
        }
        if self.memory.reinitialize_asked_at.is_none() {
            self.orders
                .reinitialize_ended(Some("it was given up: no leader took writes")); // Where it never began.
        }
        let reloads = self.context.keeper.instance().borrow().reloads;
        if reloads != self.reloads_seen {
            self.reloads_seen = reloads;
            self.reload();
        }
    }

    /// Operators' callbacks hear of what has become of PostgreSQL.
    fn tell_callbacks(&mut self, seen: &Observation) {
        if let Some((event, role)) = self.told.note(Facts::of(seen, &self.memory)) {
            self.context.callbacks.call(event, role);
        }
        self.context.callbacks.set_role(self.told.running_role());
    }

    fn status_of(&self, seen: &Observation, reason: &Reason) -> MemberStatus {
        let now = Boottime::now();
        let lease = self.context.lease.state().borrow().clone();
        let system_id = match &seen.data {
            DataDir::Cluster { control, .. } => Some(control.system_id),
            DataDir::Empty | DataDir::Foreign(_) => None,
        };
        MemberStatus {
            name: self.context.config.name.clone(),
            scope: self.context.config.scope.clone(),
            state: published_state(seen, &self.memory),
            role: published_role(seen, &self.memory),
            server: match &seen.postgres {
                Postgres::Running(server) => Some((**server).clone()),
                Postgres::Down | Postgres::Ending | Postgres::Silent { .. } => None,
            },
            holding: holding(&seen.lease, &lease, now),
            watchdog_failed: seen.watchdog == WatchdogSeen::Unusable,
            tags: told_tags(&self.context.live().tags, seen),
            system_id,
            dcs_last_seen: dcs_last_seen(&lease, now),
            next_cycle_at: now + self.context.timing().loop_wait(),
            reinitialize_failed: self.orders.reinitialize_failed(),
            reason: reason.to_string(),
            scheduled_restart: self.orders.document(),
            pending_restart: self.pending.found.clone(),
        }
    }

    fn publish_status(&self, seen: &Observation, reason: &Reason) {
        self.status.send_replace(Arc::new(self.status_of(seen, reason)));
    }

    /// Waits for a fact, a job, or the next period; answers those who ask for a fresh status meanwhile.
    async fn wait(&mut self, before: Woke, again_after: Option<Duration>) {
        let period = self.context.timing().loop_wait();
        let until = Instant::now() + again_after.unwrap_or(period).min(period);
        loop {
            let context = Arc::clone(&self.context);
            let woken = tokio::select! {
                biased;
                Some(ended) = self.job.join_next() => Woken::Job(ended),
                Some(Ok(epoch)) = self.checkpoint.join_next() => Woken::Checkpointed(epoch),
                () = before.changed(&context) => Woken::Fact,
                Some(done) = self.slots.ended() => Woken::Slots(done),
                Some(refresh) = self.refresh.recv() => Woken::Refresh(refresh),
                Some(order) = self.order.recv() => Woken::Order(order),
                fresh = fresh(&mut self.reload) => Woken::Configuration(Box::new(fresh)),
                () = sleep_until(until) => Woken::Fact,
            };
            match woken {
                Woken::Fact => return,
                Woken::Job(Ok((kind, result))) => return self.job_ended(kind, result),
                Woken::Job(Err(defect)) => {
                    tracing::error!("a job ended by a defect: {defect}");
                    self.known.job = None;
                    self.memory.job_lost(Boottime::now());
                    self.orders.reinitialize_ended(Some("it ended by a defect"));
                    return;
                }
                Woken::Checkpointed(epoch) => {
                    self.memory.checkpointed = epoch.or(self.memory.checkpointed.take());
                    return;
                }
                Woken::Slots(done) => {
                    if self.slots_done(done) {
                        return;
                    }
                }
                Woken::Refresh(refresh) => self.answer(refresh).await,
                Woken::Order(order) => return self.take_order(order).await,
                Woken::Configuration(fresh) => return self.take_configuration(*fresh),
            }
        }
    }

    /// Observes PostgreSQL anew for somebody who asks; everything else is as of the last cycle.
    async fn answer(&self, refresh: Refresh) {
        let last = self.status.borrow().clone();
        let running = self.context.keeper.instance().borrow().postmaster.is_some();
        let asked = timeout(AFTER_FAILURE, self.context.sql.status());
        let server = if running {
            asked.await.ok().and_then(Result::ok)
        } else {
            None
        };
        let fresh = match server {
            Some(server) => MemberStatus {
                server: Some(server),
                ..(*last).clone()
            },
            None if running => (*last).clone(),
            None => MemberStatus {
                server: None,
                ..(*last).clone()
            },
        };
        let _ = refresh.send(Arc::new(fresh)); // Who asked may have given up.
    }

    fn start(&mut self, job: Job) {
        let kind = job.kind();
        self.known.job = Some(kind);
        self.slots.make_way(&self.context, kind);
        let context = Arc::clone(&self.context);
        self.job.spawn(async move { (kind, job.run(context).await) });
    }

    /// Drops the job that is under way, with the programs that it runs.
    async fn drop_job(&mut self) {
        self.job.shutdown().await;
        self.known.job = None;
    }

    fn job_ended(&mut self, kind: JobKind, result: Result<Outcome, JobError>) {
        self.known.job = None;
        let outcome = result.map_err(|error| {
            tracing::warn!("{kind} failed: {error}");
            format!("{kind} failed: {error}")
        });
        if let Ok(Outcome::Proven(epoch)) = &outcome {
            self.first_checkpoint(epoch.clone());
        }
        self.note_job(kind, &outcome);
        let restarted = if outcome.is_ok() {
            Restarted::Done
        } else {
            Restarted::Failed
        };
        if kind == JobKind::Clone {
            self.orders
                .reinitialize_ended(outcome.as_ref().err().map(String::as_str));
        }
        self.memory.job_ended(kind, outcome, Boottime::now());
        if self.memory.restart.is_none() {
            self.orders.ended(restarted);
        }
    }

    fn first_checkpoint(&mut self, epoch: Epoch) {
        let target = self.context.sql.target();
        // On a connection of its own: the loop's must stay free to answer.
        self.checkpoint.spawn(async move {
            let limit = Duration::from_secs(3600);
            let done =
                crate::postgres::sql::ask_once(&target, "writing the first checkpoint", "CHECKPOINT", limit).await;
            match done {
                Ok(_) => Some(epoch),
                Err(error) => {
                    tracing::warn!("the first checkpoint of this timeline: {}", error.chain());
                    None
                }
            }
        });
    }
}

/// Who may not lead for want of slots is passed over by whoever chooses.
fn told_tags(tags: &Map<String, Value>, seen: &Observation) -> Map<String, Value> {
    let mut tags = tags.clone();
    if !seen.lacks_slots.is_empty() {
        tags.insert("nofailover".to_owned(), Value::Bool(true));
    }
    tags
}

/// The sooner of two times to decide again; nothing says at the end of the period.
fn sooner(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

fn holding(lease: &LeaseSeen, state: &LeaseState, now: Boottime) -> Option<Holding> {
    let proven = state.proven(now)?;
    matches!(lease, LeaseSeen::Mine(epoch) if *epoch == proven.epoch).then_some(proven)
}

fn dcs_last_seen(lease: &LeaseState, now: Boottime) -> u64 {
    let Some(answered_at) = lease.answered_at else { return 0 };
    let wall = wall_now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    wall.saturating_sub(now.since(answered_at)).as_secs()
}

/// The facts that a cycle started from; it is woken when they are no longer so.
struct Woke {
    view: Fingerprint,
    lease: (Option<i64>, Option<Epoch>, bool),
    instance: crate::keeper::Instance,
    health: SourceHealth,
}

/// What in a view is worth a cycle at once. Positions move all the time and are looked at when the period is over.
#[derive(PartialEq)]
struct Fingerprint {
    leader: Option<Epoch>,
    initialize: Option<pgherd_cluster::view::Initialize>,
    guarded: [i64; 4],
    members: Vec<(MemberName, String, Role, PgState, bool)>,
}

impl Fingerprint {
    fn of(view: &View) -> Self {
        let member = |member: &pgherd_cluster::view::Member| {
            (
                member.name.clone(),
                member.record.conn_url.clone(),
                member.record.role,
                member.record.state,
                member.record.tag("nosync"),
            )
        };
        Self {
            leader: view.epoch().cloned(),
            initialize: view.initialize,
            guarded: [
                view.sync.mod_revision,
                view.failsafe_revision,
                view.failover.mod_revision,
                view.config.mod_revision,
            ],
            members: view.members.values().map(member).collect(),
        }
    }
}

fn lease_facts(state: &LeaseState) -> (Option<i64>, Option<Epoch>, bool) {
    let held = state.holding.as_ref();
    (
        state.lease,
        held.map(|held| held.epoch.clone()),
        held.is_some_and(|held| held.deadline.is_some()),
    )
}

impl Woke {
    fn now(context: &Context) -> Self {
        Self {
            view: Fingerprint::of(&context.view.load()),
            lease: lease_facts(&context.lease.state().borrow()),
            instance: context.keeper.instance().borrow().clone(),
            health: context.view.health().borrow().clone(),
        }
    }

    /// Resolves when any of the facts has changed since.
    async fn changed(&self, context: &Context) {
        let (mut view, mut lease) = (context.view.subscribe(), context.lease.state());
        let (mut instance, mut health) = (context.keeper.instance(), context.view.health());
        // A sender that is gone ends the process elsewhere; here it is only a reason to look.
        tokio::select! {
            _ = view.wait_for(|view| Fingerprint::of(view) != self.view) => {}
            _ = lease.wait_for(|state| lease_facts(state) != self.lease) => {}
            _ = instance.wait_for(|instance| *instance != self.instance) => {}
            _ = health.wait_for(|health| *health != self.health) => {}
        }
    }
}

//! Wires one agent and runs it to its end.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use pgherd_cluster::clock::Boottime;
use pgherd_cluster::etcd::{Budget, Etcd, StoreError};
use pgherd_cluster::event::Event;
use pgherd_cluster::http::Ask;
use pgherd_cluster::key::{Key, Keys};
use pgherd_cluster::record::{DynamicConfig, MemberRecord, PgState, Role};
use pgherd_cluster::source::{EtcdSource, SourceHealth, ViewHandle};
use pgherd_cluster::timing::LeaseTiming;
use pgherd_keeper::KeeperLink;
use serde_json::Map;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::config::AgentConfig;
use crate::context::{Context, local_target, replication_with};
use crate::cycle::{Cycle, Heard, Refresh};
use crate::health::{self, Health};
use crate::journal::{Journal, Keeping};
use crate::keeper::{Keeper, OrderError};
use crate::lease::{Lease, LeaseParts, LeaseState, Proof, Resumed};
use crate::live::{Live, Reload};
use crate::peers::Peers;
use crate::postgres::Programs;
use crate::postgres::bootstrap::{password_file, scripts_pgpass};
use crate::postgres::files::remove_if_there;
use crate::postgres::rewind::source_pgpass;
use crate::postgres::settings::written_names;
use crate::postgres::sql::Sql;
use crate::rest::{Api, ApiParts, Doors, serve};
use crate::restart::Order;
use crate::scripts::{Callbacks, Executor};
use crate::slots::Board;
use crate::status::{Holding, MemberStatus};
use crate::vigil::{Turns, Vigil};

/// Why an agent could not begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The keeper.
    #[error("speaking to the keeper: {0}")]
    Keeper(#[from] OrderError),
    /// A port or a directory.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The renewal thread has ended, by a defect.
    #[error("the thread that renews the lease has ended")]
    LeaseThread,
    /// Another process is this member.
    #[error("a member named {name} of cluster {scope} already runs and answers at {url}; give this one another name")]
    Duplicate {
        /// The name.
        name: String,
        /// The cluster.
        scope: String,
        /// Where the other answers.
        url: String,
    },
}

/// How long the end of the process waits for a callback.
const LAST_CALLBACK_MAX: Duration = Duration::from_secs(5);
const LAST_WORDS_MAX: Duration = Duration::from_secs(2);
/// How long it waits for the last events to be written.
const LAST_EVENTS_MAX: Duration = Duration::from_secs(1);

/// Runs until it is told to stop, or cannot go on; gives the exit code that the keeper was told too.
///
/// # Errors
/// When something is missing from the start, or the keeper is gone.
pub async fn run(config: AgentConfig, link: KeeperLink, reload: Reload) -> Result<u8, AgentError> {
    let (keeper, hello) = Keeper::greet(link).await?;
    let io = |what: String| move |source| AgentError::Io { what, source };
    let rest_address = config.restapi.listen.to_string();
    let listener = TcpListener::bind(wildcard(&rest_address))
        .await
        .map_err(io(format!("restapi.listen: binding {rest_address}")))?;

    // An agent that died while it made a cluster, or rewound, left them.
    for left in [password_file(&config), scripts_pgpass(&config), source_pgpass(&config)] {
        if let Err(error) = remove_if_there(&left) {
            tracing::warn!("{}", error.chain());
        }
    }
    let resumed = Resumed {
        armed_until: hello
            .armed
            .map(|(_, deadline)| Boottime::from_nanos(deadline.as_nanos())),
        ..Resumed::from_memo(&hello.memo)
    };
    let (health_tx, health) = watch::channel(Health::default());
    let (journal, untold) = Journal::new(config.name.as_str());
    let (source, context, executor) = wire(config, keeper, health, journal, &resumed).await?;

    let stop = CancellationToken::new();
    let (mut tasks, mut callbacks, mut events) = (JoinSet::new(), JoinSet::new(), JoinSet::new());
    events.spawn(keeping(&context, untold).run(stop.clone()));
    callbacks.spawn(executor.run(Arc::clone(&context), stop.clone()));
    tasks.spawn(source.run(stop.clone()));
    tasks.spawn(health::probe(Arc::clone(&context), health_tx, stop.clone()));
    tasks.spawn(report_missing_etcd(
        context.etcd.clone(),
        context.view.clone(),
        stop.clone(),
    ));
    let (status_tx, status) = watch::channel(Arc::new(first_status(&context)));
    let status_tx = Arc::new(status_tx);
    tasks.spawn(follow_proofs(context.lease.state(), Arc::clone(&status_tx)));
    let (refresh_tx, refresh) = mpsc::channel(16);
    let (order_tx, order) = mpsc::channel(4);
    let api = api_of(&context, status, refresh_tx, order_tx);
    tasks.spawn(serve(listener, Arc::new(api), stop.clone()));

    let cycle = async {
        refuse_duplicate(&context, &resumed).await?;
        Ok(Cycle::new(
            Arc::clone(&context),
            &resumed,
            status_tx,
            Heard { refresh, order, reload },
        )
        .run()
        .await)
    };
    let ended = tokio::select! {
        // The sentinel ends PostgreSQL; an agent without a keeper has no business.
        () = context.keeper.gone() => Err(AgentError::Keeper(OrderError::Gone)),
        // Nor has one whose lease nobody renews: the keeper starts another.
        () = context.lease.ended() => Err(AgentError::LeaseThread),
        code = cycle => code,
    };
    match &ended {
        Ok(left) => context.keeper.leave_with(left.code, left.keep_postgres),
        Err(AgentError::Duplicate { .. }) => context.keeper.leave(64),
        Err(_) => {}
    }
    if ended.as_ref().is_ok_and(|left| !left.keep_postgres) {
        // Others see at once that we went on purpose; the key itself lives until its lease ends.
        let _ = timeout(LAST_WORDS_MAX, say_stopped(&context)).await;
    }
    stop.cancel();
    see_off(callbacks, events).await;
    tasks.shutdown().await;
    ended.map(|left| left.code)
}

/// Waits for what is under way of callbacks and events, not for long.
async fn see_off(mut callbacks: JoinSet<()>, mut events: JoinSet<()>) {
    if timeout(LAST_CALLBACK_MAX, callbacks.join_next()).await.is_err() {
        tracing::warn!("a callback still runs and is killed, since this process ends");
    }
    callbacks.shutdown().await;
    let _ = timeout(LAST_EVENTS_MAX, events.join_next()).await; // What is not written by then is lost.
    events.shutdown().await;
}

/// What writes the events that wait in `untold`.
fn keeping(context: &Context, untold: mpsc::Receiver<Arc<Event>>) -> Keeping {
    Keeping {
        etcd: context.etcd.separate(),
        keys: context.keys.clone(),
        view: context.view.clone(),
        journal: context.journal.clone(),
        queue: untold,
    }
}

/// The parts of one member, the source of its view, and what calls its callbacks.
async fn wire(
    config: AgentConfig,
    keeper: Keeper,
    health: watch::Receiver<Health>,
    journal: Journal,
    resumed: &Resumed,
) -> Result<(EtcdSource, Arc<Context>, Executor), AgentError> {
    let keys = Keys::new(&config.namespace, &config.scope);
    let etcd = Etcd::new(config.etcd.clone());
    let (source, view) = EtcdSource::new(etcd.separate(), keys.clone(), config.scope.clone(), false);
    let watchdog = config.watchdog.settings(LeaseTiming::DEFAULT);
    if let Err(error) = keeper.watchdog(watchdog).await {
        tracing::warn!("setting up the watchdog: {error}");
    }
    let doors = Doors::new(&config.restapi).map_err(|source| AgentError::Io {
        what: "restapi: setting up its TLS".to_owned(),
        source,
    })?;
    let peers = Peers::default();
    peers.set(&config.restapi);
    let turns = Arc::new(Turns::default());
    turns.note(Boottime::now());
    let vigil = Vigil { health, turns };
    let slots = Arc::new(Board::default());
    let parts = LeaseParts {
        etcd: etcd.clone(),
        keys: keys.clone(),
        view: view.clone(),
        keeper: keeper.clone(),
        peers: peers.clone(),
        vigil: vigil.clone(),
        slots: Arc::clone(&slots),
    };
    let lease = Lease::start(config.name.clone(), parts, resumed).map_err(|source| AgentError::Io {
        what: "starting the lease's thread".to_owned(),
        source,
    })?;
    let (callbacks, executor) = Callbacks::new();
    let programs = Programs::new(config.postgresql.bin_dir.clone()).with_names(config.postgresql.bin_name.clone());
    let replication = replication_with(&config, &programs, &DynamicConfig::default());
    let context = Arc::new(Context {
        callbacks,
        journal,
        slot_sql: Sql::new(
            local_target(&config),
            replication_with(&config, &programs, &DynamicConfig::default()),
        ),
        sql: Sql::new(local_target(&config), replication),
        programs,
        slots,
        vigil,
        sync_names: Mutex::new(written_names(&config.postgresql.conf_file())),
        live: Live::new(config.clone()),
        wanted: Mutex::default(),
        config,
        etcd,
        keys,
        view,
        keeper,
        peers,
        doors: Arc::new(ArcSwap::from_pointee(doors)),
        lease,
    });
    Ok((source, context, executor))
}

fn api_of(
    context: &Context,
    status: watch::Receiver<Arc<MemberStatus>>,
    refresh: mpsc::Sender<Refresh>,
    orders: mpsc::Sender<Order>,
) -> Api {
    Api::new(ApiParts {
        status,
        view: context.view.clone(),
        etcd: context.etcd.clone(),
        keys: context.keys.clone(),
        doors: Arc::clone(&context.doors),
        peers: context.peers.clone(),
        postgres: context.sql.shared_target(),
        refresh,
        orders,
        vouches: context.lease.vouches(),
        vigil: context.vigil.clone(),
        slots: Arc::clone(&context.slots),
        journal: context.journal.clone(),
    })
}

/// Keeps the published deadline as new as the last proof, also while the loop waits for something: who asks for a warrant
/// must not be told of a lapse that is none, nor of a holding that has been given up.
async fn follow_proofs(mut lease: watch::Receiver<LeaseState>, status: Arc<watch::Sender<Arc<MemberStatus>>>) {
    while lease.changed().await.is_ok() {
        let held = lease.borrow_and_update().holding.clone();
        status.send_if_modified(|status| {
            let Some(published) = &status.holding else { return false };
            let newer = held.as_ref().filter(|held| held.epoch == published.epoch);
            let holding = newer.and_then(|held| {
                Some(Holding {
                    epoch: published.epoch.clone(),
                    deadline: held.deadline?,
                    by_vouches: held.proof == Proof::Vouches,
                })
            });
            let changed = status.holding != holding;
            if changed {
                *status = Arc::new(MemberStatus {
                    holding,
                    ..(**status).clone()
                });
            }
            changed
        });
    }
}

/// `*` is every address, as in PostgreSQL's own setting.
fn wildcard(address: &str) -> String {
    address.replacen("*:", "0.0.0.0:", 1)
}

fn first_status(context: &Context) -> MemberStatus {
    MemberStatus {
        name: context.config.name.clone(),
        scope: context.config.scope.clone(),
        state: PgState::Unknown,
        role: Role::Uninitialized,
        server: None,
        holding: None,
        tags: context.config.tags.clone(),
        system_id: None,
        dcs_last_seen: 0,
        next_cycle_at: Boottime::now() + context.timing().loop_wait(),
        watchdog_failed: false,
        scheduled_restart: None,
        reinitialize_failed: None,
        pending_restart: Map::new(),
        reason: "is starting".to_owned(),
    }
}

/// While etcd has never answered, says each second how much of it does.
async fn report_missing_etcd(etcd: Etcd, view: ViewHandle, stop: CancellationToken) {
    let (mut health, last) = (view.health(), view.health());
    let mut tick = interval(Duration::from_secs(1));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick.tick().await; // The first is at once; a healthy etcd answers before the second.
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = settled(&mut health) => return,
            _ = tick.tick() => {
                let all = etcd.endpoint_count();
                let answering = etcd.answering(Duration::from_millis(700)).await;
                let seen = last.borrow().clone();
                let trouble = match seen {
                    SourceHealth::Failing(error) => format!(" ({error})"),
                    SourceHealth::Starting | SourceHealth::Following => String::new(),
                };
                tracing::warn!("etcd: {answering} of {all} members answer, quorum needs {}; waiting{trouble}", all / 2 + 1);
            }
        }
    }
}

/// Resolves when etcd has answered, or has refused us for good.
async fn settled(health: &mut watch::Receiver<SourceHealth>) {
    let settled = |health: &SourceHealth| {
        matches!(
            health,
            SourceHealth::Following | SourceHealth::Failing(StoreError::Auth { .. })
        )
    };
    // A source that is gone ends the process elsewhere.
    let _ = health.wait_for(settled).await;
}

/// Two processes with one name would both take the leader key for their own.
async fn refuse_duplicate(context: &Context, resumed: &Resumed) -> Result<(), AgentError> {
    let name = &context.config.name;
    let key = context.key(&Key::Member(name.clone()));
    let budget = Budget::new(Duration::from_secs(2), context.etcd.endpoint_count());
    let Ok(snapshot) = context.etcd.read(&key, budget).await else {
        return Ok(());
    };
    let Some(entry) = snapshot
        .entries
        .first()
        .filter(|entry| Some(entry.lease) != resumed.lease)
    else {
        return Ok(());
    };
    let record = MemberRecord::parse(&entry.value);
    let Some(endpoint) = record.api_endpoint() else {
        return Ok(());
    };
    // At our own address it is we who would answer: the port is ours, so it was an earlier life of this member.
    let ours = &context.config.restapi;
    if endpoint.address == ours.connect_address || endpoint.address == ours.listen {
        return Ok(());
    }
    let asked = context
        .peers
        .ask(&endpoint, Ask::get("/liveness"), Duration::from_secs(3));
    match asked.await {
        Ok(_) => Err(AgentError::Duplicate {
            name: name.to_string(),
            scope: context.config.scope.to_string(),
            url: record.api_url,
        }),
        Err(_) => Ok(()),
    }
}

async fn say_stopped(context: &Context) {
    let Some(lease) = context.lease.state().borrow().lease else {
        return;
    };
    let name = &context.config.name;
    let Some(mut record) = context
        .view
        .load()
        .members
        .get(name)
        .map(|member| member.record.clone())
    else {
        return;
    };
    record.state = PgState::Stopped;
    record.role = if record.role == Role::Replica {
        Role::Replica
    } else {
        Role::Demoted
    };
    record.replication_state = None;
    (
        record.xlog_location,
        record.receive_lsn,
        record.replay_lsn,
        record.timeline,
    ) = (None, None, None, None);
    let Ok(value) = serde_json::to_string(&record) else {
        return;
    };
    let key = context.key(&Key::Member(name.clone()));
    if let Err(error) = context.etcd.put(&key, &value, lease, context.budget()).await {
        tracing::debug!(%error, "could not say that this member has stopped");
    }
}

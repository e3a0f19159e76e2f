//! Gathers what a decision rests on from the models, as late and as incomplete as the real thing.

use std::time::Duration;

use pgherd_agent::keeper::Instance;
use pgherd_agent::observation::{LeaseSeen, Observation, Postgres, SyncSeen, WatchdogSeen};
use pgherd_agent::observe::lease_seen;
use pgherd_agent::postgres::{Control, DataDir};
use pgherd_agent::status::{CommitWaiting, ServerStatus, WalSender, WalStatus};
use pgherd_agent::sync::{CommitLevel, Sender, StandbyName, SyncNames, SyncRank, SyncSettings};
use pgherd_cluster::name::{Lsn, SystemId, Timeline};
use pgherd_cluster::record::DynamicConfig;

use crate::agent::data_dir;
use crate::executor::{Owner, Topic};
use crate::postgres::{Mode, Server, lsn};
use crate::run::Planted;
use crate::world::{Shared, World};

const STATUS_MAX: Duration = Duration::from_secs(2);
/// How long an answer to another member waits for a fresh look.
const FRESH_MAX: Duration = Duration::from_millis(150);

/// Observes; nothing when the agent has gone meanwhile.
pub(crate) async fn observe(sim: &Shared, member: usize) -> Option<Observation> {
    let (instance, data) = sim.with(|world| {
        let agent = world.agent(member)?;
        let instance = agent.instance.clone();
        let known = agent.known.data.clone().filter(|_| instance.postmaster.is_some());
        let data = known.unwrap_or_else(|| inspect(world.server(member)));
        Some((instance, data))
    })?;
    let postgres = look(sim, member, &instance).await;
    let now = sim.clock(member);
    sim.with(|world| {
        let me = world.name(member).clone();
        let unfinished = world.server(member).data.as_ref().is_some_and(|data| data.unfinished);
        let sync_setting = world.server(member).sync_setting.clone();
        let agent = world.agent(member)?;
        let state = agent.core.state().clone();
        // The instance is as it was when the questions went out; the lease is as it is now.
        let lease: LeaseSeen = lease_seen(&agent.view, agent.in_touch, &state, &instance, &me, now);
        Some(Observation {
            me,
            request_due: agent
                .view
                .failover
                .value
                .as_ref()
                .is_none_or(|request| request.scheduled_at.is_none()),
            sync: sync_seen(agent, &postgres, &sync_setting),
            standby_cluster: agent
                .view
                .config
                .value
                .as_ref()
                .and_then(DynamicConfig::standby_cluster),
            view: std::sync::Arc::clone(&agent.view),
            lease,
            data_dir: data_dir(),
            data,
            bootstrap_unfinished: unfinished,
            pre_promote: false,
            made_without_leader: false,
            postgres,
            lease_term: state.holding.as_ref().map(|held| held.term),
            server_hangs_since: agent.health.server_hangs_since(instance.postmaster),
            disk_fails_since: agent.health.disk_fails_since,
            armed: instance.armed,
            fenced_term: instance.fenced,
            fence_paused: instance.paused,
            lease_paused: state.paused,
            stranger: instance.stranger.is_some(),
            watchdog: WatchdogSeen::NotNeeded,
            vouched_for: state
                .vouched
                .filter(|vouched| now < vouched.until)
                .map(|vouched| vouched.leader),
            last_held: agent.known.last_held.clone(),
            job: agent.work.as_ref().map(|work| work.kind),
            upstream: agent.known.upstream.clone(),
            rewinds: false,
            nofailover: false,
            place: pgherd_agent::topology::Place::default(),
            lacks_slots: Vec::new(),
            failover_priority: 1,
            stopping: instance.stopping,
        })
    })
}

/// PostgreSQL, as the keeper and SQL tell.
async fn look(sim: &Shared, member: usize, instance: &Instance) -> Postgres {
    let early = sim.with(|world| world.is_planted(Planted::ReleaseWhileBackendLives));
    match (instance.postmaster, instance.left) {
        (None, left) if early || !left => Postgres::Down,
        (None, _) => Postgres::Ending,
        (Some(_), _) => match status(sim, member).await {
            Some(server) => Postgres::Running(Box::new(server)),
            None => Postgres::Silent {
                writable: sim.with(|world| {
                    world
                        .agent(member)
                        .is_some_and(|agent| agent.known.writable || agent.instance.armed)
                }),
            },
        },
    }
}

/// The data directory, as the control file tells.
pub(crate) fn inspect(server: &Server) -> DataDir {
    let Some(data) = &server.data else {
        return DataDir::Empty;
    };
    DataDir::Cluster {
        control: Control {
            state: data.state,
            system_id: SystemId(data.system_id),
            checkpoint: lsn(data.checkpoint.0),
            timeline: Timeline(data.checkpoint.1),
            floors: Vec::new(),
        },
        standby: data.standby_signal,
    }
}

fn sync_seen(agent: &crate::agent::Agent, postgres: &Postgres, setting: &str) -> SyncSeen {
    let config = agent.view.config.value.clone().unwrap_or_default();
    let (configured, taken_over, senders) = match postgres {
        Postgres::Running(server) => (
            SyncNames::parse(&server.waiting.names).unwrap_or_default(),
            server.waiting.taken_over,
            server.replication.iter().map(sender).collect(),
        ),
        Postgres::Down | Postgres::Ending | Postgres::Silent { .. } => {
            (SyncNames::parse(setting).unwrap_or_default(), false, Vec::new())
        }
    };
    SyncSeen {
        settings: SyncSettings::of(&config),
        configured,
        taken_over,
        user_names: SyncNames::Off,
        senders,
        commit_level: CommitLevel::Flush,
    }
}

fn sender(row: &WalSender) -> Sender {
    Sender {
        application_name: StandbyName::from(row.application_name.as_str()),
        pid: row.pid,
        state: row.state.clone(),
        sync_state: SyncRank::of(&row.sync_state),
        sent: row.sent,
        write: row.written,
        flush: row.flushed,
        replay: row.replayed,
        stale: false,
    }
}

/// What a member's server answers to SQL; nothing when it does not.
pub(crate) async fn status(sim: &Shared, member: usize) -> Option<ServerStatus> {
    let hung = sim.exec.is_frozen(Owner::Postgres(member))
        || sim.with(|world| world.server(member).run.as_ref().is_some_and(|run| run.hung));
    let time = if hung {
        STATUS_MAX
    } else {
        sim.with(|world| world.random.millis(1, 6))
    };
    sim.exec.sleep(time).await;
    if hung {
        return None;
    }
    sim.with(|world| answer(world, member))
}

/// What a member's REST interface says of its server: fresh while the loop has time and PostgreSQL answers at once, else
/// as it was last seen.
pub(crate) async fn shown_status(sim: &Shared, member: usize) -> Option<ServerStatus> {
    let until = sim.now() + FRESH_MAX;
    let waits = || sim.with(|world| world.agent(member).is_some_and(|agent| agent.waits).then_some(()));
    let loop_answers = sim.exec.wait_for(Topic::Refresh(member), until, waits).await.is_some();
    let runs = sim.with(|world| {
        world
            .agent(member)
            .is_some_and(|agent| agent.instance.postmaster.is_some())
    });
    if loop_answers && !runs {
        return None;
    }
    let fresh = if loop_answers {
        sim.exec.until(until, status(sim, member)).await.flatten()
    } else {
        None
    };
    fresh.or_else(|| sim.with(|world| world.agent(member).and_then(|agent| agent.shown.clone())))
}

fn answer(world: &World, member: usize) -> Option<ServerStatus> {
    let server = &world.hosts.get(member)?.server;
    let (run, data) = (server.run.as_ref()?, server.data.as_ref()?);
    let wal = match run.mode {
        Mode::Primary => WalStatus::Primary { location: data.end() },
        Mode::Standby | Mode::Promoting => WalStatus::Standby {
            received: data.end(),
            replayed: lsn(run.replayed),
            replayed_at: None,
            paused: false,
            latest_end: None,
        },
        Mode::Starting { .. } | Mode::Stopping => return None,
    };
    if run.hung {
        return None;
    }
    let connected = server.confirmed(&world.names);
    let rows = run.senders.iter().filter_map(|(other, sender)| {
        let name = world.names.get(*other)?;
        let (sync_state, sync_priority) = run.sync.state_of(name, &connected);
        let reached = |count: usize| -> Option<Lsn> { Some(lsn(count)) };
        Some(WalSender {
            usename: "replicator".to_owned(),
            application_name: name.clone(),
            client_addr: name.clone(),
            state: "streaming".to_owned(),
            sync_state: sync_state.to_owned(),
            sync_priority,
            pid: i32::try_from(*other).unwrap_or(0) + 100,
            sent: Some(data.end()),
            written: reached(sender.flushed),
            flushed: reached(sender.flushed),
            replayed: reached(sender.flushed),
        })
    });
    Some(ServerStatus {
        postmaster_start_time: run.id.to_string(),
        server_version: 170_000,
        wal,
        timeline: Some(Timeline(data.timeline)),
        replication_state: run.streaming.then(|| "streaming".to_owned()),
        replication: rows.collect(),
        waiting: CommitWaiting {
            names: run.sync_text.clone(),
            taken_over: run.has_taken_over() || world.is_planted(Planted::TakenOverAtOnce),
        },
    })
}

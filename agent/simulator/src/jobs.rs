//! Long work: what the agent's jobs do, with the times that such things take.

use std::time::Duration;

use pgherd_agent::decide::upstream_address;
use pgherd_agent::jobs::Outcome;
use pgherd_agent::observation::{Peer, Poll, Rejoin};
use pgherd_agent::postgres::ControlState;
use pgherd_agent::status::{ServerStatus, WalStatus};
use pgherd_cluster::name::{Lsn, MemberName, Timeline};
use pgherd_cluster::view::Epoch;
use pgherd_keeper::protocol::{PostmasterSignal, RequestKind};

use crate::act::{disarm, end_postgres, keep_initialize, keeper_does, wait_ended};
use crate::executor::Topic;
use crate::host::Request;
use crate::lease::order;
use crate::network::Site;
use crate::observe::{shown_status, status};
use crate::postgres::{Data, Mode, lsn, pace};
use crate::rpc::ask_member;
use crate::run::Planted;
use crate::world::Shared;

type Done = Result<Outcome, String>;

const START_MAX: Duration = Duration::from_secs(60);
const PROMOTE_MAX: Duration = Duration::from_secs(60);
const STOP_MAX: Duration = Duration::from_secs(60);
const KEEPER_MAX: Duration = Duration::from_secs(5);
const POLL_MAX: Duration = Duration::from_millis(400);
const CONFIRM_MAX: Duration = Duration::from_secs(3);
const SQL_MAX: Duration = Duration::from_secs(5);

fn failed<T>(what: &str) -> Result<T, String> {
    Err(what.to_owned())
}

pub(crate) async fn initdb(sim: Shared, member: usize) -> Done {
    let time = sim.with(|world| pace::initdb(&mut world.random));
    sim.exec.sleep(time).await;
    sim.with(|world| {
        world.next_system_id += 1;
        let (system_id, record) = (world.next_system_id, world.record());
        let server = world.server(member);
        // initdb refuses a directory that is not empty.
        if server.data.is_none() {
            server.data = Some(Data::made(system_id, record));
        }
    });
    Ok(Outcome::Done)
}

pub(crate) async fn clone(sim: Shared, member: usize, from: MemberName) -> Done {
    let address = sim.with(|world| upstream_address(&world.agent(member)?.view, &from));
    let Some(source) = sim.with(|world| world.number(&address?.host)) else {
        return failed("no such member");
    };
    if end_postgres(&sim, member, KEEPER_MAX).await.is_err() || disarm(&sim, member).await.is_err() {
        return failed("the keeper did not end PostgreSQL");
    }
    let copy = sim.with(|world| source_of_copy(world, member, source));
    let Some((run, begun)) = copy else {
        return failed("the source does not answer");
    };
    let pieces = 8;
    let time = sim.with(|world| pace::clone(&mut world.random));
    for _ in 0..pieces {
        sim.exec.sleep(time / pieces).await;
        let goes_on = sim.with(|world| source_of_copy(world, member, source).is_some_and(|(now, _)| now == run));
        if !goes_on {
            return failed("the copy broke off");
        }
    }
    let now = sim.now();
    sim.with(|world| {
        // The log that was written meanwhile is part of the copy.
        let data = world.server(source).data.as_ref().map_or(begun, Data::copied);
        let host = world.host(member);
        let before = host
            .server
            .data
            .as_ref()
            .and_then(|old| Some((old.log.len(), old.log.last()?.id)));
        host.server.replace_data(data);
        host.server.sync_setting.clear();
        world.judge_replacement(member, before, now);
    });
    Ok(Outcome::Done)
}

fn source_of_copy(world: &mut crate::world::World, member: usize, source: usize) -> Option<(u64, Data)> {
    let reached = world.network.talks(Site::Member(member), Site::Member(source));
    let server = &world.host(source).server;
    let run = server
        .run
        .as_ref()
        .filter(|run| matches!(run.mode, Mode::Primary | Mode::Standby) && !run.hung)?;
    reached.then_some((run.id, server.data.as_ref()?.copied()))
}

pub(crate) async fn start_primary(sim: Shared, member: usize, epoch: Epoch) -> Done {
    sim.with(|world| {
        if let Some(data) = &mut world.server(member).data {
            data.standby_signal = false;
        }
    });
    launch(&sim, member, None, true).await?;
    until_answers(&sim, member, START_MAX, is_primary).await?;
    settle(&sim, member, epoch).await
}

pub(crate) async fn start_standby(sim: Shared, member: usize, upstream: Option<MemberName>) -> Done {
    sim.with(|world| {
        if let Some(data) = &mut world.server(member).data {
            data.standby_signal = true;
        }
    });
    if disarm(&sim, member).await.is_err() {
        return failed("the keeper does not disarm");
    }
    let upstream = sim.with(|world| {
        let address = upstream_address(&world.agent(member)?.view, &upstream?)?;
        world.number(&address.host)
    });
    launch(&sim, member, upstream, false).await?;
    until_answers(&sim, member, START_MAX, |_| true).await?;
    Ok(Outcome::Done)
}

async fn launch(sim: &Shared, member: usize, upstream: Option<usize>, writable: bool) -> Result<(), String> {
    let starts = sim.with(|world| {
        world.server(member).upstream_setting = upstream;
        world.agent(member).map(|agent| agent.instance.starts)
    });
    let Some(starts) = starts else { return failed("gone") };
    order(sim, member, Request::Start { writable });
    let started = keeper_does(sim, member, RequestKind::Start, |instance| instance.starts > starts).await;
    started.map_err(|_| "the keeper refused to start PostgreSQL".to_owned())
}

fn is_primary(server: &ServerStatus) -> bool {
    matches!(server.wal, WalStatus::Primary { .. })
}

/// Asks until the server is as wanted; ends when the server does.
async fn until_answers(
    sim: &Shared,
    member: usize,
    limit: Duration,
    wanted: impl Fn(&ServerStatus) -> bool,
) -> Result<(), String> {
    let until = sim.now() + limit;
    loop {
        let gone = sim.with(|world| {
            world
                .agent(member)
                .is_none_or(|agent| agent.instance.postmaster.is_none())
        });
        if gone {
            return failed("PostgreSQL ended while it was starting");
        }
        if status(sim, member).await.is_some_and(|server| wanted(&server)) {
            return Ok(());
        }
        if sim.now() > until {
            return failed("PostgreSQL was too slow");
        }
        sim.exec
            .changed(Topic::Postgres(member), sim.now() + Duration::from_millis(30))
            .await;
    }
}

pub(crate) async fn promote(sim: Shared, member: usize, epoch: Epoch) -> Done {
    if status(&sim, member).await.is_some_and(|server| !is_primary(&server)) {
        let allowed = sim.with(|world| {
            world
                .agent(member)
                .is_some_and(|agent| agent.instance.armed || agent.instance.paused)
        });
        if !allowed {
            return failed("no deadline lies ahead, so that nothing may become writable");
        }
        order(&sim, member, Request::Signal(PostmasterSignal::Promote));
        until_answers(&sim, member, PROMOTE_MAX, is_primary).await?;
    }
    settle(&sim, member, epoch).await
}

/// A write that goes through. The agent's own connection waits for no standby.
async fn settle(sim: &Shared, member: usize, epoch: Epoch) -> Done {
    let time = sim.with(|world| world.random.millis(1, 4));
    sim.exec.sleep(time).await;
    let new = sim.with(|world| {
        let data = world.server(member).data.as_ref()?;
        data.unfinished.then(|| data.system_id.to_string())
    });
    if let Some(system_id) = new
        && !keep_initialize(sim, member, system_id, &epoch).await
    {
        return failed("the initialize key does not name the new cluster");
    }
    let written = sim.with(|world| {
        let run = world.server(member).writable_run()?;
        let id = world.record();
        let data = world.server(member).data.as_mut()?;
        data.unfinished = false;
        data.append(id);
        Some(run)
    });
    sim.notify(Topic::Postgres(member));
    written
        .map(|_| Outcome::Proven(epoch))
        .ok_or_else(|| "PostgreSQL takes no writes".to_owned())
}

pub(crate) async fn checkpoint(sim: Shared, member: usize) -> Done {
    let time = sim.with(|world| pace::checkpoint(&mut world.random));
    sim.exec.sleep(time).await;
    let wrote = sim.with(|world| {
        let record = world.record();
        let server = world.server(member);
        server.writable_run()?;
        server.data.as_mut().map(|data| data.write_checkpoint(record))
    });
    sim.notify(Topic::Postgres(member));
    wrote
        .map(|()| Outcome::Done)
        .ok_or_else(|| "PostgreSQL does not answer".to_owned())
}

pub(crate) async fn stop(sim: Shared, member: usize) -> Done {
    order(&sim, member, Request::Signal(PostmasterSignal::StopFast));
    if wait_ended(&sim, member, STOP_MAX).await.is_err() && end_postgres(&sim, member, KEEPER_MAX).await.is_err() {
        return failed("PostgreSQL does not end");
    }
    Ok(Outcome::Done)
}

pub(crate) async fn confirm(
    sim: Shared,
    member: usize,
    members: Vec<MemberName>,
    checkpoint: Lsn,
    timeline: Timeline,
) -> Done {
    let until = sim.now() + CONFIRM_MAX;
    while !members.is_empty() && sim.now() < until {
        let goes_on = sim.with(|world| {
            world
                .agent(member)
                .is_some_and(|agent| agent.instance.armed || agent.instance.paused)
        });
        if !goes_on {
            break;
        }
        for peer in ask_all(&sim, member, &members).await {
            if peer.timeline == Some(timeline) && peer.position.is_some_and(|position| position > checkpoint) {
                return Ok(Outcome::Confirmed(Some(peer.name)));
            }
        }
        sim.exec.sleep(Duration::from_millis(20)).await;
    }
    Ok(Outcome::Confirmed(None))
}

pub(crate) async fn poll(sim: Shared, member: usize) -> Done {
    let asked_at = sim.clock(member);
    let others: Option<Vec<MemberName>> = sim.with(|world| {
        let me = world.name(member).clone();
        let agent = world.agent(member)?;
        Some(
            agent
                .memory
                .addresses
                .keys()
                .filter(|name| **name != me)
                .cloned()
                .collect(),
        )
    });
    let Some(others) = others else { return failed("gone") };
    let peers = ask_all(&sim, member, &others).await;
    // A leader whose PostgreSQL is down asks who could lead; it has no position, and is behind everybody.
    let runs = sim.with(|world| {
        world
            .agent(member)
            .is_some_and(|agent| agent.instance.postmaster.is_some())
    });
    let own = status(&sim, member).await;
    if own.is_none() && runs {
        return failed("our own PostgreSQL does not answer");
    }
    Ok(Outcome::Polled(Poll {
        asked_at,
        answered_at: sim.clock(member),
        own_position: own.as_ref().map_or(Lsn(0), |own| own.wal.position()),
        own_timeline: own.and_then(|own| own.timeline),
        silent: others.len().saturating_sub(peers.len()),
        peers,
    }))
}

/// Asks all at once.
async fn ask_all(sim: &Shared, member: usize, others: &[MemberName]) -> Vec<Peer> {
    let mut asking: Vec<_> = others
        .iter()
        .map(|name| Box::pin(ask_one(sim, member, name.clone())))
        .map(|asked| (Some(asked), None))
        .collect();
    std::future::poll_fn(|context| {
        let mut waits = false;
        for (asked, answer) in &mut asking {
            let Some(future) = asked else { continue };
            match future.as_mut().poll(context) {
                std::task::Poll::Ready(peer) => {
                    *answer = Some(peer);
                    *asked = None;
                }
                std::task::Poll::Pending => waits = true,
            }
        }
        if waits {
            std::task::Poll::Pending
        } else {
            std::task::Poll::Ready(())
        }
    })
    .await;
    asking.into_iter().filter_map(|(_, answer)| answer.flatten()).collect()
}

async fn ask_one(sim: &Shared, member: usize, name: MemberName) -> Option<Peer> {
    let to = sim.with(|world| world.number(name.as_str()))?;
    let answer = ask_member(sim, member, to, POLL_MAX, async move |sim: Shared| {
        shown_status(&sim, to).await
    })
    .await?;
    let blind = sim.with(|world| world.is_planted(Planted::NoTimelineCheck));
    let peer = |server: &ServerStatus| Peer {
        name: name.clone(),
        primary: is_primary(server),
        position: Some(server.wal.position()),
        timeline: server.timeline.filter(|_| !blind),
        nofailover: false,
        failover_priority: 1,
    };
    Some(answer.as_ref().map_or_else(
        || Peer {
            name: name.clone(),
            primary: false,
            position: None,
            timeline: None,
            nofailover: false,
            failover_priority: 1,
        },
        peer,
    ))
}

/// Asks another cluster for its history: it does not answer.
pub(crate) async fn check_remote(sim: Shared) -> Done {
    sim.exec.sleep(SQL_MAX / 5).await;
    failed("the other cluster does not answer")
}

/// Asks the leader's server for its history, and compares.
pub(crate) async fn check_rejoin(sim: Shared, member: usize, leader: Epoch) -> Done {
    let Some(to) = sim.with(|world| world.number(leader.holder.as_str())) else {
        return failed("no such member");
    };
    let time = sim.with(|world| world.random.millis(2, 20));
    sim.exec.sleep(time).await;
    let reached = sim.with(|world| {
        let there = world.network.talks(Site::Member(member), Site::Member(to));
        let follows_another = world.agent(member)?.view.config.value.as_ref()?.is_standby_cluster();
        let run = world.server(to).run.as_ref().filter(|run| !run.hung)?;
        let tells = run.mode == Mode::Primary || (follows_another && run.mode == Mode::Standby);
        (there && tells).then_some(())
    });
    if reached.is_none() {
        sim.exec.sleep(SQL_MAX / 5).await;
        return failed("the leader does not answer");
    }
    let verdict = sim.with(|world| {
        let theirs = world.server(to).data.clone()?;
        let server = world.server(member);
        let Some(ours) = &server.data else {
            return Some(Rejoin::Diverged);
        };
        Some(judge(ours, server.run.as_ref().map(|run| run.replayed), &theirs))
    });
    verdict
        .map(|verdict| Outcome::Rejoin(leader, verdict))
        .ok_or_else(|| "no data".to_owned())
}

/// The agent's rule for who may follow.
fn judge(ours: &Data, replayed: Option<usize>, leader: &Data) -> Rejoin {
    let follows = if ours.standby_signal || ours.state == ControlState::InArchiveRecovery {
        let (timeline, position) = match replayed {
            Some(replayed) => (ours.timeline, lsn(replayed)),
            None => (ours.checkpoint.1, lsn(ours.checkpoint.0)),
        };
        if timeline == leader.timeline {
            ours.timeline != timeline || ours.history() == leader.history()
        } else {
            leader.end_of(timeline).is_some_and(|end| position <= lsn(end))
        }
    } else if ours.state == ControlState::ShutDown {
        leader
            .end_of(ours.checkpoint.1)
            .is_some_and(|end| ours.checkpoint.0 < end)
    } else {
        false
    };
    if follows { Rejoin::Waits } else { Rejoin::Diverged }
}

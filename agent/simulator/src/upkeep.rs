//! What a cycle does without deciding: publishing, and telling lease and keeper what they need.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use pgherd_agent::decide::published_role;
use pgherd_agent::failsafe;
use pgherd_agent::lease::core::Input;
use pgherd_agent::lease::{Resumed, Voucher};
use pgherd_agent::observation::{LeaseSeen, Observation, Postgres};
use pgherd_agent::record::{leader_status, published_state};
use pgherd_agent::status::WalStatus;
use pgherd_cluster::etcd::{Op, Txn};
use pgherd_cluster::key::Key;
use pgherd_cluster::name::Lsn;
use pgherd_cluster::record::{History, HistoryEntry, MemberRecord, Role};
use pgherd_cluster::view::Epoch;

use crate::act::etcd;
use crate::executor::Owner;
use crate::host::Request;
use crate::lease::{order, put_in};
use crate::postgres::pace;
use crate::world::Shared;

const SLACK: Duration = Duration::from_millis(100);

pub(crate) async fn upkeep(sim: &Shared, member: usize, seen: &Observation) {
    remember(sim, member);
    retime(sim, member, seen);
    let in_touch = sim.with(|world| world.agent(member).is_some_and(|agent| agent.in_touch));
    if in_touch {
        publish_member(sim, member, seen).await;
    }
    look_after_failsafe(sim, member, seen, in_touch).await;
    let Postgres::Running(server) = &seen.postgres else {
        return;
    };
    let (WalStatus::Primary { location }, LeaseSeen::Mine(epoch)) = (&server.wal, &seen.lease) else {
        return;
    };
    let proven = sim.with(|world| {
        world
            .agent(member)
            .is_some_and(|agent| agent.memory.proven.as_ref() == Some(epoch))
    });
    if !proven {
        return;
    }
    first_checkpoint(sim, member, epoch);
    if in_touch && seen.job.is_none() {
        publish_leader(sim, member, seen, *location).await;
    }
}

/// Tells the keeper what an agent after this one needs, when it has changed.
pub(crate) fn remember(sim: &Shared, member: usize) {
    let memo = sim.with(|world| {
        let agent = world.agent(member)?;
        let state = agent.core.state();
        let epoch = state.holding.as_ref().map(|held| held.epoch.clone());
        let memo = Resumed {
            lease: state.lease,
            lease_ttl: state.lease_ttl,
            term: state.holding.as_ref().map(|held| held.term),
            proven: epoch.is_some() && agent.memory.proven == epoch,
            epoch,
            armed_until: None,
        };
        (memo != agent.written.memo).then(|| {
            agent.written.memo = memo.clone();
            memo
        })
    });
    if let Some(memo) = memo {
        order(sim, member, Request::Remember(memo.to_memo()));
    }
}

fn retime(sim: &Shared, member: usize, seen: &Observation) {
    let timing = seen.view.timing();
    let changed = sim.with(|world| {
        let agent = world.agent(member)?;
        (agent.written.timing != Some(timing) && seen.view.config.value.is_some())
            .then(|| agent.written.timing = Some(timing))
    });
    if changed.is_some() {
        put_in(sim, member, Input::Retime(timing));
    }
}

fn record_of(sim: &Shared, member: usize, seen: &Observation) -> Option<MemberRecord> {
    let name = seen.me.as_str();
    let mut record = MemberRecord::new(
        format!("postgres://{name}:5432/postgres"),
        format!("http://{name}:8008/patroni"),
    );
    sim.with(|world| {
        let memory = &world.agent(member)?.memory;
        record.state = published_state(seen, memory);
        record.role = published_role(seen, memory);
        if record.role == Role::Primary && memory.proven != memory.checkpointed {
            record.checkpoint_after_promote = Some(false);
        }
        Some(())
    })?;
    record.version = Some(pgherd_cluster::PATRONI_VERSION.to_owned());
    record.pgherd = Some(pgherd_cluster::VERSION.to_owned());
    record.pause = seen.is_paused().then_some(true);
    if let Postgres::Running(server) = &seen.postgres {
        record.timeline = server.timeline;
        record.replication_state.clone_from(&server.replication_state);
        record.xlog_location = Some(server.wal.position());
    }
    Some(record)
}

async fn publish_member(sim: &Shared, member: usize, seen: &Observation) {
    let Some(record) = record_of(sim, member, seen) else {
        return;
    };
    let now = sim.clock(member);
    let wanted = sim.with(|world| {
        let key = world.key(&Key::Member(seen.me.clone()));
        let agent = world.agent(member)?;
        let lease = agent.core.state().lease?;
        if let Some((last, last_lease, written_at)) = &agent.written.record
            && *last_lease == lease
            && seen.view.members.contains_key(&seen.me)
        {
            let still = |record: &MemberRecord| MemberRecord {
                xlog_location: None,
                ..record.clone()
            };
            let only_moved = still(last) == still(&record);
            if *last == record || (only_moved && now.since(*written_at) + SLACK < agent.timing().loop_wait()) {
                return None;
            }
        }
        Some((key, lease))
    });
    let Some((key, lease)) = wanted else { return };
    let Ok(value) = serde_json::to_string(&record) else {
        return;
    };
    if etcd(sim, member, Txn::new().then(Op::Put { key, value, lease }))
        .await
        .is_ok()
    {
        sim.with(|world| {
            if let Some(agent) = world.agent(member) {
                agent.written.record = Some((record, lease, now));
            }
        });
    }
}

/// The first checkpoint of a holding; members that rewind wait for it.
fn first_checkpoint(sim: &Shared, member: usize, epoch: &Epoch) {
    let due = sim.with(|world| {
        let agent = world.agent(member)?;
        (agent.memory.checkpointed.as_ref() != Some(epoch) && agent.checkpoint.is_none()).then_some(())
    });
    if due.is_none() {
        return;
    }
    let (inner, epoch) = (Rc::clone(sim), epoch.clone());
    let task = sim.spawn(Owner::Agent(member), async move {
        let time = inner.with(|world| pace::checkpoint(&mut world.random));
        inner.exec.sleep(time).await;
        inner.with(|world| {
            let runs = world.server(member).writable_run().is_some();
            let record = world.record();
            if let (true, Some(data)) = (runs, &mut world.server(member).data) {
                data.write_checkpoint(record);
            }
            if let Some(agent) = world.agent(member) {
                agent.checkpoint = None;
                if runs {
                    agent.memory.checkpointed = Some(epoch);
                }
            }
        });
        inner.notify(crate::executor::Topic::Postgres(member));
        inner.notify(crate::executor::Topic::Agent(member));
    });
    sim.with(|world| {
        if let Some(agent) = world.agent(member) {
            agent.checkpoint = Some(task);
        }
    });
}

async fn publish_leader(sim: &Shared, member: usize, seen: &Observation, position: Lsn) {
    let now = sim.clock(member);
    let written = sim.with(|world| {
        let key = world.key(&Key::Status);
        let agent = world.agent(member)?;
        let last = agent.written.status.clone();
        if last
            .as_ref()
            .is_some_and(|(_, at)| now.since(*at) + SLACK < agent.timing().loop_wait())
        {
            return None;
        }
        let slots = BTreeMap::new();
        let status = leader_status(
            &seen.me,
            position,
            slots,
            &seen.view,
            &mut agent.written.slots_seen,
            now,
        );
        let changed = last.is_none_or(|(last, _)| last != status);
        Some((changed, key, status))
    });
    let Some((changed, key, status)) = written else { return };
    if changed {
        let value = serde_json::to_string(&status).unwrap_or_default();
        if etcd(sim, member, Txn::new().then(Op::Put { key, value, lease: 0 }))
            .await
            .is_err()
        {
            return;
        }
    }
    sim.with(|world| {
        if let Some(agent) = world.agent(member) {
            agent.written.status = Some((status, now));
        }
    });
    publish_history(sim, member, seen).await;
}

async fn publish_history(sim: &Shared, member: usize, seen: &Observation) {
    let Postgres::Running(server) = &seen.postgres else {
        return;
    };
    let Some(timeline) = server.timeline else { return };
    let known = seen.view.history.as_ref();
    if known.map_or(timeline.0 == 1, |history| history.timeline() == timeline) {
        return;
    }
    let (key, ended) = sim.with(|world| {
        let ended = world.server(member).data.as_ref().map(crate::postgres::Data::history);
        (world.key(&Key::History), ended.unwrap_or_default())
    });
    let entry = |(timeline, lsn)| HistoryEntry {
        timeline,
        lsn,
        reason: "no recovery target specified".to_owned(),
        timestamp: None,
        new_leader: None,
    };
    let value = History(ended.into_iter().map(entry).collect()).to_json().to_string();
    // When it fails the next cycle tries again.
    let _ = etcd(sim, member, Txn::new().then(Op::Put { key, value, lease: 0 })).await;
}

async fn look_after_failsafe(sim: &Shared, member: usize, seen: &Observation, in_touch: bool) {
    let config = seen.view.config.value.clone().unwrap_or_default();
    let LeaseSeen::Mine(epoch) = &seen.lease else {
        sim.with(|world| {
            if let Some(agent) = world.agent(member) {
                (agent.written.failsafe, agent.written.failsafe_sent) = (None, None);
            }
        });
        return;
    };
    if !config.is_failsafe() {
        return tell_failsafe(sim, member, None);
    }
    if !in_touch {
        return;
    }
    let own_url = format!("http://{}:8008/patroni", seen.me);
    let stands = failsafe::stands(&seen.view);
    let wanted = failsafe::wanted(&seen.view, &seen.me, &own_url);
    let may_stand = sim.with(|world| {
        let agent = world.agent(member);
        let sent = agent.as_ref().and_then(|agent| agent.written.failsafe_sent.as_ref());
        failsafe::may_stand(&seen.view, sent)
    });
    let proven = sim.with(|world| {
        world
            .agent(member)
            .is_some_and(|agent| agent.memory.proven.as_ref() == Some(epoch) && !agent.core.state().rests_on_vouches())
    });
    if wanted == stands || !proven {
        return tell_failsafe(sim, member, Some(failsafe::vouchers(&may_stand)));
    }
    let list = failsafe::united(&may_stand, &wanted);
    tell_failsafe(sim, member, Some(failsafe::vouchers(&list)));
    sim.with(|world| {
        if let Some(agent) = world.agent(member) {
            let compared = seen.view.failsafe_revision;
            agent.written.failsafe_sent = Some(failsafe::Sent { compared, list });
        }
    });
    let txn = sim.with(|world| failsafe::write(&world.keys, &seen.view, epoch, &wanted));
    // Whatever becomes of it, either list may stand, and both were told.
    let _ = etcd(sim, member, txn).await;
}

fn tell_failsafe(sim: &Shared, member: usize, list: Option<Vec<Voucher>>) {
    let changed = sim.with(|world| {
        let agent = world.agent(member)?;
        let told = Some((agent.memory.lease_term, list.clone()));
        (agent.written.failsafe != told).then(|| agent.written.failsafe = told)
    });
    if changed.is_some() {
        put_in(sim, member, Input::Failsafe(list));
    }
}

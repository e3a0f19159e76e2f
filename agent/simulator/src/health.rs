//! The probe of PostgreSQL beside the loop: whether it still answers who connects anew. Disks that fail are not modelled.

use std::time::Duration;

use pgherd_agent::health::Health;
use pgherd_cluster::clock::Boottime;

use crate::executor::{Owner, Topic};
use crate::postgres::Mode;
use crate::world::Shared;

/// One probe may take this long before it counts as not answered.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// What one probe found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Works,
    Fails,
    Unknown,
}

fn fold(since: Option<Boottime>, found: Found, now: Boottime) -> Option<Boottime> {
    match found {
        Found::Works | Found::Unknown => None,
        Found::Fails => since.or(Some(now)),
    }
}

/// Probes once a period for as long as the agent lives.
pub(crate) async fn probe(sim: Shared, member: usize) {
    loop {
        let Some(period) = sim.with(|world| world.agent(member).map(|agent| agent.timing().loop_wait())) else {
            return;
        };
        sim.exec.sleep(period).await;
        let began = sim.clock(member);
        let Some(postmaster) = sim.with(|world| world.agent(member).map(|agent| agent.instance.postmaster)) else {
            return;
        };
        let server = if postmaster.is_some() {
            probe_server(&sim, member).await
        } else {
            Found::Unknown
        };
        sim.with(|world| {
            let Some(agent) = world.agent(member) else { return };
            let hung = agent.health.server_hangs.filter(|(pid, _)| Some(*pid) == postmaster);
            agent.health = Health {
                server_hangs: postmaster.zip(fold(hung.map(|(_, since)| since), server, began)),
                disk_fails_since: None,
            };
        });
    }
}

async fn probe_server(sim: &Shared, member: usize) -> Found {
    let answers = || {
        let hung = sim.exec.is_frozen(Owner::Postgres(member))
            || sim.with(|world| world.server(member).run.as_ref().is_some_and(|run| run.hung));
        (!hung).then_some(())
    };
    let until = sim.now() + ANSWER_MAX;
    if sim
        .exec
        .wait_for(Topic::Postgres(member), until, answers)
        .await
        .is_none()
    {
        return Found::Fails;
    }
    match sim.with(|world| world.server(member).mode()) {
        Some(Mode::Standby | Mode::Promoting | Mode::Primary) => Found::Works,
        Some(Mode::Starting { .. } | Mode::Stopping) | None => Found::Unknown,
    }
}

//! Clients that know nothing of warrants: one beside each member writes to whatever takes its writes.

use std::time::Duration;

use crate::executor::Topic;
use crate::world::Shared;

/// How long a client waits for a commit before it gives the connection up.
const PATIENCE: Duration = Duration::from_secs(20);

/// Writes for ever, a commit at a time, each with a number of its own.
pub(crate) async fn writer(sim: Shared, member: usize) {
    loop {
        let pause = sim.with(|world| world.random.millis(30, 120));
        sim.exec.sleep(pause).await;
        let Some(run) = sim.with(|world| world.server(member).writable_run()) else {
            continue;
        };
        while let Written::Acknowledged = write(&sim, member, run).await {
            let pause = sim.with(|world| world.random.millis(40, 160));
            sim.exec.sleep(pause).await;
        }
    }
}

/// What else a primary writes, and nobody waits for: vacuum, checkpoints, hints.
pub(crate) async fn noise(sim: Shared, member: usize) {
    loop {
        let pause = sim.with(|world| world.random.millis(100, 500));
        sim.exec.sleep(pause).await;
        let wrote = sim.with(|world| {
            world.server(member).writable_run()?;
            let id = world.record();
            world.server(member).data.as_mut().map(|data| data.append(id))
        });
        if wrote.is_some() {
            sim.notify(Topic::Postgres(member));
        }
    }
}

enum Written {
    Acknowledged,
    Unknown,
}

async fn write(sim: &Shared, member: usize, run: u64) -> Written {
    let now = sim.now();
    let accepted = sim.with(|world| {
        if !world.host(member).server.session_lives(run) || is_hung(world, member) {
            return None;
        }
        let id = world.record();
        let position = world.server(member).data.as_mut()?.append(id);
        world.judge_write(member, id, now, "accepts a write");
        Some((id, position))
    });
    let Some((id, position)) = accepted else {
        return Written::Unknown;
    };
    sim.notify(Topic::Postgres(member));
    let flush = sim.with(|world| world.random.millis(0, 2));
    sim.exec.sleep(flush).await;
    let returns = || {
        sim.with(|world| {
            let names = world.names.clone();
            let server = &world.host(member).server;
            if !server.session_lives(run) {
                return Some(false);
            }
            (server.commit_may_return(position, &names) && !is_hung(world, member)).then_some(true)
        })
    };
    let until = sim.now() + PATIENCE;
    let returned = sim.exec.wait_for(Topic::Postgres(member), until, returns).await;
    if returned != Some(true) {
        return Written::Unknown;
    }
    let now = sim.now();
    sim.with(|world| world.judge_acknowledgement(member, run, id, now));
    Written::Acknowledged
}

fn is_hung(world: &crate::world::World, member: usize) -> bool {
    let run = world.hosts.get(member).and_then(|host| host.server.run.as_ref());
    run.is_some_and(|run| run.hung)
}

//! The task that keeps an agent's view: a list, then a watch from there, and a list again after every doubt.

use std::sync::Arc;
use std::time::Duration;

use pgherd_cluster::etcd::StoreError;
use pgherd_cluster::view::View;

use crate::executor::Topic;
use crate::network::Site;
use crate::rpc::{Budget, Client, Question, Reply};
use crate::store::Commit;
use crate::time::Time;
use crate::world::{Shared, World};

const HEARTBEAT: Duration = Duration::from_secs(1);
const SILENCE_MAX: Duration = Duration::from_millis(2500);
const CALL_MAX: Duration = Duration::from_millis(1500);
const BACKOFF_MIN: Duration = Duration::from_millis(50);

/// Runs for ever.
pub(crate) async fn run(sim: Shared, member: usize) {
    let node = sim.with(|world| world.random.index(crate::store::NODES));
    let mut client = Client::new(member, node);
    let mut backoff = BACKOFF_MIN;
    loop {
        let followed = follow(&sim, member, &mut client).await;
        if followed {
            backoff = BACKOFF_MIN;
        }
        set_health(&sim, member, false);
        client.rotate();
        sim.exec.sleep(backoff).await;
        backoff = (backoff * 2).min(HEARTBEAT);
    }
}

fn set_health(sim: &Shared, member: usize, in_touch: bool) {
    sim.with(|world| {
        if let Some(agent) = world.agent(member) {
            agent.in_touch = in_touch;
        }
    });
    sim.notify(Topic::Agent(member));
}

fn publish(sim: &Shared, member: usize, view: View) {
    sim.with(|world| {
        if let Some(agent) = world.agent(member) {
            agent.view = Arc::new(view);
        }
    });
    sim.notify(Topic::Agent(member));
}

/// What a watch hears at this moment: whether its node serves it, and what is new. Any error ends it.
fn hear(
    world: &World,
    member: usize,
    node: usize,
    (era, told): (u64, i64),
    now: Time,
) -> Result<(bool, Vec<Commit>), StoreError> {
    if world.store.is_refusing(node) {
        let what = "the connection was reset".to_owned();
        return Err(StoreError::Unreachable { what });
    }
    let up = world.store.is_up(node) && world.network.talks(Site::Member(member), Site::Etcd(node));
    let served = up && world.store.serves(node, &world.network);
    let news = if up {
        world.store.news(node, era, told, now)?
    } else {
        Vec::new()
    };
    Ok((served, news))
}

/// Until the first doubt. Says whether the watch was open at all.
async fn follow(sim: &Shared, member: usize, client: &mut Client) -> bool {
    let budget = Budget {
        total: CALL_MAX,
        attempt: CALL_MAX / 3,
    };
    let era_before = sim.with(|world| world.store.era());
    let Ok(Reply::Entries(snapshot)) = client.ask(sim, Question::List, budget).await else {
        return false;
    };
    let (scope, keys) = sim.with(|world| (world.scope.clone(), world.keys.clone()));
    let mut told = snapshot.revision;
    publish(sim, member, View::from_entries(scope, &keys, snapshot.entries, told));
    // A watch that is opened at a restored etcd from a list of the one before it is closed by the list that follows.
    let era = era_before;
    set_health(sim, member, true);
    let node = client.node;
    let mut heard_at = sim.now();
    loop {
        let now = sim.now();
        let heard = sim.with(|world| hear(world, member, node, (era, told), now));
        let Ok((served, news)) = heard else { return true };
        if served {
            heard_at = now;
        }
        if now.since(heard_at) > SILENCE_MAX {
            return true;
        }
        if let Some(last) = news.last() {
            let revision = last.revision;
            let transit = sim.with(|world| {
                world
                    .network
                    .transit(Site::Etcd(node), Site::Member(member), &mut world.random)
            });
            let Some(delay) = transit else {
                sim.exec.sleep(Duration::from_millis(100)).await; // The stream's bytes are sent again.
                continue;
            };
            sim.exec.sleep(delay).await;
            sim.point();
            let changes = news.into_iter().flat_map(|commit| commit.changes);
            let folded = sim.with(|world| {
                world
                    .agent(member)
                    .map(|agent| agent.view.with(&keys, changes, revision))
            });
            let Some(view) = folded else { return true };
            told = revision;
            publish(sim, member, view);
            continue;
        }
        let lagging = sim.with(|world| world.store.lags(node));
        let pause = if lagging {
            Duration::from_millis(50)
        } else {
            HEARTBEAT / 2
        };
        sim.exec.changed(Topic::Store, now + pause).await;
    }
}

//! What goes on by itself: etcd's own clockwork, the kernel, PostgreSQL's processes and its streams.

use std::rc::Rc;
use std::time::Duration;

use pgherd_cluster::key::Key;

use crate::agent;
use crate::executor::{Owner, Topic};
use crate::host::{Deed, Keeper, Word, guard, succeed};
use crate::network::Site;
use crate::postgres::{Mode, Run, Sender, pace};
use crate::time::Time;
use crate::world::Shared;

/// How often a standby that does not stream tries to.
const RECEIVER_RETRY: Duration = Duration::from_millis(200);
/// After this long without a word a stream is given up by its receiver.
const RECEIVER_SILENCE: Duration = Duration::from_secs(5);

/// How often a copy of etcd is kept.
const BACKUP_EVERY: Duration = Duration::from_millis(700);

/// Starts all that goes on from the beginning.
pub(crate) fn begin(sim: &Shared) {
    let members = sim.with(|world| world.hosts.len());
    sim.spawn(Owner::World, etcd(Rc::clone(sim)));
    for member in 0..members {
        start_keeper(sim, member);
        sim.spawn(Owner::Postgres(member), receiver(Rc::clone(sim), member));
        sim.spawn(Owner::Postgres(member), crate::client::writer(Rc::clone(sim), member));
        sim.spawn(Owner::Postgres(member), crate::client::noise(Rc::clone(sim), member));
    }
}

async fn etcd(sim: Shared) {
    let mut backup_due = Time(0);
    loop {
        sim.exec.sleep(Duration::from_millis(50)).await;
        let now = sim.now();
        let changed = sim.with(|world| {
            // A copy from before the cluster was made is no backup of it.
            let made = world.store.get(&world.key(&Key::Initialize));
            let made = made.is_some_and(|entry| !entry.value.is_empty());
            if made && now >= backup_due && world.store.is_serving(&world.network) {
                world.store.back_up(now);
                backup_due = now + BACKUP_EVERY;
            }
            world.store.tick(now, &world.network, &mut world.random)
        });
        if changed {
            sim.notify(Topic::Store);
        }
    }
}

/// The service manager starts a keeper; it waits until nothing of the last one's PostgreSQL is left.
pub(crate) fn start_keeper(sim: &Shared, member: usize) {
    let now = sim.now();
    sim.with(|world| {
        let forgiving = world.is_planted(crate::run::Planted::PassedDeadlineExtended);
        let host = world.host(member);
        let mut keeper = Keeper::new(host.memo.clone());
        keeper.forgiving = forgiving;
        keeper.agent_due = Some(now);
        host.keeper = Some(keeper);
        host.keeper_since = now;
        host.word = Word::Disarmed;
    });
    sim.spawn(Owner::Keeper(member), keeper_loop(Rc::clone(sim), member));
    start_sentinel(sim, member);
}

fn start_sentinel(sim: &Shared, member: usize) {
    sim.spawn(Owner::Sentinel(member), sentinel_loop(Rc::clone(sim), member));
}

/// The sentinel is killed; its keeper starts another. Keeper and sentinel of one machine do not fail together: nothing would
/// be left there that could fence.
pub(crate) fn kill_sentinel(sim: &Shared, member: usize) {
    if sim.exec.is_frozen(Owner::Keeper(member)) {
        return;
    }
    let now = sim.now();
    let due = sim.with(|world| {
        let soon = now + world.random.millis(1, 20);
        world.host(member).keeper.as_mut()?.sentinel_due = Some(soon);
        Some(())
    });
    if due.is_some() {
        sim.exec.kill_owner(Owner::Sentinel(member));
        sim.notify(Topic::Keeper(member));
    }
}

/// Before something happens to the keeper its sentinel is there.
pub(crate) fn see_to_sentinel(sim: &Shared, member: usize) {
    let due = sim.with(|world| world.host(member).keeper.as_mut()?.sentinel_due.take());
    if due.is_some() {
        start_sentinel(sim, member);
    }
}

async fn keeper_loop(sim: Shared, member: usize) {
    loop {
        let now = sim.now();
        let turned = sim.with(|world| {
            let mut run = world.next_run;
            let host = world.host(member);
            let keeper = host.keeper.as_mut()?;
            let clock = pgherd_keeper::clock::Boottime::from_nanos(host.clocks.boottime(now).as_nanos());
            let deeds = keeper.turn(&mut host.server, clock, now, &mut run);
            host.word = keeper.word;
            host.memo.clone_from(&keeper.memo);
            let wake_at = keeper.wake_at(host.clocks, now);
            let told = !keeper.outbox.is_empty();
            world.next_run = run;
            Some((deeds, wake_at, told))
        });
        let Some((deeds, wake_at, told)) = turned else { return };
        if told {
            sim.notify(Topic::Reports(member));
            sim.notify(Topic::Postgres(member));
        }
        for deed in deeds {
            perform(&sim, member, deed);
        }
        // Woken at a moment that has come, the loop looks again a moment later, not for ever in the same.
        let wake_at = wake_at.max(now + Duration::from_micros(50));
        sim.exec.changed(Topic::Keeper(member), wake_at).await;
    }
}

fn perform(sim: &Shared, member: usize, deed: Deed) {
    sim.say(member, || format!("keeper: {deed:?}"));
    let run = sim.with(|world| world.server(member).run.as_ref().map(|run| run.id));
    let inner = Rc::clone(sim);
    match (deed, run) {
        (Deed::StartAgent, _) => agent::start(sim, member),
        (Deed::StartSentinel, _) => start_sentinel(sim, member),
        (Deed::Started(id), _) => {
            sim.spawn(Owner::Postgres(member), come_up(inner, member, id));
        }
        (_, None) => {}
        (Deed::Quit, Some(id)) => {
            sim.spawn(Owner::Postgres(member), quit(inner, member, id));
        }
        (Deed::StopFast, Some(id)) => {
            sim.spawn(Owner::Postgres(member), stop_fast(inner, member, id));
        }
        (Deed::Reload, Some(id)) => {
            sim.spawn(Owner::Postgres(member), reload(inner, member, id));
        }
        (Deed::Promote, Some(id)) => {
            sim.spawn(Owner::Postgres(member), promote(inner, member, id));
        }
    }
}

/// Says to all who look that a member's PostgreSQL is not what it was.
pub(crate) fn server_changed(sim: &Shared, member: usize) {
    sim.notify(Topic::Postgres(member));
    sim.notify(Topic::Keeper(member));
}

async fn come_up(sim: Shared, member: usize, id: u64) {
    let time = sim.with(|world| pace::start(&mut world.random));
    sim.exec.sleep(time).await;
    let now = sim.now();
    sim.with(|world| {
        let record = world.record();
        if world.server(member).come_up(id, record) {
            world.judge_loss(member, now, "starts as primary");
        }
        if let Some(run) = &mut world.server(member).run {
            run.up_since.get_or_insert(now);
        }
    });
    server_changed(&sim, member);
}

async fn quit(sim: Shared, member: usize, id: u64) {
    let time = sim.with(|world| world.random.millis(3, 80));
    sim.exec.sleep(time).await;
    let now = sim.now();
    sim.with(|world| {
        let server = world.server(member);
        let answers = server.run.as_ref().is_some_and(|run| run.id == id && !run.hung);
        if answers && now >= server.stuck_until {
            server.gone();
        }
    });
    server_changed(&sim, member);
}

async fn stop_fast(sim: Shared, member: usize, id: u64) {
    let was_primary = sim.with(|world| {
        let run = world
            .server(member)
            .run
            .as_mut()
            .filter(|run| run.id == id && !run.hung)?;
        let was_primary = run.mode == Mode::Primary;
        // One that is starting stops as soon as it has come up; here it is as good as down.
        run.mode = Mode::Stopping;
        run.streaming = false;
        Some(was_primary)
    });
    let Some(was_primary) = was_primary else { return };
    server_changed(&sim, member);
    let time = sim.with(|world| world.random.millis(20, 150));
    sim.exec.sleep(time).await;
    sim.with(|world| {
        let record = world.record();
        world.server(member).write_shutdown(id, record, was_primary);
    });
    server_changed(&sim, member);
    // Walsenders go when everything has arrived; one whose standby is silent is given up.
    let until = sim.now() + Duration::from_secs(3);
    let caught_up = || {
        sim.with(|world| {
            let server = world.server(member);
            let end = server.data.as_ref().map_or(0, |data| data.log.len());
            let run = server.run.as_ref().filter(|run| run.id == id)?;
            Some(run.senders.values().all(|sender| sender.flushed >= end)).filter(|all| *all)
        })
    };
    sim.exec.wait_for(Topic::Postgres(member), until, caught_up).await;
    let exit = sim.with(|world| world.random.millis(1, 20));
    sim.exec.sleep(exit).await;
    let now = sim.now();
    sim.with(|world| {
        let server = world.server(member);
        if server.run.as_ref().is_some_and(|run| run.id == id) && now >= server.stuck_until {
            server.gone();
        }
    });
    server_changed(&sim, member);
}

async fn reload(sim: Shared, member: usize, id: u64) {
    let time = sim.with(|world| world.random.millis(1, 8));
    sim.exec.sleep(time).await;
    let late = sim.with(|world| {
        let server = world.server(member);
        let upstream = server.upstream_setting;
        let run = server.run.as_mut().filter(|run| run.id == id)?;
        if run.mode == Mode::Standby && run.upstream != upstream {
            run.upstream = upstream;
            run.streaming = false;
        }
        server.reload().then(|| pace::checkpointer(&mut world.random))
    });
    server_changed(&sim, member);
    let Some(late) = late else { return };
    sim.exec.sleep(late).await;
    sim.with(|world| world.server(member).reload_checkpointer(id));
    server_changed(&sim, member);
}

async fn promote(sim: Shared, member: usize, id: u64) {
    let begun = sim.with(|world| {
        let run = world.server(member).run.as_mut();
        let run = run.filter(|run| run.id == id && run.mode == Mode::Standby && !run.hung)?;
        run.mode = Mode::Promoting;
        Some(())
    });
    if begun.is_none() {
        return;
    }
    let time = sim.with(|world| pace::promote(&mut world.random));
    sim.exec.sleep(time).await;
    let now = sim.now();
    sim.with(|world| {
        let record = world.record();
        // What a dead process was about to do it does not do any more.
        if world.server(member).become_primary(id, record) {
            world.judge_promotion(member, now);
        }
    });
    sim.say(member, || "postgres: promoted".to_owned());
    server_changed(&sim, member);
}

async fn sentinel_loop(sim: Shared, member: usize) {
    loop {
        let now = sim.now();
        let again = sim.with(|world| {
            let host = world.host(member);
            let clock = pgherd_keeper::clock::Boottime::from_nanos(host.clocks.boottime(now).as_nanos());
            match &host.keeper {
                Some(_) => Some(guard(host.word, &mut host.server, clock, now)),
                None => succeed(host.word, &mut host.server, now),
            }
        });
        server_changed(&sim, member);
        let Some(again) = again else { return };
        // A dead keeper is noticed at once.
        let until = sim.now() + again;
        let had_keeper = sim.with(|world| world.host(member).keeper.is_some());
        let died = || sim.with(|world| (had_keeper && world.host(member).keeper.is_none()).then_some(()));
        sim.exec.wait_for(Topic::Keeper(member), until, died).await;
    }
}

/// Postmaster dead, backends alive: they notice some time.
pub(crate) fn kill_postmaster(sim: &Shared, member: usize) {
    let now = sim.now();
    let orphaned = sim.with(|world| {
        let until = now + pace::orphans(&mut world.random);
        world.server(member).lose_postmaster(until).then_some(until)
    });
    server_changed(sim, member);
    let Some(until) = orphaned else { return };
    let inner = Rc::clone(sim);
    sim.spawn(Owner::Postgres(member), async move {
        inner.exec.sleep_until(until).await;
        inner.with(|world| {
            let server = world.server(member);
            server.orphans = server.orphans.filter(|orphans| orphans.until > until);
        });
        server_changed(&inner, member);
    });
}

/// A standby's walreceiver, or what starts one.
async fn receiver(sim: Shared, member: usize) {
    loop {
        let upstream = sim.with(|world| may_stream(world, member));
        let Some(upstream) = upstream else {
            sim.with(|world| stop_streaming(world, member));
            sim.exec
                .changed(Topic::Postgres(member), sim.now() + RECEIVER_RETRY)
                .await;
            // A change of our own does not make the other side ready: the retry interval passes all the same.
            let rest = sim.with(|world| world.random.millis(20, 200));
            sim.exec.sleep(rest).await;
            continue;
        };
        let connecting = sim.with(|world| world.random.millis(5, 40));
        sim.exec.sleep(connecting).await;
        stream(&sim, member, upstream).await;
        sim.with(|world| disconnect(world, member, upstream));
        sim.notify(Topic::Postgres(upstream));
    }
}

/// Whom a member could stream from now.
fn may_stream(world: &mut crate::world::World, member: usize) -> Option<usize> {
    let run = world.host(member).server.run.as_ref()?;
    let upstream = run.upstream.filter(|upstream| *upstream != member)?;
    if run.hung || !matches!(run.mode, Mode::Standby | Mode::Starting { standby: true }) {
        return None;
    }
    let reached = world.network.talks(Site::Member(member), Site::Member(upstream));
    let (here, there) = (world.hosts.get(member)?, world.hosts.get(upstream)?);
    let up = there.server.run.as_ref()?;
    let serves = matches!(up.mode, Mode::Primary | Mode::Standby) && !up.hung && there.powered;
    let fits = here.server.data.as_ref()?.may_follow(there.server.data.as_ref()?);
    (reached && serves && fits).then_some(upstream)
}

fn stop_streaming(world: &mut crate::world::World, member: usize) {
    if let Some(run) = &mut world.server(member).run {
        run.streaming = false;
    }
}

fn disconnect(world: &mut crate::world::World, member: usize, upstream: usize) {
    stop_streaming(world, member);
    if let Some(run) = &mut world.server(upstream).run {
        run.senders.remove(&member);
    }
}

/// One connection, until it ends.
async fn stream(sim: &Shared, member: usize, upstream: usize) {
    let ids = sim.with(|world| {
        let own = world.server(member).run.as_ref().map(|run| run.id)?;
        Some((own, world.server(upstream).run.as_ref().map(|run| run.id)?))
    });
    let Some((own, other)) = ids else { return };
    let mut heard_at = sim.now();
    loop {
        let stands = sim.with(|world| stream_stands(world, (member, own), (upstream, other)));
        if !stands || sim.now().since(heard_at) > RECEIVER_SILENCE {
            return;
        }
        if sim.exec.is_frozen(Owner::Postgres(upstream)) {
            sim.exec.sleep(Duration::from_millis(50)).await;
            continue;
        }
        let limit = sim.with(|world| world.server(upstream).data.as_ref().map_or(0, |data| data.log.len()));
        let there = sim.with(|world| {
            let (from, to) = (Site::Member(upstream), Site::Member(member));
            world.network.transit(from, to, &mut world.random)
        });
        let Some(delay) = there else {
            sim.exec.sleep(Duration::from_millis(100)).await; // Sent again.
            continue;
        };
        sim.exec.sleep(delay).await;
        heard_at = sim.now();
        if !sim.with(|world| take_over(world, member, upstream, own, limit)) {
            return;
        }
        sim.notify(Topic::Postgres(member));
        acknowledge(sim, member, upstream, other, limit).await;
        let idle = || sim.with(|world| stream_moves(world, (member, own), (upstream, other), limit).then_some(()));
        let until = sim.now() + Duration::from_millis(500);
        sim.exec.wait_for(Topic::Postgres(upstream), until, idle).await;
    }
}

/// Whether both ends of a stream are still the postmasters that made it, and want it.
fn stream_stands(world: &mut crate::world::World, here: (usize, u64), there: (usize, u64)) -> bool {
    let answers = |run: &&Run, id: u64| run.id == id && !run.hung;
    let theirs = world.server(there.0).run.as_ref().filter(|run| answers(run, there.1));
    let serving = theirs.is_some_and(|run| matches!(run.mode, Mode::Primary | Mode::Standby | Mode::Stopping));
    let ours = world.server(here.0).run.as_ref().filter(|run| answers(run, here.1));
    let wanted = ours.is_some_and(|run| {
        matches!(run.mode, Mode::Standby | Mode::Starting { standby: true }) && run.upstream == Some(there.0)
    });
    serving && wanted
}

/// Whether there is more than `limit` records to stream, or one of the ends has changed.
fn stream_moves(world: &mut crate::world::World, here: (usize, u64), there: (usize, u64), limit: usize) -> bool {
    let upstream = world.server(there.0);
    let more = upstream.data.as_ref().is_some_and(|data| data.log.len() > limit);
    let over = upstream.run.as_ref().is_none_or(|run| run.id != there.1);
    let ours = world.server(here.0).run.as_ref();
    let left = ours.is_none_or(|run| run.id != here.1 || run.mode == Mode::Promoting || run.upstream != Some(there.0));
    more || over || left
}

fn take_over(world: &mut crate::world::World, member: usize, upstream: usize, own: u64, limit: usize) -> bool {
    // A machine that went down and came up again has another log by now, perhaps.
    let Ok([ours, theirs]) = world.hosts.get_disjoint_mut([member, upstream]) else {
        return false;
    };
    let Some(theirs) = &theirs.server.data else {
        return false;
    };
    let (Some(run), Some(data)) = (&mut ours.server.run, &mut ours.server.data) else {
        return false;
    };
    if run.id != own
        || !matches!(run.mode, Mode::Standby | Mode::Starting { standby: true })
        || !data.may_follow(theirs)
    {
        return false;
    }
    data.receive(theirs, limit);
    run.replayed = data.log.len();
    run.streaming = true;
    true
}

async fn acknowledge(sim: &Shared, member: usize, upstream: usize, other: u64, flushed: usize) {
    let back = sim.with(|world| {
        let (from, to) = (Site::Member(member), Site::Member(upstream));
        world.network.transit(from, to, &mut world.random)
    });
    let Some(delay) = back else { return };
    sim.exec.sleep(delay).await;
    sim.with(|world| {
        if let Some(run) = world.server(upstream).run.as_mut().filter(|run| run.id == other) {
            run.senders.insert(member, Sender { flushed });
        }
    });
    sim.notify(Topic::Postgres(upstream));
}

/// The machine loses its power, and all that ran on it.
pub(crate) fn power_off(sim: &Shared, member: usize) {
    kill_keeper(sim, member);
    sim.exec.kill_owner(Owner::Sentinel(member));
    sim.exec.unfreeze(Owner::Sentinel(member));
    sim.with(|world| {
        let host = world.host(member);
        host.powered = false;
        host.memo.clear();
        host.word = Word::Disarmed;
        host.server.stuck_until = Time(0);
        host.server.kill_all(Time(0));
    });
    server_changed(sim, member);
}

/// The machine starts again.
pub(crate) fn power_on(sim: &Shared, member: usize) {
    let now = sim.now();
    let started = sim.with(|world| {
        let host = world.host(member);
        let was_off = !std::mem::replace(&mut host.powered, true);
        if was_off {
            host.clocks.reboot(now);
        }
        was_off && !host.service_stopped
    });
    if started {
        start_keeper(sim, member);
    }
}

/// The keeper is killed; its agent goes with it.
pub(crate) fn kill_keeper(sim: &Shared, member: usize) {
    see_to_sentinel(sim, member);
    sim.exec.kill_owner(Owner::Keeper(member));
    sim.exec.unfreeze(Owner::Keeper(member));
    agent::kill(sim, member);
    sim.with(|world| {
        let host = world.host(member);
        host.keeper = None;
        if host.word == Word::Paused {
            host.left_in_pause = host.server.run.as_ref().map(|run| run.id);
        }
    });
    server_changed(sim, member);
}

/// The service manager starts a dead keeper again, once its sentinel has done its work.
pub(crate) async fn revive_keeper(sim: Shared, member: usize) {
    let time = sim.with(|world| world.random.millis(200, 2000));
    sim.exec.sleep(time).await;
    let until = sim.now() + Duration::from_secs(3);
    let quiet = || {
        sim.with(|world| {
            let host = world.host(member);
            (host.word == Word::Paused || !host.server.is_left()).then_some(())
        })
    };
    sim.exec.wait_for(Topic::Postgres(member), until, quiet).await;
    let dead = sim.with(|world| {
        let host = world.host(member);
        host.keeper.is_none() && host.powered && !host.service_stopped
    });
    if dead {
        sim.exec.kill_owner(Owner::Sentinel(member));
        start_keeper(&sim, member);
    }
}

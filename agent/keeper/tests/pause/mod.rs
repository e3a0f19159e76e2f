//! Maintenance: PostgreSQL is left alone, and nobody has to watch it.

use std::fs;
use std::time::Duration;

use pgherd_keeper::clock::Boottime;
use pgherd_keeper::protocol::{ExitKind, Refusal, Report, Request, RequestKind};
use rustix::process::{Pid, Signal};

use crate::refused;
use crate::support::{Agent, World, arm, freeze, is_alive, signal, wait_until, wait_until_dead};

/// The sentinel has looked at least once more.
const LOOKED: Duration = Duration::from_millis(1000);

const KEEP: Request = Request::Leave {
    code: 3,
    keep_postgres: true,
};

/// A primary in pause, whose last deadline is returned.
fn paused_primary(world: &World) -> (Agent, Pid, Boottime) {
    let (agent, _) = world.agent();
    let deadline = agent.armed(7, 2000, 500);
    agent.started(&world.start(true));
    let backend = world.backend();
    world.sentinel();
    assert_eq!(agent.ask(&Request::Pause), Report::Paused);
    (agent, backend, deadline)
}

/// What the last keeper has left alone is found by the next, and ended when its agent says so.
fn end_with_next_keeper(world: &mut World, backend: Pid) {
    wait_until("the sentinel leaves too", || world.is_unlocked());
    world.writes_after(Boottime::now().plus(LOOKED));
    world.replace_keeper();
    let (agent, hello) = world.agent();
    assert!(hello.instance_left && !hello.paused);
    let postmaster = world.pid_in("data/postmaster");
    assert_eq!((hello.postmaster, hello.stranger), (None, Some(postmaster)));
    assert_eq!(
        agent.ask(&arm(9, 60_000, 1000)),
        refused(RequestKind::Arm, Refusal::Stranger)
    );
    assert_eq!(agent.adopted(), postmaster);
    let deadline = agent.armed(9, 2000, 1000);
    wait_until_dead(backend);
    assert!(world.last_write().is_some_and(|write| write < deadline));
    agent.recv_until(&Report::Ended);
}

#[test]
fn a_deadline_that_passes_in_pause_ends_nothing_and_the_fence_can_be_armed_again() {
    let world = World::new();
    let (agent, backend, deadline) = paused_primary(&world);
    world.writes_after(deadline.plus(LOOKED));
    // The sentinel leaves it alone too.
    freeze(world.keeper());
    world.writes_after(Boottime::now().plus(LOOKED));
    signal(world.keeper(), Signal::CONT);
    assert_eq!(
        agent.ask(&Request::Disarm),
        refused(RequestKind::Disarm, Refusal::InstanceLeft)
    );

    let deadline = agent.armed(7, 2000, 1000);

    wait_until_dead(backend);
    assert!(world.last_write().unwrap() < deadline);
    assert_eq!(agent.recv(), Report::Fenced { term: 7 });
    agent.recv_until(&Report::Ended);
    assert_eq!(agent.ask(&Request::Pause), Report::Paused);
    assert_eq!(
        agent.ask(&arm(7, 60_000, 1000)),
        refused(RequestKind::Arm, Refusal::TermIsFinal)
    );
    agent.armed(8, 60_000, 1000);
}

/// An operator's order is obeyed in maintenance, and what it made writable is fenced once maintenance is over.
#[test]
fn what_is_made_writable_in_pause_has_to_get_a_deadline_before_the_fence_is_taken_off() {
    let world = World::new();
    let (agent, _) = world.agent();
    agent.armed(7, 60_000, 500);
    assert_eq!(agent.ask(&Request::Pause), Report::Paused);
    agent.started(&world.start(true));
    let backend = world.backend();
    assert_eq!(
        agent.ask(&Request::Disarm),
        refused(RequestKind::Disarm, Refusal::InstanceLeft)
    );
    let deadline = agent.armed(8, 2000, 1000);
    wait_until_dead(backend);
    assert!(world.last_write().is_some_and(|write| write < deadline));
}

#[test]
fn a_new_agent_is_told_of_the_pause() {
    let world = World::new();
    let (agent, backend, _) = paused_primary(&world);
    signal(agent.pid, Signal::KILL);
    let (agent, hello) = world.agent();
    assert_eq!((hello.paused, hello.armed, hello.instance_left), (true, None, true));
    agent.armed(8, 60_000, 1000);
    signal(agent.pid, Signal::KILL);
    let (_agent, hello) = world.agent();
    assert!(!hello.paused && is_alive(backend));
}

#[test]
fn a_standbys_pause_is_ended_without_a_deadline() {
    let world = World::new();
    let (agent, _) = world.agent();
    agent.started(&world.start(false));
    let backend = world.backend();
    world.sentinel();
    assert_eq!(agent.ask(&Request::Pause), Report::Paused);
    assert_eq!(agent.ask(&Request::Disarm), Report::Disarmed);
    signal(world.keeper(), Signal::KILL);
    wait_until_dead(backend);
    wait_until("the sentinel leaves", || world.is_unlocked());
}

#[test]
fn an_agent_may_leave_postgres_behind_in_pause_only() {
    let mut world = World::with(&["10000", "proxy"]);
    let (agent, _) = world.agent();
    agent.armed(7, 60_000, 1000);
    agent.started(&world.start(true));
    let backend = world.backend();
    assert_eq!(agent.ask(&KEEP), refused(RequestKind::Leave, Refusal::NotPaused));
    assert_eq!(agent.ask(&Request::Pause), Report::Paused);
    let (sentinel, proxy) = (world.sentinel(), world.pid_in("proxy"));
    agent.start_tool();
    let tool = world.pid_in("tool");

    signal(world.keeper(), Signal::TERM);
    assert_eq!(agent.recv(), Report::Stop);
    agent.send(&KEEP);
    agent.exit();

    assert_eq!(world.outcome().code(), Some(3));
    wait_until_dead(sentinel);
    assert!(!is_alive(proxy) && !is_alive(tool), "only PostgreSQL is left behind");
    end_with_next_keeper(&mut world, backend);
}

#[test]
fn an_agent_in_pause_may_have_postgres_ended_all_the_same() {
    let mut world = World::new();
    let (agent, backend, _) = paused_primary(&world);
    agent.send(&crate::leave(3));
    agent.exit();
    assert_eq!(world.outcome().code(), Some(3));
    assert!(!is_alive(backend));
}

#[test]
fn arming_after_a_farewell_takes_the_pause_back() {
    let mut world = World::new();
    let (agent, backend, _) = paused_primary(&world);
    agent.send(&KEEP);
    agent.armed(7, 60_000, 1000);
    agent.exit();
    assert_eq!(world.outcome().code(), Some(3));
    assert!(!is_alive(backend));
}

#[test]
fn an_impatient_stop_in_pause_leaves_postgres_alone() {
    let mut world = World::with(&["600000"]);
    let (agent, backend, _) = paused_primary(&world);
    freeze(agent.pid);
    let status = world.outcome_while(|keeper| signal(keeper, Signal::TERM));
    assert_eq!(status.code(), Some(100));
    end_with_next_keeper(&mut world, backend);
}

#[test]
fn a_keeper_that_is_killed_in_pause_leaves_postgres_alone() {
    let mut world = World::new();
    let (agent, backend, _) = paused_primary(&world);
    signal(world.keeper(), Signal::KILL);
    wait_until_dead(agent.pid);
    end_with_next_keeper(&mut world, backend);
}

#[test]
fn a_pause_outlives_an_upgrade() {
    let mut world = World::new();
    let (agent, backend, deadline) = paused_primary(&world);
    world.install();
    world.upgrade();
    world.writes_after(deadline.plus(LOOKED));
    assert_eq!(
        agent.ask(&Request::Disarm),
        refused(RequestKind::Disarm, Refusal::InstanceLeft)
    );
    signal(world.keeper(), Signal::KILL);
    end_with_next_keeper(&mut world, backend);
}

/// An operator restarts by hand, and the next postmaster begins before the keeper has looked at what the last one left.
#[test]
fn a_postmaster_that_others_start_in_pause_right_after_the_end_of_the_last_is_left_alone() {
    let world = World::new();
    let (agent, _, _) = paused_primary(&world);
    let last = world.pid_in("data/postmaster");
    freeze(world.keeper());
    signal(last, Signal::INT);
    wait_until_dead(last);
    fs::remove_file(world.path("data/backend")).unwrap();
    let mut elsewhere = world.start_elsewhere();
    let backend = world.backend();
    let next = Pid::from_child(&elsewhere);

    signal(world.keeper(), Signal::CONT);

    agent.hears_the_end_of(last, ExitKind::Code(0));
    assert_eq!(agent.recv(), Report::Stranger { pid: Some(next) });
    assert_eq!(agent.adopted(), next);
    world.writes_after(Boottime::now().plus(LOOKED));
    assert!(is_alive(backend));
    agent.send(&Request::End);
    agent.recv_until(&Report::Ended);
    elsewhere.wait().unwrap();
}

//! A postmaster that somebody else has started: told of, refused beside a deadline, and adopted.

use std::fs;
use std::process::Child;

use pgherd_keeper::clock::Boottime;
use pgherd_keeper::protocol::{ExitKind, PostmasterSignal, Refusal, Report, Request, RequestKind};
use rustix::process::{Pid, Signal};

use crate::refused;
use crate::support::{Agent, World, arm, freeze, is_alive, signal, wait_until, wait_until_dead};

const UNKNOWN: ExitKind = ExitKind::Unknown;

/// A keeper that has adopted a postmaster of ours, with its backend.
fn adopted(world: &World) -> (Agent, Child, Pid) {
    let (agent, hello) = world.agent();
    assert_eq!((hello.stranger, hello.adopted), (None, false));
    let elsewhere = world.start_elsewhere();
    let backend = world.backend();
    let pid = Pid::from_child(&elsewhere);
    assert_eq!(agent.recv(), Report::Stranger { pid: Some(pid) });
    assert_eq!(agent.adopted(), pid);
    (agent, elsewhere, backend)
}

#[test]
fn nothing_is_armed_beside_a_stranger_until_it_is_adopted() {
    let world = World::new();
    let (agent, _) = world.agent();
    assert_eq!(
        agent.ask(&Request::Adopt { writable: true }),
        refused(RequestKind::Adopt, Refusal::NoPostmaster)
    );
    let mut elsewhere = world.start_elsewhere();
    let backend = world.backend();
    let pid = Pid::from_child(&elsewhere);
    assert_eq!(agent.recv(), Report::Stranger { pid: Some(pid) });
    assert_eq!(
        agent.ask(&arm(7, 60_000, 1000)),
        refused(RequestKind::Arm, Refusal::Stranger)
    );
    assert_eq!(
        agent.ask(&world.start(false)),
        refused(RequestKind::Start, Refusal::InstanceLeft)
    );
    signal(agent.pid, Signal::KILL);
    let (agent, hello) = world.agent();
    assert_eq!((hello.stranger, hello.postmaster), (Some(pid), None));
    assert!(hello.instance_left && is_alive(backend));

    assert_eq!(agent.adopted(), pid);
    assert_eq!(
        agent.ask(&Request::Adopt { writable: true }),
        refused(RequestKind::Adopt, Refusal::InstanceLeft)
    );
    let deadline = agent.armed(7, 60_000, 1000);
    agent.send(&Request::Signal(PostmasterSignal::Promote));
    wait_until("the promotion is seen", || world.path("data/promoted").exists());
    signal(agent.pid, Signal::KILL);
    let (_agent, hello) = world.agent();
    assert_eq!(
        (hello.stranger, hello.postmaster, hello.adopted),
        (None, Some(pid), true)
    );
    assert_eq!(hello.armed, Some((7, deadline)));
    world.writes_after(Boottime::now());
    signal(pid, Signal::INT);
    wait_until_dead(pid);
    elsewhere.wait().unwrap();
}

#[test]
fn a_stranger_that_leaves_by_itself_is_told_of() {
    let world = World::new();
    let (agent, _) = world.agent();
    let mut elsewhere = world.start_elsewhere();
    world.backend();
    let pid = Pid::from_child(&elsewhere);
    assert_eq!(agent.recv(), Report::Stranger { pid: Some(pid) });
    signal(pid, Signal::INT);
    elsewhere.wait().unwrap();
    assert_eq!(agent.recv(), Report::Stranger { pid: None });
    assert_eq!(agent.recv(), Report::Ended);
    agent.armed(7, 60_000, 1000);
}

#[test]
fn an_adopted_postmaster_is_ended_by_the_deadline() {
    let world = World::new();
    let (agent, mut elsewhere, backend) = adopted(&world);
    let pid = Pid::from_child(&elsewhere);
    let deadline = agent.armed(7, 3000, 2000);
    freeze(pid);
    wait_until_dead(backend);
    assert!(world.last_write().unwrap() < deadline);
    wait_until_dead(pid);
    // Whose child it is, and whether that has reaped it, is of no account.
    assert_eq!(agent.recv(), Report::Fenced { term: 7 });
    assert_eq!(agent.recv(), Report::PostmasterExited { pid, status: UNKNOWN });
    assert_eq!(agent.recv(), Report::Ended);
    elsewhere.wait().unwrap();
}

#[test]
fn backends_do_not_outlive_a_killed_postmaster_that_was_adopted_and_the_next_one_is_a_child() {
    let world = World::new();
    let (agent, mut elsewhere, backend) = adopted(&world);
    let pid = Pid::from_child(&elsewhere);
    agent.armed(7, 60_000, 1000);

    signal(pid, Signal::KILL);

    // The backend has left session and directory, and is nobody's descendant any more.
    assert_eq!(agent.recv(), Report::PostmasterExited { pid, status: UNKNOWN });
    assert_eq!(agent.recv(), Report::Ended);
    assert!(!is_alive(backend));
    elsewhere.wait().unwrap();
    fs::remove_file(world.path("data/backend")).unwrap();
    let pid = agent.started(&world.start(true));
    world.backend();
    agent.send(&Request::Signal(PostmasterSignal::StopFast));
    let status = ExitKind::Code(0);
    assert_eq!(agent.recv(), Report::PostmasterExited { pid, status });
    assert_eq!(agent.recv(), Report::Ended);
}

#[test]
fn a_pause_does_not_end_with_a_writable_server_and_without_a_deadline() {
    let world = World::new();
    let (agent, mut elsewhere, backend) = adopted(&world);
    assert_eq!(agent.ask(&Request::Pause), Report::Paused);
    assert_eq!(
        agent.ask(&Request::Disarm),
        refused(RequestKind::Disarm, Refusal::InstanceLeft)
    );
    assert!(is_alive(backend));
    agent.armed(7, 60_000, 1000);
    agent.send(&Request::End);
    agent.recv_until(&Report::Ended);
    assert_eq!(agent.ask(&Request::Disarm), Report::Disarmed);
    elsewhere.wait().unwrap();
}

#[test]
fn an_adopted_postmaster_stops_in_order_too() {
    let world = World::new();
    let (agent, mut elsewhere, _) = adopted(&world);
    let pid = Pid::from_child(&elsewhere);
    agent.send(&Request::Signal(PostmasterSignal::StopFast));
    assert_eq!(agent.recv(), Report::PostmasterExited { pid, status: UNKNOWN });
    assert_eq!(agent.recv(), Report::Ended);
    assert_eq!(elsewhere.wait().unwrap().code(), Some(0));
}

#[test]
fn an_adoption_outlives_an_upgrade() {
    let world = World::new();
    let (agent, mut elsewhere, backend) = adopted(&world);
    let pid = Pid::from_child(&elsewhere);
    agent.armed(7, 60_000, 1000);
    world.sentinel();
    world.install();
    world.upgrade();
    agent.armed(7, 60_000, 1000);

    signal(pid, Signal::KILL);

    assert_eq!(agent.recv(), Report::PostmasterExited { pid, status: UNKNOWN });
    assert_eq!(agent.recv(), Report::Ended);
    assert!(!is_alive(backend));
    elsewhere.wait().unwrap();
}

#[test]
fn the_sentinel_ends_an_adopted_postmaster_whose_keeper_is_killed() {
    let world = World::new();
    let (agent, mut elsewhere, backend) = adopted(&world);
    agent.armed(7, 60_000, 1000);
    world.sentinel();
    signal(world.keeper(), Signal::KILL);
    wait_until_dead(backend);
    wait_until("the sentinel leaves", || world.is_unlocked());
    elsewhere.wait().unwrap();
}

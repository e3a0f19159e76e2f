//! A postmaster that somebody else has started: told of, refused beside a deadline, and adopted.

use std::fs;
use std::process::{Child, ExitStatus};

use pgherd_keeper::clock::Boottime;
use pgherd_keeper::protocol::{ExitKind, PostmasterSignal, Refusal, Report, Request, RequestKind};
use rustix::process::{Pid, Signal};

use crate::refused;
use crate::support::{Agent, World, arm, freeze, is_alive, signal, wait_until, wait_until_dead};

const UNKNOWN: ExitKind = ExitKind::Unknown;
const ADOPT: Request = Request::Adopt { writable: true };

/// A postmaster that is no child of the keeper's, with its backend.
struct Elsewhere {
    child: Child,
    pid: Pid,
    backend: Pid,
}

impl Elsewhere {
    /// Starts one, and waits until the agent is told of it.
    fn start(world: &World, agent: &Agent) -> Self {
        let child = world.start_elsewhere();
        let backend = world.backend();
        let pid = Pid::from_child(&child);
        assert_eq!(agent.recv(), Report::Stranger { pid: Some(pid) });
        Self { child, pid, backend }
    }

    /// Stops it as an operator does, past the keeper. Returns when it has ended.
    fn stop(mut self) {
        signal(self.pid, Signal::INT);
        self.reap();
    }

    /// It was adopted. Killed, it takes its backend with it, although that has left session and directory and is nobody's
    /// descendant any more.
    fn dies_whole(mut self, agent: &Agent) {
        signal(self.pid, Signal::KILL);
        agent.hears_the_end_of(self.pid, UNKNOWN);
        assert!(!is_alive(self.backend));
        self.reap();
    }

    /// Whose child it is, and whether that has reaped it, is of no account to the keeper.
    fn reap(&mut self) -> ExitStatus {
        self.child.wait().expect("a child can be waited for")
    }
}

/// A keeper that has adopted such a postmaster.
fn adopted(world: &World) -> (Agent, Elsewhere) {
    let (agent, hello) = world.agent();
    assert_eq!((hello.stranger, hello.adopted), (None, false));
    let elsewhere = Elsewhere::start(world, &agent);
    assert_eq!(agent.adopted(), elsewhere.pid);
    (agent, elsewhere)
}

#[test]
fn nothing_is_armed_beside_a_stranger_until_it_is_adopted() {
    let world = World::new();
    let (agent, _) = world.agent();
    assert_eq!(agent.ask(&ADOPT), refused(RequestKind::Adopt, Refusal::NoPostmaster));
    let elsewhere = Elsewhere::start(&world, &agent);
    let pid = elsewhere.pid;
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
    assert!(hello.instance_left && is_alive(elsewhere.backend));

    assert_eq!(agent.adopted(), pid);
    assert_eq!(agent.ask(&ADOPT), refused(RequestKind::Adopt, Refusal::InstanceLeft));
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
    elsewhere.stop();
}

#[test]
fn a_stranger_that_leaves_by_itself_is_told_of() {
    let world = World::new();
    let (agent, _) = world.agent();
    Elsewhere::start(&world, &agent).stop();
    assert_eq!(agent.recv(), Report::Stranger { pid: None });
    assert_eq!(agent.recv(), Report::Ended);
    agent.armed(7, 60_000, 1000);
}

/// Nobody has it in his care, and it cannot be adopted; who waits until it is gone must hear of it, the next agent too.
#[test]
fn what_is_left_and_names_no_postmaster_is_told_of_when_it_is_gone() {
    let world = World::new();
    let (agent, _) = world.agent();
    let elsewhere = Elsewhere::start(&world, &agent);
    fs::remove_file(world.path("data/postmaster.pid")).unwrap();
    assert_eq!(agent.recv(), Report::Stranger { pid: None });
    signal(agent.pid, Signal::KILL);
    let (agent, hello) = world.agent();
    assert_eq!((hello.instance_left, hello.stranger), (true, None));
    elsewhere.stop();
    assert_eq!(agent.recv(), Report::Ended);
    agent.armed(7, 60_000, 1000);
}

/// An agent that believes in a postmaster which has ended would ask, be refused, and ask again at once.
#[test]
fn an_adoption_that_finds_nobody_tells_first_that_the_stranger_is_gone() {
    let world = World::new();
    let (agent, _) = world.agent();
    // The keeper has just looked, and will not look by itself for a second.
    Elsewhere::start(&world, &agent).stop();
    assert_eq!(agent.ask(&ADOPT), Report::Stranger { pid: None });
    assert_eq!(agent.recv(), Report::Ended);
    assert_eq!(agent.recv(), refused(RequestKind::Adopt, Refusal::NoPostmaster));
    agent.armed(7, 60_000, 1000);
}

#[test]
fn an_adopted_postmaster_is_ended_by_the_deadline() {
    let world = World::new();
    let (agent, mut elsewhere) = adopted(&world);
    let deadline = agent.armed(7, 3000, 2000);
    freeze(elsewhere.pid);
    wait_until_dead(elsewhere.backend);
    assert!(world.last_write().unwrap() < deadline);
    wait_until_dead(elsewhere.pid);
    assert_eq!(agent.recv(), Report::Fenced { term: 7 });
    agent.hears_the_end_of(elsewhere.pid, UNKNOWN);
    elsewhere.reap();
}

#[test]
fn backends_do_not_outlive_a_killed_postmaster_that_was_adopted_and_the_next_one_is_a_child() {
    let world = World::new();
    let (agent, elsewhere) = adopted(&world);
    agent.armed(7, 60_000, 1000);
    elsewhere.dies_whole(&agent);
    fs::remove_file(world.path("data/backend")).unwrap();
    let pid = agent.started(&world.start(true));
    world.backend();
    agent.send(&Request::Signal(PostmasterSignal::StopFast));
    agent.hears_the_end_of(pid, ExitKind::Code(0));
}

#[test]
fn a_pause_does_not_end_with_a_writable_server_and_without_a_deadline() {
    let world = World::new();
    let (agent, mut elsewhere) = adopted(&world);
    assert_eq!(agent.ask(&Request::Pause), Report::Paused);
    assert_eq!(
        agent.ask(&Request::Disarm),
        refused(RequestKind::Disarm, Refusal::InstanceLeft)
    );
    assert!(is_alive(elsewhere.backend));
    agent.armed(7, 60_000, 1000);
    agent.send(&Request::End);
    agent.recv_until(&Report::Ended);
    assert_eq!(agent.ask(&Request::Disarm), Report::Disarmed);
    elsewhere.reap();
}

#[test]
fn an_adopted_postmaster_stops_in_order_too() {
    let world = World::new();
    let (agent, mut elsewhere) = adopted(&world);
    agent.send(&Request::Signal(PostmasterSignal::StopFast));
    agent.hears_the_end_of(elsewhere.pid, UNKNOWN);
    assert_eq!(elsewhere.reap().code(), Some(0));
}

#[test]
fn an_adoption_outlives_an_upgrade() {
    let world = World::new();
    let (agent, elsewhere) = adopted(&world);
    agent.armed(7, 60_000, 1000);
    world.sentinel();
    world.install();
    world.upgrade();
    agent.armed(7, 60_000, 1000);
    elsewhere.dies_whole(&agent);
}

#[test]
fn the_sentinel_ends_an_adopted_postmaster_whose_keeper_is_killed() {
    let world = World::new();
    let (agent, mut elsewhere) = adopted(&world);
    agent.armed(7, 60_000, 1000);
    world.sentinel();
    signal(world.keeper(), Signal::KILL);
    wait_until_dead(elsewhere.backend);
    wait_until("the sentinel leaves", || world.is_unlocked());
    elsewhere.reap();
}

//! The keeper with real processes: an agent that the test speaks through, and a postmaster whose backend writes the
//! time to a file until SIGKILL ends it. That file shows until when the instance was alive.

mod adoption;
mod pause;
mod postgres;
mod support;
mod upgrade;
mod watchdog;

use std::fs;
use std::process::Command;
use std::time::Duration;

use pgherd_keeper::clock::Boottime;
use pgherd_keeper::protocol::{ExitKind, PostmasterSignal, Refusal, Report, Request, RequestKind};
use rustix::process::{Pid, Signal};

use support::{World, arm, freeze, is_alive, leave, signal, wait_until, wait_until_dead};

const fn refused(what: RequestKind, why: Refusal) -> Report {
    Report::Refused { what, why }
}

#[test]
fn a_killed_agent_is_replaced_and_told_how_things_are_while_postgres_runs_on() {
    let world = World::new();
    let (agent, hello) = world.agent();
    assert_eq!(
        (hello.postmaster, hello.instance_left, hello.stopping),
        (None, false, false)
    );
    agent.send(&Request::Remember {
        memo: b"lease 7".to_vec(),
    });
    let deadline = agent.armed(7, 60_000, 1000);
    let postmaster = agent.started(&world.start(true));
    let backend = world.backend();
    agent.start_tool();
    let tool = world.pid_in("tool");

    signal(agent.pid, Signal::KILL);

    let (next, hello) = world.agent();
    assert_ne!(next.pid, agent.pid);
    assert!(
        !is_alive(tool),
        "what the dead agent has started is ended before the next one begins"
    );
    assert_eq!(hello.memo, b"lease 7");
    assert_eq!((hello.armed, hello.fenced), (Some((7, deadline)), None));
    assert_eq!((hello.postmaster, hello.instance_left), (Some(postmaster), true));
    world.writes_after(Boottime::now());
    assert!(is_alive(backend) && is_alive(postmaster));
}

#[test]
fn a_frozen_agent_does_not_keep_postgres_writable() {
    let world = World::new();
    let (agent, _) = world.agent();
    let deadline = agent.armed(7, 3000, 2000);
    let postmaster = agent.started(&world.start(true));
    let backend = world.backend();

    freeze(agent.pid);

    wait_until_dead(backend);
    assert!(!is_alive(postmaster));
    // It was the keeper, for the sentinel leaves it half of the margin.
    assert!(world.last_write().unwrap() < deadline.minus(Duration::from_millis(1000)));
    signal(agent.pid, Signal::CONT);
    assert_eq!(agent.recv(), Report::Fenced { term: 7 });
    // Unwilling to die by SIGQUIT, the postmaster's backend was found by its descent although it had left its session.
    agent.hears_the_end_of(postmaster, ExitKind::Code(2));
    assert_eq!(
        agent.ask(&arm(7, 60_000, 1000)),
        refused(RequestKind::Arm, Refusal::TermIsFinal)
    );
    assert_eq!(
        agent.ask(&world.start(true)),
        refused(RequestKind::Start, Refusal::NotArmed)
    );
    agent.armed(8, 60_000, 1000);
    agent.started(&world.start(true));
}

#[test]
fn a_dead_agent_does_not_keep_postgres_writable_either() {
    // The agents that come after the first are never accepted, and so never renew.
    let world = World::new();
    let (agent, _) = world.agent();
    let deadline = agent.armed(7, 3000, 2000);
    agent.started(&world.start(true));
    let backend = world.backend();
    signal(agent.pid, Signal::KILL);
    wait_until_dead(backend);
    assert!(world.last_write().unwrap() < deadline);
    let (_agent, hello) = world.agent();
    assert_eq!(
        hello.armed.map(|(term, _)| term),
        Some(7),
        "it was started before the fence began"
    );
}

#[test]
fn a_frozen_postmaster_is_ended_by_the_deadline_too() {
    let world = World::new();
    let (agent, _) = world.agent();
    let deadline = agent.armed(7, 3000, 2000);
    let postmaster = agent.started(&world.start(true));
    let backend = world.backend();
    freeze(postmaster);
    wait_until_dead(backend);
    wait_until_dead(postmaster);
    assert!(world.last_write().unwrap() < deadline);
    agent.recv_until(&Report::Ended);
}

#[test]
fn backends_do_not_outlive_a_killed_postmaster() {
    let world = World::new();
    let (agent, _) = world.agent();
    agent.armed(7, 60_000, 1000);
    let postmaster = agent.started(&world.start(true));
    let backend = world.backend();

    signal(postmaster, Signal::KILL);

    agent.hears_the_end_of(postmaster, ExitKind::Signal(Signal::KILL.as_raw()));
    assert!(!is_alive(backend));
    // The lease is held as before, and so PostgreSQL may be started in place.
    fs::remove_file(world.path("data/backend")).unwrap();
    agent.started(&world.start(true));
    world.backend();
}

#[test]
fn a_deadline_that_is_renewed_ends_nothing() {
    let world = World::new();
    let (agent, _) = world.agent();
    let first = agent.armed(7, 2000, 500);
    agent.started(&world.start(true));
    let backend = world.backend();
    while Boottime::now() < first.plus(Duration::from_millis(500)) {
        let renewed = agent.armed(7, 2000, 500);
        world.writes_after(Boottime::now());
        // An older proof that arrives late takes nothing away.
        let late = Request::Arm {
            term: 7,
            deadline: renewed.minus(Duration::from_millis(100)),
            margin: Duration::ZERO,
        };
        assert_eq!(
            agent.ask(&late),
            Report::Armed {
                term: 7,
                deadline: renewed
            }
        );
    }
    assert!(is_alive(backend));
}

#[test]
fn what_makes_postgres_writable_needs_a_deadline() {
    let world = World::new();
    let (agent, _) = world.agent();
    assert_eq!(
        agent.ask(&world.start(true)),
        refused(RequestKind::Start, Refusal::NotArmed)
    );
    let signal = Request::Signal;
    let not_running = refused(RequestKind::Signal, Refusal::NoPostmaster);
    assert_eq!(agent.ask(&signal(PostmasterSignal::Reload)), not_running);

    let postmaster = agent.started(&world.start(false));
    world.backend();
    assert_eq!(
        agent.ask(&world.start(false)),
        refused(RequestKind::Start, Refusal::InstanceLeft)
    );
    agent.send(&signal(PostmasterSignal::Reload));
    wait_until("the reload is seen", || world.path("data/reloaded").exists());
    assert_eq!(
        agent.ask(&signal(PostmasterSignal::Promote)),
        refused(RequestKind::Signal, Refusal::NotArmed)
    );

    assert_eq!(
        agent.ask(&arm(7, 100, 200)),
        refused(RequestKind::Arm, Refusal::DeadlinePassed)
    );
    agent.armed(7, 60_000, 1000);
    agent.send(&signal(PostmasterSignal::Promote));
    wait_until("the promotion is seen", || world.path("data/promoted").exists());
    assert_eq!(
        agent.ask(&arm(8, 60_000, 1000)),
        refused(RequestKind::Arm, Refusal::OtherTermRuns)
    );
    assert_eq!(
        agent.ask(&Request::Disarm),
        refused(RequestKind::Disarm, Refusal::InstanceLeft)
    );

    agent.send(&signal(PostmasterSignal::StopFast));
    agent.hears_the_end_of(postmaster, ExitKind::Code(0));
    assert_eq!(agent.ask(&Request::Disarm), Report::Disarmed);
    assert_eq!(
        agent.ask(&world.start(true)),
        refused(RequestKind::Start, Refusal::NotArmed)
    );
}

#[test]
fn an_end_that_is_asked_for_leaves_no_process() {
    let world = World::new();
    let (agent, _) = world.agent();
    assert_eq!(agent.ask(&Request::End), Report::Ended);
    let postmaster = agent.started(&world.start(false));
    let backend = world.backend();
    agent.send(&Request::End);
    agent.hears_the_end_of(postmaster, ExitKind::Code(2));
    assert!(!is_alive(backend));
}

#[test]
fn a_program_that_cannot_be_started_is_said_to_be_so() {
    let world = World::new();
    let (agent, _) = world.agent();
    let Request::Start(mut start) = world.start(false) else {
        panic!("it starts")
    };
    start.program = world.path("nothing");
    let enoent = rustix::io::Errno::NOENT.raw_os_error();
    assert_eq!(
        agent.ask(&Request::Start(start)),
        refused(RequestKind::Start, Refusal::System(enoent))
    );
}

#[test]
fn a_server_that_somebody_else_started_is_found_by_its_directory() {
    let world = World::new();
    let (agent, _) = world.agent();
    let mut elsewhere = world.start_elsewhere();
    let backend = world.backend();
    let mut shell = Command::new("sleep")
        .arg("60")
        .current_dir(world.path("data"))
        .spawn()
        .unwrap();

    let stranger = Some(Pid::from_child(&elsewhere));
    assert_eq!(agent.recv(), Report::Stranger { pid: stranger });
    assert_eq!(
        agent.ask(&world.start(false)),
        refused(RequestKind::Start, Refusal::InstanceLeft)
    );
    agent.send(&Request::End);
    agent.recv_until(&Report::Ended);

    assert!(!is_alive(backend) && !is_alive(Pid::from_child(&elsewhere)));
    assert!(
        is_alive(Pid::from_child(&shell)),
        "no server, although it sits in the data directory"
    );
    agent.started_at_last(&world.start(false));
    elsewhere.wait().unwrap();
    shell.kill().unwrap();
    shell.wait().unwrap();
}

#[test]
fn the_sentinel_ends_postgres_by_the_deadline_when_the_keeper_is_frozen() {
    let world = World::new();
    let (agent, _) = world.agent();
    let deadline = agent.armed(7, 3000, 2000);
    let postmaster = agent.started(&world.start(true));
    let backend = world.backend();
    world.sentinel();

    freeze(world.keeper());

    wait_until_dead(backend);
    wait_until_dead(postmaster);
    assert!(world.last_write().unwrap() < deadline);
    assert!(
        Boottime::now() > deadline.minus(Duration::from_millis(1000)),
        "half of the margin was the keeper's"
    );
    // A keeper that wakes up again reports the fence, and what it finds.
    signal(world.keeper(), Signal::CONT);
    assert_eq!(agent.recv(), Report::Fenced { term: 7 });
    agent.recv_until(&Report::Ended);
}

#[test]
fn the_sentinel_ends_postgres_at_once_when_the_keeper_is_killed() {
    let mut world = World::new();
    let (agent, _) = world.agent();
    agent.send(&Request::Remember {
        memo: b"lease 7".to_vec(),
    });
    let deadline = agent.armed(7, 60_000, 1000);
    let postmaster = agent.started(&world.start(true));
    let backend = world.backend();
    world.sentinel();

    signal(world.keeper(), Signal::KILL);

    wait_until_dead(backend);
    assert!(!is_alive(postmaster));
    assert!(Boottime::now() < deadline.minus(Duration::from_secs(30)));
    wait_until_dead(agent.pid);
    world.replace_keeper();
    let (_next, hello) = world.agent();
    assert_eq!(
        hello.memo, b"lease 7",
        "the copy in the runtime directory is of this boot"
    );
    assert_eq!((hello.armed, hello.instance_left), (None, false));
}

#[test]
fn a_standby_without_a_deadline_is_none_of_the_sentinels_business_while_the_keeper_lives() {
    let world = World::new();
    let (agent, _) = world.agent();
    agent.started(&world.start(false));
    let backend = world.backend();
    let sentinel = world.sentinel();
    signal(sentinel, Signal::KILL);
    wait_until("another sentinel runs", || world.sentinel() != sentinel);
    freeze(world.keeper());
    // The sentinel looks twice a second.
    world.writes_after(Boottime::now().plus(Duration::from_millis(1200)));
    assert!(is_alive(backend));
}

#[test]
fn a_stop_is_handed_to_the_agent_whose_code_becomes_the_keepers() {
    let mut world = World::with(&["10000", "proxy"]);
    let (agent, _) = world.agent();
    agent.started(&world.start(false));
    let backend = world.backend();
    let (sentinel, proxy) = (world.sentinel(), world.pid_in("proxy"));

    signal(world.keeper(), Signal::TERM);
    assert_eq!(agent.recv(), Report::Stop);
    assert!(is_alive(backend), "the agent has the word");
    agent.send(&leave(3));
    agent.exit();

    assert_eq!(world.outcome().code(), Some(3));
    assert!(!is_alive(backend) && !is_alive(proxy));
    assert!(world.path("proxy-stopped").exists());
    wait_until_dead(sentinel);
}

#[test]
fn an_agent_may_leave_unasked() {
    let mut world = World::new();
    let (agent, _) = world.agent();
    agent.send(&leave(64));
    agent.exit();
    assert_eq!(world.outcome().code(), Some(64));
}

#[test]
fn an_agent_that_leaves_but_does_not_go_is_ended() {
    let mut world = World::with(&["300"]);
    let (agent, _) = world.agent();
    agent.send(&leave(64));
    assert_eq!(world.outcome().code(), Some(64));
}

#[test]
fn an_agent_that_dies_while_stopping_is_not_replaced() {
    let mut world = World::new();
    let (agent, _) = world.agent();
    agent.started(&world.start(false));
    let backend = world.backend();
    signal(world.keeper(), Signal::INT);
    assert_eq!(agent.recv(), Report::Stop);
    signal(agent.pid, Signal::KILL);
    assert_eq!(world.outcome().code(), Some(100));
    assert!(!is_alive(backend));
}

#[test]
fn a_stop_does_not_wait_longer_than_it_may() {
    let mut world = World::with(&["300"]);
    let (agent, _) = world.agent();
    agent.started(&world.start(false));
    let backend = world.backend();
    freeze(agent.pid);
    signal(world.keeper(), Signal::TERM);
    assert_eq!(world.outcome().code(), Some(100));
    assert!(!is_alive(backend));
}

#[test]
fn a_second_stop_ends_everything_at_once() {
    let mut world = World::with(&["600000", "proxy"]);
    let (agent, _) = world.agent();
    agent.started(&world.start(false));
    let backend = world.backend();
    freeze(world.pid_in("proxy"));
    signal(world.keeper(), Signal::TERM);
    assert_eq!(agent.recv(), Report::Stop);
    freeze(agent.pid);
    // Twice at once is the same order; only the impatient repeat it.
    let status = world.outcome_while(|keeper| signal(keeper, Signal::TERM));
    assert_eq!(status.code(), Some(100));
    assert!(!is_alive(backend));
}

#[test]
fn an_agent_that_sends_nonsense_is_replaced() {
    let nonsense: [&[u8]; 4] = [&[0], &[2, 99], &[2, 5, 0], &[2; 66_000]];
    for bytes in nonsense {
        let world = World::new();
        let (agent, _) = world.agent();
        let postmaster = agent.started(&world.start(false));
        agent.send_raw(bytes);
        let (next, hello) = world.agent();
        assert_ne!(next.pid, agent.pid);
        assert!(!is_alive(agent.pid));
        assert_eq!(hello.postmaster, Some(postmaster));
        assert!(is_alive(postmaster));
    }
}

#[test]
fn a_reload_reaches_agent_and_proxy_and_a_dead_proxy_is_replaced() {
    let world = World::with(&["10000", "proxy"]);
    let (agent, _) = world.agent();
    let proxy = world.pid_in("proxy");
    signal(world.keeper(), Signal::HUP);
    assert_eq!(agent.recv(), Report::Reload);
    wait_until("the proxy reloads", || world.path("proxy-reloaded").exists());
    signal(proxy, Signal::KILL);
    wait_until("another proxy runs", || world.pid_in("proxy") != proxy);
}

#[test]
fn two_keepers_do_not_share_a_directory() {
    let world = World::new();
    let (_agent, _) = world.agent();
    let mut second = Command::new(env!("CARGO_BIN_EXE_pgherd-keeper-test-role"));
    let output = second.arg("keeper").arg(world.path("")).arg("100").output().unwrap();
    assert_eq!(output.status.code(), Some(70));
    assert!(String::from_utf8_lossy(&output.stderr).contains("another keeper"));
}

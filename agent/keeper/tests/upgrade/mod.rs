//! The keeper becomes another program while everything that it keeps runs on.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::time::Duration;

use pgherd_keeper::clock::Boottime;
use pgherd_keeper::protocol::{ExitKind, Refusal, Report, Request, RequestKind};
use rustix::fs::OFlags;
use rustix::process::Signal;

use crate::refused;
use crate::support::{World, arm, command_line, freeze, is_alive, leave, signal, wait_until, wait_until_dead};

/// A script's way of saying that it would go on, and of going on.
const YES: &str = "exit 0";
const GO_ON: &str = "exec $role \"$@\"";

#[test]
fn an_upgrade_is_noticed_by_nobody() {
    let world = World::with(&["10000", "proxy"]);
    let (agent, _) = world.agent();
    agent.send(&Request::Remember {
        memo: b"lease 7".to_vec(),
    });
    agent.armed(7, 60_000, 1000);
    let postmaster = agent.started(&world.start(true));
    let (backend, sentinel, proxy) = (world.backend(), world.sentinel(), world.pid_in("proxy"));
    world.install();

    world.upgrade();

    // Not greeted again: the next report is the answer. And again, for what was handed on can be handed on.
    agent.armed(7, 60_000, 1000);
    world.install();
    world.upgrade();
    let deadline = agent.armed(7, 60_000, 1000);
    assert!(!world.is_unlocked());
    assert_eq!((world.sentinel(), world.pid_in("proxy")), (sentinel, proxy));
    world.writes_after(Boottime::now());
    signal(agent.pid, Signal::KILL);
    let (agent, hello) = world.agent();
    assert_eq!(hello.memo, b"lease 7");
    assert_eq!((hello.armed, hello.fenced), (Some((7, deadline)), None));
    assert_eq!((hello.postmaster, hello.paused), (Some(postmaster), false));
    // It is still the parent, also of those who lose theirs.
    signal(proxy, Signal::KILL);
    wait_until("another proxy runs", || world.pid_in("proxy") != proxy);
    signal(postmaster, Signal::KILL);
    agent.hears_the_end_of(postmaster, ExitKind::Signal(Signal::KILL.as_raw()));
    assert!(!is_alive(backend));
}

#[test]
fn a_deadline_means_the_same_after_an_upgrade() {
    let world = World::new();
    let (agent, _) = world.agent();
    let deadline = agent.armed(7, 4000, 2000);
    let postmaster = agent.started(&world.start(true));
    let backend = world.backend();
    world.install();
    world.upgrade();
    assert!(is_alive(backend));

    wait_until_dead(backend);

    assert!(world.last_write().unwrap() < deadline.minus(Duration::from_millis(1000)));
    assert_eq!(agent.recv(), Report::Fenced { term: 7 });
    agent.hears_the_end_of(postmaster, ExitKind::Code(2));
    world.install();
    world.upgrade();
    assert_eq!(
        agent.ask(&arm(7, 60_000, 1000)),
        refused(RequestKind::Arm, Refusal::TermIsFinal),
        "final terms are handed on"
    );
    agent.armed(8, 60_000, 1000);
}

#[test]
fn the_sentinel_goes_by_what_the_upgraded_keeper_says() {
    let world = World::new();
    let (agent, _) = world.agent();
    let first = agent.armed(7, 4000, 1000);
    agent.started(&world.start(true));
    let backend = world.backend();
    let sentinel = world.sentinel();
    world.install();
    world.upgrade();
    let deadline = agent.armed(7, 6000, 2000);
    assert_eq!(world.sentinel(), sentinel);

    freeze(world.keeper());

    world.writes_after(first);
    wait_until_dead(backend);
    assert!(world.last_write().unwrap() < deadline);
    signal(world.keeper(), Signal::CONT);
    agent.recv_until(&Report::Ended);
}

#[test]
fn what_happens_during_the_exec_is_heeded_after_it() {
    let mut world = World::with(&["10000", "proxy"]);
    let (agent, _) = world.agent();
    let proxy = world.pid_in("proxy");
    world.sentinel();
    let gate = world.path("gate");
    assert!(Command::new("mkfifo").arg(&gate).status().unwrap().success());
    world.install_script(YES, &format!("read _ < $dir/gate\n{GO_ON}"));
    signal(world.keeper(), Signal::USR2);
    // From here on the process is a shell without any handler that waits at the gate.
    wait_until("the keeper is the script", || {
        command_line(world.keeper()).contains("/bin/sh")
    });

    signal(proxy, Signal::KILL);
    agent.send(&Request::End);
    signal(world.keeper(), Signal::HUP);
    signal(world.keeper(), Signal::TERM);
    // Cannot be opened unless somebody waits at it.
    let mut opened = OpenOptions::new();
    let opened = opened.write(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed());
    wait_until("the process is still at the gate", || {
        opened
            .open(&gate)
            .is_ok_and(|mut gate| gate.write_all(b"open\n").is_ok())
    });

    let mut reports = [agent.recv(), agent.recv(), agent.recv()];
    reports.sort_by_key(|report| format!("{report:?}"));
    assert_eq!(reports, [Report::Ended, Report::Reload, Report::Stop]);
    agent.send(&leave(3));
    agent.exit();
    assert_eq!(world.outcome().code(), Some(3));
}

#[test]
fn a_stop_right_after_the_order_to_upgrade_is_obeyed() {
    // With ever more time in between, so that it comes before, during and after the dry start and the exec.
    for millis in [0, 2, 5, 10, 20, 40] {
        let mut world = World::new();
        let (agent, _) = world.agent();
        agent.started(&world.start(false));
        let backend = world.backend();
        world.install();
        signal(world.keeper(), Signal::USR2);
        let from = Boottime::now().plus(Duration::from_millis(millis));
        wait_until("it is time", || Boottime::now() >= from);
        signal(world.keeper(), Signal::TERM);
        assert_eq!(agent.recv(), Report::Stop);
        agent.send(&leave(3));
        agent.exit();
        assert_eq!(world.outcome().code(), Some(3), "after {millis} ms");
        assert!(!is_alive(backend));
    }
}

#[test]
fn reports_that_the_agent_has_not_read_are_not_lost() {
    let world = World::new();
    let (agent, _) = world.agent();
    world.sentinel();
    freeze(agent.pid);
    signal(world.keeper(), Signal::HUP);
    world.install();
    world.upgrade();
    signal(agent.pid, Signal::CONT);
    assert_eq!(agent.recv(), Report::Reload);
}

#[test]
fn a_program_that_refuses_changes_nothing_and_a_better_one_is_taken_later() {
    let world = World::new();
    let (agent, _) = world.agent();
    agent.armed(7, 60_000, 1000);
    agent.started(&world.start(true));
    let backend = world.backend();
    world.sentinel();
    world.install_script("echo $$ > $dir/asked.new; mv $dir/asked.new $dir/asked; exit 3", GO_ON);
    signal(world.keeper(), Signal::USR2);
    wait_until("the program is asked", || world.path("asked").exists());
    agent.armed(7, 60_000, 1000);
    assert!(!world.is_upgraded() && is_alive(backend));
    world.install();
    let status = || {
        // Whether the first has ended yet cannot be seen; until it has, it is the same order.
        signal(world.keeper(), Signal::USR2);
        world.is_upgraded()
    };
    wait_until("the keeper is the better program", status);
    agent.armed(7, 60_000, 1000);
}

#[test]
fn a_program_that_hangs_does_not_hold_up_the_fence() {
    let world = World::new();
    let (agent, _) = world.agent();
    let deadline = agent.armed(7, 3000, 2000);
    agent.started(&world.start(true));
    let backend = world.backend();
    world.sentinel();
    world.install_script(
        "printf %s $$ > $dir/asked.new; mv $dir/asked.new $dir/asked; exec sleep 600",
        GO_ON,
    );
    signal(world.keeper(), Signal::USR2);
    let asked = world.pid_in("asked");
    wait_until_dead(backend);
    assert!(world.last_write().unwrap() < deadline.minus(Duration::from_millis(1000)));
    agent.recv_until(&Report::Ended);
    assert!(is_alive(asked), "it is no process of the instance");
    wait_until_dead(asked);
    agent.armed(8, 60_000, 1000);
    assert!(!world.is_upgraded());
}

#[test]
fn a_program_that_cannot_be_executed_changes_nothing() {
    let world = World::new();
    let (agent, _) = world.agent();
    agent.armed(7, 60_000, 1000);
    let postmaster = agent.started(&world.start(true));
    world.backend();
    world.sentinel();
    // Its interpreter is gone by the time of the exec.
    let script = "#!DIR/sh\nrm DIR/sh\nexit 0\n".replace("DIR", world.path("").to_str().unwrap());
    std::os::unix::fs::symlink("/bin/sh", world.path("sh")).unwrap();
    world.install_raw(&script);
    signal(world.keeper(), Signal::USR2);
    wait_until("the program is asked", || !world.path("sh").exists());
    agent.armed(7, 60_000, 1000);
    // Its handlers are in place, and signals get through.
    signal(world.keeper(), Signal::HUP);
    assert_eq!(agent.recv(), Report::Reload);
    assert!(is_alive(postmaster));
    world.install();
    wait_until("the keeper is the better program", || {
        signal(world.keeper(), Signal::USR2);
        world.is_upgraded()
    });
    agent.armed(7, 60_000, 1000);
}

#[test]
fn an_upgrade_waits_until_an_end_is_over() {
    let world = World::new();
    let (agent, _) = world.agent();
    agent.started(&world.start(false));
    world.backend();
    world.sentinel();
    world.install_script(
        "grep -q . /proc/$(cat $dir/data/backend)/cmdline && touch $dir/too-early; exit 0",
        GO_ON,
    );
    agent.send(&Request::End);
    let exited = agent.recv();
    assert!(matches!(exited, Report::PostmasterExited { .. }));
    // The backend goes on for a while.
    signal(world.keeper(), Signal::USR2);
    assert_eq!(agent.recv(), Report::Ended);
    wait_until("the keeper goes on as the script's program", || {
        command_line(world.keeper()).contains("test-role\0keeper")
    });
    assert!(!world.path("too-early").exists());
    agent.armed(7, 60_000, 1000);
}

#[test]
fn a_program_that_loses_the_state_leaves_postgres_to_the_sentinel() {
    let mut world = World::new();
    let (agent, _) = world.agent();
    agent.armed(7, 60_000, 1000);
    let postmaster = agent.started(&world.start(true));
    let backend = world.backend();
    world.sentinel();
    world.install_script(YES, "exec $role \"$@\" < /dev/null");
    signal(world.keeper(), Signal::USR2);
    assert_eq!(world.outcome().code(), Some(70));
    wait_until_dead(backend);
    wait_until_dead(postmaster);
    wait_until("the sentinel leaves", || world.is_unlocked());
    wait_until_dead(agent.pid);
}

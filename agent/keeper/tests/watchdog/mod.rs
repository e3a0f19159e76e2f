//! The kernel's watchdog, played by a FIFO that tells when it is opened, written to and closed.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::time::Duration;

use pgherd_keeper::clock::Boottime;
use pgherd_keeper::protocol::{
    Refusal, Report, Request, RequestKind, WatchdogDriver, WatchdogMode, WatchdogSettings, WatchdogState,
};
use rustix::fs::OFlags;
use rustix::process::Signal;

use crate::refused;
use crate::support::{Agent, World, arm, freeze, leave, signal, wait_until, wait_until_dead};

/// The reading end of the device.
struct Device {
    fifo: File,
    written: String,
    is_open: bool,
}

impl Device {
    fn new(world: &World) -> Self {
        let path = world.path("watchdog");
        let made = Command::new("mkfifo").arg(&path).status();
        assert!(made.is_ok_and(|made| made.success()));
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed());
        Self {
            fifo: options.open(path).expect("it has just been made"),
            written: String::new(),
            is_open: false,
        }
    }

    fn look(&mut self) {
        let mut buffer = [0; 100];
        loop {
            match self.fifo.read(&mut buffer) {
                Ok(0) => return self.is_open = false,
                Ok(length) => self.written += str::from_utf8(&buffer[..length]).expect("only text is written"),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return self.is_open = true,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// All that has been written, and whether somebody has it open.
    fn shows(&mut self, written: &str, is_open: bool) {
        self.look();
        assert_eq!((self.written.as_str(), self.is_open), (written, is_open));
    }

    /// Waits until it does.
    fn comes_to(&mut self, written: &str, is_open: bool) {
        wait_until(&format!("{written:?} is written"), || {
            self.look();
            (self.written.as_str(), self.is_open) == (written, is_open)
        });
    }
}

fn settings(world: &World, mode: WatchdogMode, seconds: u64) -> WatchdogSettings {
    WatchdogSettings {
        mode,
        driver: WatchdogDriver::Testing,
        device: world.path("watchdog"),
        timeout: Duration::from_secs(seconds),
        timeout_min: Duration::from_secs(2),
    }
}

fn told(agent: &Agent, settings: WatchdogSettings) -> WatchdogState {
    match agent.ask(&Request::Watchdog(settings)) {
        Report::Watchdog { state } => state,
        report => panic!("no word about the watchdog: {report:?}"),
    }
}

/// A leader whose watchdog is required, and fires so many seconds after a ping.
fn required(world: &World, seconds: u64) -> (Agent, Device) {
    let mut device = Device::new(world);
    let (agent, hello) = world.agent();
    assert_eq!(hello.watchdog, WatchdogState::Off);
    assert_eq!(
        told(&agent, settings(world, WatchdogMode::Required, seconds)),
        WatchdogState::Usable
    );
    device.shows("", false);
    (agent, device)
}

#[test]
fn it_is_opened_before_the_first_deadline_pinged_by_each_later_one_and_stopped_when_postgres_has_ended() {
    let world = World::new();
    let (agent, mut device) = required(&world, 25);
    agent.started(&world.start(false));
    world.backend();
    device.shows("", false);
    assert_eq!(
        agent.ask(&arm(7, 100, 200)),
        refused(RequestKind::Arm, Refusal::DeadlinePassed)
    );
    device.shows("", false);
    let deadline = agent.armed(7, 60_000, 1000);
    device.shows("V25\n1", true);
    let late = Request::Arm {
        term: 7,
        deadline: deadline.minus(Duration::from_millis(100)),
        margin: Duration::from_secs(1),
    };
    assert_eq!(agent.ask(&late), Report::Armed { term: 7, deadline });
    device.shows("V25\n1", true);
    agent.armed(7, 60_000, 1000);
    device.shows("V25\n11", true);
    // A restart in place happens under the same watchdog.
    agent.send(&Request::End);
    agent.recv_until(&Report::Ended);
    device.shows("V25\n11", true);
    assert_eq!(agent.ask(&Request::Disarm), Report::Disarmed);
    device.shows("V25\n11V", false);
    agent.armed(8, 60_000, 1000);
    device.shows("V25\n11VV25\n1", true);
}

#[test]
fn postgres_has_ended_before_it_would_fire() {
    let world = World::new();
    let (agent, mut device) = required(&world, 3);
    let before = Boottime::now();
    agent.armed(7, 60_000, 1000);
    let fires_at = before.plus(Duration::from_secs(3));
    agent.started(&world.start(true));
    let backend = world.backend();
    freeze(agent.pid);
    wait_until_dead(backend);
    device.comes_to("V3\n1V", false);
    assert!(Boottime::now() < fires_at);
    signal(agent.pid, Signal::CONT);
    assert_eq!(agent.recv(), Report::Fenced { term: 7 });
    agent.recv_until(&Report::Ended);
}

#[test]
fn a_frozen_keeper_lets_it_fire_and_so_does_one_that_is_killed() {
    let mut world = World::new();
    let (agent, mut device) = required(&world, 25);
    agent.armed(7, 3000, 2000);
    agent.started(&world.start(true));
    let backend = world.backend();
    world.sentinel();
    freeze(world.keeper());
    wait_until_dead(backend);
    device.shows("V25\n1", true);
    signal(world.keeper(), Signal::KILL);
    device.comes_to("V25\n1", false);
    wait_until("the sentinel leaves", || world.is_unlocked());
    world.replace_keeper();
    world.agent();
}

#[test]
fn it_is_stopped_in_pause_and_opened_again_after_it() {
    let world = World::new();
    let (agent, mut device) = required(&world, 25);
    agent.armed(7, 60_000, 1000);
    agent.started(&world.start(true));
    assert_eq!(agent.ask(&Request::Pause), Report::Paused);
    device.shows("V25\n1V", false);
    agent.armed(7, 60_000, 1000);
    device.shows("V25\n1VV25\n1", true);
}

#[test]
fn a_keeper_that_stops_in_order_stops_it() {
    let mut world = World::new();
    let (agent, mut device) = required(&world, 25);
    agent.armed(7, 60_000, 1000);
    agent.started(&world.start(true));
    let backend = world.backend();
    agent.send(&leave(3));
    agent.exit();
    assert_eq!(world.outcome().code(), Some(3));
    wait_until_dead(backend);
    device.shows("V25\n1V", false);
}

#[test]
fn it_runs_on_through_an_upgrade() {
    let world = World::new();
    let (agent, mut device) = required(&world, 25);
    agent.armed(7, 60_000, 1000);
    world.sentinel();
    for written in ["V25\n11", "V25\n111"] {
        world.install();
        world.upgrade();
        agent.armed(7, 60_000, 1000);
        device.shows(written, true);
    }
    assert_eq!(agent.ask(&Request::Disarm), Report::Disarmed);
    device.shows("V25\n111V", false);
}

#[test]
fn other_times_count_from_the_next_deadline_on_and_switching_off_counts_at_once() {
    let world = World::new();
    let (agent, mut device) = required(&world, 25);
    agent.armed(7, 60_000, 1000);
    assert_eq!(
        told(&agent, settings(&world, WatchdogMode::Required, 55)),
        WatchdogState::Usable
    );
    device.shows("V25\n1", true);
    agent.armed(7, 60_000, 1000);
    device.shows("V25\n11V55\n1", true);
    assert_eq!(
        told(&agent, settings(&world, WatchdogMode::Off, 55)),
        WatchdogState::Off
    );
    device.shows("V25\n11V55\n1V", false);
    agent.armed(7, 60_000, 1000);
    device.shows("V25\n11V55\n1V", false);
}

#[test]
fn where_it_is_required_nothing_is_armed_without_it() {
    let world = World::new();
    let (agent, _) = world.agent();
    fs::write(world.path("watchdog"), "").unwrap();
    let mut plain = settings(&world, WatchdogMode::Required, 25);
    plain.driver = WatchdogDriver::Linux;
    assert_eq!(told(&agent, plain.clone()), WatchdogState::Unusable);
    assert_eq!(
        agent.ask(&arm(7, 60_000, 1000)),
        refused(RequestKind::Arm, Refusal::WatchdogUnusable)
    );
    assert_eq!(
        agent.ask(&world.start(true)),
        refused(RequestKind::Start, Refusal::NotArmed),
        "a refused deadline is none"
    );
    // As far as there is one: a file takes pings too.
    plain.mode = WatchdogMode::Automatic;
    assert_eq!(told(&agent, plain.clone()), WatchdogState::Usable);
    agent.armed(7, 60_000, 1000);
    assert!(fs::read_to_string(world.path("watchdog")).unwrap().ends_with('1'));
    plain.device = world.path("nothing");
    assert_eq!(
        told(&agent, plain),
        WatchdogState::Usable,
        "the open one is in use until then"
    );
    agent.armed(7, 60_000, 1000);
    assert_eq!(
        agent.recv(),
        Report::Watchdog {
            state: WatchdogState::Unusable
        }
    );
}

#[test]
fn an_agent_hears_when_the_device_appears() {
    let world = World::new();
    let (agent, _) = world.agent();
    assert_eq!(
        told(&agent, settings(&world, WatchdogMode::Required, 25)),
        WatchdogState::Unusable
    );
    let _device = Device::new(&world);
    assert_eq!(
        agent.recv(),
        Report::Watchdog {
            state: WatchdogState::Usable
        }
    );
    signal(agent.pid, Signal::KILL);
    let (_next, hello) = world.agent();
    assert_eq!(hello.watchdog, WatchdogState::Usable);
}

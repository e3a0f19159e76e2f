//! A keeper with a relay for an agent: the test itself says what the agent says, and hears what it hears.

#![expect(
    clippy::unwrap_used,
    reason = "as in the tests themselves: what fails here ends the test"
)]

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::Duration;

use pgherd_keeper::clock::Boottime;
use pgherd_keeper::protocol::{ExitKind, Hello, Report, Request, Start};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use rustix::net::{accept_with, bind, listen, recv, send, socket_with};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const ROLE: &str = env!("CARGO_BIN_EXE_pgherd-keeper-test-role");
/// After this a test gives up waiting; nothing takes that long unless it never comes.
const PATIENCE: Duration = Duration::from_secs(20);
/// Messages that the agent takes for itself.
const EXIT: u8 = 255;
const TOOL: u8 = 254;

/// A keeper's process and the directory that it works in.
pub(crate) struct World {
    dir: TempDir,
    keeper: Child,
    control: OwnedFd,
}

impl World {
    /// Works as this user, in a directory that it may enter, and has no data directory yet. Without a user it works as
    /// whoever runs the test.
    pub(crate) fn of_user(user: Option<(u32, u32)>) -> Self {
        let dir = TempDir::new().unwrap();
        fs::copy(ROLE, dir.path().join("pgherd")).unwrap();
        let control = listen_at(dir.path());
        if let Some((uid, gid)) = user {
            for path in [
                dir.path().to_owned(),
                dir.path().join("pgherd"),
                dir.path().join("control"),
            ] {
                chown(path, Some(uid), Some(gid)).unwrap();
            }
        }
        let keeper = spawn_keeper_of(user, dir.path());
        Self { dir, keeper, control }
    }

    /// As `replace_keeper`, for a world of this user.
    pub(crate) fn replace_keeper_of(&mut self, user: Option<(u32, u32)>) {
        self.keeper.wait().unwrap();
        self.keeper = spawn_keeper_of(user, self.dir.path());
    }

    /// A keeper that gives its agent ten seconds to stop.
    pub(crate) fn new() -> Self {
        Self::with(&["10000"])
    }

    pub(crate) fn with(args: &[&str]) -> Self {
        let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("cargo has made the directory");
        fs::create_dir(dir.path().join("data")).expect("the directory is new");
        // Under a server's name, by which the sentinel knows it.
        fs::hard_link(ROLE, dir.path().join("postgres")).expect("both lie in cargo's target directory");
        // What the keeper starts, and becomes by an upgrade.
        fs::hard_link(ROLE, dir.path().join("pgherd")).unwrap();
        let control = listen_at(dir.path());
        let keeper = spawn_keeper(dir.path(), args);
        Self { dir, keeper, control }
    }

    /// Another keeper in the same place; the first one has been killed.
    pub(crate) fn replace_keeper(&mut self) {
        self.keeper.wait().unwrap();
        self.keeper = spawn_keeper(self.dir.path(), &["10000"]);
    }

    /// Replaces the program as a package does: another file takes its name.
    pub(crate) fn install(&self) {
        fs::copy(ROLE, self.path("pgherd.new")).unwrap();
        fs::rename(self.path("pgherd.new"), self.path("pgherd")).unwrap();
    }

    /// Replaces the program by a shell script, whose directory is the variable `dir` and which knows the real program as
    /// `role`. What the script says to a dry start is its first part.
    pub(crate) fn install_script(&self, when_dry: &str, otherwise: &str) {
        let dir = self.dir.path().display();
        let script = format!(
            "#!/bin/sh\ndir={dir}; role={ROLE}\nif [ -n \"$PGHERD_KEEPER_DRY_START\" ]; then\n{when_dry}\nfi\n{otherwise}\n"
        );
        self.install_raw(&script);
    }

    /// Replaces the program by a script as it is.
    pub(crate) fn install_raw(&self, script: &str) {
        fs::write(self.path("pgherd.new"), script).unwrap();
        fs::set_permissions(self.path("pgherd.new"), Permissions::from_mode(0o700)).unwrap();
        fs::rename(self.path("pgherd.new"), self.path("pgherd")).unwrap();
    }

    /// Asks the keeper to become what `install` has put in place, and waits until it has.
    pub(crate) fn upgrade(&self) {
        assert!(!self.is_upgraded());
        signal(self.keeper(), Signal::USR2);
        wait_until("the keeper is the new program", || self.is_upgraded());
    }

    /// Whether the keeper runs the program that is in place now.
    pub(crate) fn is_upgraded(&self) -> bool {
        let inode = |path: PathBuf| fs::metadata(path).unwrap().ino();
        inode(format!("/proc/{}/exe", self.keeper().as_raw_nonzero()).into()) == inode(self.path("pgherd"))
    }

    /// The next agent that the keeper starts, and what it is told first.
    pub(crate) fn agent(&self) -> (Agent, Hello) {
        readable(&self.control, "an agent");
        let link = accept_with(&self.control, SocketFlags::CLOEXEC).unwrap();
        readable(&link, "the agent's number");
        let mut number = [0; 4];
        recv(&link, &mut number, RecvFlags::empty()).unwrap();
        let agent = Agent {
            link,
            pid: Pid::from_raw(i32::from_ne_bytes(number)).unwrap(),
        };
        match agent.recv() {
            Report::Hello(hello) => (agent, hello),
            report => panic!("the first report is {report:?}"),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn keeper(&self) -> Pid {
        Pid::from_child(&self.keeper)
    }

    pub(crate) fn start(&self, writable: bool) -> Request {
        let args = vec![OsString::from("postmaster"), self.path("data").into()];
        Request::Start(Start {
            writable,
            program: self.path("postgres"),
            args,
            env: Vec::new(),
        })
    }

    /// A postmaster with its backend, started by somebody else.
    pub(crate) fn start_elsewhere(&self) -> Child {
        Command::new(self.path("postgres"))
            .arg("postmaster")
            .arg(self.path("data"))
            .spawn()
            .unwrap()
    }

    /// Waits until the backend writes; returns its number.
    pub(crate) fn backend(&self) -> Pid {
        let backend = self.pid_in("data/backend");
        self.writes_after(Boottime::now());
        backend
    }

    /// The process number in a file, once it is there.
    pub(crate) fn pid_in(&self, file: &str) -> Pid {
        let path = self.path(file);
        wait_until(&format!("{file} appears"), || path.exists());
        Pid::from_raw(fs::read_to_string(path).unwrap().parse().unwrap()).unwrap()
    }

    /// Waits until the backend has written at a later time than this.
    pub(crate) fn writes_after(&self, time: Boottime) {
        wait_until("the backend writes", || {
            self.last_write().is_some_and(|write| write > time)
        });
    }

    /// When the backend has written last.
    pub(crate) fn last_write(&self) -> Option<Boottime> {
        let bytes = fs::read(self.path("data/heartbeat")).ok()?;
        Some(Boottime::from_nanos(u64::from_ne_bytes(bytes.try_into().ok()?)))
    }

    /// The keeper's sentinel, once it runs.
    pub(crate) fn sentinel(&self) -> Pid {
        let mut sentinel = None;
        wait_until("a sentinel runs", || {
            sentinel = children(self.keeper())
                .into_iter()
                .find(|pid| command_line(*pid).contains("sentinel"));
            sentinel.is_some()
        });
        sentinel.unwrap()
    }

    /// Waits until the keeper has exited.
    pub(crate) fn outcome(&mut self) -> ExitStatus {
        self.outcome_while(|_| {})
    }

    /// Whether neither a keeper nor a sentinel holds the runtime directory.
    pub(crate) fn is_unlocked(&self) -> bool {
        let lock = File::open(self.path("run/lock"));
        lock.is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok())
    }

    /// SIGKILL to what a keeper in pause has left behind.
    fn kill_left_behind(&self) {
        for file in ["data/postmaster", "data/backend"] {
            let number = fs::read_to_string(self.path(file)).ok();
            let pid = number.and_then(|number| Pid::from_raw(number.parse().ok()?));
            if let Some(pid) = pid.filter(|pid| command_line(*pid).contains(&*self.dir.path().to_string_lossy())) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }

    /// Does something to the keeper again and again until it has exited.
    pub(crate) fn outcome_while(&mut self, act: impl Fn(Pid)) -> ExitStatus {
        let mut status = None;
        wait_until("the keeper exits", || {
            act(self.keeper());
            status = self.keeper.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for World {
    /// Has the keeper end everything that it started. After a failure the sentinel does, which knows the instance by its
    /// directory, so that this must not be removed before.
    fn drop(&mut self) {
        if thread::panicking() {
            let _ = self.keeper.kill();
            let _ = self.keeper.wait();
            let until = Boottime::now().plus(PATIENCE);
            while !self.is_unlocked() && Boottime::now() < until {
                thread::park_timeout(Duration::from_millis(10));
            }
            self.kill_left_behind();
        } else if self.keeper.try_wait().is_ok_and(|status| status.is_none()) {
            signal(self.keeper(), Signal::CONT);
            self.outcome_while(|keeper| signal(keeper, Signal::TERM));
        }
    }
}

/// One agent's process, which passes messages on.
pub(crate) struct Agent {
    link: OwnedFd,
    pub(crate) pid: Pid,
}

impl Agent {
    pub(crate) fn send(&self, request: &Request) {
        let mut message = Vec::new();
        request.encode(&mut message).unwrap();
        self.send_raw(&message);
    }

    pub(crate) fn send_raw(&self, message: &[u8]) {
        send(&self.link, message, SendFlags::NOSIGNAL).unwrap();
    }

    pub(crate) fn exit(&self) {
        self.send_raw(&[EXIT]);
    }

    /// Has the agent start a tool, whose number appears in the file `tool`.
    pub(crate) fn start_tool(&self) {
        self.send_raw(&[TOOL]);
    }

    pub(crate) fn recv(&self) -> Report {
        readable(&self.link, "a report");
        let mut buffer = vec![0; 70_000];
        let (length, _) = recv(&self.link, buffer.as_mut_slice(), RecvFlags::empty()).unwrap();
        Report::decode(&buffer[..length]).unwrap()
    }

    /// Sends a request and receives the answer.
    pub(crate) fn ask(&self, request: &Request) -> Report {
        self.send(request);
        self.recv()
    }

    /// Receives until this report has come.
    pub(crate) fn recv_until(&self, wanted: &Report) {
        while self.recv() != *wanted {}
    }

    /// Hears that the postmaster has ended like this, and then that nothing is left of the instance.
    pub(crate) fn hears_the_end_of(&self, postmaster: Pid, status: ExitKind) {
        let pid = postmaster;
        assert_eq!(self.recv(), Report::PostmasterExited { pid, status });
        assert_eq!(self.recv(), Report::Ended);
    }

    /// Starts PostgreSQL and returns the postmaster.
    pub(crate) fn started(&self, start: &Request) -> Pid {
        match self.ask(start) {
            Report::Started { pid } => pid,
            report => panic!("not started: {report:?}"),
        }
    }

    /// As `started`, after reports about what was before.
    pub(crate) fn started_at_last(&self, start: &Request) -> Pid {
        self.send(start);
        loop {
            match self.recv() {
                Report::Started { pid } => return pid,
                Report::Stranger { pid: None } | Report::Ended => {}
                report => panic!("not started: {report:?}"),
            }
        }
    }

    /// Adopts the postmaster that others have started.
    pub(crate) fn adopted(&self) -> Pid {
        match self.ask(&Request::Adopt { writable: true }) {
            Report::Adopted { pid } => pid,
            report => panic!("not adopted: {report:?}"),
        }
    }

    /// Arms a term for so many milliseconds, the last so many of which are the margin. Returns the deadline.
    pub(crate) fn armed(&self, term: u64, millis: u64, margin: u64) -> Boottime {
        let request = arm(term, millis, margin);
        let Request::Arm { deadline, .. } = request else {
            panic!("it arms")
        };
        assert_eq!(self.ask(&request), Report::Armed { term, deadline });
        deadline
    }
}

pub(crate) fn arm(term: u64, millis: u64, margin: u64) -> Request {
    let deadline = Boottime::now().plus(Duration::from_millis(millis));
    Request::Arm {
        term,
        deadline,
        margin: Duration::from_millis(margin),
    }
}

/// An agent's farewell that leaves nothing of PostgreSQL behind.
pub(crate) const fn leave(code: u8) -> Request {
    Request::Leave {
        code,
        keep_postgres: false,
    }
}

pub(crate) fn signal(pid: Pid, signal: Signal) {
    kill_process(pid, signal).unwrap();
}

/// Whether the process has not ended; one that only waits to be reaped has.
pub(crate) fn is_alive(pid: Pid) -> bool {
    let state = state(pid);
    !state.is_empty() && state != "Z" && state != "X"
}

pub(crate) fn is_frozen(pid: Pid) -> bool {
    state(pid) == "T"
}

/// Stops the process, and waits until it stands still.
pub(crate) fn freeze(pid: Pid) {
    signal(pid, Signal::STOP);
    wait_until("the process stands still", || is_frozen(pid));
}

pub(crate) fn wait_until_dead(pid: Pid) {
    wait_until("the process ends", || !is_alive(pid));
}

pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Boottime::now().plus(PATIENCE);
    while !condition() {
        assert!(Boottime::now() < until, "in vain: {what}");
        thread::park_timeout(Duration::from_millis(2));
    }
}

fn listen_at(dir: &Path) -> OwnedFd {
    let control = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    bind(&control, &SocketAddrUnix::new(dir.join("control")).unwrap()).unwrap();
    listen(&control, 8).unwrap();
    control
}

fn spawn_keeper_of(user: Option<(u32, u32)>, dir: &Path) -> Child {
    let mut keeper = Command::new(dir.join("pgherd"));
    keeper.arg("keeper").arg(dir).arg("10000");
    if let Some((uid, gid)) = user {
        keeper.uid(uid).gid(gid);
    }
    keeper.spawn().unwrap()
}

fn spawn_keeper(dir: &Path, args: &[&str]) -> Child {
    Command::new(ROLE).arg("keeper").arg(dir).args(args).spawn().unwrap()
}

fn readable(fd: &OwnedFd, what: &str) {
    let timeout = Timespec {
        tv_sec: PATIENCE.as_secs().try_into().unwrap(),
        tv_nsec: 0,
    };
    let ready = poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout)).unwrap();
    assert!(ready > 0, "in vain: {what}");
}

fn state(pid: Pid) -> String {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit_once(") ")
        .and_then(|(_, rest)| rest.split(' ').next())
        .unwrap_or_default()
        .to_owned()
}

pub(crate) fn command_line(pid: Pid) -> String {
    fs::read_to_string(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default()
}

fn children(pid: Pid) -> Vec<Pid> {
    let number = pid.as_raw_nonzero();
    let list = fs::read_to_string(format!("/proc/{number}/task/{number}/children")).unwrap_or_default();
    list.split_ascii_whitespace()
        .filter_map(|child| Pid::from_raw(child.parse().ok()?))
        .collect()
}

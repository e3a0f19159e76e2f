//! The keeper's loop: it is woken by anything, then looks at everything, the fence first.

use std::ffi::OsString;
use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock, openat};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, getpid, set_child_subreaper, wait};

use crate::child::{Child, Service};
use crate::clock::{Alarm, Boottime};
use crate::ending::{Departure, Ending, Step, grace_within};
use crate::error::{Doing, KeeperError};
use crate::fence::Fence;
use crate::instance::{Household, Instance};
use crate::leaving::Life;
use crate::log::Log;
use crate::memo::Memo;
use crate::postmaster::Postmaster;
use crate::protocol::{ExitKind, Hello, Report};
use crate::seat::Seat;
use crate::sentinel::SENTINEL_ENV;
use crate::signals::Signals;
use crate::surroundings::Surroundings;
use crate::upgrade::Upgrade;
use crate::watchdog::Watchdog;
use crate::word::{Notice, Word};

/// The longest time between two turns of the loop, so that nothing that was missed is missed for long.
pub(crate) const TURN_MAX: Duration = Duration::from_secs(1);
/// How long to wait for the sentinel of a keeper that has just died: it ends what that one left running.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(3);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// What a keeper runs, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeeperConfig {
    /// The program of agent, proxy and sentinel: this binary, by an absolute path. After an upgrade of the package it must
    /// name the new file, which what /proc/self/exe says by then does not.
    pub program: PathBuf,
    /// Arguments of the keeper itself, with which an upgrade executes `program`. See [`resume`](crate::resume).
    pub keeper_args: Vec<OsString>,
    /// Arguments of the agent, which is told by [`crate::LINK_ENV`] that its standard input is a [`crate::KeeperLink`].
    pub agent_args: Vec<OsString>,
    /// Arguments of a proxy to run beside; none for no proxy.
    pub proxy_args: Option<Vec<OsString>>,
    /// Arguments of the sentinel, which is told by [`SENTINEL_ENV`] whose sentinel it is.
    pub sentinel_args: Vec<OsString>,
    /// PostgreSQL's data directory. It need not exist yet.
    pub data_dir: PathBuf,
    /// A directory of this keeper's own, best in memory. Created with mode 0700 if it does not exist.
    pub runtime_dir: PathBuf,
    /// After SIGTERM: how long agent and proxy may take before everything is ended.
    pub stop_timeout: Duration,
}

/// Why the keeper's work is over. No process of the instance is left then, unless the fence was paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeeperOutcome {
    /// It was told to stop, and the agent did not say with which code.
    Stopped,
    /// The agent said that it leaves, whether it was told to stop or not, and with which exit code.
    AgentLeft {
        /// The code to exit with.
        code: u8,
    },
}

/// Keeps agent, proxy, sentinel and PostgreSQL until told to stop. To be called once, by a process with one thread.
///
/// # Errors
/// When the system refuses what the fence rests on, or another keeper holds the runtime directory. The caller must exit
/// then, so that the sentinel ends what runs.
pub fn run(config: KeeperConfig) -> Result<KeeperOutcome, KeeperError> {
    Keeper::new(config)?.live()
}

pub(crate) struct Keeper {
    pub(crate) config: KeeperConfig,
    pub(crate) lock: OwnedFd,
    pub(crate) log: Log,
    pub(crate) alarm: Alarm,
    pub(crate) signals: Signals,
    pub(crate) memo: Memo,
    pub(crate) word: Word,
    pub(crate) fence: Fence,
    pub(crate) instance: Instance,
    pub(crate) ending: Option<Ending>,
    pub(crate) postmaster: Option<Postmaster>,
    pub(crate) surroundings: Surroundings,
    pub(crate) watchdog: Watchdog,
    pub(crate) agent: Seat,
    pub(crate) proxy: Option<Service>,
    pub(crate) sentinel: Service,
    pub(crate) life: Life,
    pub(crate) upgrade: Upgrade,
}

impl Keeper {
    fn new(config: KeeperConfig) -> Result<Self, KeeperError> {
        set_child_subreaper(Some(getpid())).doing("becoming the parent of orphans")?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&config.runtime_dir)
            .doing("creating the runtime directory")?;
        let lock = lock(&config.runtime_dir)?;
        let now = Boottime::now();
        Ok(Self {
            lock,
            log: Log::new(),
            alarm: Alarm::new().doing("creating a timer")?,
            signals: Signals::new().doing("catching signals")?,
            memo: Memo::load(&config.runtime_dir).doing("reading the memo in the runtime directory")?,
            word: Word::new().doing("creating the shared word")?,
            fence: Fence::new(),
            instance: Instance::new(config.data_dir.clone()).doing("looking at /proc")?,
            ending: None,
            postmaster: None,
            surroundings: Surroundings::default(),
            watchdog: Watchdog::new(),
            agent: Seat::new(now),
            proxy: config.proxy_args.is_some().then(|| Service::new(now)),
            sentinel: Service::new(now),
            life: Life::Running,
            upgrade: Upgrade::None,
            config,
        })
    }

    pub(crate) fn live(mut self) -> Result<KeeperOutcome, KeeperError> {
        loop {
            if let Some(outcome) = self.turn()? {
                // It would leave by itself, but a new keeper would have to wait for that.
                self.sentinel.kill();
                // PostgreSQL has ended, or is left alone on purpose.
                self.watchdog.stop(&self.log);
                return Ok(outcome);
            }
            self.wait()?;
        }
    }

    /// One turn looks at everything, whatever woke it: nothing of it blocks, and turns are rare.
    fn turn(&mut self) -> Result<Option<KeeperOutcome>, KeeperError> {
        self.enforce_fence(Boottime::now());
        let now = Boottime::now();
        self.heed_signals(now);
        self.heed_agent()?;
        self.reap(now)?;
        self.go_on_ending(Boottime::now())?;
        self.look_around(now);
        self.start_services(now);
        self.agent.flush();
        self.go_on_upgrading(Boottime::now());
        Ok(self.go_on_leaving(now))
    }

    fn wait(&self) -> Result<(), KeeperError> {
        self.alarm.set(self.wake_at(Boottime::now())).doing("setting a timer")?;
        let mut fds = Vec::with_capacity(11);
        let readable = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        fds.push(readable(self.alarm.as_fd()));
        fds.extend(self.signals.fds().map(readable));
        let services = [Some(&self.agent.service), Some(&self.sentinel), self.proxy.as_ref()]
            .into_iter()
            .flatten();
        let children = services.filter_map(Service::child).chain(self.upgrade.child());
        fds.extend(children.map(|child| readable(child.as_fd())));
        fds.extend(self.postmaster.as_ref().map(|postmaster| readable(postmaster.as_fd())));
        fds.extend(self.agent.poll_fd());
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error).doing("waiting for something to happen"),
        }
    }

    fn wake_at(&self, now: Boottime) -> Boottime {
        let (services, until) = match self.life {
            Life::Running => (
                [self.agent.wake_at(), self.proxy.as_ref().and_then(Service::wake_at)],
                None,
            ),
            Life::Stopping { until, .. } => ([None, None], (now < until).then_some(until)),
            Life::Leaving {
                until, keeps_postgres, ..
            } => {
                let sweep = if keeps_postgres { self.agent.sweep_at() } else { None };
                ([sweep, None], (now < until).then_some(until))
            }
        };
        let ending = self.ending.as_ref().map(Ending::wake_at);
        let others = [
            self.fence.wake_at(),
            ending,
            self.sentinel.wake_at(),
            self.upgrade.wake_at(),
            until,
            Some(now.plus(TURN_MAX)),
        ];
        services.into_iter().chain(others).flatten().min().unwrap_or(now)
    }

    /// Begins the end of PostgreSQL when the deadline less its margin has passed.
    pub(crate) fn enforce_fence(&mut self, now: Boottime) {
        let Some(armed) = self.fence.begin(now) else { return };
        self.log
            .line(format_args!("term {} was not renewed, ending PostgreSQL", armed.term));
        self.begin_ending(now, grace_within(armed.margin));
        self.agent.report(&Report::Fenced { term: armed.term });
    }

    /// Lets the sentinel know of the deadline in force, or of the pause.
    pub(crate) fn publish_notice(&mut self) -> Result<(), KeeperError> {
        self.word
            .write(Notice::of(&self.fence))
            .doing("writing the shared word")
    }

    pub(crate) fn household(&self) -> Household {
        Household {
            agent: self.agent.service.pid(),
            proxy: self.proxy.as_ref().and_then(Service::pid),
            sentinel: self.sentinel.pid(),
            dry_start: self.upgrade.child().map(Child::pid),
            postmaster: self.postmaster.as_ref().map(Postmaster::pid),
        }
    }

    pub(crate) fn instance_left(&mut self) -> bool {
        let household = self.household();
        self.ending.is_some() || self.instance.is_left(Some(&household))
    }

    pub(crate) fn begin_ending(&mut self, now: Boottime, grace: Duration) {
        if let Some(ending) = &mut self.ending {
            ending.hurry(now, grace);
            return;
        }
        let household = self.household();
        self.list_adopted();
        let asked = match &self.postmaster {
            Some(postmaster) => postmaster.signal(Signal::QUIT).is_ok(),
            None => self.instance.quit_strangers(Some(&household)).unwrap_or(false),
        };
        let ending = if asked {
            Ending::after_quit(now, grace)
        } else {
            Ending::without_postmaster(now)
        };
        self.ending = Some(ending);
    }

    fn go_on_ending(&mut self, now: Boottime) -> Result<(), KeeperError> {
        let household = self.household();
        let is_paused = self.fence.is_paused();
        let Some(ending) = &mut self.ending else { return Ok(()) };
        let left = match ending.step(now) {
            Step::Wait => true,
            // In pause an operator restarts by hand, and is not to find the next server killed with what the last one left.
            Step::Look | Step::Kill
                if is_paused && ending.is_only_seen() && self.instance.living_postmaster().is_some() =>
            {
                false
            }
            Step::Look => self.instance.is_left(Some(&household)),
            Step::Kill => self.instance.kill(Some(&household)) != Ok(0),
        };
        // A postmaster that has not been reaped is reported first.
        if left || self.postmaster.is_some() {
            return Ok(());
        }
        self.ending = None;
        self.instance.forget();
        self.fence.instance_ended();
        self.publish_notice()?;
        if self.fence.deadline().is_none() {
            self.watchdog.stop(&self.log);
        }
        self.agent.report(&Report::Ended);
        Ok(())
    }

    fn heed_signals(&mut self, now: Boottime) {
        self.signals.forget_children();
        if self.signals.reload() {
            self.agent.report(&Report::Reload);
            self.signal_proxy(Signal::HUP);
        }
        if self.signals.stop() {
            self.told_to_stop(now);
        }
        if self.signals.upgrade() {
            self.told_to_upgrade(now);
        }
    }

    /// Takes note of every child that has ended, and of every orphan: nobody else will.
    fn reap(&mut self, now: Boottime) -> Result<(), KeeperError> {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.reaped(pid, status, now)?,
                Ok(None) | Err(Errno::CHILD) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).doing("reaping children"),
            }
        }
        if let Some(postmaster) = self.postmaster.take_if(|postmaster| postmaster.has_vanished()) {
            self.postmaster_exited(postmaster.pid(), ExitKind::Unknown, now);
        }
        Ok(())
    }

    fn reaped(&mut self, pid: Pid, status: WaitStatus, now: Boottime) -> Result<(), KeeperError> {
        let status = exit_kind(status);
        if self.postmaster.take_if(|postmaster| postmaster.pid() == pid).is_some() {
            self.postmaster_exited(pid, status, now);
        } else if self.agent.service.reaped(pid, now) {
            self.log.line(format_args!("agent {pid} ended: {status}"));
            self.agent_died(now)?;
        } else if self.proxy.as_mut().is_some_and(|proxy| proxy.reaped(pid, now)) {
            self.log.line(format_args!("proxy {pid} ended: {status}"));
        } else if self.sentinel.reaped(pid, now) {
            self.log.line(format_args!("sentinel {pid} ended: {status}"));
        } else if self.upgrade.child().is_some_and(|child| child.pid() == pid) {
            self.dry_start_ended(status);
        }
        Ok(())
    }

    fn postmaster_exited(&mut self, pid: Pid, status: ExitKind, now: Boottime) {
        self.log.line(format_args!("postmaster {pid} ended: {status}"));
        let departure = match status {
            ExitKind::Code(_) => Departure::Orderly,
            ExitKind::Signal(_) => Departure::Killed,
            ExitKind::Unknown if self.instance.names(pid) => Departure::Killed,
            ExitKind::Unknown => Departure::Orderly,
        };
        match &mut self.ending {
            Some(ending) => ending.postmaster_died(now, departure),
            None => self.ending = Some(Ending::after_exit(now, departure)),
        }
        self.agent.report(&Report::PostmasterExited { pid, status });
    }

    fn agent_died(&mut self, now: Boottime) -> Result<(), KeeperError> {
        self.heed_last_words()?;
        self.agent.vacate(now);
        self.agent_gone(now);
        Ok(())
    }

    fn start_services(&mut self, now: Boottime) {
        if self.sentinel.is_due(now)
            && let Err(error) = self.start_sentinel(now)
        {
            self.log.line(format_args!("starting the sentinel: {error}"));
        }
        if self.life != Life::Running {
            return;
        }
        if self.agent_swept(now)
            && self.agent.service.is_due(now)
            && let Err(error) = self.start_agent(now)
        {
            self.log.line(format_args!("starting the agent: {error}"));
        }
        if let (Some(proxy), Some(args)) = (&mut self.proxy, &self.config.proxy_args)
            && proxy.is_due(now)
            && let Err(error) = proxy.started(
                Child::spawn(Command::new(&self.config.program).args(args).stdin(Stdio::null())),
                now,
            )
        {
            self.log.line(format_args!("starting the proxy: {error}"));
        }
    }

    /// Whether nothing of the last agent is left. In pause a server without a postmaster of ours may be the operator's,
    /// and could be taken for something of the agent's.
    pub(crate) fn agent_swept(&mut self, now: Boottime) -> bool {
        let household = self.household();
        let spares_all = self.fence.is_paused() && household.postmaster.is_none();
        let kill = || match spares_all {
            true => Ok(0),
            false => self.instance.kill_orphans(&household),
        };
        !self.agent.sweep(now, kill)
    }

    /// The sentinel's standard output is our lock, so that a new keeper waits until it has done its work.
    fn start_sentinel(&mut self, now: Boottime) -> io::Result<()> {
        let mut command = Command::new(&self.config.program);
        command
            .args(&self.config.sentinel_args)
            .env(SENTINEL_ENV, getpid().to_string());
        let inherited = self
            .word
            .share()
            .map_err(io::Error::from)
            .and_then(|word| Ok((word, self.lock.try_clone()?)));
        let child = inherited.and_then(|(word, lock)| Child::spawn(command.stdin(word).stdout(lock)));
        self.sentinel.started(child, now)
    }

    fn start_agent(&mut self, now: Boottime) -> io::Result<()> {
        self.agent
            .start(Command::new(&self.config.program).args(&self.config.agent_args), now)?;
        self.surroundings.stranger = self.stranger();
        self.surroundings.watchdog = self.watchdog.state(now);
        let hello = Hello {
            memo: self.memo.bytes().to_vec(),
            armed: self.fence.armed().map(|armed| (armed.term, armed.deadline)),
            fenced: self.fence.last_final_term(),
            postmaster: self.postmaster.as_ref().map(Postmaster::pid),
            instance_left: self.instance_left(),
            stopping: self.life != Life::Running,
            paused: self.fence.is_paused(),
            stranger: self.surroundings.stranger,
            adopted: self.postmaster.as_ref().is_some_and(Postmaster::is_adopted),
            watchdog: self.surroundings.watchdog,
        };
        self.surroundings.left_told = hello.instance_left;
        self.agent.report(&Report::Hello(hello));
        Ok(())
    }
}

fn exit_kind(status: WaitStatus) -> ExitKind {
    match status.terminating_signal() {
        Some(signal) => ExitKind::Signal(signal),
        None => ExitKind::Code(status.exit_status().unwrap_or(-1)),
    }
}

/// Makes sure that no other keeper uses the directory. The lock is held as long as this keeper or its sentinel lives.
fn lock(runtime_dir: &Path) -> Result<OwnedFd, KeeperError> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    let file = openat(CWD, runtime_dir.join("lock"), flags, Mode::RUSR | Mode::WUSR).doing("opening the lock")?;
    let until = Boottime::now().plus(LOCK_WAIT_MAX);
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::AGAIN) if Boottime::now() < until => thread::park_timeout(LOCK_PAUSE),
            Err(Errno::AGAIN) => return Err(KeeperError::Busy),
            Err(error) => return Err(error).doing("taking the lock"),
        }
    }
}

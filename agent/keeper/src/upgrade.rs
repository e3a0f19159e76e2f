//! The keeper's upgrade: the new program is started dry, and if it understands the state, this process becomes it.
//!
//! Number, parent and children of the process stay as they are; nobody notices. It is put off while anything is under
//! way that the state does not tell of.

use std::convert::Infallible;
use std::env;
use std::io;
use std::os::fd::AsFd;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use rustix::process::{getpid, set_child_subreaper};
use rustix::stdio::stdin;

use crate::child::{Child, Service};
use crate::clock::{Alarm, Boottime};
use crate::error::{Doing, KeeperError};
use crate::instance::Instance;
use crate::keeper::{Keeper, KeeperOutcome};
use crate::leaving::Life;
use crate::link::LINK_ENV;
use crate::log::Log;
use crate::memo::Memo;
use crate::postmaster::Postmaster;
use crate::process::ProcessTable;
use crate::protocol::ExitKind;
use crate::seat::Seat;
use crate::signals::{self, Signals};
use crate::state::{STATE_VERSION, State};
use crate::succession::{self, is_successor, receive, seal, unseal};
use crate::watchdog::Watchdog;
use crate::word::Word;

/// The environment variable that makes a process a dry start: it holds the version of the state to be understood, which
/// is the standard input.
const DRY_START_ENV: &str = "PGHERD_KEEPER_DRY_START";
/// How long a dry start may take.
const DRY_START_MAX: Duration = Duration::from_secs(5);
/// No exec so shortly before the fence would begin: the new program needs a moment to come to its first turn.
const ROOM_MIN: Duration = Duration::from_millis(500);
/// The exit code of a dry start that does not understand.
const NOT_UNDERSTOOD: u8 = 65;

/// Answers a keeper that asks whether this program could go on for it: `None` when nobody asks. To be called first in
/// `main`, which is to return the code and print nothing.
#[must_use]
pub fn dry_start() -> Option<ExitCode> {
    let version = env::var_os(DRY_START_ENV)?;
    let understood = version.to_str() == Some(STATE_VERSION.to_string().as_str()) && unseal(stdin()).is_ok();
    Some(if understood {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(NOT_UNDERSTOOD)
    })
}

/// Goes on for the keeper that this process was before an upgrade, until told to stop: `None` when it was none. To be
/// called in `main` before arguments or configuration are looked at, which must not come between PostgreSQL and its
/// fence: the keeper goes on with the [`KeeperConfig`](crate::KeeperConfig) that it was started with. Until then its
/// signals are blocked.
///
/// # Errors
/// Within, as [`run`](crate::run). The caller must exit then, so that the sentinel ends what runs.
#[must_use]
pub fn resume() -> Option<Result<KeeperOutcome, KeeperError>> {
    is_successor().then(|| Keeper::take_over()?.live())
}

/// How far an upgrade has come.
#[derive(Debug)]
pub(crate) enum Upgrade {
    None,
    /// As soon as nothing is under way.
    Wanted,
    /// The new program is being asked. It is killed at a time, if it has not been yet.
    DryStart {
        child: Child,
        kill_at: Option<Boottime>,
    },
    /// The new program understands the state.
    Ready,
}

impl Upgrade {
    pub(crate) fn child(&self) -> Option<&Child> {
        match self {
            Self::DryStart { child, .. } => Some(child),
            Self::None | Self::Wanted | Self::Ready => None,
        }
    }

    pub(crate) fn wake_at(&self) -> Option<Boottime> {
        match self {
            Self::DryStart { kill_at, .. } => *kill_at,
            Self::None | Self::Wanted | Self::Ready => None,
        }
    }
}

impl Keeper {
    /// Told by SIGUSR2.
    pub(crate) fn told_to_upgrade(&mut self, now: Boottime) {
        if !matches!(self.upgrade, Upgrade::None) {
            return;
        }
        if self.life != Life::Running {
            self.log.line(format_args!("no upgrade: the keeper is stopping"));
            return;
        }
        if !self.is_quiet(now) {
            self.log.line(format_args!(
                "the upgrade waits until what is under way is over and the deadline has been renewed"
            ));
        }
        self.upgrade = Upgrade::Wanted;
    }

    /// Takes the step that is due.
    pub(crate) fn go_on_upgrading(&mut self, now: Boottime) {
        let stopping = self.life != Life::Running;
        let quiet = self.is_quiet(now);
        match &mut self.upgrade {
            Upgrade::DryStart { child, kill_at } => {
                if kill_at.is_some_and(|kill_at| stopping || kill_at <= now) {
                    child.kill();
                    *kill_at = None;
                }
            }
            Upgrade::Wanted if quiet => match self.start_dry() {
                Ok(child) => {
                    let kill_at = Some(now.plus(DRY_START_MAX));
                    self.upgrade = Upgrade::DryStart { child, kill_at };
                }
                Err(error) => self.give_up_upgrade(&error),
            },
            Upgrade::Ready if quiet => match self.become_successor() {
                Ok(None) => self.upgrade = Upgrade::Wanted,
                Ok(Some(never)) => match never {},
                Err(error) => self.give_up_upgrade(&error),
            },
            // The program may be another one until things are quiet again, and is asked then.
            Upgrade::Ready => self.upgrade = Upgrade::Wanted,
            Upgrade::None | Upgrade::Wanted => {}
        }
    }

    pub(crate) fn dry_start_ended(&mut self, status: ExitKind) {
        if status == ExitKind::Code(0) {
            self.upgrade = Upgrade::Ready;
            return;
        }
        self.upgrade = Upgrade::None;
        self.log.line(format_args!(
            "no upgrade: {} does not understand this keeper's state: {status}",
            self.config.program.display()
        ));
    }

    fn give_up_upgrade(&mut self, error: &io::Error) {
        self.upgrade = Upgrade::None;
        self.log.line(format_args!("no upgrade: {error}"));
    }

    /// Whether the state tells all: no end, fence or stop is under way. A sentinel has to run, for if the new program
    /// failed all the same, it would be what is left to end PostgreSQL. A disk has to answer: the kernel ends all threads
    /// before an exec, and would wait for one that a hung disk holds, with the fence unguarded.
    fn is_quiet(&mut self, now: Boottime) -> bool {
        let has_room = self
            .fence
            .wake_at()
            .is_none_or(|fence_at| now.plus(ROOM_MIN) < fence_at);
        self.life == Life::Running
            && self.ending.is_none()
            && !self.fence.is_fencing()
            && has_room
            && self.agent.sweep_at().is_none()
            && self.sentinel.child().is_some()
            && !self.instance.disk_hangs()
    }

    /// The program is given a standard input that is no link and the variable that says it is one: a release that does
    /// not know of dry starts takes itself for an agent, and fails at once.
    fn start_dry(&self) -> io::Result<Child> {
        let state = seal(&self.state()?)?;
        Child::spawn(
            Command::new(&self.config.program)
                .args(&self.config.agent_args)
                .env(DRY_START_ENV, STATE_VERSION.to_string())
                .env(LINK_ENV, "stdin")
                .stdin(state)
                .stdout(Stdio::null()),
        )
    }

    /// Returns `None` when a signal has come first, and an error when this process stays what it is.
    fn become_successor(&mut self) -> io::Result<Option<Infallible>> {
        let state = seal(&self.state()?)?;
        let mut fds = vec![state.as_fd(), self.word.as_fd(), self.lock.as_fd()];
        fds.extend(self.agent.link.as_ref().map(AsFd::as_fd));
        fds.extend(self.watchdog.fd());
        let adopted = self.postmaster.as_ref().filter(|postmaster| postmaster.is_adopted());
        fds.extend(adopted.map(AsFd::as_fd));
        let socket = succession::pack(&fds)?;
        signals::block()?;
        let failed = match self.signals.any_waits() {
            Ok(true) => Ok(None),
            Ok(false) => {
                self.log
                    .line(format_args!("becoming {}", self.config.program.display()));
                succession::replace(&self.config.program, &self.config.keeper_args, socket).map(Some)
            }
            Err(error) => Err(error),
        };
        signals::unblock()?;
        failed
    }

    fn state(&self) -> io::Result<State> {
        let mut table = ProcessTable::open()?;
        Ok(State {
            config: self.config.clone(),
            memo: self.memo.bytes().to_vec(),
            fence: self.fence.clone(),
            postmaster: self
                .postmaster
                .as_ref()
                .map(|postmaster| postmaster.record(&mut table))
                .transpose()?,
            instance: self.instance.record(),
            watchdog: self.watchdog.record(),
            surroundings: self.surroundings.clone(),
            agent: self.agent.service.record(&mut table)?,
            proxy: self.proxy.as_ref().map(|proxy| proxy.record(&mut table)).transpose()?,
            sentinel: self.sentinel.record(&mut table)?,
            linked: self.agent.link.is_some(),
            outbox: self.agent.outbox.iter().cloned().collect(),
        })
    }

    /// Becomes what this process was before the exec.
    fn take_over() -> Result<Self, KeeperError> {
        let estate = receive().doing("taking over from the keeper before the upgrade")?;
        let state = estate.state;
        // An exec keeps this; it costs nothing to be sure.
        set_child_subreaper(Some(getpid())).doing("becoming the parent of orphans")?;
        let mut table = ProcessTable::open().doing("looking at /proc")?;
        let mut service = |record| Service::adopt(record, &mut table).doing("taking over a child");
        let agent = Seat::taken(service(state.agent)?, estate.link, state.outbox.into());
        let (proxy, sentinel) = (state.proxy.map(&mut service).transpose()?, service(state.sentinel)?);
        let postmaster = state
            .postmaster
            .map(|record| Postmaster::take_over(record, estate.adopted, &mut table));
        let instance = Instance::new(state.config.data_dir.clone()).doing("looking at /proc")?;
        let keeper = Self {
            lock: estate.lock,
            log: Log::new(),
            alarm: Alarm::new().doing("creating a timer")?,
            memo: Memo::take_over(&state.config.runtime_dir, state.memo).doing("taking over the memo")?,
            word: Word::take_over(estate.word).doing("reading the shared word")?,
            fence: state.fence,
            instance: instance.take_over(state.instance),
            ending: None,
            postmaster: postmaster.transpose().doing("taking over the postmaster")?,
            surroundings: state.surroundings,
            watchdog: Watchdog::take_over(state.watchdog, estate.watchdog),
            agent,
            proxy,
            sentinel,
            life: Life::Running,
            upgrade: Upgrade::None,
            config: state.config,
            // Signals that have waited arrive here, when all that they are about is in place.
            signals: Signals::new().doing("catching signals")?,
        };
        let version = env!("CARGO_PKG_VERSION");
        keeper.log.line(format_args!("goes on as version {version}"));
        Ok(keeper)
    }
}

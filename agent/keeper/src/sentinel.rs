//! The sentinel: a second process that knows the deadline, for the case that the keeper is frozen or killed.

use std::env;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, getppid, pidfd_open};
use rustix::stdio::stdin;

use crate::clock::{Alarm, Boottime};
use crate::ending::{Ending, GRACE_MAX, Step};
use crate::error::{Doing, KeeperError};
use crate::instance::Instance;
use crate::log::Log;
use crate::signals::disregard_stop;
use crate::word::{self, Notice};

/// The environment variable that makes a process a sentinel: it holds the keeper's process number.
pub const SENTINEL_ENV: &str = "PGHERD_SENTINEL";

/// How often the word is read while its deadline is far away: a first arming wakes nobody.
const READ_INTERVAL: Duration = Duration::from_millis(500);
/// How soon it is looked again for processes that were just sent SIGKILL.
const KILL_INTERVAL: Duration = Duration::from_millis(10);
/// How long nothing must be found after the keeper's death. A postmaster that was started in the last moment is not
/// found before it has entered the data directory.
const QUIET_MIN: Duration = Duration::from_millis(500);

/// The keeper that this process is to be the sentinel of, as its environment says.
#[must_use]
pub fn keeper_of_sentinel() -> Option<Pid> {
    let pid = env::var(SENTINEL_ENV).ok()?.parse().ok().filter(|pid| *pid > 0)?;
    Pid::from_raw(pid)
}

/// The whole life of a sentinel, whose standard input is the shared word. Returns when its keeper has died and no
/// process of the instance is left, or the keeper was in pause: then PostgreSQL is left alone.
///
/// # Errors
/// When the system refuses what the watch rests on; the keeper then starts another sentinel.
pub fn run_sentinel(keeper: Pid, data_dir: &Path) -> Result<(), KeeperError> {
    disregard_stop().doing("catching signals")?;
    let word = stdin().try_clone_to_owned().doing("taking over the shared word")?;
    let mut sentinel = Sentinel {
        word,
        instance: Instance::new(data_dir.to_owned()).doing("looking at /proc")?,
        alarm: Alarm::new().doing("creating a timer")?,
        log: Log::new(),
        killed: None,
    };
    if let Some(keeper) = open_parent(keeper)? {
        sentinel.watch(&keeper)?;
    }
    sentinel.succeed()
}

/// `None` when the keeper has died already, even if its number belongs to another process by now.
fn open_parent(keeper: Pid) -> Result<Option<OwnedFd>, KeeperError> {
    let pidfd = match pidfd_open(keeper, PidfdFlags::empty()) {
        Err(Errno::SRCH) => return Ok(None),
        result => result.doing("opening the keeper's process")?,
    };
    Ok((getppid() == Some(keeper)).then_some(pidfd))
}

struct Sentinel {
    word: OwnedFd,
    instance: Instance,
    alarm: Alarm,
    log: Log,
    /// Of which term how many were last killed.
    killed: Option<(u64, usize)>,
}

impl Sentinel {
    /// Until the keeper is dead: ends the instance when the keeper should have done so.
    fn watch(&mut self, keeper: &OwnedFd) -> Result<(), KeeperError> {
        loop {
            let wake_at = self.guard(Boottime::now())?;
            self.alarm.set(wake_at).doing("setting a timer")?;
            let mut fds = [
                PollFd::new(keeper, PollFlags::IN),
                PollFd::new(&self.alarm, PollFlags::IN),
            ];
            wait(&mut fds)?;
            if !fds[0].revents().is_empty() {
                return Ok(());
            }
        }
    }

    /// Returns when to look again. Half of the margin is the keeper's; it has no more to do in the other half.
    fn guard(&mut self, now: Boottime) -> Result<Boottime, KeeperError> {
        let Notice::Armed(armed) = word::read(&self.word).doing("reading the shared word")? else {
            self.instance.forget();
            return Ok(now.plus(READ_INTERVAL));
        };
        let act_at = armed.deadline.minus(armed.margin / 2);
        if now < act_at {
            self.instance.forget();
            return Ok(act_at.min(now.plus(READ_INTERVAL)));
        }
        match self.instance.kill(None) {
            Ok(0) => Ok(now.plus(READ_INTERVAL)),
            Ok(count) => {
                // What hangs in the kernel is killed again and again, and told of once.
                let killed = (armed.term, count);
                if self.killed.replace(killed) != Some(killed) {
                    let term = armed.term;
                    self.log.line(format_args!(
                        "the keeper let the deadline of term {term} pass, sentinel killed {count}"
                    ));
                }
                Ok(now.plus(KILL_INTERVAL))
            }
            Err(_) => Ok(now.plus(KILL_INTERVAL)),
        }
    }

    /// The keeper is dead: ends the instance, whether a deadline is set or not, for nobody watches it any more. In pause
    /// nobody is to watch it, and a keeper that is killed then leaves what one that is stopped then leaves.
    fn succeed(&mut self) -> Result<(), KeeperError> {
        // A word that cannot be read says nothing about a pause.
        if word::read(&self.word) == Ok(Notice::Paused) {
            self.log
                .line(format_args!("the keeper has died in pause, PostgreSQL is left alone"));
            return Ok(());
        }
        self.log
            .line(format_args!("the keeper has died, its sentinel ends PostgreSQL"));
        let mut now = Boottime::now();
        let quit = self.instance.quit_strangers(None).unwrap_or(false);
        let mut ending = if quit {
            Ending::after_quit(now, GRACE_MAX)
        } else {
            Ending::without_postmaster(now)
        };
        let mut quiet_since = None;
        loop {
            let left = match ending.step(now) {
                Step::Wait => None,
                Step::Look => Some(self.instance.is_left(None)),
                Step::Kill => Some(self.instance.kill(None) != Ok(0)),
            };
            if let Some(left) = left {
                quiet_since = if left { None } else { quiet_since.or(Some(now)) };
            }
            if quiet_since.is_some_and(|since| now >= since.plus(QUIET_MIN)) {
                return Ok(());
            }
            self.alarm.set(ending.wake_at()).doing("setting a timer")?;
            wait(&mut [PollFd::from_borrowed_fd(self.alarm.as_fd(), PollFlags::IN)])?;
            now = Boottime::now();
        }
    }
}

fn wait(fds: &mut [PollFd<'_>]) -> Result<(), KeeperError> {
    match poll(fds, None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error).doing("waiting for the keeper"),
    }
}

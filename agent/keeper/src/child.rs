//! What the keeper holds by its pidfd: one process, and a service that is started again when it dies.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};

use crate::clock::Boottime;
use crate::process::ProcessTable;
use crate::succession::STATE_ENV;

/// A process that lived this long did not die of being started.
const LIFE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// A child that has not been reaped yet, whose number is its own until then, or an adopted process.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
    pidfd: OwnedFd,
    started: Boottime,
}

impl Child {
    /// Starts the command in a process group of its own, so that a terminal's Ctrl-C reaches the keeper alone.
    ///
    /// The child is reaped by the keeper's loop, never through the handle that is dropped here.
    pub(crate) fn spawn(command: &mut Command) -> io::Result<Self> {
        let mut child = command.process_group(0).env_remove(STATE_ENV).spawn()?;
        let pid = Pid::from_child(&child);
        // It may have ended already, but it cannot have been reaped.
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).inspect_err(|_| {
            // Nothing runs here that is not watched.
            let _ = child.kill();
        })?;
        Ok(Self {
            pid,
            pidfd,
            started: Boottime::now(),
        })
    }

    /// Takes over a child from the keeper before an upgrade. Nobody else could have reaped it, so that its number is
    /// still its own; that it has the same parent and start is seen to all the same.
    pub(crate) fn adopt(record: ChildRecord, table: &mut ProcessTable) -> io::Result<Self> {
        let ours = table
            .read(record.pid)?
            .is_some_and(|process| process.started == record.born && Pid::from_raw(process.parent) == Some(getpid()));
        if !ours {
            return Err(Errno::SRCH.into());
        }
        Ok(Self {
            pid: record.pid,
            pidfd: pidfd_open(record.pid, PidfdFlags::empty())?,
            started: record.started,
        })
    }

    /// A process that is nobody's of ours, as long as `is_meant` says yes once it is held. Only its pidfd names it for
    /// good.
    pub(crate) fn open(pid: Pid, is_meant: impl FnOnce() -> bool) -> io::Result<Self> {
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        if !is_meant() {
            return Err(Errno::SRCH.into());
        }
        Ok(Self {
            pid,
            pidfd,
            started: Boottime::now(),
        })
    }

    /// A process that the keeper before an upgrade has held.
    pub(crate) fn with_pidfd(record: ChildRecord, pidfd: OwnedFd) -> Self {
        Self {
            pid: record.pid,
            pidfd,
            started: record.started,
        }
    }

    /// What `adopt` needs.
    pub(crate) fn record(&self, table: &mut ProcessTable) -> io::Result<ChildRecord> {
        let process = table.read(self.pid)?.ok_or(Errno::SRCH)?;
        Ok(ChildRecord {
            pid: self.pid,
            born: process.started,
            started: self.started,
        })
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(pidfd_send_signal(&self.pidfd, signal)?)
    }

    /// SIGKILL. That it has ended already is as good.
    pub(crate) fn kill(&self) {
        let _ = self.signal(Signal::KILL);
    }
}

/// Readable once the child has ended.
impl AsFd for Child {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// A child as one keeper writes it down for the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChildRecord {
    pub(crate) pid: Pid,
    /// Clock ticks between the start of the machine and that of the process, as /proc has it.
    pub(crate) born: u64,
    /// When the keeper had started it.
    pub(crate) started: Boottime,
}

/// A service as one keeper writes it down for the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ServiceRecord {
    pub(crate) child: Option<ChildRecord>,
    pub(crate) start_at: Boottime,
    pub(crate) pause: Duration,
}

/// A child that shall always run.
#[derive(Debug)]
pub(crate) struct Service {
    child: Option<Child>,
    start_at: Boottime,
    pause: Duration,
}

impl Service {
    /// To be started at once.
    pub(crate) fn new(now: Boottime) -> Self {
        Self {
            child: None,
            start_at: now,
            pause: Duration::ZERO,
        }
    }

    /// Takes over a service from the keeper before an upgrade.
    pub(crate) fn adopt(record: ServiceRecord, table: &mut ProcessTable) -> io::Result<Self> {
        Ok(Self {
            child: record.child.map(|child| Child::adopt(child, table)).transpose()?,
            start_at: record.start_at,
            pause: record.pause,
        })
    }

    /// What `adopt` needs.
    pub(crate) fn record(&self, table: &mut ProcessTable) -> io::Result<ServiceRecord> {
        Ok(ServiceRecord {
            child: self.child.as_ref().map(|child| child.record(table)).transpose()?,
            start_at: self.start_at,
            pause: self.pause,
        })
    }

    pub(crate) fn child(&self) -> Option<&Child> {
        self.child.as_ref()
    }

    pub(crate) fn pid(&self) -> Option<Pid> {
        self.child.as_ref().map(Child::pid)
    }

    pub(crate) fn kill(&self) {
        if let Some(child) = &self.child {
            child.kill();
        }
    }

    /// Whether it is time to start it.
    pub(crate) fn is_due(&self, now: Boottime) -> bool {
        self.child.is_none() && self.start_at <= now
    }

    /// Notes how the start went. A start that fails counts as a death within the first second.
    pub(crate) fn started(&mut self, child: io::Result<Child>, now: Boottime) -> io::Result<()> {
        match child {
            Ok(child) => {
                self.child = Some(child);
                Ok(())
            }
            Err(error) => {
                self.pause_after(Duration::ZERO, now);
                Err(error)
            }
        }
    }

    /// Notes that the process has been reaped, if it was this one.
    pub(crate) fn reaped(&mut self, pid: Pid, now: Boottime) -> bool {
        let Some(child) = self.child.take_if(|child| child.pid == pid) else {
            return false;
        };
        self.pause_after(now.remaining(child.started), now);
        true
    }

    /// When it is to be started, if it does not run.
    pub(crate) fn wake_at(&self) -> Option<Boottime> {
        self.child.is_none().then_some(self.start_at)
    }

    /// At once after a life worth the name, otherwise after a pause that doubles.
    fn pause_after(&mut self, life: Duration, now: Boottime) {
        self.pause = if life >= LIFE_MIN {
            Duration::ZERO
        } else {
            (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX)
        };
        self.start_at = now.plus(self.pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_that_dies_young_is_started_after_ever_longer_pauses() {
        let now = Boottime::from_nanos(1);
        let mut service = Service::new(now);
        assert!(service.is_due(now));
        let mut pauses = Vec::new();
        for _ in 0..7 {
            service.pause_after(Duration::from_millis(999), now);
            pauses.push(service.start_at.remaining(now).as_millis());
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 2000, 2000]);
        service.pause_after(Duration::from_secs(1), now);
        assert!(service.is_due(now));
        service.pause_after(Duration::ZERO, now);
        assert_eq!(service.start_at.remaining(now), PAUSE_MIN);
    }
}

//! The postmaster: a child of the keeper, or one that somebody else has started and that was adopted.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal};

use crate::child::{Child, ChildRecord};
use crate::process::ProcessTable;

/// Who has started it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// This keeper, which will reap it.
    Child,
    /// Somebody else. The keeper sees that it has ended, but not how.
    Adopted,
}

/// A postmaster that is not known to have ended.
#[derive(Debug)]
pub(crate) struct Postmaster {
    process: Child,
    origin: Origin,
}

/// A postmaster as one keeper writes it down for the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PostmasterRecord {
    pub(crate) process: ChildRecord,
    /// Its pidfd is handed over too: its number may be another's by then.
    pub(crate) adopted: bool,
}

impl Postmaster {
    pub(crate) fn started(child: Child) -> Self {
        Self {
            process: child,
            origin: Origin::Child,
        }
    }

    pub(crate) fn adopted(process: Child) -> Self {
        Self {
            process,
            origin: Origin::Adopted,
        }
    }

    /// The postmaster of the keeper before an upgrade.
    pub(crate) fn take_over(
        record: PostmasterRecord,
        pidfd: Option<OwnedFd>,
        table: &mut ProcessTable,
    ) -> io::Result<Self> {
        match pidfd {
            Some(pidfd) => Ok(Self::adopted(Child::with_pidfd(record.process, pidfd))),
            None => Child::adopt(record.process, table).map(Self::started),
        }
    }

    /// What `take_over` needs.
    pub(crate) fn record(&self, table: &mut ProcessTable) -> io::Result<PostmasterRecord> {
        Ok(PostmasterRecord {
            process: self.process.record(table)?,
            adopted: self.is_adopted(),
        })
    }

    pub(crate) fn pid(&self) -> Pid {
        self.process.pid()
    }

    pub(crate) fn is_adopted(&self) -> bool {
        self.origin == Origin::Adopted
    }

    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        self.process.signal(signal)
    }

    /// Whether it has ended without anybody telling us how.
    pub(crate) fn has_vanished(&self) -> bool {
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        self.is_adopted()
            && poll(&mut [PollFd::new(&self.process, PollFlags::IN)], Some(&at_once)).is_ok_and(|ready| ready > 0)
    }
}

/// Readable once it has ended.
impl AsFd for Postmaster {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }
}

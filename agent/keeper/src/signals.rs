//! Signals to the keeper itself, turned into something that `poll` can wait for.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR2};
use signal_hook::{flag, low_level::pipe};

/// One pipe to ourselves for each thing that a signal can mean.
#[derive(Debug)]
pub(crate) struct Signals {
    stop: UnixStream,
    reload: UnixStream,
    upgrade: UnixStream,
    child: UnixStream,
}

impl Signals {
    /// What has arrived while the signals were blocked, as they are when an upgraded keeper begins, arrives now.
    pub(crate) fn new() -> io::Result<Self> {
        let signals = Self {
            stop: catch(&[SIGTERM, SIGINT])?,
            reload: catch(&[SIGHUP])?,
            upgrade: catch(&[SIGUSR2])?,
            child: catch(&[SIGCHLD])?,
        };
        unblock()?;
        Ok(signals)
    }

    /// Whether SIGTERM or SIGINT has arrived since the last call.
    pub(crate) fn stop(&mut self) -> bool {
        drain(&mut self.stop)
    }

    /// Whether SIGHUP has arrived since the last call.
    pub(crate) fn reload(&mut self) -> bool {
        drain(&mut self.reload)
    }

    /// Whether SIGUSR2 has arrived since the last call.
    pub(crate) fn upgrade(&mut self) -> bool {
        drain(&mut self.upgrade)
    }

    /// Whether one of these has something to tell: what is in our pipes is lost when the program is replaced.
    pub(crate) fn any_waits(&self) -> io::Result<bool> {
        let mut fds = [&self.stop, &self.reload, &self.upgrade].map(|pipe| PollFd::new(pipe, PollFlags::IN));
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        Ok(poll(&mut fds, Some(&at_once))? > 0)
    }

    /// Forgets that a child has ended; the caller looks for such children at each turn anyway.
    pub(crate) fn forget_children(&mut self) {
        drain(&mut self.child);
    }

    /// What becomes readable when a signal arrives.
    pub(crate) fn fds(&self) -> [BorrowedFd<'_>; 4] {
        [&self.stop, &self.reload, &self.upgrade, &self.child].map(AsFd::as_fd)
    }
}

/// Holds the keeper's signals back. The mask outlives an exec, and so does what it holds back, whereas a handler does
/// not: without the mask, the first SIGTERM to the new program would kill it.
pub(crate) fn block() -> io::Result<()> {
    Ok(mask().thread_block()?)
}

/// Lets them through again. Nothing may be started before, for the mask is inherited.
pub(crate) fn unblock() -> io::Result<()> {
    Ok(mask().thread_unblock()?)
}

/// Starts a thread that none of the keeper's signals is given to. The kernel gives a signal to any thread that does not
/// block it, and [`block`] speaks for one thread alone: what another took just before an exec would be lost with its pipe.
pub(crate) fn spared<T>(start: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    // What is blocked already, as it is in a keeper that begins after an upgrade, stays so.
    let before = mask().thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    let started = start();
    before.thread_set_mask()?;
    started
}

/// All that `Signals` catches.
fn mask() -> SigSet {
    [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGUSR2,
        Signal::SIGCHLD,
    ]
    .into_iter()
    .collect()
}

/// For the sentinel: a signal to the whole service or terminal is not for it. It leaves when its keeper has.
pub(crate) fn disregard_stop() -> io::Result<()> {
    for signal in [SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR2] {
        flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    Ok(())
}

fn catch(signals: &[i32]) -> io::Result<UnixStream> {
    let (ours, handlers) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    for signal in signals {
        pipe::register(*signal, handlers.try_clone()?)?;
    }
    Ok(ours)
}

/// Whether there was anything.
fn drain(stream: &mut UnixStream) -> bool {
    let mut bytes = [0; 64];
    // What does not fit is found at the next turn. When no byte waits, reading fails.
    stream.read(&mut bytes).is_ok_and(|count| count > 0)
}

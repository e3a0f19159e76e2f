//! Signals to the keeper itself, turned into something that `poll` can wait for.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::{flag, low_level::pipe};

/// One pipe to ourselves for each thing that a signal can mean.
#[derive(Debug)]
pub(crate) struct Signals {
    stop: UnixStream,
    reload: UnixStream,
    child: UnixStream,
}

impl Signals {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            stop: catch(&[SIGTERM, SIGINT])?,
            reload: catch(&[SIGHUP])?,
            child: catch(&[SIGCHLD])?,
        })
    }

    /// Whether SIGTERM or SIGINT has arrived since the last call.
    pub(crate) fn stop(&mut self) -> bool {
        drain(&mut self.stop)
    }

    /// Whether SIGHUP has arrived since the last call.
    pub(crate) fn reload(&mut self) -> bool {
        drain(&mut self.reload)
    }

    /// Forgets that a child has ended; the caller looks for such children at each turn anyway.
    pub(crate) fn forget_children(&mut self) {
        drain(&mut self.child);
    }

    /// What becomes readable when a signal arrives.
    pub(crate) fn fds(&self) -> [BorrowedFd<'_>; 3] {
        [self.stop.as_fd(), self.reload.as_fd(), self.child.as_fd()]
    }
}

/// For the sentinel: a signal to the whole service or terminal is not for it. It leaves when its keeper has.
pub(crate) fn disregard_stop() -> io::Result<()> {
    for signal in [SIGTERM, SIGINT, SIGHUP, SIGQUIT] {
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

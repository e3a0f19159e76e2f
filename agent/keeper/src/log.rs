//! The keeper's few lines on standard error. A reader that has stopped reading must never hold up the fence, so that a
//! line which cannot be written at once is lost.

use std::fmt::Arguments;
use std::os::fd::OwnedFd;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::write;
use rustix::net::{SendFlags, send};
use rustix::stdio::stderr;

/// Writes lines without waiting.
#[derive(Debug)]
pub(crate) struct Log {
    /// Our own opening of the file behind standard error. The one that we inherited is shared with every other process
    /// that did, and may not be made non-blocking under them.
    own: Option<OwnedFd>,
}

impl Log {
    pub(crate) fn new() -> Self {
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        Self {
            own: openat(CWD, "/proc/self/fd/2", flags, Mode::empty()).ok(),
        }
    }

    /// One line, with the program's name in front.
    pub(crate) fn line(&self, text: Arguments<'_>) {
        let line = format!("pgherd keeper: {text}\n");
        // Losing a line is what this module is for.
        let _ = match &self.own {
            Some(own) => write(own, line.as_bytes()),
            // A socket, as the system's journal provides, cannot be opened again, but it can be asked not to wait.
            None => send(stderr(), line.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
        };
    }
}

//! The keeper's few lines on standard error. A reader that has stopped reading must never hold up the fence, so that a
//! line which cannot be written at once is lost.

use std::fmt::Arguments;
use std::os::fd::OwnedFd;

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};
use rustix::io::write;
use rustix::net::{SendFlags, send};
use rustix::stdio::stderr;

/// Writes lines without waiting.
#[derive(Debug)]
pub(crate) struct Log {
    /// Our own opening of the file behind standard error. The one that we inherited is shared with every other process
    /// that did, and may not be made non-blocking under them.
    own: Option<OwnedFd>,
    /// What standard error is: it may be of another user, who opened it for us, so that we cannot open it ourselves.
    kind: FileType,
}

impl Log {
    pub(crate) fn new() -> Self {
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        Self {
            own: openat(CWD, "/proc/self/fd/2", flags, Mode::empty()).ok(),
            kind: fstat(stderr()).map_or(FileType::Unknown, |stat| FileType::from_raw_mode(stat.st_mode)),
        }
    }

    /// One line, with the program's name in front.
    pub(crate) fn line(&self, text: Arguments<'_>) {
        let line = format!("pgherd keeper: {text}\n");
        // Losing a line is what this module is for.
        let _ = match (&self.own, self.kind) {
            (Some(own), _) => write(own, line.as_bytes()),
            // A socket, as the system's journal provides, cannot be opened again, but it can be asked not to wait.
            (None, FileType::Socket) => send(stderr(), line.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
            // No reader holds up who writes to a file.
            (None, FileType::RegularFile) => write(stderr(), line.as_bytes()),
            (None, _) => return,
        };
    }
}

//! One open watchdog: every operation on it is a single system call that does not wait.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{Access, CWD, FileType, Mode, OFlags, access, openat, stat};
use rustix::io::{Errno, write};

use super::ioctl;
use crate::protocol::{WatchdogDriver, WatchdogMode, WatchdogSettings};

/// Any byte but the one of the magic close.
const PING: &[u8] = b"1";
/// Closing a device right after this byte stops it, unless the kernel was told never to (nowayout).
const MAGIC_CLOSE: &[u8] = b"V";

/// A watchdog that runs from its opening on, until it is stopped.
#[derive(Debug)]
pub(super) struct Device {
    file: OwnedFd,
    driver: WatchdogDriver,
}

impl Device {
    pub(super) fn open(settings: &WatchdogSettings) -> Result<Self, Errno> {
        // A FIFO without a reader must not hold up the fence, and a regular file keeps what was written before. A
        // device heeds neither.
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = openat(CWD, &settings.device, flags, Mode::empty())?;
        Ok(Self::taken(file, settings.driver))
    }

    /// The device of the keeper before an upgrade.
    pub(super) fn taken(file: OwnedFd, driver: WatchdogDriver) -> Self {
        Self { file, driver }
    }

    pub(super) fn driver(&self) -> WatchdogDriver {
        self.driver
    }

    pub(super) fn ping(&self) -> Result<(), Errno> {
        self.write(PING)
    }

    /// Sets the timeout as far as the driver can, and returns the one that counts: `None` when nothing is there that
    /// could fire.
    pub(super) fn set_timeout(&self, wanted: Duration) -> Result<Option<Duration>, Errno> {
        let seconds = i32::try_from(wanted.as_secs()).unwrap_or(i32::MAX);
        match self.driver {
            WatchdogDriver::Testing => {
                self.write(format!("V{seconds}\n").as_bytes())?;
                Ok(Some(Duration::from_secs(wanted.as_secs())))
            }
            WatchdogDriver::Linux => {
                // Some drivers have one timeout only, and some refuse what they cannot do.
                let told = ioctl::set_timeout(&self.file, seconds).or_else(|_| ioctl::timeout(&self.file));
                match told {
                    Ok(seconds) => Ok(Some(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))),
                    Err(Errno::NOTTY | Errno::INVAL | Errno::OPNOTSUPP) => Ok(None),
                    Err(error) => Err(error),
                }
            }
        }
    }

    /// Stops it. Dropping it without this lets it run on until it fires.
    pub(super) fn stop(self) -> Result<(), Errno> {
        self.write(MAGIC_CLOSE)
    }

    fn write(&self, bytes: &[u8]) -> Result<(), Errno> {
        match write(&self.file, bytes)? {
            length if length == bytes.len() => Ok(()),
            _ => Err(Errno::IO),
        }
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Whether opening it may succeed. It is not tried: that would start it.
pub(super) fn is_promising(settings: &WatchdogSettings) -> bool {
    let may_be_one = match (settings.mode, settings.driver) {
        (WatchdogMode::Required, WatchdogDriver::Linux) => is_device(&settings.device),
        _ => true,
    };
    may_be_one && exists(settings).is_ok()
}

/// Whether there is something that this process may write to.
pub(super) fn exists(settings: &WatchdogSettings) -> Result<(), Errno> {
    access(&settings.device, Access::WRITE_OK)
}

fn is_device(path: &Path) -> bool {
    stat(path).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice)
}

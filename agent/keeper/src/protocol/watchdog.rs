//! How the agent wants the kernel's watchdog to be used.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use super::Malformed;
use crate::clock::nanos;
use crate::wire::{Reader, Writer};

/// A device that resets the machine unless it is pinged in time, and what to do with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchdogSettings {
    /// Whether it is wanted at all.
    pub mode: WatchdogMode,
    /// How to speak to it.
    pub driver: WatchdogDriver,
    /// Where it is; an absolute path.
    pub device: PathBuf,
    /// How long after a ping it is to fire: shorter than a lease, so that it comes before the deadline.
    pub timeout: Duration,
    /// A device that can only fire earlier than this after a ping is not used: the time between two renewals, what a
    /// renewal may take and the margin of the fence have to fit in.
    pub timeout_min: Duration,
}

/// How much a watchdog is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchdogMode {
    /// Not at all.
    Off,
    /// Used as far as there is one.
    Automatic,
    /// No deadline is accepted without one that fires in time.
    Required,
}

/// How to speak to a watchdog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchdogDriver {
    /// By the interface of Linux (Documentation/watchdog/watchdog-api.rst in its sources).
    Linux,
    /// To a file or FIFO that a test reads: the timeout is written as a line `V<seconds>`.
    Testing,
}

/// Whether a deadline would be guarded by a watchdog.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WatchdogState {
    /// None is wanted.
    #[default]
    Off,
    /// It is in use, or nothing is known that speaks against it. It is not tried before there is a deadline, for some
    /// cannot be stopped again.
    Usable,
    /// There is none, or it does not do.
    Unusable,
}

impl WatchdogSettings {
    pub(crate) fn encode(&self, writer: &mut Writer<'_>) {
        writer.u8(self.mode as u8);
        writer.u8(self.driver as u8);
        writer.bytes(self.device.as_os_str().as_bytes());
        writer.u64(nanos(self.timeout));
        writer.u64(nanos(self.timeout_min));
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            mode: WatchdogMode::decode(reader.u8()?)?,
            driver: WatchdogDriver::decode(reader.u8()?)?,
            device: PathBuf::from(OsStr::from_bytes(reader.c_bytes()?)),
            timeout: Duration::from_nanos(reader.u64()?),
            timeout_min: Duration::from_nanos(reader.u64()?),
        })
    }
}

impl WatchdogMode {
    fn decode(code: u8) -> Result<Self, Malformed> {
        [Self::Off, Self::Automatic, Self::Required]
            .into_iter()
            .find(|mode| *mode as u8 == code)
            .ok_or(Malformed::Value { value: i64::from(code) })
    }
}

impl WatchdogDriver {
    fn decode(code: u8) -> Result<Self, Malformed> {
        [Self::Linux, Self::Testing]
            .into_iter()
            .find(|driver| *driver as u8 == code)
            .ok_or(Malformed::Value { value: i64::from(code) })
    }
}

impl WatchdogState {
    pub(crate) fn decode(code: u8) -> Result<Self, Malformed> {
        [Self::Off, Self::Usable, Self::Unusable]
            .into_iter()
            .find(|state| *state as u8 == code)
            .ok_or(Malformed::Value { value: i64::from(code) })
    }
}

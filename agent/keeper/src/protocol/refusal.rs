//! Why the keeper does not do what the agent asks.

use std::fmt;

use super::Malformed;
use crate::wire::{Reader, Writer};

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The fence of this term has begun. It stays refused: the lease has to be won anew.
    TermIsFinal,
    /// The deadline less its margin lies in the past: the proof took too long.
    DeadlinePassed,
    /// Another term is in force, and PostgreSQL has not been ended since.
    OtherTermRuns,
    /// A process of the instance is left, or it could not be found out whether one is.
    InstanceLeft,
    /// This makes PostgreSQL writable, and no deadline lies ahead.
    NotArmed,
    /// There is no postmaster.
    NoPostmaster,
    /// PostgreSQL may be left behind only in pause.
    NotPaused,
    /// A postmaster runs that this keeper has neither started nor adopted.
    Stranger,
    /// The configuration requires a watchdog, and none that would fire in time could be set.
    WatchdogUnusable,
    /// The system refused, with this error number.
    System(i32),
}

impl Refusal {
    /// The kind of refusal, then the system's error number or zero.
    pub(super) fn encode(self, writer: &mut Writer<'_>) {
        let (code, errno) = match self {
            Self::TermIsFinal => (0, 0),
            Self::DeadlinePassed => (1, 0),
            Self::OtherTermRuns => (2, 0),
            Self::InstanceLeft => (3, 0),
            Self::NotArmed => (4, 0),
            Self::NoPostmaster => (5, 0),
            Self::System(errno) => (6, errno),
            Self::NotPaused => (7, 0),
            Self::Stranger => (8, 0),
            Self::WatchdogUnusable => (9, 0),
        };
        writer.u8(code);
        writer.i32(errno);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        match (reader.u8()?, reader.i32()?) {
            (0, 0) => Ok(Self::TermIsFinal),
            (1, 0) => Ok(Self::DeadlinePassed),
            (2, 0) => Ok(Self::OtherTermRuns),
            (3, 0) => Ok(Self::InstanceLeft),
            (4, 0) => Ok(Self::NotArmed),
            (5, 0) => Ok(Self::NoPostmaster),
            (6, errno) => Ok(Self::System(errno)),
            (7, 0) => Ok(Self::NotPaused),
            (8, 0) => Ok(Self::Stranger),
            (9, 0) => Ok(Self::WatchdogUnusable),
            (code, _) => Err(Malformed::Value { value: i64::from(code) }),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TermIsFinal => write!(out, "the fence of this term has begun, the lease has to be won anew"),
            Self::DeadlinePassed => write!(out, "the deadline less its margin has passed already"),
            Self::OtherTermRuns => write!(out, "PostgreSQL still runs under another term"),
            Self::InstanceLeft => write!(out, "a process of the instance is left"),
            Self::NotArmed => write!(out, "no deadline lies ahead"),
            Self::NoPostmaster => write!(out, "there is no postmaster"),
            Self::NotPaused => write!(out, "PostgreSQL may be left behind only in pause"),
            Self::Stranger => write!(out, "a postmaster runs that has not been adopted"),
            Self::WatchdogUnusable => write!(out, "a watchdog is required, and there is none that can be used"),
            Self::System(errno) => write!(out, "{}", std::io::Error::from_raw_os_error(*errno)),
        }
    }
}

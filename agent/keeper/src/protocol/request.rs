//! What the agent asks of the keeper, and its bytes.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use super::{Malformed, TooLong, VERSION, WatchdogSettings, memo, os_string, tag};
use crate::clock::{Boottime, nanos};
use crate::wire::{Reader, Writer};

/// What the agent asks of the keeper. Requests are handled in the order of sending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Set or renew the deadline. Answered by [`Report::Armed`](super::Report::Armed) or
    /// [`Report::Refused`](super::Report::Refused).
    ///
    /// Accepted for a term whose fence has not begun, or for a new term when no fence is armed or no process of the
    /// instance is left. The later deadline wins. Refused while a postmaster runs that has not been adopted, and where a
    /// watchdog is required that cannot be used.
    Arm {
        /// One holding of the lease: the leader key's create revision. Compared for equality only.
        term: u64,
        /// When PostgreSQL must have ended, counted from before the proof was asked for.
        deadline: Boottime,
        /// How long before the deadline the keeper begins to end it.
        margin: Duration,
    },
    /// Take the deadline away. Accepted when no process of the instance is left, and for the end of a pause that began
    /// without a deadline. Answered by [`Report::Disarmed`](super::Report::Disarmed) or a refusal.
    Disarm,
    /// Suspend the fence for maintenance: no deadline is in force, PostgreSQL stays as it is, and it is left alone also
    /// when the agent, the keeper or both end. What makes it writable stays refused. Answered by
    /// [`Report::Paused`](super::Report::Paused), or refused when the fence has begun.
    ///
    /// [`Request::Arm`] ends the pause, for any term that is not final, so that no renewal may be sent after this.
    Pause,
    /// Start the postmaster. Answered by [`Report::Started`](super::Report::Started) or a refusal.
    Start(Start),
    /// Send the postmaster a signal. Answered only if refused.
    Signal(PostmasterSignal),
    /// End PostgreSQL whole. Answered by [`Report::Ended`](super::Report::Ended) when no process of the instance is left.
    End,
    /// Keep these bytes, at most [`MEMO_BYTES_MAX`](super::MEMO_BYTES_MAX), for the next agent. Not answered.
    Remember {
        /// Handed to the next agent in its [`Report::Hello`](super::Report::Hello).
        memo: Vec<u8>,
    },
    /// The agent is about to exit on purpose: when it has, end what is left of PostgreSQL and return the code. Answered
    /// only if refused.
    Leave {
        /// The keeper's exit code.
        code: u8,
        /// Leave PostgreSQL alone instead. Refused unless the fence is paused; when the agent is gone and the pause has
        /// been ended meanwhile, PostgreSQL is ended after all.
        keep_postgres: bool,
    },
    /// How to use the kernel's watchdog from the next deadline on; switching it off counts at once. Answered by
    /// [`Report::Watchdog`](super::Report::Watchdog). Until an agent has said something, none is used.
    Watchdog(WatchdogSettings),
    /// Take the postmaster that somebody else has started for our own. Answered by
    /// [`Report::Adopted`](super::Report::Adopted) or a refusal.
    Adopt {
        /// Whether it is writable. If so, a deadline has to follow, or its end.
        writable: bool,
    },
}

/// How to start the postmaster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// Whether the data directory would come up writable. If so, a deadline must lie ahead.
    pub writable: bool,
    /// The server's program; an absolute path.
    pub program: PathBuf,
    /// Its arguments, without the program's name.
    pub args: Vec<OsString>,
    /// Added to the keeper's own environment.
    pub env: Vec<(OsString, OsString)>,
}

/// The signals that the agent has use for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PostmasterSignal {
    /// SIGHUP: read the configuration again.
    Reload,
    /// SIGUSR1: look for the `promote` file, which the agent wrote before. Refused unless a deadline lies ahead.
    Promote,
    /// SIGINT: end the sessions, write a checkpoint, exit.
    StopFast,
    /// SIGQUIT: exit without a checkpoint.
    StopImmediate,
}

/// A request without its fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// [`Request::Arm`]
    Arm,
    /// [`Request::Disarm`]
    Disarm,
    /// [`Request::Start`]
    Start,
    /// [`Request::Signal`]
    Signal,
    /// [`Request::Pause`]
    Pause,
    /// [`Request::Leave`]
    Leave,
    /// [`Request::Adopt`]
    Adopt,
}

impl Request {
    /// Replaces the buffer's contents by this message.
    ///
    /// # Errors
    /// When it is too long; the buffer then holds nothing of use.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), TooLong> {
        let mut writer = Writer::new(out);
        writer.u8(VERSION);
        match self {
            Self::Arm { term, deadline, margin } => {
                writer.u8(1);
                writer.u64(*term);
                writer.u64(deadline.as_nanos());
                writer.u64(nanos(*margin));
            }
            Self::Disarm => writer.u8(2),
            Self::Start(start) => {
                writer.u8(3);
                start.encode(&mut writer);
            }
            Self::Signal(signal) => {
                writer.u8(4);
                writer.u8(*signal as u8);
            }
            Self::End => writer.u8(5),
            Self::Remember { memo } => {
                writer.u8(6);
                writer.bytes(memo);
            }
            Self::Leave { code, keep_postgres } => {
                writer.u8(7);
                writer.u8(*code);
                writer.u8(u8::from(*keep_postgres));
            }
            Self::Pause => writer.u8(8),
            Self::Watchdog(settings) => {
                writer.u8(9);
                settings.encode(&mut writer);
            }
            Self::Adopt { writable } => {
                writer.u8(10);
                writer.u8(u8::from(*writable));
            }
        }
        writer.finish()
    }

    /// Reads one whole message.
    ///
    /// # Errors
    /// When the bytes are not exactly one request.
    pub fn decode(message: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(message);
        let request = match tag(&mut reader)? {
            1 => Self::Arm {
                term: reader.u64()?,
                deadline: Boottime::from_nanos(reader.u64()?),
                margin: Duration::from_nanos(reader.u64()?),
            },
            2 => Self::Disarm,
            3 => Self::Start(Start::decode(&mut reader)?),
            4 => Self::Signal(PostmasterSignal::decode(reader.u8()?)?),
            5 => Self::End,
            6 => Self::Remember {
                memo: memo(&mut reader)?,
            },
            7 => Self::Leave {
                code: reader.u8()?,
                keep_postgres: reader.flag()?,
            },
            8 => Self::Pause,
            9 => Self::Watchdog(WatchdogSettings::decode(&mut reader)?),
            10 => Self::Adopt {
                writable: reader.flag()?,
            },
            tag => return Err(Malformed::Tag { tag }),
        };
        reader.end()?;
        Ok(request)
    }
}

impl Start {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.u8(u8::from(self.writable));
        writer.bytes(self.program.as_os_str().as_bytes());
        writer.count(self.args.len());
        for arg in &self.args {
            writer.bytes(arg.as_bytes());
        }
        writer.count(self.env.len());
        for (name, value) in &self.env {
            writer.bytes(name.as_bytes());
            writer.bytes(value.as_bytes());
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let writable = reader.flag()?;
        let program = PathBuf::from(OsStr::from_bytes(reader.c_bytes()?));
        let args = (0..reader.count(2)?)
            .map(|_| os_string(reader))
            .collect::<Result<_, _>>()?;
        let env = (0..reader.count(4)?)
            .map(|_| {
                let (name, value) = (os_string(reader)?, os_string(reader)?);
                if name.is_empty() || name.as_bytes().contains(&b'=') {
                    return Err(Malformed::EnvName);
                }
                Ok((name, value))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            writable,
            program,
            args,
            env,
        })
    }
}

impl PostmasterSignal {
    fn decode(code: u8) -> Result<Self, Malformed> {
        [Self::Reload, Self::Promote, Self::StopFast, Self::StopImmediate]
            .into_iter()
            .find(|signal| *signal as u8 == code)
            .ok_or(Malformed::Value { value: i64::from(code) })
    }
}

impl RequestKind {
    pub(super) fn decode(code: u8) -> Result<Self, Malformed> {
        [
            Self::Arm,
            Self::Disarm,
            Self::Start,
            Self::Signal,
            Self::Pause,
            Self::Leave,
            Self::Adopt,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == code)
        .ok_or(Malformed::Value { value: i64::from(code) })
    }
}

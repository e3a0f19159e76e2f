//! What the keeper tells the agent, and its bytes.

use std::fmt;

use rustix::process::Pid;

use super::{Malformed, Refusal, RequestKind, TooLong, VERSION, WatchdogState, memo, pid, tag};
use crate::clock::Boottime;
use crate::wire::{Reader, Writer};

/// What the keeper tells the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The first message that each agent receives.
    Hello(Hello),
    /// A deadline is in force: the one asked for, or a later one of the same term.
    Armed {
        /// The term.
        term: u64,
        /// When PostgreSQL must have ended.
        deadline: Boottime,
    },
    /// No deadline is in force, and the fence is not paused.
    Disarmed,
    /// The fence is paused: no deadline is in force, and PostgreSQL is left alone.
    Paused,
    /// The postmaster's process has been started; whether PostgreSQL accepts connections is not known.
    Started {
        /// The postmaster.
        pid: Pid,
    },
    /// A request was not carried out.
    Refused {
        /// Which kind of request.
        what: RequestKind,
        /// The reason.
        why: Refusal,
    },
    /// The postmaster is gone. Processes of the instance may be left; [`Report::Ended`] follows.
    PostmasterExited {
        /// The postmaster.
        pid: Pid,
        /// How it ended.
        status: ExitKind,
    },
    /// No process of the instance is left.
    Ended,
    /// The deadline less its margin has passed: the term is final, and PostgreSQL is being ended.
    Fenced {
        /// The term.
        term: u64,
    },
    /// The keeper was told to stop: hand over, stop PostgreSQL and send [`Request::Leave`](super::Request::Leave).
    Stop,
    /// The keeper was told to reload.
    Reload,
    /// Whether the watchdog could be used. Sent in answer to [`Request::Watchdog`](super::Request::Watchdog), and whenever
    /// it changes.
    Watchdog {
        /// How things are with it.
        state: WatchdogState,
    },
    /// A postmaster that this keeper has not started has begun to run in the data directory, or does so no longer.
    Stranger {
        /// That postmaster. No deadline is accepted until it has been adopted or ended.
        pid: Option<Pid>,
    },
    /// The postmaster that somebody else has started counts as ours from here on. How it ends cannot be known; what starts
    /// after it is a child of the keeper again.
    Adopted {
        /// The postmaster.
        pid: Pid,
    },
}

/// The state of things when an agent begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// What the last agent on this machine since its start asked to be remembered; empty if nothing.
    pub memo: Vec<u8>,
    /// Term and deadline in force, if any. It proves nothing about the lease.
    pub armed: Option<(u64, Boottime)>,
    /// The last term that was fenced, if any.
    pub fenced: Option<u64>,
    /// The postmaster that this keeper started or adopted, if it runs.
    pub postmaster: Option<Pid>,
    /// Whether any process of the instance is left, the postmaster included.
    pub instance_left: bool,
    /// Whether the keeper is stopping.
    pub stopping: bool,
    /// Whether the fence is paused. It stays so until this agent arms it or ends the pause.
    pub paused: bool,
    /// A postmaster in the data directory that this keeper has neither started nor adopted.
    pub stranger: Option<Pid>,
    /// Whether `postmaster` was adopted.
    pub adopted: bool,
    /// Whether the watchdog could be used, as an earlier agent wanted it to be.
    pub watchdog: WatchdogState,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// It called exit with this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
    /// Nobody told us: only a parent hears it, and this process was adopted.
    Unknown,
}

impl Report {
    /// Replaces the buffer's contents by this message.
    ///
    /// # Errors
    /// When it is too long, which only a memo over its limit can make it.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), TooLong> {
        let mut writer = Writer::new(out);
        writer.u8(VERSION);
        match self {
            Self::Hello(hello) => {
                writer.u8(1);
                hello.encode(&mut writer);
            }
            Self::Armed { term, deadline } => {
                writer.u8(2);
                writer.u64(*term);
                writer.u64(deadline.as_nanos());
            }
            Self::Disarmed => writer.u8(3),
            Self::Started { pid } => {
                writer.u8(4);
                write_pid(&mut writer, *pid);
            }
            Self::Refused { what, why } => {
                writer.u8(5);
                writer.u8(*what as u8);
                why.encode(&mut writer);
            }
            Self::PostmasterExited { pid, status } => {
                writer.u8(6);
                write_pid(&mut writer, *pid);
                status.encode(&mut writer);
            }
            Self::Ended => writer.u8(7),
            Self::Fenced { term } => {
                writer.u8(8);
                writer.u64(*term);
            }
            Self::Stop => writer.u8(9),
            Self::Reload => writer.u8(10),
            Self::Watchdog { state } => {
                writer.u8(11);
                writer.u8(*state as u8);
            }
            Self::Paused => writer.u8(12),
            Self::Stranger { pid } => {
                writer.u8(13);
                writer.option(*pid, write_pid);
            }
            Self::Adopted { pid } => {
                writer.u8(14);
                write_pid(&mut writer, *pid);
            }
        }
        writer.finish()
    }

    /// Reads one whole message.
    ///
    /// # Errors
    /// When the bytes are not exactly one report.
    pub fn decode(message: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(message);
        let report = match tag(&mut reader)? {
            1 => Self::Hello(Hello::decode(&mut reader)?),
            2 => Self::Armed {
                term: reader.u64()?,
                deadline: Boottime::from_nanos(reader.u64()?),
            },
            3 => Self::Disarmed,
            4 => Self::Started { pid: pid(&mut reader)? },
            5 => Self::Refused {
                what: RequestKind::decode(reader.u8()?)?,
                why: Refusal::decode(&mut reader)?,
            },
            6 => Self::PostmasterExited {
                pid: pid(&mut reader)?,
                status: ExitKind::decode(&mut reader)?,
            },
            7 => Self::Ended,
            8 => Self::Fenced { term: reader.u64()? },
            9 => Self::Stop,
            10 => Self::Reload,
            11 => Self::Watchdog {
                state: WatchdogState::decode(reader.u8()?)?,
            },
            12 => Self::Paused,
            13 => Self::Stranger {
                pid: reader.option(pid)?,
            },
            14 => Self::Adopted { pid: pid(&mut reader)? },
            tag => return Err(Malformed::Tag { tag }),
        };
        reader.end()?;
        Ok(report)
    }
}

impl Hello {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.bytes(&self.memo);
        writer.option(self.armed, |writer, (term, deadline)| {
            writer.u64(term);
            writer.u64(deadline.as_nanos());
        });
        writer.option(self.fenced, Writer::u64);
        writer.option(self.postmaster, write_pid);
        writer.u8(u8::from(self.instance_left));
        writer.u8(u8::from(self.stopping));
        writer.u8(u8::from(self.paused));
        writer.option(self.stranger, write_pid);
        writer.u8(u8::from(self.adopted));
        writer.u8(self.watchdog as u8);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            memo: memo(reader)?,
            armed: reader.option(|reader| Ok((reader.u64()?, Boottime::from_nanos(reader.u64()?))))?,
            fenced: reader.option(Reader::u64)?,
            postmaster: reader.option(pid)?,
            instance_left: reader.flag()?,
            stopping: reader.flag()?,
            paused: reader.flag()?,
            stranger: reader.option(pid)?,
            adopted: reader.flag()?,
            watchdog: WatchdogState::decode(reader.u8()?)?,
        })
    }
}

impl ExitKind {
    fn encode(self, writer: &mut Writer<'_>) {
        match self {
            Self::Code(code) => {
                writer.u8(0);
                writer.i32(code);
            }
            Self::Signal(signal) => {
                writer.u8(1);
                writer.i32(signal);
            }
            Self::Unknown => {
                writer.u8(2);
                writer.i32(0);
            }
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        match (reader.u8()?, reader.i32()?) {
            (0, code) => Ok(Self::Code(code)),
            (1, signal) => Ok(Self::Signal(signal)),
            (2, 0) => Ok(Self::Unknown),
            (kind, _) => Err(Malformed::Value { value: i64::from(kind) }),
        }
    }
}

impl fmt::Display for ExitKind {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(out, "exit code {code}"),
            Self::Signal(signal) => write!(out, "signal {signal}"),
            Self::Unknown => write!(out, "in a way that only its parent knows"),
        }
    }
}

fn write_pid(writer: &mut Writer<'_>, pid: Pid) {
    writer.i32(pid.as_raw_nonzero().get());
}

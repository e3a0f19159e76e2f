//! What the agent and the keeper say to each other: one message per packet of a SOCK_SEQPACKET socket.
//!
//! A message is the protocol's version, a tag and the tag's fields. Decoding is total: whatever the bytes are, it
//! returns a message or says what is wrong, and it allocates no more than the message is long.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Pid;

use crate::clock::{Boottime, nanos};
use crate::wire::{Reader, Writer};

/// The longest message, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// The longest memo, in bytes.
pub const MEMO_BYTES_MAX: usize = 4096;
/// First byte of each message. The keeper outlives the agent, so that after an upgrade of the package the two may be
/// of different versions; neither may then guess.
pub(crate) const VERSION: u8 = 1;

/// What the agent asks of the keeper. Requests are handled in the order of sending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Set or renew the deadline. Answered by [`Report::Armed`] or [`Report::Refused`].
    ///
    /// Accepted for a term whose fence has not begun, or for a new term when no fence is armed or no process of the
    /// instance is left. The later deadline wins.
    Arm {
        /// One holding of the lease: the leader key's create revision. Compared for equality only.
        term: u64,
        /// When PostgreSQL must have ended, counted from before the proof was asked for.
        deadline: Boottime,
        /// How long before the deadline the keeper begins to end it.
        margin: Duration,
    },
    /// Take the deadline away. Accepted when no process of the instance is left, and for the end of a pause that began
    /// without a deadline. Answered by [`Report::Disarmed`] or [`Report::Refused`].
    Disarm,
    /// Suspend the fence for maintenance: no deadline is in force, PostgreSQL stays as it is, and it is left alone also
    /// when the agent, the keeper or both end. What makes it writable stays refused. Answered by [`Report::Disarmed`],
    /// or by [`Report::Refused`] when the fence has begun.
    ///
    /// [`Request::Arm`] ends the pause, for any term that is not final, so that no renewal may be sent after this.
    Pause,
    /// Start the postmaster. Answered by [`Report::Started`] or [`Report::Refused`].
    Start(Start),
    /// Send the postmaster a signal. Answered only if refused.
    Signal(PostmasterSignal),
    /// End PostgreSQL whole. Answered by [`Report::Ended`] when no process of the instance is left.
    End,
    /// Keep these bytes, at most [`MEMO_BYTES_MAX`], for the next agent. Not answered.
    Remember {
        /// Handed to the next agent in its [`Report::Hello`].
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
    /// No deadline is in force, be it by [`Request::Disarm`] or by [`Request::Pause`].
    Disarmed,
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
    /// The keeper was told to stop: hand over, stop PostgreSQL and send [`Request::Leave`].
    Stop,
    /// The keeper was told to reload.
    Reload,
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
    /// The postmaster that this keeper started, if it runs.
    pub postmaster: Option<Pid>,
    /// Whether any process of the instance is left, the postmaster included.
    pub instance_left: bool,
    /// Whether the keeper is stopping.
    pub stopping: bool,
    /// Whether the fence is paused. It stays so until this agent arms it or ends the pause.
    pub paused: bool,
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
}

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
    /// The system refused, with this error number.
    System(i32),
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// It called exit with this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

/// Bytes that are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// It ends before its last field does, or names a count that it cannot hold.
    Short,
    /// Bytes follow its last field.
    Trailing {
        /// How many.
        bytes: usize,
    },
    /// It is in another version of the protocol: the two processes are of different releases.
    Version {
        /// The version that it names.
        version: u8,
    },
    /// There is no message of this kind.
    Tag {
        /// The tag that it names.
        tag: u8,
    },
    /// A field holds a number that has no meaning.
    Value {
        /// The number.
        value: i64,
    },
    /// A zero byte in a path, an argument or the environment.
    Nul,
    /// An environment variable without a name, or with `=` in its name.
    EnvName,
    /// A memo over [`MEMO_BYTES_MAX`].
    Memo {
        /// Its length.
        bytes: usize,
    },
}

impl fmt::Display for Malformed {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short => write!(out, "message ends too early"),
            Self::Trailing { bytes } => write!(out, "{bytes} bytes follow the message"),
            Self::Version { version } => write!(out, "message of protocol version {version}, ours is {VERSION}"),
            Self::Tag { tag } => write!(out, "unknown message {tag}"),
            Self::Value { value } => write!(out, "a field holds {value}, which means nothing"),
            Self::Nul => write!(out, "zero byte in a path, an argument or the environment"),
            Self::EnvName => write!(out, "unusable name of an environment variable"),
            Self::Memo { bytes } => write!(out, "memo of {bytes} bytes, over the limit of {MEMO_BYTES_MAX}"),
        }
    }
}

impl std::error::Error for Malformed {}

/// A message over [`MESSAGE_BYTES_MAX`], or with a list or string of more than 65535 elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong;

impl fmt::Display for TooLong {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "message is over the limit of {MESSAGE_BYTES_MAX} bytes")
    }
}

impl std::error::Error for TooLong {}

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
                writer.i32(pid.as_raw_nonzero().get());
            }
            Self::Refused { what, why } => {
                writer.u8(5);
                writer.u8(*what as u8);
                why.encode(&mut writer);
            }
            Self::PostmasterExited { pid, status } => {
                writer.u8(6);
                writer.i32(pid.as_raw_nonzero().get());
                status.encode(&mut writer);
            }
            Self::Ended => writer.u8(7),
            Self::Fenced { term } => {
                writer.u8(8);
                writer.u64(*term);
            }
            Self::Stop => writer.u8(9),
            Self::Reload => writer.u8(10),
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
        writer.option(self.postmaster, |writer, pid| writer.i32(pid.as_raw_nonzero().get()));
        writer.u8(u8::from(self.instance_left));
        writer.u8(u8::from(self.stopping));
        writer.u8(u8::from(self.paused));
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
        })
    }
}

impl RequestKind {
    fn decode(code: u8) -> Result<Self, Malformed> {
        [
            Self::Arm,
            Self::Disarm,
            Self::Start,
            Self::Signal,
            Self::Pause,
            Self::Leave,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == code)
        .ok_or(Malformed::Value { value: i64::from(code) })
    }
}

impl Refusal {
    /// The kind of refusal, then the system's error number or zero.
    fn encode(self, writer: &mut Writer<'_>) {
        let (code, errno) = match self {
            Self::TermIsFinal => (0, 0),
            Self::DeadlinePassed => (1, 0),
            Self::OtherTermRuns => (2, 0),
            Self::InstanceLeft => (3, 0),
            Self::NotArmed => (4, 0),
            Self::NoPostmaster => (5, 0),
            Self::System(errno) => (6, errno),
            Self::NotPaused => (7, 0),
        };
        writer.u8(code);
        writer.i32(errno);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        match (reader.u8()?, reader.i32()?) {
            (0, 0) => Ok(Self::TermIsFinal),
            (1, 0) => Ok(Self::DeadlinePassed),
            (2, 0) => Ok(Self::OtherTermRuns),
            (3, 0) => Ok(Self::InstanceLeft),
            (4, 0) => Ok(Self::NotArmed),
            (5, 0) => Ok(Self::NoPostmaster),
            (6, errno) => Ok(Self::System(errno)),
            (7, 0) => Ok(Self::NotPaused),
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
            Self::System(errno) => write!(out, "{}", std::io::Error::from_raw_os_error(*errno)),
        }
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
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        if reader.flag()? {
            reader.i32().map(Self::Signal)
        } else {
            reader.i32().map(Self::Code)
        }
    }
}

impl fmt::Display for ExitKind {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(out, "exit code {code}"),
            Self::Signal(signal) => write!(out, "signal {signal}"),
        }
    }
}

fn tag(reader: &mut Reader<'_>) -> Result<u8, Malformed> {
    match reader.u8()? {
        VERSION => reader.u8(),
        version => Err(Malformed::Version { version }),
    }
}

pub(crate) fn pid(reader: &mut Reader<'_>) -> Result<Pid, Malformed> {
    let raw = reader.i32()?;
    // A negative number would name a process group to `kill`.
    let positive = if raw > 0 { Pid::from_raw(raw) } else { None };
    positive.ok_or(Malformed::Value { value: i64::from(raw) })
}

pub(crate) fn memo(reader: &mut Reader<'_>) -> Result<Vec<u8>, Malformed> {
    let memo = reader.bytes()?;
    if memo.len() > MEMO_BYTES_MAX {
        return Err(Malformed::Memo { bytes: memo.len() });
    }
    Ok(memo.to_vec())
}

pub(crate) fn os_string(reader: &mut Reader<'_>) -> Result<OsString, Malformed> {
    reader.c_bytes().map(|bytes| OsString::from_vec(bytes.to_vec()))
}

#[cfg(test)]
#[path = "protocol_tests.rs"]
mod tests;

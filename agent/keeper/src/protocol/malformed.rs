//! What is wrong with bytes that are no message, and with messages that do not fit.

use std::fmt;

use super::{MEMO_BYTES_MAX, MESSAGE_BYTES_MAX, VERSION};

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

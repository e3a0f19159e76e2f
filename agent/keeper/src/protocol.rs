//! What the agent and the keeper say to each other: one message per packet of a SOCK_SEQPACKET socket.
//!
//! A message is the protocol's version, a tag and the tag's fields. Decoding is total: whatever the bytes are, it
//! returns a message or says what is wrong, and it allocates no more than the message is long.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use rustix::process::Pid;

use crate::wire::Reader;

mod malformed;
mod refusal;
mod report;
mod request;
mod watchdog;

pub use malformed::{Malformed, TooLong};
pub use refusal::Refusal;
pub use report::{ExitKind, Hello, Report};
pub use request::{PostmasterSignal, Request, RequestKind, Start};
pub use watchdog::{WatchdogDriver, WatchdogMode, WatchdogSettings, WatchdogState};

/// The longest message, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// The longest memo, in bytes.
pub const MEMO_BYTES_MAX: usize = 4096;
/// First byte of each message. The keeper outlives the agent, so that after an upgrade of the package the two may be
/// of different versions; neither may then guess.
pub(crate) const VERSION: u8 = 2;

pub(crate) fn tag(reader: &mut Reader<'_>) -> Result<u8, Malformed> {
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
mod tests;

//! Bytes of one message: little-endian integers and counted byte strings, read and written within bounds.

use crate::protocol::{MESSAGE_BYTES_MAX, Malformed, TooLong};

/// Reads fields off the front of one message.
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) const fn new(message: &'a [u8]) -> Self {
        Self(message)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.0.split_first_chunk().ok_or(Malformed::Short)?;
        self.0 = rest;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Malformed> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(crate) fn flag(&mut self) -> Result<bool, Malformed> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(Malformed::Value {
                value: i64::from(value),
            }),
        }
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn i32(&mut self) -> Result<i32, Malformed> {
        self.array().map(i32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    /// A byte string, borrowed from the message: its count cannot make us allocate.
    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], Malformed> {
        let count = usize::from(self.u16()?);
        let (head, rest) = self.0.split_at_checked(count).ok_or(Malformed::Short)?;
        self.0 = rest;
        Ok(head)
    }

    /// A field that may be missing.
    pub(crate) fn option<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, Malformed>,
    ) -> Result<Option<T>, Malformed> {
        if self.flag()? { read(self).map(Some) } else { Ok(None) }
    }

    /// A byte string that can be handed to `execve`.
    pub(crate) fn c_bytes(&mut self) -> Result<&'a [u8], Malformed> {
        let bytes = self.bytes()?;
        if bytes.contains(&0) {
            Err(Malformed::Nul)
        } else {
            Ok(bytes)
        }
    }

    /// How many elements a list has. Each takes at least `element_bytes_min`, so a count that the message cannot hold
    /// is refused before anything is reserved for it.
    pub(crate) fn count(&mut self, element_bytes_min: usize) -> Result<usize, Malformed> {
        let count = usize::from(self.u16()?);
        if count.saturating_mul(element_bytes_min) > self.0.len() {
            Err(Malformed::Short)
        } else {
            Ok(count)
        }
    }

    /// As `count`, for a list that has a limit of its own.
    pub(crate) fn count_within(&mut self, element_bytes_min: usize, count_max: usize) -> Result<usize, Malformed> {
        let count = self.count(element_bytes_min)?;
        if count > count_max {
            let value = i64::try_from(count).unwrap_or(i64::MAX);
            return Err(Malformed::Value { value });
        }
        Ok(count)
    }

    /// The message must be used up.
    pub(crate) fn end(self) -> Result<(), Malformed> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Malformed::Trailing { bytes: self.0.len() })
        }
    }
}

/// Writes one message into the caller's buffer. What does not fit is noticed by `finish`, so that the fields can be
/// written without a check each.
pub(crate) struct Writer<'a> {
    out: &'a mut Vec<u8>,
    countable: bool,
}

impl<'a> Writer<'a> {
    /// Starts anew: the buffer's contents are replaced.
    pub(crate) fn new(out: &'a mut Vec<u8>) -> Self {
        out.clear();
        Self { out, countable: true }
    }

    pub(crate) fn u8(&mut self, value: u8) {
        self.out.push(value);
    }

    pub(crate) fn i32(&mut self, value: i32) {
        self.out.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.out.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn count(&mut self, count: usize) {
        let checked = u16::try_from(count).unwrap_or_else(|_| {
            self.countable = false;
            0
        });
        self.out.extend_from_slice(&checked.to_le_bytes());
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.out.extend_from_slice(bytes);
    }

    /// A field that may be missing.
    pub(crate) fn option<T>(&mut self, value: Option<T>, write: impl FnOnce(&mut Self, T)) {
        self.u8(u8::from(value.is_some()));
        if let Some(value) = value {
            write(self, value);
        }
    }

    pub(crate) fn finish(self) -> Result<(), TooLong> {
        self.finish_within(MESSAGE_BYTES_MAX)
    }

    /// As `finish`, for what is no message and has a limit of its own.
    pub(crate) fn finish_within(self, bytes_max: usize) -> Result<(), TooLong> {
        if self.countable && self.out.len() <= bytes_max {
            Ok(())
        } else {
            Err(TooLong)
        }
    }
}

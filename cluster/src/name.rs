//! Checked names and numbers: what a member, a scope, an LSN and a timeline may be.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is not a usable name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing was given.
    #[error("it is empty")]
    Empty,
    /// A key in etcd is built from it, so a `/` would make another level.
    #[error("it contains {0:?}, which cannot be part of a key")]
    Forbidden(char),
    /// PostgreSQL cuts `application_name` and slot names at 63 bytes.
    #[error("it is {len} bytes long, the limit is {max}")]
    TooLong {
        /// Bytes given.
        len: usize,
        /// Bytes allowed.
        max: usize,
    },
}

const NAME_BYTES_MAX: usize = 255;

fn check_name(text: &str) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    if text.len() > NAME_BYTES_MAX {
        return Err(NameError::TooLong {
            len: text.len(),
            max: NAME_BYTES_MAX,
        });
    }
    match text.chars().find(|c| *c == '/' || c.is_control()) {
        Some(c) => Err(NameError::Forbidden(c)),
        None => Ok(()),
    }
}

macro_rules! checked_name {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// Checks `text` and wraps it.
            ///
            /// # Errors
            /// When it is empty, too long, or has a `/` or a control character.
            pub fn new(text: impl Into<String>) -> Result<Self, NameError> {
                let text = text.into();
                check_name(&text)?;
                Ok(Self(text))
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> Self {
                name.0
            }
        }
    };
}

checked_name! {
    /// A member's name: the last part of its key, its PostgreSQL `application_name`, and the value of the leader key.
    MemberName
}

checked_name! {
    /// A cluster's name, one level of the key prefix and PostgreSQL's `cluster_name`.
    Scope
}

impl MemberName {
    /// The name of the physical replication slot that a leader keeps for this member: lower case, `-` and `.` become `_`,
    /// any other character outside `[a-z0-9_]` becomes `u` and its decimal code point in at least four digits, cut at 63
    /// bytes. Patroni's rule, so that members of both kinds agree on names.
    #[must_use]
    pub fn slot_name(&self) -> String {
        let mut slot = String::with_capacity(self.0.len());
        for c in self.0.to_lowercase().chars() {
            match c {
                'a'..='z' | '0'..='9' | '_' => slot.push(c),
                '-' | '.' => slot.push('_'),
                other => slot.push_str(&format!("u{:04}", u32::from(other))),
            }
        }
        slot.truncate(63); // Every character pushed above is ASCII.
        slot
    }
}

/// A position in the write-ahead log, in bytes since `0/0`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lsn(pub u64);

impl Lsn {
    /// How many bytes `self` is behind `other`; zero when it is not.
    #[must_use]
    pub const fn behind(self, other: Self) -> u64 {
        other.0.saturating_sub(self.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

/// The text is not of PostgreSQL's form `X/X` with hexadecimal halves of at most 32 bits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an LSN such as 0/3000060")]
pub struct LsnError(String);

impl FromStr for Lsn {
    type Err = LsnError;

    fn from_str(text: &str) -> Result<Self, LsnError> {
        let bad = || LsnError(text.to_owned());
        let (high, low) = text.split_once('/').ok_or_else(bad)?;
        let half = |digits: &str| match digits.len() {
            1..=8 if digits.bytes().all(|b| b.is_ascii_hexdigit()) => {
                u32::from_str_radix(digits, 16).map_err(|_| bad())
            }
            _ => Err(bad()),
        };
        Ok(Self(u64::from(half(high)?) << 32 | u64::from(half(low)?)))
    }
}

/// A timeline identifier; the first is 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timeline(pub u32);

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// PostgreSQL's system identifier: made by initdb, equal on all members of one physical cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SystemId(pub u64);

impl fmt::Display for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for SystemId {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_that_would_break_a_key_is_refused() {
        assert_eq!(MemberName::new(""), Err(NameError::Empty));
        assert_eq!(MemberName::new("a/b"), Err(NameError::Forbidden('/')));
        assert_eq!(MemberName::new("a\nb"), Err(NameError::Forbidden('\n')));
        assert!(matches!(
            MemberName::new("x".repeat(256)),
            Err(NameError::TooLong { len: 256, .. })
        ));
    }

    #[test]
    fn slot_names_follow_patronis_rule() {
        let slot = |name: &str| MemberName::new(name).map(|name| name.slot_name());
        assert_eq!(slot("node1").as_deref(), Ok("node1"));
        assert_eq!(slot("Node-1.example").as_deref(), Ok("node_1_example"));
        assert_eq!(slot("pg 1").as_deref(), Ok("pgu00321"));
        assert_eq!(slot("é").as_deref(), Ok("u0233"));
        assert_eq!(slot(&"n".repeat(80)).map(|slot| slot.len()), Ok(63));
    }

    #[test]
    fn lsn_texts_that_postgresql_never_writes_are_refused() {
        for text in ["", "/", "0/", "/0", "0/123456789", "x/1", "1/2/3", "+1/2"] {
            assert!(text.parse::<Lsn>().is_err(), "{text}");
        }
        assert_eq!("0/4000060".parse(), Ok(Lsn(67_108_960)));
    }

    proptest! {
        #[test]
        fn an_lsn_survives_its_text(value: u64) {
            prop_assert_eq!(Lsn(value).to_string().parse(), Ok(Lsn(value)));
        }

        #[test]
        fn a_slot_name_is_always_one_that_postgresql_takes(name in "[^/\\p{C}]{1,60}") {
            if let Ok(name) = MemberName::new(name) {
                let slot = name.slot_name();
                prop_assert!(!slot.is_empty() && slot.len() <= 63);
                prop_assert!(slot.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_')));
            }
        }
    }
}

//! Why a keeper or a sentinel cannot work.

use std::error::Error;
use std::fmt;
use std::io;

/// What failed, and why. Whatever it is, PostgreSQL does not stay behind unwatched: the sentinel ends it when the
/// keeper's process ends.
#[derive(Debug)]
pub enum KeeperError {
    /// Another keeper, or the sentinel of one that has just died, still holds the runtime directory.
    Busy,
    /// The system refused something that the work rests on.
    System {
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl fmt::Display for KeeperError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy => write!(out, "another keeper holds the runtime directory"),
            Self::System { doing, .. } => write!(out, "{doing}"),
        }
    }
}

impl Error for KeeperError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Busy => None,
            Self::System { source, .. } => Some(source),
        }
    }
}

/// Says what was being done when the system refused.
pub(crate) trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T, KeeperError>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, doing: &'static str) -> Result<T, KeeperError> {
        self.map_err(|error| KeeperError::System {
            doing,
            source: error.into(),
        })
    }
}

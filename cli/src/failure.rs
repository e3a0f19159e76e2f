//! Why a command ended without success, by what its caller should do about it. Only `main` turns it into an exit code.

use std::process::ExitCode;

/// The end of a command that did not do what it was asked for.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Failure {
    /// Arguments, file or environment are wrong; one finding per entry.
    #[error("{}", .0.join("\n"))]
    Configuration(Vec<String>),
    /// What was asked for was understood and refused, or it failed.
    #[error("{0}")]
    Refused(String),
    /// Something that it takes is not there: a program, a server, a port.
    #[error("{0}")]
    Unavailable(String),
    /// A defect of ours.
    #[error("defect: {0}")]
    Defect(String),
    /// The same may succeed a little later.
    #[error("{0}")]
    TryAgain(String),
    /// Why has been said already, by a process that we ran in our place or by a line for each member.
    #[error("")]
    Ended(u8),
}

impl Failure {
    /// A single finding about the configuration.
    pub(crate) fn configuration(finding: impl Into<String>) -> Self {
        Self::Configuration(vec![finding.into()])
    }

    /// The exit code, in the spirit of sysexits.h.
    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Refused(_) => 1,
            Self::Configuration(_) => 64,
            Self::Unavailable(_) => 69,
            Self::Defect(_) => 70,
            Self::TryAgain(_) => 75,
            Self::Ended(code) => *code,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_told_one_per_line() {
        let failure = Failure::Configuration(vec!["a: 1".to_owned(), "b: 2".to_owned()]);
        assert_eq!(failure.to_string(), "a: 1\nb: 2");
    }
}

//! PostgreSQL's programs, run with a deadline and with their words kept for the error.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::scripts::keep_to_ourselves;

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It could not be started.
    #[error("starting {program}")]
    Spawn {
        /// Which.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It was still running at the deadline, and was killed.
    #[error("{program} did not finish within {limit:?}")]
    Timeout {
        /// Which.
        program: String,
        /// How long it had.
        limit: Duration,
    },
    /// It failed.
    #[error("{program} failed: {said}")]
    Failed {
        /// Which.
        program: String,
        /// The end of what it wrote to stderr.
        said: String,
    },
    /// It succeeded, and what it wrote is not what was expected.
    #[error("{program} wrote something unexpected: {what}")]
    Unexpected {
        /// Which.
        program: String,
        /// What was missing.
        what: String,
    },
    /// A program of an operator's, or one that takes long.
    #[error(transparent)]
    Run(#[from] crate::scripts::RunError),
    /// No method to make a replica could be tried.
    #[error(
        "postgresql.create_replica_methods names no method that works while nobody leads: waiting for a leader, or add one \
         with no_leader"
    )]
    NoMethod,
    /// A method to make a replica said that it did, and nothing is there.
    #[error("{method} ended well and left no data directory in {}", .path.display())]
    NothingMade {
        /// Which.
        method: String,
        /// Where it should have been.
        path: PathBuf,
    },
    /// There is no room for a new copy beside the old one.
    #[error(
        "a copy needs {needed} bytes beside the data directory, and {free} are free on the filesystem of {}: make room, or \
         remove the data directory to have it made in its place",
        .path.display()
    )]
    NoRoom {
        /// How many bytes the source has.
        needed: u64,
        /// How many are free.
        free: u64,
        /// Where.
        path: PathBuf,
    },
    /// A file could not be read or written.
    #[error("{what}: {}", .path.display())]
    File {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// A query failed.
    #[error("{what}")]
    Sql {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: tokio_postgres::Error,
    },
}

impl ToolError {
    /// What the server said no with, where it did.
    #[must_use]
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Sql { source, .. } => source.code().map(tokio_postgres::error::SqlState::code),
            _ => None,
        }
    }

    /// The error with its causes, on one line.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

/// Where PostgreSQL's programs are.
#[derive(Clone, Debug)]
pub struct Programs {
    bin_dir: Option<PathBuf>,
    names: BTreeMap<String, String>,
}

impl Programs {
    /// In `bin_dir`, or on `PATH` without one.
    #[must_use]
    pub const fn new(bin_dir: Option<PathBuf>) -> Self {
        Self {
            bin_dir,
            names: BTreeMap::new(),
        }
    }

    /// With other names for some, by the usual ones.
    #[must_use]
    pub fn with_names(mut self, names: BTreeMap<String, String>) -> Self {
        self.names = names;
        self
    }

    /// The path of one program.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        let name = self.names.get(name).map_or(name, String::as_str);
        self.bin_dir
            .as_deref()
            .map_or_else(|| PathBuf::from(name), |dir| dir.join(name))
    }

    /// Runs a program to its end. Dropped midway, it is killed.
    ///
    /// # Errors
    /// See [`ToolError`].
    pub async fn run<A: AsRef<OsStr>>(
        &self,
        name: &str,
        args: &[A],
        env: &[(&str, &OsStr)],
        limit: Duration,
    ) -> Result<Output, ToolError> {
        let program = || name.to_owned();
        let mut command = Command::new(self.path(name));
        keep_to_ourselves(&mut command); // pg_rewind and a recovery run commands of the operator's.
        let child = command
            .args(args)
            .env("LC_ALL", "C") // What it writes is read by us.
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| ToolError::Spawn {
                program: program(),
                source,
            })?;
        let output = timeout(limit, child.wait_with_output())
            .await
            .map_err(|_| ToolError::Timeout {
                program: program(),
                limit,
            })?
            .map_err(|source| ToolError::Spawn {
                program: program(),
                source,
            })?;
        if output.status.success() {
            return Ok(output);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let last_lines: Vec<&str> = said.lines().rev().take(4).collect();
        let said = last_lines.into_iter().rev().collect::<Vec<_>>().join(" | ");
        Err(ToolError::Failed {
            program: program(),
            said,
        })
    }

    /// The major version of the programs, such as 15.
    ///
    /// # Errors
    /// See [`ToolError`].
    pub async fn major_version(&self) -> Result<u32, ToolError> {
        let output = self
            .run("postgres", &["--version"], &[], Duration::from_secs(10))
            .await?;
        let text = String::from_utf8_lossy(&output.stdout);
        // "postgres (PostgreSQL) 15.18 (Debian ...)"
        let digits: String = text
            .split("PostgreSQL) ")
            .nth(1)
            .unwrap_or_default()
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        digits.parse().map_err(|_| ToolError::Unexpected {
            program: "postgres".to_owned(),
            what: text.trim().to_owned(),
        })
    }
}

/// Attaches what was being done to a file error.
pub(crate) fn file_error(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> ToolError {
    let path = path.to_owned();
    move |source| ToolError::File { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only a process that was started with such variables has them: the test starts itself once more.
    #[tokio::test]
    async fn what_is_meant_for_us_is_not_handed_to_programs() {
        const OURS: &str = "PATRONI_SUPERUSER_PASSWORD";
        const NAME: &str = "postgres::programs::tests::what_is_meant_for_us_is_not_handed_to_programs";
        const LIMIT: Duration = Duration::from_secs(60);
        if std::env::var_os(OURS).is_some() {
            let told = Programs::new(None).run("env", &[] as &[&str], &[], LIMIT).await;
            let told = String::from_utf8_lossy(&told.expect("it runs").stdout).into_owned();
            assert!(told.contains("LC_ALL=C") && !told.contains("secret"), "{told}");
            return;
        }
        let again = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", NAME])
            .envs([(OURS, "secret"), ("PGHERD_ETCD_PASSWORD", "secret")])
            .output();
        let output = timeout(LIMIT, again).await.expect("in time").expect("it runs");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
    }
}

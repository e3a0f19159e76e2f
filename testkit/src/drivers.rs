//! Where the drivers are that `scripts/deps.sh tests` installs: Python's in an environment of their own, JDBC's as Debian has it.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use crate::program;

/// The environment variable that names the Python environment with the drivers.
const PYTHON_ENV: &str = "PGHERD_TEST_DRIVERS";
/// The environment variable that names the jar of PostgreSQL's JDBC driver.
const JDBC_ENV: &str = "PGHERD_TEST_JDBC";
/// Where Debian's libpostgresql-jdbc-java puts it.
const JDBC: &str = "/usr/share/java/postgresql.jar";

/// A Python that has psycopg 3, psycopg 2, SQLAlchemy and asyncpg.
///
/// # Errors
/// When it has not been installed.
pub fn python() -> Result<PathBuf> {
    let dir = match std::env::var_os(PYTHON_ENV) {
        Some(named) => PathBuf::from(named),
        None => program::tests_cache()?.join("drivers"),
    };
    let python = dir.join("bin").join("python");
    ensure!(
        python.is_file(),
        "there is no {} (scripts/deps.sh tests)",
        python.display()
    );
    Ok(python)
}

/// The jar of PostgreSQL's JDBC driver.
///
/// # Errors
/// When it is not installed.
pub fn jdbc() -> Result<PathBuf> {
    let jar = std::env::var_os(JDBC_ENV).map_or_else(|| Path::new(JDBC).to_owned(), PathBuf::from);
    ensure!(jar.is_file(), "there is no {} (scripts/deps.sh tests)", jar.display());
    Ok(jar)
}

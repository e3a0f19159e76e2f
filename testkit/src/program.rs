//! Where the programs are that the tests run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::process::geteuid;

/// The environment variable that names the binary to test.
const BINARY_ENV: &str = "PGHERD_BIN";
/// The environment variable that names the directory of PostgreSQL's programs.
const POSTGRES_BIN_ENV: &str = "PGHERD_TEST_PG_BIN";

/// The environment variable that names the etcd to run.
const ETCD_ENV: &str = "ETCD_BIN";

/// The cache directory for tests that run as root, whose daemons run as somebody else.
const SYSTEM_CACHE: &str = "/var/cache";

/// Where `scripts/deps.sh tests` keeps what it installs and no package manager looks after, by the same rules.
///
/// # Errors
/// When there is no home directory.
pub fn tests_cache() -> Result<PathBuf> {
    let cache = if geteuid().is_root() {
        PathBuf::from(SYSTEM_CACHE)
    } else if let Some(cache) = std::env::var_os("XDG_CACHE_HOME") {
        PathBuf::from(cache)
    } else {
        PathBuf::from(std::env::var_os("HOME").context("there is no HOME")?).join(".cache")
    };
    Ok(cache.join("pgherd-tests"))
}

/// The root of the workspace.
#[must_use]
pub fn workspace() -> PathBuf {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.parent().unwrap_or(crate_dir).to_owned()
}

/// Where cargo builds.
#[must_use]
pub fn target_dir() -> PathBuf {
    named("CARGO_TARGET_DIR").unwrap_or_else(|| workspace().join("target"))
}

/// The binary under test: `PGHERD_BIN`, or what a plain `cargo build` leaves.
///
/// # Errors
/// When there is none.
pub fn pgherd() -> Result<PathBuf> {
    let binary = named(BINARY_ENV).unwrap_or_else(|| target_dir().join("debug").join("pgherd"));
    ensure!(
        binary.is_file(),
        "there is no {}: build it with `cargo build -p pgherd`, or name another in {BINARY_ENV}",
        binary.display()
    );
    Ok(binary)
}

/// The etcd to run: `ETCD_BIN`, or the one on `PATH`.
#[must_use]
pub fn etcd() -> PathBuf {
    named(ETCD_ENV).unwrap_or_else(|| PathBuf::from("etcd"))
}

/// The path in an environment variable; a relative one begins at the root of the workspace.
#[must_use]
pub fn named(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(|path| workspace().join(path))
}

/// The directory of PostgreSQL's programs: `PGHERD_TEST_PG_BIN`, the newest of Debian's, or what `pg_config` says.
///
/// # Errors
/// When PostgreSQL's server is not installed.
pub fn postgres_bin_dir() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os(POSTGRES_BIN_ENV) {
        return Ok(PathBuf::from(named));
    }
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let with_server = versions
        .map(|entry| entry.path().join("bin"))
        .filter(|bin| bin.join("postgres").is_file());
    let major = |bin: &PathBuf| bin.parent()?.file_name()?.to_str()?.parse::<u32>().ok();
    if let Some(newest) = with_server.max_by_key(major) {
        return Ok(newest);
    }
    let said = Command::new("pg_config")
        .arg("--bindir")
        .output()
        .context("PostgreSQL is not installed (make deps)")?;
    let bin = PathBuf::from(String::from_utf8_lossy(&said.stdout).trim());
    ensure!(
        bin.join("postgres").is_file(),
        "no PostgreSQL server in {} (make deps)",
        bin.display()
    );
    Ok(bin)
}

/// One of PostgreSQL's client programs, of the version that runs if it is there, otherwise whichever is on `PATH`.
#[must_use]
pub fn postgres_client(name: &str) -> PathBuf {
    let of_server = postgres_bin_dir().map(|bin| bin.join(name)).ok();
    of_server
        .filter(|program| program.is_file())
        .unwrap_or_else(|| PathBuf::from(name))
}

/// The psql 17 that `scripts/postgresql-trixie.sh` has fetched, if it has.
#[must_use]
pub fn newer_psql() -> Option<PathBuf> {
    let psql = tests_cache().ok()?.join("postgresql-17/usr/lib/postgresql/17/bin/psql");
    psql.is_file().then_some(psql)
}

/// The first of the directories on `PATH` that has `name`.
#[must_use]
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

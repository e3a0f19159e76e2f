//! Others' clients: psql, pgbench, Python's psycopg, patronictl.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::program;
use crate::site::Site;
use crate::sql::{DATABASE, SUPERUSER, SUPERUSER_PASSWORD};

/// Making a Python environment downloads a few packages.
const VENV_MAX: Duration = Duration::from_secs(180);

/// A command of libpq's kind that will connect to `address` as the superuser.
#[must_use]
pub fn libpq(site: &Site, program: impl AsRef<std::ffi::OsStr>, address: SocketAddr) -> Command {
    let mut command = site.client_command(program);
    command
        .env("PGHOST", address.ip().to_string())
        .env("PGPORT", address.port().to_string());
    command
        .env("PGUSER", SUPERUSER)
        .env("PGPASSWORD", SUPERUSER_PASSWORD)
        .env("PGDATABASE", DATABASE);
    command
        .env("PGCONNECT_TIMEOUT", "15")
        .env("PGAPPNAME", "testkit-client");
    command
}

/// A program of the Python environment that `scripts/python-clients.sh` makes under the target directory.
///
/// # Errors
/// With the reason, when the environment cannot be made: a test then says so and is over.
pub async fn python_program(site: &Site, name: &str) -> Result<PathBuf> {
    let venv = program::target_dir().join("python-clients");
    let file = venv.join("bin").join(name);
    if !venv.join("complete").is_file() {
        let mut command = site.client_command("bash");
        command
            .arg(program::workspace().join("scripts/python-clients.sh"))
            .arg(&venv);
        site.run(command, VENV_MAX)
            .await?
            .success()
            .context("Python's packages cannot be had")?;
    }
    anyhow::ensure!(file.is_file(), "{} has no {name}", venv.display());
    Ok(file)
}

/// A `patronictl`: of the Python environment, or on `PATH`.
///
/// # Errors
/// When there is none.
pub async fn patronictl(site: &Site) -> Result<PathBuf> {
    match program::find("patronictl") {
        Some(found) => Ok(found),
        None => python_program(site, "patronictl").await,
    }
}

/// Writes a file for patronictl that says where etcd is.
///
/// # Errors
/// When it cannot be written.
pub fn patronictl_config(site: &Site, hosts: &[String]) -> Result<PathBuf> {
    let config = serde_json::json!({"scope": crate::config::SCOPE, "etcd3": {"hosts": hosts}});
    site.write_file("patronictl.yml", &crate::yaml::write(&config))
}

/// Says why a test is over before it began. A test that needs what is not here must not fail for it, nor be silent.
pub fn skip(reason: &anyhow::Error) {
    println!("skipped: {reason:#}");
}

/// The text of a file of this crate, for scripts that clients run.
#[must_use]
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests")
        .join("fixtures")
        .join(name)
}

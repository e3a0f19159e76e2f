//! Drivers of other languages: each has a program of its own that says "ok" in the end.

use std::process::Command;

use anyhow::{Result, ensure};
use pgherd_testkit::client::fixture;
use pgherd_testkit::drivers;

use super::Field;

/// A program for one of Python's drivers.
pub(super) async fn python(field: &Field, name: &str) -> Result<()> {
    let mut command = field.libpq(drivers::python()?, field.write());
    command.arg(fixture("drivers").join(name));
    // What they share is compiled when it is imported, and would be kept beside it.
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    says_ok(field, command).await
}

pub(super) async fn jdbc(field: &Field) -> Result<()> {
    let mut command = field.libpq("java", field.write());
    // It lives for seconds: what it would gain by compiling well, others need.
    command.args(["-XX:TieredStopAtLevel=1", "-Xshare:auto", "-cp"]);
    command.arg(drivers::jdbc()?).arg(fixture("drivers").join("Jdbc.java"));
    says_ok(field, command).await
}

async fn says_ok(field: &Field, mut command: Command) -> Result<()> {
    let (write, read) = (field.write(), field.read());
    command
        .env_remove("PGHOST")
        .env_remove("PGPORT")
        .env_remove("PGAPPNAME");
    command.arg(write.ip().to_string());
    command.args([write.port().to_string(), read.port().to_string()]);
    command.arg(field.tls.word());
    let said = field.run(command).await?;
    ensure!(said.trim() == "ok", "{said}");
    Ok(())
}

//! A PostgreSQL server on its own, without an agent: what benches compare with, and data directories for tests.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::Mutex;

use crate::address::{POSTGRES_PORT, at};
use crate::process::{self, Daemon, Pid, Signal};
use crate::program;
use crate::site::Site;
use crate::sql::{SUPERUSER, SUPERUSER_PASSWORD, value};
use crate::wait::eventually;

const INITDB_MAX: Duration = Duration::from_secs(60);
const READY_MAX: Duration = Duration::from_secs(60);
const STOP_MAX: Duration = Duration::from_secs(30);

/// A server. It ends with its site.
pub struct Postgres {
    site: Arc<Site>,
    name: String,
    ip: Ipv4Addr,
    daemon: Mutex<Option<Daemon>>,
}

/// Makes a data directory at `NAME/data` under the site's directory: UTF-8, checksums, the tests' superuser.
///
/// # Errors
/// When initdb fails.
pub async fn initdb(site: &Site, name: &str) -> Result<PathBuf> {
    let data_dir = site.make_dir(name)?.join("data");
    let password = site.write_file(&format!("{name}.pwfile"), SUPERUSER_PASSWORD)?;
    let mut command = site.command(program::postgres_bin_dir()?.join("initdb"));
    command.arg("--pgdata").arg(&data_dir).args([
        "--encoding=UTF8",
        "--locale=C.UTF-8",
        "--data-checksums",
        "--no-sync",
    ]);
    command
        .arg(format!("--username={SUPERUSER}"))
        .arg(format!("--pwfile={}", password.display()));
    command.args(["--auth-local=trust", "--auth-host=scram-sha-256"]);
    site.run(command, INITDB_MAX).await?.success().context("initdb")?;
    Ok(data_dir)
}

impl Postgres {
    /// Makes a data directory called `name`, starts a server on `ip`, and waits until it answers.
    ///
    /// # Errors
    /// When it does not.
    pub async fn start(site: &Arc<Site>, name: &str, ip: Ipv4Addr) -> Result<Self> {
        initdb(site, name).await?;
        let server = Self {
            site: Arc::clone(site),
            name: name.to_owned(),
            ip,
            daemon: Mutex::new(None),
        };
        server.start_again().await?;
        Ok(server)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        at(self.ip, POSTGRES_PORT)
    }

    /// Its process.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn pid(&self) -> Result<Pid> {
        Ok(self.daemon.lock().await.as_ref().context("it does not run")?.pid())
    }

    /// Starts a server that has ended, and waits until it answers.
    ///
    /// # Errors
    /// When it does not.
    pub async fn start_again(&self) -> Result<()> {
        let dir = self.site.dir().join(&self.name);
        let mut command = self.site.command(program::postgres_bin_dir()?.join("postgres"));
        command
            .arg("-D")
            .arg(dir.join("data"))
            .arg("-h")
            .arg(self.ip.to_string())
            .arg("-p")
            .arg(POSTGRES_PORT.to_string());
        command
            .arg("-c")
            .arg(format!("unix_socket_directories={}", dir.display()))
            .args(["-c", "shared_buffers=16MB", "-c", "dynamic_shared_memory_type=mmap"]);
        *self.daemon.lock().await = Some(self.site.start(&self.name, command)?);
        let answers = eventually("PostgreSQL answers", READY_MAX, async || {
            Ok(value(self.address(), "SELECT 1", Duration::from_secs(2)).await?)
        });
        answers.await?;
        Ok(())
    }

    /// Ends the postmaster by a signal (SIGINT is a fast shutdown), and waits for all of its processes.
    ///
    /// # Errors
    /// When they do not end.
    pub async fn end(&self, signal: Signal) -> Result<()> {
        let mut daemon = self.daemon.lock().await.take().context("it does not run")?;
        process::signal(daemon.pid(), signal)?;
        daemon.end(STOP_MAX).await?;
        let data_dir = self.site.dir().join(&self.name).join("data");
        let gone = eventually("its backends have ended", STOP_MAX, async || {
            let mut left = process::table();
            left.retain(|left| {
                !left.is_zombie && process::working_directory(left.pid).is_some_and(|cwd| cwd == data_dir)
            });
            anyhow::ensure!(left.is_empty(), "{left:?}");
            Ok(())
        });
        gone.await
    }
}

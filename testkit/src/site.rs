//! A place for one test: a directory, a block of addresses, the user that everything runs as, and the certainty that
//! nothing of it is left when the test is over.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{geteuid, getpid};
use tokio::task::JoinSet;
use tokio::time::{interval, timeout};

use crate::address::AddressBlock;
use crate::ending;
use crate::network::Network;
use crate::process::{self, Daemon, Process};

/// Set for everything that a site starts, with the site's directory as value.
pub(crate) const SITE_ENV: &str = "PGHERD_TEST_SITE";
/// When set, no site's directory is removed.
pub(crate) const KEEP_ENV: &str = "PGHERD_TEST_KEEP";
/// A directory with this file in it is left for people to look at.
pub(crate) const KEPT_FILE: &str = "KEPT";
pub(crate) const DIRECTORY_PREFIX: &str = "pgherd-test-";
/// What a memory file system must have free to be used: a cluster of three takes about a third of it.
const MEMORY_BYTES_MIN: u64 = 3 << 30;
const TAIL_LINES: usize = 40;
const REAPING: Duration = Duration::from_millis(250);

/// Where one test lives. Everything started through it is ended when it is dropped, and its directory is removed unless
/// the test failed, which is assumed until [`Site::pass`] is called.
#[derive(Debug)]
pub struct Site {
    dir: PathBuf,
    addresses: AddressBlock,
    user: Option<User>,
    network: Option<Arc<Network>>,
    passed: AtomicBool,
    _reaper: JoinSet<()>,
}

/// Whom everything runs as when the tests run as root: PostgreSQL refuses to.
#[derive(Clone, Copy, Debug)]
struct User {
    uid: u32,
    gid: u32,
}

/// What a program that ran to its end has left.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Its exit code; nothing when a signal ended it.
    pub code: Option<i32>,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Outcome {
    /// Its standard output.
    ///
    /// # Errors
    /// When it did not end with exit code 0.
    pub fn success(self) -> Result<String> {
        anyhow::ensure!(
            self.code == Some(0),
            "exit code {:?}\n{}{}",
            self.code,
            self.stdout,
            self.stderr
        );
        Ok(self.stdout)
    }
}

impl Site {
    /// Makes a place. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// When there is no room, no address, or no user `postgres` although the tests run as root.
    pub fn new() -> Result<Self> {
        Self::make(AddressBlock::take, None)
    }

    /// Makes a place whose parts run on the hosts of `network`, each on the one that has its address. Must be called in a
    /// tokio runtime.
    ///
    /// # Errors
    /// As [`Site::new`].
    pub fn on(network: &Arc<Network>) -> Result<Self> {
        Self::make(|| Ok(AddressBlock::of(network.subnet())), Some(Arc::clone(network)))
    }

    fn make(addresses: impl FnOnce() -> Result<AddressBlock>, network: Option<Arc<Network>>) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static SWEPT: Once = Once::new();
        process::adopt_orphans()?;
        SWEPT.call_once(|| ending::sweep(&base_dir()));
        let user = geteuid().is_root().then(postgres_user).transpose()?;
        let started = process::look(getpid()).map_or(0, |me| me.started);
        let nth = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = base_dir().join(format!("{DIRECTORY_PREFIX}{}-{started}-{nth}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
        let mut reaper = JoinSet::new();
        reaper.spawn(async {
            let mut turn = interval(REAPING);
            loop {
                turn.tick().await;
                process::reap_orphans();
            }
        });
        let site = Self {
            dir,
            addresses: addresses()?,
            user,
            network,
            passed: AtomicBool::new(false),
            _reaper: reaper,
        };
        site.make_dir("log")?;
        site.give(&site.dir)?;
        Ok(site)
    }

    /// The site's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The site's addresses.
    #[must_use]
    pub const fn addresses(&self) -> &AddressBlock {
        &self.addresses
    }

    /// The test has passed: nothing needs to be kept.
    pub fn pass(&self) {
        self.passed.store(true, Ordering::Relaxed);
    }

    /// Makes a directory under the site's, with mode 0700, that belongs to whom everything runs as.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make_dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))?;
        self.give(&dir)?;
        Ok(dir)
    }

    /// Writes a file under the site's directory that belongs to whom everything runs as.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_file(&self, name: &str, text: &str) -> Result<PathBuf> {
        let file = self.dir.join(name);
        fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
        self.give(&file)?;
        Ok(file)
    }

    pub(crate) fn give(&self, path: &Path) -> Result<()> {
        match self.user {
            Some(user) => {
                chown(path, Some(user.uid), Some(user.gid)).with_context(|| format!("giving {} away", path.display()))
            }
            None => Ok(()),
        }
    }

    /// A command that will run as the site's user, in the site's directory, with a plain environment.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.client_command(program);
        if let Some(user) = self.user {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    /// A command that will run as the site's user on the host that has the address `ip`, where the site is on a network.
    ///
    /// # Errors
    /// When no host has this address.
    pub fn command_at(&self, ip: Ipv4Addr, program: impl AsRef<OsStr>) -> Result<Command> {
        let Some((network, user)) = self.network.as_ref().zip(self.user) else {
            return Ok(self.command(program));
        };
        // It turns into the program, and keeps its process number. Only root may enter, so the user is changed inside.
        let mut command = self.client_command("nsenter");
        command
            .arg(format!("--net={}", network.namespace_file(ip)?.display()))
            .arg(format!("--setuid={}", user.uid))
            .arg(format!("--setgid={}", user.gid))
            .arg("--")
            .arg(program);
        Ok(command)
    }

    /// The network that the site's parts run on.
    #[must_use]
    pub const fn network(&self) -> Option<&Arc<Network>> {
        self.network.as_ref()
    }

    /// A command for a client, which runs as whoever runs the test: its programs may lie where nobody else can read.
    #[must_use]
    pub fn client_command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if ["PG", "PATRONI", "ETCD"].iter().any(|prefix| text.starts_with(prefix)) {
                command.env_remove(&name);
            }
        }
        command
            .current_dir(&self.dir)
            .env("HOME", &self.dir)
            .env(SITE_ENV, &self.dir)
            .env("LC_ALL", "C.UTF-8");
        command
    }

    /// Starts a process that runs until it is told to end. Its output is appended to `log/NAME.log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, name: &str, command: Command) -> Result<Daemon> {
        Daemon::start(command, self.log_file(name))
    }

    /// Where the output of the daemon called `name` goes.
    #[must_use]
    pub fn log_file(&self, name: &str) -> PathBuf {
        self.dir.join("log").join(format!("{name}.log"))
    }

    /// Runs a program to its end. Dropping the future ends the program.
    ///
    /// # Errors
    /// When it cannot be started or has not ended within `limit`.
    pub async fn run(&self, mut command: Command, limit: Duration) -> Result<Outcome> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let shown = format!("{command:?}");
        let mut command = tokio::process::Command::from(command);
        command.kill_on_drop(true);
        let child = process::start_own(|| command.spawn(), tokio::process::Child::id)
            .with_context(|| format!("starting {shown}"))?;
        let output = timeout(limit, child.wait_with_output()).await;
        let output = output.with_context(|| format!("has not ended within {limit:?}: {shown}"))??;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Outcome {
            code: output.status.code(),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        })
    }

    /// Whether a process was started through this site, or by something that was.
    #[must_use]
    pub fn owns(&self, process: &Process) -> bool {
        ending::belongs(process, &self.dir)
    }

    /// The site's living processes.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        ending::family(&self.dir)
    }

    /// A copy of `program`, if whom everything runs as could not reach it where it is.
    ///
    /// # Errors
    /// When it cannot be copied.
    pub fn reachable(&self, program: &Path) -> Result<PathBuf> {
        let open = |path: &Path| fs::metadata(path).is_ok_and(|metadata| metadata.mode() & 0o001 != 0);
        if self.user.is_none() || program.ancestors().all(open) {
            return Ok(program.to_owned());
        }
        let copy = self.dir.join(program.file_name().context("a program has a name")?);
        if !copy.exists() {
            fs::copy(program, &copy).with_context(|| format!("copying {}", program.display()))?;
            self.give(&copy)?;
        }
        Ok(copy)
    }

    fn print_tails(&self) {
        let mut logs = BTreeMap::new();
        for entry in fs::read_dir(self.dir.join("log")).into_iter().flatten().flatten() {
            logs.insert(entry.file_name(), process::last_lines(&entry.path(), TAIL_LINES));
        }
        for (name, tail) in logs {
            eprintln!("==== {} ====\n{tail}", name.display());
        }
        eprintln!("==== kept: {} ====", self.dir.display());
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let ended = ending::end_all(&self.dir);
        if let Err(error) = &ended {
            eprintln!("{error:#}");
        }
        let failed = !self.passed.load(Ordering::Relaxed) || std::thread::panicking() || ended.is_err();
        if failed {
            self.print_tails();
        }
        let removed = if failed || std::env::var_os(KEEP_ENV).is_some() {
            fs::write(self.dir.join(KEPT_FILE), "")
        } else {
            fs::remove_dir_all(&self.dir)
        };
        if let Err(error) = removed {
            eprintln!("{}: {error}", self.dir.display());
        }
    }
}

/// Memory when there is enough of it: what is tested is the death of processes, which no disk needs to outlive.
fn base_dir() -> PathBuf {
    let memory = Path::new("/dev/shm");
    match rustix::fs::statvfs(memory) {
        Ok(space) if space.f_bavail.saturating_mul(space.f_frsize) >= MEMORY_BYTES_MIN => memory.to_owned(),
        _ => std::env::temp_dir(),
    }
}

fn postgres_user() -> Result<User> {
    let passwd = fs::read_to_string("/etc/passwd")?;
    let line = passwd.lines().find(|line| line.starts_with("postgres:"));
    let line = line.context("the tests run as root, and there is no user postgres to run PostgreSQL as")?;
    let mut fields = line.split(':').skip(2).map(str::parse);
    match (fields.next(), fields.next()) {
        (Some(Ok(uid)), Some(Ok(gid))) => Ok(User { uid, gid }),
        _ => anyhow::bail!("no numbers in /etc/passwd: {line}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::is_alive;

    #[tokio::test]
    async fn nothing_is_left_of_a_site() {
        let site = Site::new().unwrap();
        let mut command = site.command("sh");
        command.args(["-c", "(setsid sleep 62 &) ; exec sleep 63"]);
        let daemon = site.start("shell", command).unwrap();
        crate::eventually("both run", Duration::from_secs(5), async || {
            let names: Vec<_> = site.processes().into_iter().map(|process| process.name).collect();
            anyhow::ensure!(names == ["sleep", "sleep"], "{names:?}");
            Ok(())
        })
        .await
        .unwrap();
        let (dir, processes) = (site.dir().to_owned(), site.processes());
        site.pass();
        drop(site);
        assert!(!dir.exists() && processes.len() == 2);
        assert!(!processes.iter().any(|process| is_alive(process.pid)));
        drop(daemon);
    }
}

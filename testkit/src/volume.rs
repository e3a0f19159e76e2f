//! Filesystems of their own for data directories, so that one can fill up or hang without anything else noticing. They
//! need root, as mounting does.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::statvfs;

use crate::process::{self, Daemon, Signal};
use crate::site::Site;
use crate::wait::eventually;

/// A small cluster's data and the log that it keeps, with room for a second copy beside it.
const IMAGE_BYTES: u64 = 512 << 20;
const MOUNTED_MAX: Duration = Duration::from_secs(20);

/// What kind of filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VolumeKind {
    /// A disk of its own: it can fill up, and be frozen. A process that writes to a frozen one cannot be killed.
    Disk,
    /// A server in user space stands between: while it is stopped, nothing can be read either.
    Served,
}

/// A mounted filesystem.
#[derive(Debug)]
pub struct Volume {
    mount: PathBuf,
    server: Option<Daemon>,
}

impl Volume {
    /// Makes and mounts one at `mount`, which the site's user may write.
    pub(crate) async fn mount(site: &Site, kind: VolumeKind, name: &str, mount: &Path) -> Result<Self> {
        let server = match kind {
            VolumeKind::Disk => {
                let image = site.write_file(&format!("{name}.image"), "")?;
                fs::OpenOptions::new().write(true).open(&image)?.set_len(IMAGE_BYTES)?;
                run(Command::new("mkfs.ext4").arg("-q").arg("-m0").arg(&image))?;
                run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(mount))?;
                None
            }
            VolumeKind::Served => {
                let served = site.make_dir(&format!("{name}.served"))?;
                let mut command = site.client_command("bindfs");
                command.arg("-f").args(["-o", "allow_other"]).arg(served).arg(mount);
                Some(site.start(&format!("{name}-volume"), command)?)
            }
        };
        eventually("the volume is mounted", MOUNTED_MAX, async || {
            ensure!(mounts_under(mount)?.iter().any(|at| at == mount), "it is not");
            Ok(())
        })
        .await?;
        site.give(mount)?;
        Ok(Self {
            mount: mount.to_owned(),
            server,
        })
    }

    /// Takes all the room that is left.
    ///
    /// # Errors
    /// When there is some left all the same.
    pub fn fill(&self) -> Result<()> {
        let mut file = fs::File::create(self.filler())?;
        let block = vec![1; 1 << 16];
        for length in [block.len(), 512, 1] {
            while file.write_all(block.get(..length).unwrap_or_default()).is_ok() {}
        }
        let left = statvfs(&self.mount)?.f_bavail;
        ensure!(left == 0, "{left} blocks are left");
        Ok(())
    }

    /// Gives that room back.
    ///
    /// # Errors
    /// When it was not taken.
    pub fn clear(&self) -> Result<()> {
        Ok(fs::remove_file(self.filler())?)
    }

    /// From now on whoever touches it waits: who writes to a disk, and who does anything with a served one.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn hang(&self) -> Result<()> {
        match &self.server {
            None => run(Command::new("fsfreeze").arg("--freeze").arg(&self.mount)),
            Some(server) => process::signal(server.pid(), Signal::STOP),
        }
    }

    /// Lets all of them go on.
    ///
    /// # Errors
    /// When it did not hang.
    pub fn go_on(&self) -> Result<()> {
        match &self.server {
            None => run(Command::new("fsfreeze").arg("--unfreeze").arg(&self.mount)),
            Some(server) => process::signal(server.pid(), Signal::CONT),
        }
    }

    fn filler(&self) -> PathBuf {
        self.mount.join("filler")
    }
}

/// Lets everybody go on who waits for a filesystem below `dir`: they could not be ended otherwise.
pub(crate) fn let_go_under(dir: &Path) {
    for mount in mounts_under(dir).unwrap_or_default() {
        let _ = quiet(Command::new("fsfreeze").arg("--unfreeze").arg(mount)); // Most are not frozen.
    }
}

/// Unmounts every filesystem below `dir`.
pub(crate) fn unmount_under(dir: &Path) {
    for mount in mounts_under(dir).unwrap_or_default() {
        if let Err(error) = run(Command::new("umount").arg("--lazy").arg(&mount)) {
            eprintln!("{error:#}");
        }
    }
}

fn mounts_under(dir: &Path) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mounts").context("reading the table of mounts")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(1));
    Ok(points
        .map(PathBuf::from)
        .filter(|point| point.starts_with(dir))
        .collect())
}

fn run(command: &mut Command) -> Result<()> {
    let shown = format!("{command:?}");
    let output = quiet(command).with_context(|| format!("running {shown}"))?;
    ensure!(
        output.status.success(),
        "{shown}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

fn quiet(command: &mut Command) -> std::io::Result<Output> {
    // As elsewhere in the sbin directories, which a user's path may lack.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    let child = || {
        command
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::piped())
            .spawn()
    };
    process::start_own(child, |child| Some(child.id()))?.wait_with_output()
}

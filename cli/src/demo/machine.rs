//! What the demo needs of this machine: programs, a user that PostgreSQL accepts, a directory.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};
use rustix::process::geteuid;
use tempfile::TempDir;

use super::files::Passwords;
use crate::failure::Failure;
use crate::preflight::programs::{self, Search};

/// The programs.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    pub(crate) etcd: PathBuf,
    pub(crate) bin_dir: PathBuf,
    /// This very program.
    pub(crate) pgherd: PathBuf,
}

/// Whom children run as, when that is not who runs the demo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// Finds etcd, PostgreSQL and ourselves.
///
/// # Errors
/// Names what is not there, and the command that brings it.
pub(crate) fn tools() -> Result<Tools, Failure> {
    let path = std::env::var_os("PATH");
    let mut findings = Vec::new();
    let etcd = path
        .iter()
        .flat_map(std::env::split_paths)
        .map(|dir| dir.join("etcd"))
        .find(|program| runs(program));
    if etcd.is_none() {
        let tried = path.as_deref().unwrap_or_default().display();
        findings.push(format!(
            "etcd is not in any of {tried}; install it: apt-get install etcd-server"
        ));
    }
    let bin_dir = programs::find(&Search {
        bin_dir: None,
        path: path.as_deref(),
        root: Path::new("/"),
    });
    if let Err(missing) = &bin_dir {
        let what = missing.finding.trim_start_matches("postgresql.bin_dir: missing, and ");
        findings.push(format!("{what}; on Debian or Ubuntu: apt-get install postgresql"));
    }
    let pgherd = std::env::current_exe()
        .map_err(|error| Failure::Unavailable(format!("finding this program's own file: {error}")))?;
    match (etcd, bin_dir) {
        (Some(etcd), Ok(bin_dir)) => Ok(Tools { etcd, bin_dir, pgherd }),
        _ => Err(Failure::Unavailable(findings.join("\n"))),
    }
}

fn runs(program: &Path) -> bool {
    program.is_file() && access(program, Access::EXEC_OK).is_ok()
}

/// PostgreSQL refuses root, so root's demo runs as `postgres`; anybody else's as themselves.
///
/// # Errors
/// When root's machine has no such user.
pub(crate) fn user() -> Result<Option<User>, Failure> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    find_user(&passwd, "postgres").map(Some).ok_or_else(|| {
        Failure::Unavailable(
            "PostgreSQL refuses to run as root, and there is no user postgres to run it as; run the demo as another user, \
             or make that one: useradd --system postgres"
                .to_owned(),
        )
    })
}

fn find_user(passwd: &str, name: &str) -> Option<User> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let matches = fields.next()? == name;
        let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
        (matches && uid != 0).then(|| User {
            name: name.to_owned(),
            uid,
            gid,
        })
    })
}

/// The demo's directory: gone with this value, unless it is to be kept.
pub(crate) struct Site {
    dir: PathBuf,
    temporary: Option<TempDir>,
    user: Option<User>,
}

impl Site {
    /// Makes the directory: `keep`, or a new one among temporary files.
    ///
    /// # Errors
    /// When it cannot be made, or is not empty.
    pub(crate) fn make(keep: Option<&Path>, user: Option<User>) -> Result<Self, Failure> {
        let failed =
            |path: &Path, error: &std::io::Error| Failure::Unavailable(format!("making {}: {error}", path.display()));
        let (dir, temporary) = match keep {
            Some(keep) => {
                let dir = std::path::absolute(keep).map_err(|error| failed(keep, &error))?;
                fs::DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(&dir)
                    .map_err(|error| failed(&dir, &error))?;
                if fs::read_dir(&dir)
                    .map_err(|error| failed(&dir, &error))?
                    .next()
                    .is_some()
                {
                    return Err(Failure::configuration(format!(
                        "--keep: {} is not empty; name a new or an empty directory",
                        dir.display()
                    )));
                }
                (dir, None)
            }
            None => {
                let usual = std::env::temp_dir();
                // Root's own may be closed to the user that the children run as.
                let closed = user.is_some() && !open_to_all(&usual);
                let parent = if closed { PathBuf::from("/tmp") } else { usual };
                let made = tempfile::Builder::new().prefix("pgherd-demo-").tempdir_in(&parent);
                let made = made.map_err(|error| failed(&parent, &error))?;
                (made.path().to_owned(), Some(made))
            }
        };
        let site = Self { dir, temporary, user };
        site.give(&site.dir).map_err(|error| failed(&site.dir, &error))?;
        Ok(site)
    }

    /// Where it is.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whom children run as.
    pub(crate) fn user(&self) -> Option<&User> {
        self.user.as_ref()
    }

    /// Makes a directory that belongs to the children's user.
    pub(crate) fn make_dir(&self, dir: &Path) -> std::io::Result<()> {
        fs::DirBuilder::new().mode(0o700).create(dir)?;
        self.give(dir)
    }

    /// Writes a file that only the children's user may read.
    pub(crate) fn write(&self, file: &Path, text: &str) -> std::io::Result<()> {
        let mut options = fs::OpenOptions::new();
        let mut written = options.write(true).create_new(true).mode(0o600).open(file)?;
        std::io::Write::write_all(&mut written, text.as_bytes())?;
        self.give(file)
    }

    /// Opens a log to append to.
    pub(crate) fn log(&self, file: &Path) -> std::io::Result<File> {
        let log = fs::OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(file)?;
        self.give(file)?;
        Ok(log)
    }

    fn give(&self, path: &Path) -> std::io::Result<()> {
        match &self.user {
            Some(user) => chown(path, Some(user.uid), Some(user.gid)),
            None => Ok(()),
        }
    }

    /// A program that the children's user can start: itself, or a copy when it lies where that user may not go.
    pub(crate) fn reachable(&self, program: &Path) -> std::io::Result<PathBuf> {
        if self.user.is_none() || open_to_all(program) {
            return Ok(program.to_owned());
        }
        let copy = self.dir.join("pgherd");
        fs::copy(program, &copy)?;
        self.give(&copy)?;
        Ok(copy)
    }

    /// Removes the directory, unless it is to be kept.
    ///
    /// # Errors
    /// When something in it cannot be removed.
    pub(crate) fn remove(self) -> Result<(), Failure> {
        let Some(temporary) = self.temporary else { return Ok(()) };
        temporary
            .close()
            .map_err(|error| Failure::Unavailable(format!("removing {}: {error}", self.dir.display())))
    }
}

/// Whether anybody may run a program or enter a directory: it, and every directory on the way to it.
fn open_to_all(path: &Path) -> bool {
    path.ancestors()
        .all(|path| fs::metadata(path).is_ok_and(|metadata| metadata.mode() & 0o001 != 0))
}

/// New passwords from the kernel's random numbers.
///
/// # Errors
/// When the kernel gives none.
pub(crate) fn passwords() -> Result<Passwords, Failure> {
    let one = || -> std::io::Result<String> {
        let mut bytes = [0; 8];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    };
    let failed = |error| Failure::Unavailable(format!("reading /dev/urandom: {error}"));
    Ok(Passwords {
        superuser: one().map_err(failed)?,
        replication: one().map_err(failed)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_found_by_its_whole_name() {
        let passwd =
            "root:x:0:0:root:/root:/bin/sh\npostgres2:x:5:6::/:\npostgres:x:101:104::/var/lib/postgresql:/bin/bash\n";
        assert_eq!(
            find_user(passwd, "postgres"),
            Some(User {
                name: "postgres".into(),
                uid: 101,
                gid: 104
            })
        );
        assert_eq!(find_user(passwd, "root"), None);
        assert_eq!(find_user("garbage\n:::\n", "postgres"), None);
    }

    #[test]
    fn a_directory_to_keep_must_be_empty_and_a_temporary_one_goes() {
        let parent = tempfile::tempdir().expect("a directory");
        let keep = parent.path().join("a/b");
        let site = Site::make(Some(&keep), None).expect("new");
        site.write(&site.dir().join("file"), "x").expect("written");
        site.remove().expect("kept");
        assert!(keep.join("file").exists());
        assert!(matches!(Site::make(Some(&keep), None), Err(Failure::Configuration(_))));

        let site = Site::make(None, None).expect("new");
        let dir = site.dir().to_owned();
        assert!(dir.is_dir());
        site.remove().expect("removed");
        assert!(!dir.exists());
    }

    #[test]
    fn passwords_differ_each_time() {
        let (a, b) = (passwords().expect("random"), passwords().expect("random"));
        assert!(a.superuser.len() == 16 && a.superuser != b.superuser && a.superuser != a.replication);
    }
}

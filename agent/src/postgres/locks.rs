//! PostgreSQL's lock files, as a server leaves them that was killed. They name a process by its number alone, and PostgreSQL
//! only asks whether that is in use: by a server that is dead and not buried yet, or by whoever has got the number since, as
//! in a container that begins with small numbers again, it would be kept from starting for ever. The keeper has found no
//! process of the instance left before any of this is used.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use super::{ToolError, files};

/// Removes what would keep a server from starting that is to have its socket, of this port, in one of `socket_dirs`. Returns
/// what it is to be started with.
///
/// # Errors
/// When a file cannot be removed.
pub fn clear(data_dir: &Path, socket_dirs: &[PathBuf], port: u16) -> Result<Vec<(OsString, OsString)>, ToolError> {
    for dir in socket_dirs {
        let lock = data_dir.join(dir).join(format!(".s.PGSQL.{port}.lock"));
        // What is another data directory's is not ours to judge: its processes may be in another container.
        let ours = Holder::of(&lock).filter(|holder| holder.names(data_dir));
        if let Some(holder) = ours.filter(|holder| holder.is_unburied() || holder.is_no_server()) {
            tracing::info!(pid = holder.pid, lock = %lock.display(), "removing the lock of a socket that nobody serves");
            files::remove_if_there(&lock)?;
        }
    }
    clear_data(data_dir)
}

/// The same for a server without a socket.
///
/// # Errors
/// When a file cannot be removed.
pub fn clear_data(data_dir: &Path) -> Result<Vec<(OsString, OsString)>, ToolError> {
    let lock = data_dir.join("postmaster.pid");
    let Some(holder) = Holder::of(&lock).map(|holder| holder.in_dir(data_dir)) else {
        return Ok(Vec::new());
    };
    if holder.is_unburied() {
        tracing::info!(pid = holder.pid, "removing the lock file of a PostgreSQL that is dead");
        files::remove_if_there(&lock)?;
    } else if holder.is_no_server() {
        tracing::info!(
            pid = holder.pid,
            "the lock file that was left names another process, which is no server"
        );
        // PostgreSQL takes no process for a server that is said to be its grandparent, and still looks at the shared memory
        // that the file tells of.
        return Ok(vec![("PG_GRANDPARENT_PID".into(), holder.pid.to_string().into())]);
    }
    Ok(Vec::new())
}

/// Who holds a lock file, by its own word.
struct Holder {
    pid: u32,
    data_dir: PathBuf,
}

impl Holder {
    /// Nothing when there is no such file, or it names nobody. It begins with a number, which is negative for a server for one
    /// session, and a data directory: `src/include/utils/pidfile.h`.
    fn of(lock: &Path) -> Option<Self> {
        let text = fs::read_to_string(lock).ok()?;
        let mut lines = text.lines().map(str::trim);
        Some(Self {
            pid: lines.next()?.trim_start_matches('-').parse().ok()?,
            data_dir: lines.next().unwrap_or_default().into(),
        })
    }

    fn names(&self, data_dir: &Path) -> bool {
        self.data_dir == data_dir || self.data_dir.canonicalize().ok() == data_dir.canonicalize().ok()
    }

    /// A data directory may have been moved since.
    fn in_dir(self, data_dir: &Path) -> Self {
        Self {
            data_dir: data_dir.to_owned(),
            ..self
        }
    }

    /// Whether it has ended, and nobody has asked how.
    fn is_unburied(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        // `pid (name) state ...`, where the name may hold anything.
        let state = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().next());
        matches!(state, Some("Z" | "X"))
    }

    /// Whether a process has the number that serves something else, if anything. A server's working directory is its data
    /// directory; whose cannot be read is another user's, and no server of this one.
    fn is_no_server(&self) -> bool {
        let process = PathBuf::from(format!("/proc/{}", self.pid));
        let cwd = fs::read_link(process.join("cwd"));
        let serves = cwd.is_ok_and(|cwd| self.data_dir.canonicalize().is_ok_and(|dir| dir == cwd));
        process.exists() && !serves
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, id};
    use std::time::{Duration, Instant};

    use super::*;

    /// A data directory that has its sockets within.
    struct Dir(tempfile::TempDir);

    impl Dir {
        fn new() -> Self {
            Self(tempfile::tempdir().expect("a directory"))
        }

        fn data(&self) -> PathBuf {
            self.0.path().join("postmaster.pid")
        }

        fn socket(&self) -> PathBuf {
            self.0.path().join(".s.PGSQL.5432.lock")
        }

        fn write(&self, lock: &Path, pid: u32) {
            fs::write(lock, format!("{pid}\n{}\n1795322013\n5432\n", self.0.path().display())).expect("written");
        }

        fn clear(&self) -> Vec<(OsString, OsString)> {
            clear(self.0.path(), &[self.0.path().to_owned()], 5432).expect("looked at")
        }

        fn server(&self) -> Child {
            let mut sleep = Command::new("sleep");
            sleep.arg("60").current_dir(self.0.path()).spawn().expect("a process")
        }
    }

    fn grandparent(pid: u32) -> Vec<(OsString, OsString)> {
        vec![("PG_GRANDPARENT_PID".into(), pid.to_string().into())]
    }

    #[test]
    fn a_number_that_another_process_has_by_now_keeps_no_server_from_starting() {
        let dir = Dir::new();
        assert!(dir.clear().is_empty(), "no lock file");
        dir.write(&dir.data(), id());
        dir.write(&dir.socket(), id());
        assert_eq!(dir.clear(), grandparent(id()));
        assert!(dir.data().exists(), "it tells PostgreSQL of the shared memory");
        assert!(!dir.socket().exists());
    }

    /// As after a copy has taken the place of the data: only the socket's lock is left of the server before.
    #[test]
    fn a_sockets_lock_is_cleared_also_where_the_data_has_none() {
        let dir = Dir::new();
        dir.write(&dir.socket(), id());
        assert!(dir.clear().is_empty() && !dir.socket().exists());
    }

    #[test]
    fn the_lock_of_another_data_directory_stays() {
        let (dir, other) = (Dir::new(), Dir::new());
        other.write(&dir.socket(), id());
        assert!(dir.clear().is_empty() && dir.socket().exists());
    }

    #[test]
    fn one_that_works_in_the_data_directory_is_a_server_and_keeps_its_locks() {
        let dir = Dir::new();
        let mut server = dir.server();
        dir.write(&dir.data(), server.id());
        dir.write(&dir.socket(), server.id());
        let told = dir.clear();
        server.kill().expect("ended");
        assert!(told.is_empty() && dir.data().exists() && dir.socket().exists());
        server.wait().expect("buried");
        assert!(dir.clear().is_empty(), "nobody has the number");
    }

    #[test]
    fn both_locks_of_an_unburied_server_go() {
        let dir = Dir::new();
        let mut server = dir.server();
        dir.write(&dir.data(), server.id());
        dir.write(&dir.socket(), server.id());
        server.kill().expect("ended");
        let deadline = Instant::now() + Duration::from_secs(30);
        while !Holder::of(&dir.data()).is_some_and(|holder| holder.is_unburied()) {
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::yield_now();
        }
        assert!(dir.clear().is_empty() && !dir.data().exists() && !dir.socket().exists());
        server.wait().expect("buried");
    }
}

//! The processes of this machine, as /proc shows them at one moment.

use std::ffi::CString;
use std::fmt::Write;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, StatxFlags, makedev, openat, readlinkat, stat, statat, statx};
use rustix::io::{self, Errno};
use rustix::process::{Pid, Signal, geteuid, getpid, kill_process};

use crate::lock_file::Segment;

/// The server's program goes by one of these names. A postmaster of our own needs no name: it is a descendant.
const SERVER_NAMES: [&str; 3] = ["postgres", "postmaster", "edb-postgres"];

/// One process. Number and start together name it for as long as the machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: Pid,
    /// Zero for a process whose parent is outside of our namespace.
    pub(crate) parent: i32,
    /// Clock ticks since the machine started.
    pub(crate) started: u64,
    /// Whether it has ended and only waits to be reaped.
    pub(crate) zombie: bool,
}

impl Process {
    pub(crate) fn raw_pid(self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// What no other process shares.
    pub(crate) fn identity(self) -> (i32, u64) {
        (self.raw_pid(), self.started)
    }

    /// To be called only for a process that has been found a moment ago: its number may be another's later.
    pub(crate) fn signal(self, signal: Signal) {
        // It may have ended since, which is what a signal of ours is for.
        let _ = kill_process(self.pid, signal);
    }
}

/// A picture of all processes that can be taken again and again into the same memory.
pub(crate) struct ProcessTable {
    dir: Dir,
    /// Ordered by number.
    processes: Vec<Process>,
    path: String,
}

impl ProcessTable {
    /// # Errors
    /// When there is no /proc, or it shows another PID namespace than ours, so that its numbers mean other processes.
    pub(crate) fn open() -> io::Result<Self> {
        let me = readlinkat(CWD, "/proc/self", Vec::new())?;
        if me.to_bytes() != getpid().as_raw_nonzero().to_string().as_bytes() {
            return Err(Errno::SRCH);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = Dir::new(openat(CWD, "/proc", flags, Mode::empty())?)?;
        Ok(Self {
            dir,
            processes: Vec::with_capacity(512),
            path: String::with_capacity(32),
        })
    }

    /// Takes the picture. It is not of one instant: a process that is being born or handed to another parent meanwhile
    /// may be missed, so that only two pictures without a process show that there is none.
    pub(crate) fn take(&mut self) -> io::Result<()> {
        self.processes.clear();
        self.dir.rewind();
        while let Some(entry) = self.dir.read() {
            let entry = entry?;
            let Some(pid) = entry.file_name().to_str().ok().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let Some(pid) = Pid::from_raw(pid) else { continue };
            let process = self.read(pid)?;
            self.processes.extend(process);
        }
        self.processes.sort_unstable_by_key(|process| process.raw_pid());
        Ok(())
    }

    /// The processes of the last picture, ordered by number.
    pub(crate) fn processes(&self) -> &[Process] {
        &self.processes
    }

    /// Whether the process runs PostgreSQL's server in the directory, for this user. The directory alone would not do:
    /// an operator's shell may sit there.
    pub(crate) fn serves(&mut self, pid: Pid, data_dir: &DirectoryId) -> bool {
        // A process that cannot be asked belongs to somebody else, or has ended.
        self.is_server(pid) && self.runs_in(pid, data_dir).unwrap_or(false)
    }

    /// Whether the program is PostgreSQL's server. Asks for the file, which a process cannot change as it can its name.
    pub(crate) fn is_server(&mut self, pid: Pid) -> bool {
        let Ok(target) = self.link(pid, "exe") else {
            return false;
        };
        let target = target.to_string_lossy();
        // The package may have been upgraded since the process was started.
        let path = target.strip_suffix(" (deleted)").unwrap_or(&target);
        Path::new(path)
            .file_name()
            .is_some_and(|name| SERVER_NAMES.iter().any(|server| name.as_bytes() == server.as_bytes()))
    }

    fn runs_in(&mut self, pid: Pid, data_dir: &DirectoryId) -> io::Result<bool> {
        self.set_path(pid, "");
        let owner = statat(self.dir.fd()?, self.path.as_str(), AtFlags::empty())?.st_uid;
        if owner != geteuid().as_raw() {
            return Ok(false);
        }
        self.set_path(pid, "cwd");
        // Any process may sit on a disk or a network share that hangs. Who asks for no more than the identity is not kept
        // waiting for it: the kernel knows that by itself.
        let cwd = statx(
            self.dir.fd()?,
            self.path.as_str(),
            AtFlags::STATX_DONT_SYNC,
            StatxFlags::INO,
        )?;
        let cwd = DirectoryId {
            device: makedev(cwd.stx_dev_major, cwd.stx_dev_minor),
            inode: cwd.stx_ino,
        };
        Ok(cwd == *data_dir)
    }

    /// Whether the process is attached to the segment. One that cannot be asked belongs to somebody else.
    pub(crate) fn is_attached(&mut self, pid: Pid, segment: Segment) -> bool {
        self.set_path(pid, "maps");
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let Ok(file) = self
            .dir
            .fd()
            .and_then(|dir| openat(dir, self.path.as_str(), flags, Mode::empty()))
        else {
            return false;
        };
        let mut maps = Vec::new();
        File::from(file).read_to_end(&mut maps).is_ok() && segment.is_mapped_in(&maps)
    }

    fn link(&mut self, pid: Pid, name: &str) -> io::Result<CString> {
        self.set_path(pid, name);
        readlinkat(self.dir.fd()?, self.path.as_str(), Vec::new())
    }

    /// One process as it is now; `None` when it has ended and been reaped.
    pub(crate) fn read(&mut self, pid: Pid) -> io::Result<Option<Process>> {
        self.set_path(pid, "stat");
        // The line has 52 fields, of which the name, 15 bytes at most, is the only one without a narrow bound.
        let mut line = [0; 2048];
        let read = openat(
            self.dir.fd()?,
            self.path.as_str(),
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .and_then(|file| io::read(file, &mut line));
        match read {
            Ok(length) => Ok(parse_stat(pid, &line[..length])),
            Err(Errno::NOENT | Errno::SRCH | Errno::ACCESS | Errno::PERM) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn set_path(&mut self, pid: Pid, name: &str) {
        self.path.clear();
        // Writing to a string cannot fail.
        let _ = write!(self.path, "{}/{name}", pid.as_raw_nonzero());
    }
}

/// Which directory it is, whatever path leads there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DirectoryId {
    device: u64,
    inode: u64,
}

impl DirectoryId {
    /// `None` when there is no such directory, or it cannot be reached.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        stat(path).ok().map(|stat| Self {
            device: stat.st_dev,
            inode: stat.st_ino,
        })
    }
}

/// Fields of /proc/PID/stat, counted behind the name: state, parent, and 19 further on the start (proc_pid_stat(5)).
fn parse_stat(pid: Pid, line: &[u8]) -> Option<Process> {
    // The name stands in parentheses and may hold any byte, also a closing parenthesis.
    let behind_name = line.iter().rposition(|byte| *byte == b')')? + 1;
    let mut fields = std::str::from_utf8(&line[behind_name..]).ok()?.split_ascii_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    let started = fields.nth(17)?.parse().ok()?;
    Some(Process {
        pid,
        parent,
        started,
        zombie: matches!(state, "Z" | "X" | "x"),
    })
}

#[cfg(test)]
mod tests {
    use rustix::process::getppid;

    use super::*;

    #[test]
    fn a_stat_line_is_read_whatever_the_name_holds() {
        let pid = Pid::from_raw(42).expect("positive");
        let line =
            b"42 (po) R 1 (x) S 7 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1000 10 18446744073709551615";
        let want = Process {
            pid,
            parent: 7,
            started: 987_654,
            zombie: false,
        };
        assert_eq!(parse_stat(pid, line), Some(want));
        assert_eq!(parse_stat(pid, b"42 (postgres) S 7"), None);
        assert_eq!(parse_stat(pid, b""), None);
    }

    #[test]
    fn this_process_is_in_the_picture() {
        let mut table = ProcessTable::open().expect("the tests have a /proc");
        table.take().expect("it can be read");
        let me = table
            .processes()
            .iter()
            .find(|process| process.pid == getpid())
            .copied()
            .expect("this process runs");
        assert_eq!(Pid::from_raw(me.parent), getppid());
        assert!(!me.zombie && me.started > 0);
        let cwd = DirectoryId::of(Path::new(".")).expect("it exists");
        assert_eq!(table.runs_in(getpid(), &cwd), Ok(true));
        assert_eq!(
            table.runs_in(getpid(), &DirectoryId::of(Path::new("/proc")).expect("it exists")),
            Ok(false)
        );
        assert!(!table.serves(getpid(), &cwd), "in the directory, but no server");
    }
}

//! Unix sockets that clients connect to: their names, and the files that stand for them.
//!
//! Names are libpq's: `host=/run/pgherd port=5432` means `/run/pgherd/.s.PGSQL.5432`. Beside each file lies a lock file
//! as PostgreSQL makes it, with the process that listens, since a PostgreSQL that finds none takes the name away from
//! whoever has it (`CreateSocketLockFile` and `Lock_AF_UNIX` of PostgreSQL).

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, fchmod, flock};
use socket2::{Domain, SockAddr, Socket, Type};
use tracing::warn;

/// The longest name of a socket, in bytes: what Linux has room for, less the byte that ends it.
const PATH_BYTES_MAX: usize = 107;
/// So much of a lock file is read.
const PID_BYTES_MAX: u64 = 32;
/// PostgreSQL's own: whoever may reach the directory may connect.
pub const SOCKET_MODE: u32 = 0o777;

/// Where a listener on a unix socket is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum UnixName {
    /// A file.
    Path(PathBuf),
    /// A name without a file, which this host's network namespace knows; `@` is not part of it.
    Abstract(String),
}

impl UnixName {
    /// What a listener's address says, if it is one of a unix socket: those begin with `/` or `@`.
    pub(crate) fn of(address: &str) -> Option<Self> {
        match address.strip_prefix('@') {
            Some(name) => Some(Self::Abstract(name.to_owned())),
            None => address.starts_with('/').then(|| Self::Path(PathBuf::from(address))),
        }
    }

    /// The name of a socket that listens.
    pub(crate) fn of_socket(socket: &UnixListener) -> Option<String> {
        let address = socket.local_addr().ok()?;
        match (address.as_pathname(), address.as_abstract_name()) {
            (Some(path), _) => Some(path.to_str()?.to_owned()),
            (None, Some(name)) => Some(format!("@{}", std::str::from_utf8(name).ok()?)),
            (None, None) => None,
        }
    }
}

/// Listens on `name`.
///
/// # Errors
/// When somebody else does, or the file cannot be made.
pub(crate) fn bind(name: &UnixName, mode: u32, backlog: i32) -> io::Result<(UnixListener, Option<SocketFile>)> {
    match name {
        UnixName::Abstract(name) => Ok((bind_abstract(name, backlog)?, None)),
        UnixName::Path(path) => {
            let (listener, file) = bind_path(path, mode, backlog)?;
            Ok((listener, Some(file)))
        }
    }
}

fn bind_abstract(name: &str, backlog: i32) -> io::Result<UnixListener> {
    if name.len() > PATH_BYTES_MAX {
        return Err(too_long(name.len()));
    }
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
    // Listening again changes the length of the queue, see listen(2).
    rustix::net::listen(&listener, backlog)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn bind_path(path: &Path, mode: u32, backlog: i32) -> io::Result<(UnixListener, SocketFile)> {
    check_name(path)?;
    let mut lock = Lock::take(path)?;
    check_free(path)?;
    match fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Linux gives the file the mode of the socket, less the umask: at no time may more connect than are meant to.
    fchmod(&socket, Mode::from_raw_mode(mode))?;
    lock.name_this_process()?;
    socket.bind(&SockAddr::unix(path)?)?;
    set_mode(path, mode)?;
    socket.listen(backlog)?;
    let file = SocketFile { path: path.to_owned() };
    socket.set_nonblocking(true)?;
    Ok((UnixListener::from(OwnedFd::from(socket)), file))
}

/// Lets those connect whom `mode` names.
pub(crate) fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

fn too_long(length: usize) -> io::Error {
    io::Error::new(
        ErrorKind::InvalidInput,
        format!("the name of a unix socket has at most {PATH_BYTES_MAX} bytes, and this one has {length}"),
    )
}

fn check_name(path: &Path) -> io::Result<()> {
    let length = path.as_os_str().len();
    if length > PATH_BYTES_MAX {
        return Err(too_long(length));
    }
    let dir = path.parent().unwrap_or(Path::new("/"));
    if !dir.is_dir() {
        let what = format!("there is no directory {} that this user may enter", dir.display());
        return Err(io::Error::new(ErrorKind::NotFound, what));
    }
    Ok(())
}

/// Whether the name is free, or only the file of a process that has ended is in its way.
fn check_free(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(found) if !found.file_type().is_socket() => {
            let what = format!("{} is there and is no socket", path.display());
            return Err(io::Error::new(ErrorKind::AlreadyExists, what));
        }
        Ok(_) => {}
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // One whose queue is full would let us wait.
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::unix(path)?) {
        Err(error) if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) => Ok(()),
        Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
        Ok(()) | Err(_) => {
            let by = match open_lock(&lock_path(path), false).ok().as_mut().and_then(pid_in) {
                Some(pid) => format!(" (pid {pid})"),
                None => String::new(),
            };
            let what = format!("another process{by} listens on {}", path.display());
            Err(io::Error::new(ErrorKind::AddrInUse, what))
        }
    }
}

/// Whether a listener at `address` could be opened, as far as looking tells; `address` is one of a unix socket.
///
/// # Errors
/// Why not.
pub fn probe_unix(address: &str) -> io::Result<()> {
    match UnixName::of(address) {
        Some(UnixName::Path(path)) => check_name(&path).and_then(|()| check_free(&path)),
        Some(UnixName::Abstract(name)) => bind_abstract(&name, 1).map(drop),
        None => Err(ErrorKind::InvalidInput.into()),
    }
}

/// The file of a socket that this process listens on. Removed when dropped, unless another process has it by then.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
}

impl SocketFile {
    /// That of a socket named `name` which another process listens on, if that one would remove it at its end.
    pub(crate) fn of_another(name: &str) -> Option<Self> {
        match UnixName::of(name)? {
            UnixName::Path(path) if lock_path(&path).exists() => Some(Self { path }),
            UnixName::Path(_) | UnixName::Abstract(_) => None,
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody who is about to take it replaces it; and nothing follows from a file that stays.
        if let Ok(mut lock) = Lock::take(&self.path)
            && lock.names_this_process()
        {
            let _ = fs::remove_file(&self.path);
            let _ = fs::remove_file(lock_path(&self.path));
        }
    }
}

/// This process will not remove the file at `path`: another one goes on with its socket.
pub(crate) fn release(path: &Path) {
    if let Ok(mut lock) = Lock::take(path)
        && lock.names_this_process()
    {
        let _ = fs::remove_file(lock_path(path));
    }
}

/// The file at `path`, whose socket this process has got from another one, is this one's from now on.
pub(crate) fn claim(path: &Path) {
    // The other one may be looking at it right now.
    let mut taken = Lock::take(path);
    for _ in 0..100 {
        if !matches!(&taken, Err(error) if error.kind() == ErrorKind::WouldBlock) {
            break;
        }
        std::thread::yield_now();
        taken = Lock::take(path);
    }
    if let Err(error) = taken.and_then(|mut lock| lock.name_this_process()) {
        warn!(%error, "{} stays when this proxy ends", path.display());
    }
}

fn lock_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    PathBuf::from(name)
}

/// Opens a lock file. Everybody may write into a directory such as `/tmp`: what lies there under this name may be a link to
/// another file, which would be emptied, or something that can be read without end.
fn open_lock(path: &Path, write: bool) -> io::Result<File> {
    let plain = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        .create(write)
        .truncate(false)
        .mode(0o600)
        .custom_flags(plain.bits().cast_signed())
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(ErrorKind::AlreadyExists, "it is there and is no file"));
    }
    Ok(file)
}

/// The process that a lock file names, on its first line.
fn pid_in(file: &mut File) -> Option<u32> {
    let mut text = Vec::new();
    file.rewind().ok()?;
    file.take(PID_BYTES_MAX).read_to_end(&mut text).ok()?;
    let line = text.split(|byte| *byte == b'\n').next()?;
    std::str::from_utf8(line).ok()?.trim().parse().ok()
}

/// A socket's lock file, which only one process at a time looks at and changes.
struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    fn take(path: &Path) -> io::Result<Self> {
        let path = lock_path(path);
        let failed = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        // Who removes it holds it: what was opened may be gone before it was locked.
        for _ in 0..4 {
            let file = open_lock(&path, true).map_err(failed)?;
            flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| failed(error.into()))?;
            let own = file.metadata()?;
            if fs::metadata(&path).is_ok_and(|there| there.ino() == own.ino() && there.dev() == own.dev()) {
                return Ok(Self { file, path });
            }
        }
        Err(failed(ErrorKind::ResourceBusy.into()))
    }

    fn names_this_process(&mut self) -> bool {
        pid_in(&mut self.file) == Some(std::process::id())
    }

    fn name_this_process(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        writeln!(self.file, "{}", std::process::id())
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // One that names nobody keeps PostgreSQL from starting, which takes it for another's that is about to write.
        if self.file.metadata().is_ok_and(|found| found.len() == 0) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn dir() -> tempfile::TempDir {
        tempfile::tempdir().expect("a directory")
    }

    fn bound(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
        bind_path(path, 0o660, 8)
    }

    #[test]
    fn a_file_lives_as_long_as_its_listener_and_has_its_mode() {
        let dir = dir();
        let path = dir.path().join(".s.PGSQL.5432");
        let (_listener, file) = bound(&path).expect("free");
        let found = fs::metadata(&path).expect("it is there");
        assert_eq!(found.mode() & 0o7777, 0o660);
        assert_eq!(
            fs::read_to_string(lock_path(&path)).expect("a lock file"),
            format!("{}\n", std::process::id())
        );
        UnixStream::connect(&path).expect("it listens");
        drop(file);
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 0);
    }

    #[test]
    fn the_file_of_one_that_has_ended_is_replaced_and_a_living_one_is_told_of() {
        let dir = dir();
        let path = dir.path().join(".s.PGSQL.5432");
        drop(UnixListener::bind(&path).expect("free")); // As after a kill: the file stays.
        fs::write(lock_path(&path), "4711\n").expect("a lock file");
        let (_listener, _file) = bound(&path).expect("the dead one's name is free");
        let error = bound(&path).expect_err("it lives").to_string();
        let pid = std::process::id();
        assert!(
            error.starts_with(&format!("another process (pid {pid}) listens on /")),
            "{error}"
        );
        assert!(probe_unix(path.to_str().expect("text")).is_err());
        UnixStream::connect(&path).expect("who asked has changed nothing");
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let dir = dir();
        let path = dir.path().join(".s.PGSQL.5432");
        fs::write(&path, "precious").expect("a file");
        assert!(bound(&path).expect_err("a file").to_string().contains("is no socket"));
        assert_eq!(fs::read_to_string(&path).expect("still there"), "precious");
        assert!(!lock_path(&path).exists(), "it would keep PostgreSQL from starting");
        let nowhere = dir.path().join("missing/.s.PGSQL.5432");
        assert!(
            bound(&nowhere)
                .expect_err("nowhere")
                .to_string()
                .contains("no directory")
        );
        let long = dir.path().join("x".repeat(PATH_BYTES_MAX));
        assert!(bound(&long).expect_err("too long").to_string().contains("at most 107"));
    }

    #[test]
    fn a_lock_file_that_is_a_link_is_not_followed() {
        let dir = dir();
        let path = dir.path().join(".s.PGSQL.5432");
        let precious = dir.path().join("precious");
        fs::write(&precious, "precious").expect("a file");
        std::os::unix::fs::symlink(&precious, lock_path(&path)).expect("a link");
        assert!(bound(&path).is_err(), "it is somebody's trap");
        assert_eq!(fs::read_to_string(&precious).expect("still there"), "precious");
    }

    #[test]
    fn who_goes_and_has_lost_its_lock_file_leaves_none() {
        let dir = dir();
        let path = dir.path().join(".s.PGSQL.5432");
        let (_listener, file) = bound(&path).expect("free");
        fs::remove_file(lock_path(&path)).expect("it was there");
        drop(file);
        assert!(
            !lock_path(&path).exists(),
            "an empty one would keep PostgreSQL from starting"
        );
    }

    #[test]
    fn a_file_that_another_process_goes_on_with_stays() {
        let dir = dir();
        let path = dir.path().join(".s.PGSQL.5432");
        let (listener, file) = bound(&path).expect("free");
        release(&path);
        drop(file);
        UnixStream::connect(&path).expect("it still listens");
        claim(&path);
        drop(SocketFile { path: path.clone() });
        assert!(!path.exists(), "the other one removes it at its end");
        drop(listener);
    }

    #[test]
    fn a_name_without_a_file_is_taken_once() {
        let name = format!("pgherd-test-{}/.s.PGSQL.5432", std::process::id());
        let address = format!("@{name}");
        assert_eq!(UnixName::of(&address), Some(UnixName::Abstract(name)));
        let (listener, file) = bind(&UnixName::of(&address).expect("a name"), 0o777, 1).expect("free");
        assert!(file.is_none() && probe_unix(&address).is_err());
        assert_eq!(UnixName::of_socket(&listener), Some(address.clone()));
        drop(listener);
        assert!(probe_unix(&address).is_ok());
        assert_eq!(UnixName::of("127.0.0.1:5432"), None);
    }
}

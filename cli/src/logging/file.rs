//! Log lines in files that take turns. A thread of its own writes: who logs must not wait for a disk, a lease least of all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use tracing_subscriber::fmt::MakeWriter;

/// Where tools that watch a `patroni.yml`'s directory look.
pub(super) const FILE: &str = "patroni.log";
/// How long the last lines may take to be written.
const FLUSH_MAX: Duration = Duration::from_secs(1);

/// What files there are.
#[derive(Clone, Debug)]
pub(super) struct Turns {
    pub(super) dir: PathBuf,
    /// How many older files are kept.
    pub(super) keep: usize,
    /// How long a file gets.
    pub(super) bytes_max: u64,
    pub(super) mode: Option<u32>,
}

enum Told {
    Line(Vec<u8>),
    Flush(SyncSender<()>),
}

/// Takes lines; those for which there is no room are counted.
#[derive(Clone)]
pub(super) struct Queue {
    lines: SyncSender<Told>,
    lost: Arc<Mutex<u64>>,
}

/// Sees to it that the last lines are written.
pub(crate) struct Flush(Option<Queue>);

impl Flush {
    /// For lines that are written at once.
    pub(super) const fn nothing() -> Self {
        Self(None)
    }
}

impl Drop for Flush {
    fn drop(&mut self) {
        let Some(queue) = &self.0 else { return };
        let (done, written) = sync_channel(1);
        if queue.lines.try_send(Told::Flush(done)).is_ok() {
            // A disk that hangs keeps nobody from leaving.
            let _ = written.recv_timeout(FLUSH_MAX);
        }
    }
}

/// Opens the file and begins to write. At most `queue` lines wait.
///
/// # Errors
/// When the file cannot be opened.
pub(super) fn start(turns: Turns, queue: usize) -> io::Result<(Queue, Flush)> {
    let mut writing = Writing::open(turns)?;
    let (lines, told) = sync_channel(queue);
    let lost = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&lost);
    std::thread::Builder::new()
        .name("log".to_owned())
        .spawn(move || write_all(&mut writing, &told, &counted))?;
    let queue = Queue { lines, lost };
    Ok((queue.clone(), Flush(Some(queue))))
}

fn write_all(writing: &mut Writing, told: &Receiver<Told>, lost: &Mutex<u64>) {
    while let Ok(told) = told.recv() {
        let line = match told {
            Told::Line(line) => line,
            Told::Flush(done) => {
                let _ = done.try_send(()); // Who waited may be gone.
                continue;
            }
        };
        let missed = std::mem::take(&mut *lost.lock().unwrap_or_else(PoisonError::into_inner));
        if missed > 0 {
            writing.write_or_tell(
                format!("{missed} log lines were lost: they came faster than the disk takes them\n").as_bytes(),
            );
        }
        writing.write_or_tell(&line);
    }
}

impl Write for Queue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.lines.try_send(Told::Line(line.to_vec())) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                *self.lost.lock().unwrap_or_else(PoisonError::into_inner) += 1;
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// The file that is written. Agent and proxy of one host may write the same one, and either may begin the next.
struct Writing {
    turns: Turns,
    file: File,
    failed: bool,
}

impl Writing {
    fn open(turns: Turns) -> io::Result<Self> {
        fs::create_dir_all(&turns.dir)?;
        let file = open(&turns)?;
        Ok(Self {
            turns,
            file,
            failed: false,
        })
    }

    fn path(&self) -> PathBuf {
        self.turns.dir.join(FILE)
    }

    fn write_or_tell(&mut self, line: &[u8]) {
        let written = self.write(line);
        if let Err(error) = &written
            && !self.failed
        {
            // Once, until it works again: this is the only other place.
            eprintln!(
                "pgherd: {}: log lines cannot be written: {error}",
                self.path().display()
            );
        }
        self.failed = written.is_err();
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if !is_same(&self.file, &self.path())? {
            self.file = open(&self.turns)?; // Another process has begun the next one, or logrotate has.
        }
        let length = self.file.metadata()?.len();
        let added = u64::try_from(line.len()).unwrap_or(u64::MAX);
        if length > 0 && length.saturating_add(added) > self.turns.bytes_max {
            self.begin_next()?;
        }
        self.file.write_all(line)
    }

    /// Under a lock on the file that is full, so that two processes do not both move it on.
    fn begin_next(&mut self) -> io::Result<()> {
        flock(&self.file, FlockOperation::LockExclusive)?;
        if is_same(&self.file, &self.path())? {
            let numbered = |number: usize| self.turns.dir.join(format!("{FILE}.{number}"));
            for number in (1..self.turns.keep).rev() {
                move_on(&numbered(number), &numbered(number + 1))?;
            }
            if self.turns.keep > 0 {
                move_on(&self.path(), &numbered(1))?;
            } else {
                fs::remove_file(self.path())?;
            }
        }
        self.file = open(&self.turns)?; // The lock goes with the file of before.
        Ok(())
    }
}

fn move_on(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        moved => moved,
    }
}

fn open(turns: &Turns) -> io::Result<File> {
    let path = turns.dir.join(FILE);
    let is_new = !path.exists();
    let file = OpenOptions::new().create(true).append(true).open(&path)?;
    if let Some(mode) = turns.mode.filter(|_| is_new) {
        file.set_permissions(fs::Permissions::from_mode(mode))?;
    }
    Ok(file)
}

fn is_same(file: &File, path: &Path) -> io::Result<bool> {
    let own = file.metadata()?;
    Ok(fs::metadata(path).is_ok_and(|there| (there.dev(), there.ino()) == (own.dev(), own.ino())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns(dir: &Path, keep: usize) -> Turns {
        Turns {
            dir: dir.to_owned(),
            keep,
            bytes_max: 10,
            mode: Some(0o640),
        }
    }

    fn read(dir: &Path, name: &str) -> String {
        fs::read_to_string(dir.join(name)).unwrap_or_default()
    }

    #[test]
    fn files_take_turns_and_the_oldest_goes() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut writing = Writing::open(turns(dir.path(), 2)).expect("opened");
        for line in ["first.\n", "second.\n", "third.\n", "fourth.\n"] {
            writing.write(line.as_bytes()).expect("written");
        }
        let names = [FILE, "patroni.log.1", "patroni.log.2", "patroni.log.3"];
        assert_eq!(
            names.map(|name| read(dir.path(), name)),
            ["fourth.\n", "third.\n", "second.\n", ""]
        );
        let mode = fs::metadata(dir.path().join(FILE)).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o640);
    }

    #[test]
    fn two_who_write_one_file_move_it_on_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut one = Writing::open(turns(dir.path(), 3)).expect("opened");
        let mut other = Writing::open(turns(dir.path(), 3)).expect("opened");
        one.write(b"12345678\n").expect("written");
        one.write(b"next\n").expect("written");
        other.write(b"more\n").expect("written");
        assert_eq!(read(dir.path(), FILE), "next\nmore\n");
        assert_eq!(read(dir.path(), "patroni.log.1"), "12345678\n");
        assert_eq!(read(dir.path(), "patroni.log.2"), "");
    }

    #[test]
    fn what_was_logged_is_there_when_the_process_ends() {
        let dir = tempfile::tempdir().expect("a directory");
        let (mut queue, flush) = start(turns(dir.path(), 1), 10).expect("started");
        queue.write_all(b"last\n").expect("queued");
        drop(flush);
        assert_eq!(read(dir.path(), FILE), "last\n");
    }
}

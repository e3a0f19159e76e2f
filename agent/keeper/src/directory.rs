//! The data directory, looked at by a thread of its own: its disk may hang, and whoever asks it anything then waits for as
//! long as it does. The fence must not.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use crate::lock_file::LockFile;
use crate::process::DirectoryId;
use crate::signals::spared;

/// How long one look may take before what was seen last has to do. A disk that works answers in microseconds, a machine
/// that is busy in milliseconds; and it is spent once, not again for each look at a disk that hangs.
const LOOK_MAX: Duration = Duration::from_millis(250);

/// What a data directory shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sight {
    /// Which directory it is; nothing when there is none.
    pub(crate) id: Option<DirectoryId>,
    /// Whom it names as its postmaster.
    pub(crate) lock: Option<LockFile>,
}

/// The data directory, as last seen.
pub(crate) struct DataDirectory {
    ask: SyncSender<()>,
    answers: Receiver<Sight>,
    /// Whether a look has not come back yet.
    waits: bool,
    last: Option<Sight>,
}

impl DataDirectory {
    /// # Errors
    /// When the thread cannot be started.
    pub(crate) fn new(path: PathBuf) -> std::io::Result<Self> {
        Self::seen_by(move || Sight {
            id: DirectoryId::of(&path),
            lock: LockFile::read(&path),
        })
    }

    fn seen_by(look: impl Fn() -> Sight + Send + 'static) -> std::io::Result<Self> {
        let (ask, asked) = sync_channel(1);
        let (tell, answers) = sync_channel(1);
        let thread = thread::Builder::new()
            .name("data directory".to_owned())
            .stack_size(128 << 10);
        // It ends with the handle, as soon as the disk lets it.
        spared(|| thread.spawn(move || while asked.recv().is_ok() && tell.send(look()).is_ok() {}))?;
        Ok(Self {
            ask,
            answers,
            waits: false,
            last: None,
        })
    }

    /// What there is to see now; on a disk that hangs what was seen before, and nothing where that was nothing.
    pub(crate) fn look(&mut self) -> Option<Sight> {
        if self.hangs() {
            return self.last;
        }
        self.waits = self.ask.try_send(()).is_ok();
        self.take(LOOK_MAX);
        self.last
    }

    /// Whether a look is under way that the disk has not answered, even now. Its thread cannot be ended before.
    pub(crate) fn hangs(&mut self) -> bool {
        self.waits && self.take(Duration::ZERO).is_none()
    }

    fn take(&mut self, limit: Duration) -> Option<()> {
        self.last = Some(self.answers.recv_timeout(limit).ok()?);
        self.waits = false;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Instant;

    use super::*;

    fn sight(inode_of: &str) -> Sight {
        Sight {
            id: DirectoryId::of(std::path::Path::new(inode_of)),
            lock: None,
        }
    }

    #[test]
    fn a_disk_that_hangs_is_waited_for_once_and_what_was_seen_before_holds() {
        let (let_it, may) = channel::<Sight>();
        let mut directory = DataDirectory::seen_by(move || may.recv().unwrap_or(sight("/"))).expect("a thread");
        assert_eq!(directory.look(), None, "nothing was ever seen");
        let_it.send(sight("/")).expect("the thread waits");
        let deadline = Instant::now() + Duration::from_secs(5);
        while directory.look().is_none() && Instant::now() < deadline {}
        assert_eq!(directory.look(), Some(sight("/")));
        assert!(directory.hangs(), "nothing has been answered");
        let before = Instant::now();
        for _ in 0..100 {
            assert_eq!(directory.look(), Some(sight("/")), "it hangs again");
        }
        assert!(before.elapsed() < 20 * LOOK_MAX, "a hundred looks, one wait");
        let_it.send(sight("/proc")).expect("the thread waits");
        let_it.send(sight("/proc")).expect("the thread waits");
        let deadline = Instant::now() + Duration::from_secs(5);
        while directory.look() != Some(sight("/proc")) && Instant::now() < deadline {}
        assert_eq!(directory.look(), Some(sight("/proc")), "what it says late counts");
        drop(let_it);
        let deadline = Instant::now() + Duration::from_secs(5);
        while directory.hangs() && Instant::now() < deadline {}
        assert!(!directory.hangs(), "the disk answers at once again");
    }

    #[test]
    fn a_directory_is_seen_as_it_is_now() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("data");
        let mut directory = DataDirectory::new(path.clone()).expect("a thread");
        let nothing = Sight { id: None, lock: None };
        assert_eq!(directory.look(), Some(nothing));
        std::fs::create_dir(&path).expect("made");
        std::fs::write(path.join("postmaster.pid"), "4711\n").expect("written");
        let seen = directory.look().expect("a disk that works");
        assert_eq!(seen.id, DirectoryId::of(&path));
        assert_eq!(seen.lock.map(|lock| lock.postmaster.as_raw_nonzero().get()), Some(4711));
    }
}

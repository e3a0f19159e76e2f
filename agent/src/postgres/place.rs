//! Where a data directory is made, and how it takes the place of another.
//!
//! As a rule a new one is made beside the old one, and the two change places by renames. Where that cannot be, because the
//! data directory is a mount point or its parent is not ours to write, the new one is made within, and the contents change
//! places, under a mark that keeps a half-changed one from being taken for a data directory.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use pgherd_cluster::clock::wall_now;
use rustix::fs::{Access, access};

use super::files::{beside, remove_if_there, sync_dir, write_whole};
use super::linked::{forget_note, remove_filled, remove_links_of_ours};
use super::programs::{ToolError, file_error};

/// How many digits the stamp has that names a directory that was moved aside.
pub const STAMP_DIGITS: usize = 12;
/// How many directories that were moved aside are kept, the newest ones.
const ASIDE_MAX: usize = 2;
/// Where what is half made is moved.
const HALF_MADE: &str = "half-made";
/// The name of a mark.
const MARK: &str = "pgherd-unfinished";

/// What lies in a data directory that is not whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// What a program has made so far, and nothing else.
    HalfMade,
    /// What was there before, in part.
    HalfChanged,
}

impl Mark {
    const fn text(self) -> &'static str {
        match self {
            Self::HalfMade => "half-made\n",
            Self::HalfChanged => "half-changed\n",
        }
    }
}
/// What this member itself keeps within a data directory begins with this.
pub(super) const OURS: &str = "pgherd-";

/// A stamp for names of directories that were moved aside; sorts by time.
#[must_use]
pub fn stamp() -> String {
    let now = wall_now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{:0digits$}", now.as_millis() / 100, digits = STAMP_DIGITS)
}

/// Whether an entry of a data directory is none of PostgreSQL's: a filesystem's own, or ours.
#[must_use]
pub fn is_foreign(name: &str) -> bool {
    name == "lost+found" || name.starts_with(OURS)
}

/// The place of a data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    data_dir: PathBuf,
    /// It can neither be renamed nor have anything beside it.
    within: bool,
}

impl Place {
    /// The place that `data_dir` names, with its parents made. A symbolic link stands for its target.
    ///
    /// # Errors
    /// When the parents cannot be made or looked at.
    pub fn of(data_dir: &Path) -> Result<Self, ToolError> {
        if let Some(parent) = data_dir.parent() {
            std::fs::create_dir_all(parent).map_err(file_error("making", parent))?;
        }
        let data_dir = match std::fs::canonicalize(data_dir) {
            Ok(real) => real,
            Err(error) if error.kind() == ErrorKind::NotFound => target_of_link(data_dir),
            Err(error) => return Err(file_error("looking at the data directory", data_dir)(error)),
        };
        let within = data_dir.is_dir() && (is_mount_point(&data_dir) || !may_write_beside(&data_dir));
        Ok(Self { data_dir, within })
    }

    /// The data directory itself.
    #[must_use]
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// A directory for what is to take its place, on the same filesystem. Of an earlier try, nothing is left in it.
    ///
    /// # Errors
    /// When what is left cannot be removed.
    pub async fn prepare(&self, purpose: &str) -> Result<PathBuf, ToolError> {
        let new = if self.within {
            self.data_dir.join(format!("{OURS}{purpose}"))
        } else {
            beside(&self.data_dir, &format!("{OURS}{purpose}"))
        };
        // Tablespaces may be large: the runtime has other things to do meanwhile.
        let (half_made, others) = (new.clone(), self.all_but(&new));
        let cleared = tokio::task::spawn_blocking(move || remove_filled(&half_made, &others));
        if let Err(error) = cleared.await {
            tracing::warn!(%error, "what a half-made copy has filled outside was not removed");
        }
        // By its name it can be nothing else than a half-made copy of ours.
        match tokio::fs::remove_dir_all(&new).await {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(file_error("removing a half-made copy", &new)(error));
            }
            _ => forget_note(&new)?,
        }
        Ok(new)
    }

    /// Puts the finished directory `new` in place. What was there is moved aside, never deleted, unless more than two such
    /// copies of ours have gathered. Says where it went.
    ///
    /// # Errors
    /// When something cannot be moved; nothing is lost then.
    pub fn install(&self, new: &Path, stamp: &str) -> Result<Option<PathBuf>, ToolError> {
        close(new)?;
        let moved = if self.within {
            let moved = self.move_aside(stamp)?;
            mark(&self.data_dir, Mark::HalfChanged)?;
            move_entries(new, &self.data_dir, |_| true)?;
            std::fs::remove_dir(new).map_err(file_error("removing what is empty now", new))?;
            close(&self.data_dir)?;
            sync_dir(&self.data_dir)?;
            moved
        } else {
            let moved = self.move_aside(stamp)?;
            // A rename onto an empty directory replaces it.
            if let Err(error) = std::fs::rename(new, &self.data_dir) {
                if let Some(aside) = &moved {
                    std::fs::rename(aside, &self.data_dir)
                        .map_err(file_error("moving the data directory back", aside))?;
                }
                return Err(file_error("moving the new data directory into place", &self.data_dir)(
                    error,
                ));
            }
            sync_dir(self.data_dir.parent().unwrap_or(Path::new("/")))?;
            moved
        };
        unmark(&self.data_dir)?;
        forget_note(new)?;
        self.bound_asides();
        Ok(moved)
    }

    /// Moves what is there aside, and leaves the place empty. Says where it went, if anything was there. What a program has
    /// half made has a place of its own, which only the next such thing takes: two of them would push out what was there
    /// before.
    ///
    /// # Errors
    /// When it cannot be moved.
    pub fn move_aside(&self, stamp: &str) -> Result<Option<PathBuf>, ToolError> {
        let what = "moving the data directory aside";
        let half_made = marked(&self.data_dir) == Some(Mark::HalfMade);
        let Ok(entries) = std::fs::read_dir(&self.data_dir) else {
            return Ok(None);
        };
        let occupied = entries
            .flatten()
            .any(|entry| !is_foreign(&entry.file_name().to_string_lossy()));
        if !occupied {
            return Ok(None);
        }
        let name = if half_made {
            format!("{OURS}{HALF_MADE}")
        } else {
            format!("aside-{stamp}")
        };
        if !self.within {
            let aside = beside(&self.data_dir, &name);
            if half_made {
                remove_former(&aside)?;
            }
            std::fs::rename(&self.data_dir, &aside).map_err(file_error(what, &self.data_dir))?;
            return Ok(Some(aside));
        }
        let aside = self.data_dir.join(format!("{OURS}{}", name.trim_start_matches(OURS)));
        if half_made {
            remove_former(&aside)?;
        } else {
            mark(&self.data_dir, Mark::HalfChanged)?;
        }
        std::fs::create_dir_all(&aside).map_err(file_error(what, &aside))?;
        close(&aside)?;
        move_entries(&self.data_dir, &aside, |name| !is_foreign(&name.to_string_lossy()))?;
        sync_dir(&aside)?;
        unmark(&self.data_dir)?;
        Ok(Some(aside))
    }

    /// Removes what a program that has just failed has half made.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn clear(&self) -> Result<(), ToolError> {
        let Ok(entries) = std::fs::read_dir(&self.data_dir) else {
            return Ok(());
        };
        for entry in entries.flatten() {
            if is_foreign(&entry.file_name().to_string_lossy()) {
                continue;
            }
            let path = entry.path();
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let removed = if is_dir {
                std::fs::remove_dir_all(&path)
            } else {
                std::fs::remove_file(&path)
            };
            removed.map_err(file_error("removing what was half made", &path))?;
        }
        Ok(())
    }

    /// Refuses what needs the whole directory to be renamed where it cannot be.
    ///
    /// # Errors
    /// Where the data directory is a mount point, or its parent is not ours to write.
    pub fn require_movable(&self, what: &'static str) -> Result<(), ToolError> {
        if !self.within {
            return Ok(());
        }
        let source = std::io::Error::from(ErrorKind::Unsupported);
        Err(file_error(what, &self.data_dir)(source))
    }

    /// Moves a directory aside that stood for the data directory, where the oldest of its like go. Says where it went.
    ///
    /// # Errors
    /// When it cannot be moved.
    pub fn set_aside(&self, from: &Path, stamp: &str) -> Result<PathBuf, ToolError> {
        let aside = beside(&self.data_dir, &format!("aside-{stamp}"));
        std::fs::rename(from, &aside).map_err(file_error("moving aside", from))?;
        sync_dir(self.data_dir.parent().unwrap_or(Path::new("/")))?;
        self.bound_asides();
        Ok(aside)
    }

    /// Removes what is there, on the configuration's order only.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self) -> Result<(), ToolError> {
        if self.within {
            return self.clear();
        }
        match std::fs::remove_dir_all(&self.data_dir) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(file_error("removing the data directory", &self.data_dir)(error))
            }
            _ => Ok(()),
        }
    }

    /// Deletes the oldest copies beyond the bound. A copy that cannot be deleted is only in the way of nobody.
    pub fn bound_asides(&self) {
        // Exactly what we name them: an operator's own `data.aside-keep` is none of our business.
        let is_ours = |path: &PathBuf| {
            let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
            let stamp = name
                .rsplit_once("aside-")
                .filter(|(before, _)| *before == self.prefix());
            stamp.is_some_and(|(_, stamp)| stamp.len() == STAMP_DIGITS && stamp.bytes().all(|b| b.is_ascii_digit()))
        };
        let mut copies = self.kin();
        copies.retain(is_ours);
        copies.sort(); // The stamp sorts by time.
        let surplus = copies.len().saturating_sub(ASIDE_MAX);
        for copy in copies.into_iter().take(surplus) {
            tracing::info!(copy = %copy.display(), "deleting the oldest copy that was moved aside, {ASIDE_MAX} newer ones stay");
            remove_links_of_ours(&copy, &self.all_but(&copy));
            if let Err(error) = std::fs::remove_dir_all(&copy) {
                tracing::warn!(copy = %copy.display(), %error, "the copy cannot be deleted");
            }
        }
    }

    /// What the names begin with of all that stands, stood or is to stand for the data directory.
    fn prefix(&self) -> String {
        let name = self.data_dir.file_name().unwrap_or_default().to_string_lossy();
        if self.within {
            OURS.to_owned()
        } else {
            format!("{name}.")
        }
    }

    /// All that stands, stood or is to stand for the data directory, by their names.
    fn kin(&self) -> Vec<PathBuf> {
        let parent = if self.within {
            self.data_dir.as_path()
        } else {
            self.data_dir.parent().unwrap_or(Path::new("/"))
        };
        let prefix = self.prefix();
        let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .map(|entry| entry.path())
            .collect()
    }

    /// The data directory and its kin, without `copy`.
    fn all_but(&self, copy: &Path) -> Vec<PathBuf> {
        let mut others = self.kin();
        others.push(self.data_dir.clone());
        others.retain(|other| other != copy);
        others
    }
}

/// Says that what is in the data directory is not whole from now on, also after a crash of the machine.
///
/// # Errors
/// When it cannot be written.
pub fn mark(data_dir: &Path, what: Mark) -> Result<(), ToolError> {
    let outside = may_write_beside(data_dir) && !is_mount_point(data_dir);
    let path = if outside {
        beside(data_dir, MARK)
    } else {
        data_dir.join(MARK)
    };
    write_whole(&path, what.text(), 0o600).map(|_| ())
}

/// It is whole.
///
/// # Errors
/// When the mark cannot be removed.
pub fn unmark(data_dir: &Path) -> Result<(), ToolError> {
    for (mark, dir) in [
        (beside(data_dir, MARK), data_dir.parent().unwrap_or(Path::new("/"))),
        (data_dir.join(MARK), data_dir),
    ] {
        if mark.exists() {
            remove_if_there(&mark)?;
            sync_dir(dir)?;
        }
    }
    Ok(())
}

/// What is not whole about a data directory; nothing when it is.
#[must_use]
pub fn marked(data_dir: &Path) -> Option<Mark> {
    let real = std::fs::canonicalize(data_dir).unwrap_or_else(|_| target_of_link(data_dir));
    let texts = [beside(&real, MARK), real.join(MARK)].map(|mark| std::fs::read_to_string(mark).ok());
    // One that cannot be read is taken for the one that loses nothing.
    let kind = |text: String| match text.as_str() {
        text if text == Mark::HalfMade.text() => Mark::HalfMade,
        _ => Mark::HalfChanged,
    };
    texts.into_iter().flatten().next().map(kind)
}

/// What a link whose target is not there yet names.
fn target_of_link(path: &Path) -> PathBuf {
    match std::fs::read_link(path) {
        Ok(target) => path.parent().unwrap_or(Path::new("/")).join(target),
        Err(_) => path.to_owned(),
    }
}

/// Gives a data directory the mode without which PostgreSQL does not start; that of a mount point is the filesystem's own.
///
/// # Errors
/// When it belongs to somebody else.
pub fn close(dir: &Path) -> Result<(), ToolError> {
    let mode = std::fs::metadata(dir).map(|meta| meta.mode() & 0o777);
    if matches!(mode, Ok(0o700 | 0o750)) {
        return Ok(());
    }
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).map_err(file_error("setting mode 0700", dir))
}

/// A place that is taken again, or that a crash has left.
fn remove_former(aside: &Path) -> Result<(), ToolError> {
    match std::fs::remove_dir_all(aside) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(file_error("removing what was half made before", aside)(error))
        }
        _ => Ok(()),
    }
}

fn move_entries(from: &Path, to: &Path, wanted: impl Fn(&OsStr) -> bool) -> Result<(), ToolError> {
    let entries = std::fs::read_dir(from).map_err(file_error("reading", from))?;
    for entry in entries {
        let name = entry.map_err(file_error("reading", from))?.file_name();
        if wanted(&name) {
            let path = from.join(&name);
            std::fs::rename(&path, to.join(&name)).map_err(file_error("moving", &path))?;
        }
    }
    Ok(())
}

pub(super) fn may_write_beside(dir: &Path) -> bool {
    let parent = dir.parent().unwrap_or(Path::new("/"));
    access(parent, Access::WRITE_OK | Access::EXEC_OK).is_ok()
}

/// Whether a directory is where a filesystem is mounted, be it the same one again, as in a container.
#[must_use]
pub fn is_mount_point(dir: &Path) -> bool {
    let device = |path: &Path| std::fs::metadata(path).map(|meta| meta.dev()).ok();
    let other = dir
        .parent()
        .is_some_and(|parent| device(parent) != device(dir) && dir.exists());
    other || mount_points().iter().any(|point| point == dir)
}

/// <https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html>, the fifth field.
fn mount_points() -> Vec<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let point = |line: &str| Some(PathBuf::from(unescaped(line.split(' ').nth(4)?)));
    text.lines().filter_map(point).collect()
}

/// Blanks and backslashes are written as `\` and three octal digits.
fn unescaped(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                plain.push(char::from(code));
                plain.push_str(part.get(3..).unwrap_or_default());
            }
            None => plain.extend(["\\", part]),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::super::linked::{linked_dir, note};
    use super::*;

    fn dir_with(parent: &Path, name: &str, content: &str) -> PathBuf {
        let dir = parent.join(name);
        std::fs::create_dir_all(&dir).expect("made");
        std::fs::write(dir.join("PG_VERSION"), content).expect("written");
        dir
    }

    fn version(dir: &Path) -> String {
        std::fs::read_to_string(dir.join("PG_VERSION")).expect("readable")
    }

    #[test]
    fn what_was_there_is_moved_aside_and_copies_are_bounded() {
        for within in [false, true] {
            let dir = tempfile::tempdir().expect("a temporary directory");
            let data = dir.path().join("data");
            std::fs::create_dir(&data).expect("made");
            let place = Place {
                data_dir: data.clone(),
                within,
            };
            let (parent, prefix) = if within {
                (data.clone(), "pgherd-")
            } else {
                (dir.path().to_owned(), "data.")
            };
            std::fs::create_dir(parent.join(format!("{prefix}aside-keep"))).expect("made");
            let stamps = ["1", "2", "3", "4"].map(|digit| digit.repeat(STAMP_DIGITS));
            for stamp in &stamps {
                let new = dir_with(&parent, "pgherd-clone", stamp);
                place.install(&new, stamp).expect("installed");
                assert_eq!(version(&data), *stamp);
                assert!(!new.exists() && marked(&data).is_none());
                let mode = std::fs::metadata(&data).expect("there").mode() & 0o777;
                assert_eq!(mode, 0o700, "within: {within}");
            }
            let aside = |stamp: &str| parent.join(format!("{prefix}aside-{stamp}")).exists();
            assert_eq!(
                stamps.map(|stamp| aside(&stamp)),
                [false, false, true, true],
                "within: {within}"
            );
            assert!(aside("keep"), "what we did not name is not ours");
        }
    }

    #[test]
    fn an_empty_directory_is_simply_replaced_and_a_link_stands_for_its_target() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let real = dir.path().join("real");
        std::fs::create_dir(&real).expect("made");
        std::os::unix::fs::symlink(&real, dir.path().join("data")).expect("linked");
        let place = Place::of(&dir.path().join("data")).expect("looked at");
        assert_eq!(place.data_dir(), real);
        let new = dir_with(dir.path(), "n", "15");
        assert_eq!(place.install(&new, "1").expect("installed"), None);
        assert_eq!(version(&dir.path().join("data")), "15");
    }

    #[test]
    fn what_was_half_made_and_what_was_half_changed_are_kept_apart() {
        for (what, name) in [
            (Mark::HalfMade, "data.pgherd-half-made"),
            (Mark::HalfChanged, "data.aside-1"),
        ] {
            let dir = tempfile::tempdir().expect("a temporary directory");
            let data = dir_with(dir.path(), "data", "15");
            mark(&data, what).expect("marked");
            assert_eq!(marked(&data), Some(what));
            assert_eq!(std::fs::read_dir(&data).expect("there").count(), 1, "it stands beside");
            let place = Place::of(&data).expect("looked at");
            let new = dir_with(dir.path(), "n", "16");
            let aside = place.install(&new, "1").expect("installed");
            assert_eq!(aside, Some(dir.path().join(name)));
            assert_eq!(version(&dir.path().join(name)), "15");
            assert_eq!((version(&data).as_str(), marked(&data)), ("16", None));
        }
    }

    #[tokio::test]
    async fn a_copy_that_is_begun_again_leaves_no_tablespace_behind() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let data = dir_with(dir.path(), "data", "15");
        let place = Place::of(&data).expect("looked at");
        let new = place.prepare("clone").await.expect("prepared");
        let stamp = "7".repeat(STAMP_DIGITS);
        let own = dir_with(dir.path(), &format!("tablespace.{OURS}{stamp}"), "15");
        note(&new, std::slice::from_ref(&own)).expect("noted");
        std::fs::create_dir_all(new.join("pg_tblspc")).expect("made");
        let wanted = dir_with(dir.path(), "tablespace", "15");
        std::os::unix::fs::symlink(&wanted, new.join("pg_tblspc/1")).expect("linked");
        assert_eq!(place.prepare("clone").await.expect("prepared again"), new);
        assert!(!own.exists() && !new.exists());
        assert_eq!(linked_dir(&wanted, &stamp), wanted, "it is free again");
        let names = std::fs::read_dir(dir.path()).expect("there").flatten();
        assert!(
            names
                .map(|entry| entry.file_name())
                .all(|name| name == "data" || name == "tablespace")
        );
    }

    #[test]
    fn mount_points_are_known_by_name_too() {
        assert!(is_mount_point(Path::new("/proc")));
        assert!(!is_mount_point(Path::new("/nonexistent")));
        assert_eq!(unescaped(r"/a\040b\134c"), r"/a b\c");
    }
}

//! Directories outside that a data directory links to: its WAL and its tablespaces. Which a new one gets, and which go with
//! one that is deleted.

use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::files::{beside, remove_if_there, write_whole};
use super::place::{OURS, STAMP_DIGITS, is_mount_point, may_write_beside};
use super::programs::ToolError;

/// What is added to the name of a copy in the making for the note beside it.
const NOTE: &str = "links";

/// A directory outside that a new data directory links to, such as of its WAL or of a tablespace: `wanted` while that is
/// free, else one of our naming beside it, or within it where it is a mount point. What was there stays with the data
/// directory that links to it.
#[must_use]
pub(super) fn linked_dir(wanted: &Path, stamp: &str) -> PathBuf {
    let free = match std::fs::read_dir(wanted) {
        Ok(entries) => entries.flatten().all(|entry| entry.file_name() == "lost+found"),
        Err(error) => error.kind() == ErrorKind::NotFound,
    };
    // A filesystem's own directory would be in the way all the same.
    let empty = std::fs::read_dir(wanted).is_ok_and(|mut entries| entries.next().is_none());
    if free && (empty || !wanted.exists()) {
        return wanted.to_owned();
    }
    let base = base_name(wanted);
    let within = is_mount_point(wanted) || !may_write_beside(wanted);
    if within {
        wanted.join(format!("{OURS}{stamp}"))
    } else {
        base.with_file_name(named(&base, stamp))
    }
}

fn named(base: &Path, stamp: &str) -> OsString {
    let mut name = base.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{OURS}{stamp}"));
    name
}

/// Without a stamp of ours: names do not grow from clone to clone.
fn base_name(wanted: &Path) -> PathBuf {
    let name = wanted.file_name().and_then(OsStr::to_str).unwrap_or_default();
    match name.rsplit_once(&format!(".{OURS}")) {
        Some((base, stamp)) if stamp.len() == STAMP_DIGITS && !base.is_empty() => wanted.with_file_name(base),
        _ => wanted.to_owned(),
    }
}

/// Whether the name says that we made it, for one data directory.
fn is_named_by_us(dir: &Path) -> bool {
    let name = dir.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let stamp = name.rsplit_once(OURS).map(|(_, stamp)| stamp).unwrap_or_default();
    stamp.len() == STAMP_DIGITS && stamp.bytes().all(|b| b.is_ascii_digit())
}

/// Removes what a copy that is about to be deleted links to where the name says that we made it, but for what one of
/// `others` links to as well: a program that makes copies may take such a directory over.
pub(super) fn remove_links_of_ours(copy: &Path, others: &[PathBuf]) {
    let links = links_of(copy).unwrap_or_default();
    remove_unused(links.into_iter().filter(|target| is_named_by_us(target)), others);
}

/// Notes beside a copy in the making which neighbours it fills: its program takes the links to them along when it fails.
///
/// # Errors
/// When it cannot be written.
pub(super) fn note(new: &Path, dirs: &[PathBuf]) -> Result<(), ToolError> {
    let names: Vec<String> = dirs.iter().map(|dir| dir.display().to_string()).collect();
    write_whole(&note_of(new), &names.join("\0"), 0o600).map(|_| ())
}

/// The copy is in its place, or nothing is left of it.
///
/// # Errors
/// When the note cannot be removed.
pub(super) fn forget_note(new: &Path) -> Result<(), ToolError> {
    remove_if_there(&note_of(new))
}

fn note_of(new: &Path) -> PathBuf {
    beside(new, NOTE)
}

/// Whether a file's name is a note's.
pub(super) fn is_note(name: &OsStr) -> bool {
    Path::new(name).extension() == Some(OsStr::new(NOTE))
}

/// Removes what a copy that was never finished has filled outside, but for what one of `others` links to. A directory that it
/// links to was empty before, or it would not have been taken; one that was only noted may be anybody's by now, unless its
/// name is ours.
pub(super) fn remove_filled(new: &Path, others: &[PathBuf]) {
    let noted = std::fs::read_to_string(note_of(new)).unwrap_or_default();
    let noted = noted.split('\0').map(PathBuf::from).filter(|dir| is_named_by_us(dir));
    let links = links_of(new).unwrap_or_default();
    remove_unused(links.into_iter().chain(noted), others);
}

fn remove_unused(dirs: impl Iterator<Item = PathBuf>, others: &[PathBuf]) {
    let used: std::io::Result<Vec<Vec<PathBuf>>> = others.iter().map(|other| links_of(other)).collect();
    let used: Vec<PathBuf> = match used {
        Ok(used) => used.iter().flatten().map(|target| real(target)).collect(),
        Err(error) => {
            tracing::warn!(%error, "what other copies link to cannot be read: no directory outside is deleted");
            return;
        }
    };
    for dir in dirs {
        let in_use = used.iter().any(|target| target.starts_with(real(&dir)));
        if in_use {
            tracing::info!(dir = %dir.display(), "another copy links to it too, and it stays");
            continue;
        }
        match remove(&dir) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                // What stays is in the way of nobody.
                tracing::warn!(dir = %dir.display(), %error, "a directory outside that a copy filled cannot be deleted");
            }
            _ => {}
        }
    }
}

/// Removes a directory of our naming; another stays, and is empty.
fn remove(dir: &Path) -> std::io::Result<()> {
    if is_named_by_us(dir) {
        return std::fs::remove_dir_all(dir);
    }
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Where a data directory's links lead, that of its WAL and those of its tablespaces.
fn links_of(data_dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut links = vec![data_dir.join("pg_wal")];
    match std::fs::read_dir(data_dir.join("pg_tblspc")) {
        Ok(entries) => {
            for entry in entries {
                links.push(entry?.path());
            }
        }
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
        Err(error) => return Err(error),
    }
    let target = |link: PathBuf| {
        let target = std::fs::read_link(&link).ok()?;
        Some(link.parent().unwrap_or(Path::new("/")).join(target))
    };
    Ok(links.into_iter().filter_map(target).collect())
}

fn real(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const STAMP: &str = "777777777777";

    fn filled(path: PathBuf) -> PathBuf {
        std::fs::create_dir_all(&path).expect("made");
        std::fs::write(path.join("x"), "x").expect("written");
        path
    }

    /// A data directory with a WAL directory and a tablespace outside.
    fn linking(data_dir: PathBuf, wal: &Path, tablespace: &Path) -> PathBuf {
        std::fs::create_dir_all(data_dir.join("pg_tblspc")).expect("made");
        symlink(wal, data_dir.join("pg_wal")).expect("linked");
        symlink(tablespace, data_dir.join("pg_tblspc/16384")).expect("linked");
        data_dir
    }

    #[test]
    fn a_linked_directory_that_is_taken_gets_a_neighbour_with_a_name_that_does_not_grow() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let wal = dir.path().join("wal");
        assert_eq!(linked_dir(&wal, "1"), wal, "nothing is there");
        let taken = filled(wal);
        let next = linked_dir(&taken, STAMP);
        assert_eq!(next, dir.path().join(format!("wal.pgherd-{STAMP}")));
        filled(next.clone());
        let later = "8".repeat(STAMP_DIGITS);
        assert_eq!(
            linked_dir(&next, &later),
            dir.path().join(format!("wal.pgherd-{later}"))
        );
    }

    #[test]
    fn what_another_copy_links_to_as_well_outlives_the_copy_that_is_deleted() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| dir.path().join(name);
        let shared = filled(at(&format!("tablespace.pgherd-{STAMP}")));
        let own = filled(at(&format!("wal.pgherd-{STAMP}")));
        let copy = linking(at("copy"), &own, &shared);
        // By another way to the same place.
        symlink(dir.path(), at("way")).expect("linked");
        let live = linking(
            at("data"),
            &filled(at("wal")),
            &at("way").join(format!("tablespace.pgherd-{STAMP}")),
        );
        remove_links_of_ours(&copy, &[live]);
        assert!(shared.join("x").exists(), "it is the live one's too");
        assert!(!own.exists(), "nobody else has it");
    }

    #[test]
    fn nothing_stays_outside_of_a_copy_that_was_never_finished() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| dir.path().join(name);
        let (wal, taken) = (filled(at("wal")), filled(at(&format!("taken.pgherd-{STAMP}"))));
        let new = linking(at("data.pgherd-clone"), &wal, &taken);
        let live = linking(at("data"), &filled(at("other")), &taken);
        let unlinked = filled(at(&format!("tablespace.pgherd-{STAMP}")));
        let somebodys = filled(at("somebodys"));
        note(&new, &[unlinked.clone(), taken.clone(), somebodys.clone()]).expect("noted");
        remove_filled(&new, &[live]);
        assert!(!unlinked.exists(), "noted, and named by us");
        assert_eq!(
            std::fs::read_dir(&wal).expect("it stays").count(),
            0,
            "it is free again"
        );
        assert!(taken.join("x").exists(), "the live one has it");
        assert!(somebodys.join("x").exists(), "a note alone proves nothing");
    }

    #[test]
    fn what_we_did_not_name_outlives_the_copy_that_is_deleted() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| dir.path().join(name);
        let (wal, tablespace) = (filled(at("wal")), filled(at("tablespace.pgherd-1")));
        remove_links_of_ours(&linking(at("copy"), &wal, &tablespace), &[]);
        assert!(wal.join("x").exists() && tablespace.join("x").exists());
    }
}

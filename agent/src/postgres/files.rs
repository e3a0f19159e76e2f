//! Small files: written whole or not at all, with the mode that PostgreSQL expects; and directories that change places.

use std::io::ErrorKind;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::programs::{ToolError, file_error};

/// Replaces `path` by `text`, through a file beside it, so that a reader or a crash never meets half of it. Says whether
/// anything changed.
///
/// # Errors
/// When a file cannot be written.
pub fn write_whole(path: &Path, text: &str, mode: u32) -> Result<bool, ToolError> {
    if std::fs::read_to_string(path).is_ok_and(|current| current == text) {
        return Ok(false);
    }
    let beside = beside(path, "new");
    let write = || {
        use std::io::Write;
        // A file left by a crash may have another mode; the mode below holds for new files only.
        match std::fs::remove_file(&beside) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&beside, path)
    };
    write().map_err(file_error("writing", path))?;
    sync_parent(path)?; // The name too must survive a power cut: a lost standby.signal would make a primary.
    Ok(true)
}

/// `path` with `.suffix` added to its last part.
#[must_use]
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".");
    name.push(suffix);
    path.with_file_name(name)
}

/// Removes a file; one that is not there is fine.
///
/// # Errors
/// When it is there and stays.
pub fn remove_if_there(path: &Path) -> Result<(), ToolError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(file_error("removing", path)(error)),
        _ => Ok(()),
    }
}

/// How many digits the stamp has that names a directory that was moved aside.
pub const STAMP_DIGITS: usize = 12;

/// How many directories that were moved aside are kept, the newest ones.
const ASIDE_MAX: usize = 2;

/// Puts the finished directory `new` in the place of `data_dir`. What was there is moved aside, never deleted, unless
/// more than two such copies of ours have gathered. Says where it went.
///
/// # Errors
/// When a directory cannot be moved, as where the data directory is a mount point; nothing is lost then.
pub fn install(new: &Path, data_dir: &Path, stamp: &str) -> Result<Option<PathBuf>, ToolError> {
    let mut moved = None;
    let occupied = std::fs::read_dir(data_dir).is_ok_and(|mut entries| entries.next().is_some());
    if occupied {
        moved = Some(move_aside(data_dir, data_dir, stamp)?);
    }
    std::fs::set_permissions(new, std::fs::Permissions::from_mode(0o700)).map_err(file_error("closing", new))?;
    // A rename onto an empty directory replaces it.
    if let Err(error) = std::fs::rename(new, data_dir) {
        if let Some(aside) = &moved {
            std::fs::rename(aside, data_dir).map_err(file_error("moving the data directory back", aside))?;
        }
        return Err(file_error("moving the new data directory into place", data_dir)(error));
    }
    sync_parent(data_dir)?;
    bound_asides(data_dir);
    Ok(moved)
}

/// Moves a directory aside that stood for `data_dir`, where the oldest of its like go. Says where it went.
///
/// # Errors
/// When it cannot be moved.
pub fn set_aside(from: &Path, data_dir: &Path, stamp: &str) -> Result<PathBuf, ToolError> {
    let aside = move_aside(from, data_dir, stamp)?;
    sync_parent(data_dir)?;
    bound_asides(data_dir);
    Ok(aside)
}

fn move_aside(from: &Path, data_dir: &Path, stamp: &str) -> Result<PathBuf, ToolError> {
    let aside = beside(data_dir, &format!("aside-{stamp}"));
    std::fs::rename(from, &aside).map_err(file_error("moving the data directory aside", from))?;
    Ok(aside)
}

/// Makes the names in the directory of `path` survive a power cut.
///
/// # Errors
/// When the directory cannot be flushed.
pub fn sync_parent(path: &Path) -> Result<(), ToolError> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    std::fs::File::open(parent)
        .and_then(|dir| dir.sync_all())
        .map_err(file_error("flushing", parent))
}

/// Deletes the oldest copies beyond the bound. A copy that cannot be deleted is only in the way of nobody.
fn bound_asides(data_dir: &Path) {
    let Some(name) = data_dir.file_name().and_then(|name| name.to_str()) else {
        return;
    };
    let prefix = format!("{name}.aside-");
    let parent = data_dir.parent().unwrap_or(Path::new("/"));
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    let mut copies: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        // Exactly what we name them: an operator's own `data.aside-keep` is none of our business.
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            let stamp = name.and_then(|name| name.strip_prefix(&prefix));
            stamp.is_some_and(|stamp| stamp.len() == STAMP_DIGITS && stamp.bytes().all(|b| b.is_ascii_digit()))
        })
        .collect();
    copies.sort(); // The stamp sorts by time.
    let surplus = copies.len().saturating_sub(ASIDE_MAX);
    for copy in copies.into_iter().take(surplus) {
        tracing::info!(copy = %copy.display(), "deleting the oldest copy that was moved aside, {ASIDE_MAX} newer ones stay");
        if let Err(error) = std::fs::remove_dir_all(&copy) {
            tracing::warn!(copy = %copy.display(), %error, "the copy cannot be deleted");
        }
    }
}

/// One line of a password file, with `:` and `\` escaped.
#[must_use]
pub fn pgpass_line(host: &str, port: u16, user: &str, password: &str) -> String {
    let escape = |text: &str| text.replace('\\', "\\\\").replace(':', "\\:");
    format!("{}:{port}:*:{}:{}\n", escape(host), escape(user), escape(password))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_written_once_and_with_its_mode() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("pgpass");
        assert!(write_whole(&path, "a", 0o600).expect("written"));
        assert!(!write_whole(&path, "a", 0o600).expect("unchanged"));
        assert!(write_whole(&path, "b", 0o600).expect("rewritten"));
        assert_eq!(std::fs::read_to_string(&path).expect("readable"), "b");
        assert_eq!(
            std::fs::metadata(&path).expect("there").permissions().mode() & 0o777,
            0o600
        );
    }

    #[test]
    fn what_was_there_is_moved_aside_and_copies_are_bounded() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let data = dir.path().join("data");
        std::fs::create_dir(dir.path().join("data.aside-keep")).expect("made");
        let stamps = ["1", "2", "3", "4"].map(|digit| digit.repeat(STAMP_DIGITS));
        for stamp in &stamps {
            let new = dir.path().join("data.new");
            std::fs::create_dir(&new).expect("made");
            std::fs::write(new.join("stamp"), stamp).expect("written");
            install(&new, &data, stamp).expect("installed");
            assert_eq!(std::fs::read_to_string(data.join("stamp")).expect("readable"), *stamp);
        }
        let aside = |stamp: &str| dir.path().join(format!("data.aside-{stamp}")).exists();
        assert_eq!(stamps.map(|stamp| aside(&stamp)), [false, false, true, true]);
        assert!(aside("keep"), "what we did not name is not ours");
    }

    #[test]
    fn an_empty_directory_is_simply_replaced() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (new, data) = (dir.path().join("n"), dir.path().join("data"));
        std::fs::create_dir(&new).expect("made");
        std::fs::create_dir(&data).expect("made");
        assert_eq!(install(&new, &data, "1").expect("installed"), None);
    }

    #[test]
    fn a_password_with_colons_survives_the_password_file() {
        assert_eq!(pgpass_line("::1", 5432, "u", r"a:b\c"), "\\:\\:1:5432:*:u:a\\:b\\\\c\n");
    }
}

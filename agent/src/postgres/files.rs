//! Small files: written whole or not at all, with the mode that PostgreSQL expects.

use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
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
    // The name too must survive a power cut: a lost standby.signal would make a primary.
    sync_dir(path.parent().unwrap_or(Path::new("/")))?;
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

/// Flushes a directory: the names in it.
///
/// # Errors
/// When it cannot be done.
pub fn sync_dir(dir: &Path) -> Result<(), ToolError> {
    std::fs::File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(file_error("flushing", dir))
}

/// One line of a password file, with `:` and `\` escaped.
#[must_use]
pub fn pgpass_line(host: &str, port: u16, user: &str, password: &str) -> String {
    let escape = |text: &str| text.replace('\\', "\\\\").replace(':', "\\:");
    format!("{}:{port}:*:{}:{}\n", escape(host), escape(user), escape(password))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

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
    fn a_password_with_colons_survives_the_password_file() {
        assert_eq!(pgpass_line("::1", 5432, "u", r"a:b\c"), "\\:\\:1:5432:*:u:a\\:b\\\\c\n");
    }
}

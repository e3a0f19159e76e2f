//! Whether PostgreSQL can live in the data directory.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use pgherd_agent::postgres::place;
use rustix::fs::{Access, access};

/// Who is asking: `None` for root, whose view of a directory says nothing about the user who will run there.
pub(crate) type Uid = Option<u32>;

const FILES_SHOWN_MAX: usize = 3;

/// What is wrong with `dir`, one sentence with a fix, if anything.
pub(crate) fn check(dir: &Path, uid: Uid) -> Option<String> {
    let metadata = match fs::metadata(dir) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => return check_parent(dir, uid),
        Err(error) => {
            return Some(told(
                dir,
                &format!("cannot be looked at: {error}; grant this user access, or write another path"),
            ));
        }
    };
    if !metadata.is_dir() {
        return Some(told(dir, "is not a directory; move it away, or write another path"));
    }
    if let Some(uid) = uid.filter(|uid| *uid != metadata.uid()) {
        let finding = format!(
            "belongs to user {}, but pgherd runs as user {uid}; use `chown -R {uid}`, or run as that user",
            metadata.uid()
        );
        return Some(told(dir, &finding));
    }
    let mut names = match fs::read_dir(dir) {
        Ok(entries) => entries
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect::<Vec<_>>(),
        Err(error) => return uid.map(|_| told(dir, &format!("cannot be listed: {error}; grant this user access"))),
    };
    // A filesystem's own directory, and what we keep within a mount point.
    names.retain(|name| !place::is_foreign(name));
    // What is half made is ours to deal with.
    if names.is_empty() || place::marked(dir).is_some() {
        return None; // initdb sets the mode of an empty directory itself.
    }
    if !names.iter().any(|name| name == "PG_VERSION") {
        names.sort();
        let shown: Vec<&str> = names.iter().take(FILES_SHOWN_MAX).map(String::as_str).collect();
        let more = if names.len() > FILES_SHOWN_MAX { ", ..." } else { "" };
        let finding = format!(
            "holds {}{more} but no PG_VERSION, so it is not PostgreSQL's; move them away, or write an empty directory below it",
            shown.join(", ")
        );
        return Some(told(dir, &finding));
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o777 != 0o700 && mode & 0o777 != 0o750 {
        return Some(told(
            dir,
            &format!("has mode {mode:04o}, and PostgreSQL refuses all but 0700 and 0750; use `chmod 0700`"),
        ));
    }
    None
}

/// A directory that is not there yet must be possible to make.
fn check_parent(dir: &Path, uid: Uid) -> Option<String> {
    uid?;
    let parent = dir.ancestors().skip(1).find(|ancestor| ancestor.exists())?;
    let writable = parent.is_dir() && access(parent, Access::WRITE_OK | Access::EXEC_OK).is_ok();
    let finding = format!(
        "does not exist and cannot be made, since this user may not write in {}; make it and give it to this user",
        parent.display()
    );
    (!writable).then(|| told(dir, &finding))
}

fn told(dir: &Path, finding: &str) -> String {
    format!("postgresql.data_dir: \"{}\" {finding}", dir.display())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_half_made_or_not_a_users_file_is_no_trouble() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let data = dir.path().join("data");
        fs::create_dir_all(data.join("lost+found")).expect("made");
        assert_eq!(check(&data, own_uid()), None);
        fs::write(data.join("base"), "").expect("written");
        assert!(check(&data, own_uid()).is_some());
        place::mark(&data, place::Mark::HalfMade).expect("marked");
        assert_eq!(check(&data, own_uid()), None);
    }

    fn own_uid() -> Uid {
        Some(rustix::process::geteuid().as_raw())
    }

    fn set_mode(dir: &Path, mode: u32) {
        fs::set_permissions(dir, fs::Permissions::from_mode(mode)).expect("our own directory");
    }

    #[test]
    fn a_new_directory_and_an_empty_one_are_fine() {
        let parent = tempfile::tempdir().expect("a directory");
        assert_eq!(check(&parent.path().join("a/b"), own_uid()), None);
        set_mode(parent.path(), 0o755);
        assert_eq!(check(parent.path(), own_uid()), None);
    }

    #[test]
    fn foreign_files_are_listed() {
        let dir = tempfile::tempdir().expect("a directory");
        for name in ["d", "c", "b", "a"] {
            fs::write(dir.path().join(name), "").expect("written");
        }
        let finding = check(dir.path(), own_uid()).expect("not PostgreSQL's");
        assert!(finding.contains("holds a, b, c, ... but no PG_VERSION"), "{finding}");
    }

    #[test]
    fn postgresqls_directory_must_be_its_own() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("PG_VERSION"), "15\n").expect("written");
        for (mode, refused) in [(0o700, false), (0o750, false), (0o755, true), (0o777, true)] {
            set_mode(dir.path(), mode);
            let finding = check(dir.path(), own_uid());
            assert_eq!(finding.is_some(), refused, "{mode:o} {finding:?}");
        }
        set_mode(dir.path(), 0o700);
        let other = own_uid().map(|uid| uid + 1);
        let finding = check(dir.path(), other).expect("not theirs");
        assert!(
            finding.contains("belongs to user") && finding.contains("chown -R"),
            "{finding}"
        );
        assert_eq!(check(dir.path(), None), None, "root only looks");
    }

    #[test]
    fn a_file_is_not_a_directory() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        assert!(check(file.path(), own_uid()).is_some_and(|finding| finding.contains("is not a directory")));
    }
}

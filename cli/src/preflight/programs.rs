//! Where PostgreSQL's programs are.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

/// What an agent runs.
const NEEDED: [&str; 4] = ["postgres", "initdb", "pg_basebackup", "pg_controldata"];

/// Where to look.
pub(crate) struct Search<'a> {
    /// `postgresql.bin_dir`; nothing else is looked at when it is set.
    pub(crate) bin_dir: Option<&'a Path>,
    /// The `PATH` variable.
    pub(crate) path: Option<&'a OsStr>,
    /// The root of the file system.
    pub(crate) root: &'a Path,
}

/// Not found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Missing {
    /// The finding, with every place tried and a fix.
    pub(crate) finding: String,
}

/// The one directory that holds all programs: the configured one, or the first on `PATH` (links followed), or the newest of
/// the packages' usual places.
pub(crate) fn find(search: &Search<'_>) -> Result<PathBuf, Missing> {
    if let Some(bin_dir) = search.bin_dir {
        let absent = absent_in(bin_dir);
        if absent.is_empty() {
            return Ok(bin_dir.to_owned());
        }
        let finding = format!(
            "postgresql.bin_dir: \"{}\" has no {}; write the directory that has, such as /usr/lib/postgresql/17/bin",
            bin_dir.display(),
            absent.join(", ")
        );
        return Err(Missing { finding });
    }
    let mut tried = Vec::new();
    let on_path = search
        .path
        .map(|path| std::env::split_paths(path).collect::<Vec<_>>())
        .unwrap_or_default();
    for dir in on_path
        .iter()
        .filter(|dir| dir.is_absolute())
        .flat_map(|dir| with_link_target(dir))
        .chain(packaged(search.root))
    {
        let absent = absent_in(&dir);
        if absent.is_empty() {
            return Ok(dir);
        }
        if absent.len() < NEEDED.len() {
            tried.push(format!("{} (which has no {})", dir.display(), absent.join(", ")));
        } else {
            tried.push(dir.display().to_string());
        }
    }
    tried.extend(["/usr/lib/postgresql/*/bin".to_owned(), "/usr/pgsql-*/bin".to_owned()]);
    tried.dedup();
    let finding = format!(
        "postgresql.bin_dir: missing, and {} were not found together in {}; install PostgreSQL, or write its directory",
        NEEDED.join(", "),
        tried.join(", ")
    );
    Err(Missing { finding })
}

fn absent_in(dir: &Path) -> Vec<&'static str> {
    let runs = |name: &str| {
        let program = dir.join(name);
        program.is_file() && access(&program, Access::EXEC_OK).is_ok()
    };
    NEEDED.into_iter().filter(|name| !runs(name)).collect()
}

/// A directory on `PATH` often holds links to a few programs only; the directory that they lead to holds all.
fn with_link_target(dir: &Path) -> Vec<PathBuf> {
    let target = fs::canonicalize(dir.join("postgres"))
        .ok()
        .and_then(|program| program.parent().map(Path::to_owned));
    let target = target.filter(|target| target != dir);
    std::iter::once(dir.to_owned()).chain(target).collect()
}

/// Directories of Debian's and Red Hat's packages, newest version first.
fn packaged(root: &Path) -> Vec<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = Vec::new();
    for (parent, prefix) in [("usr/lib/postgresql", ""), ("usr", "pgsql-")] {
        for entry in fs::read_dir(root.join(parent)).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let version = name.to_str().and_then(|name| name.strip_prefix(prefix)?.parse().ok());
            found.extend(version.map(|version| (version, entry.path().join("bin"))));
        }
    }
    found.sort_by_key(|(version, _)| std::cmp::Reverse(*version));
    found.into_iter().map(|(_, dir)| dir).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn install(dir: &Path, programs: &[&str]) {
        fs::create_dir_all(dir).expect("made");
        for program in programs {
            fs::write(dir.join(program), "").expect("written");
            fs::set_permissions(dir.join(program), fs::Permissions::from_mode(0o755)).expect("ours");
        }
    }

    #[test]
    fn the_newest_packaged_version_is_taken() {
        let root = tempfile::tempdir().expect("a directory");
        for version in ["9", "15", "17"] {
            install(
                &root.path().join("usr/lib/postgresql").join(version).join("bin"),
                &NEEDED,
            );
        }
        install(&root.path().join("usr/pgsql-16/bin"), &NEEDED);
        let found = find(&Search {
            bin_dir: None,
            path: None,
            root: root.path(),
        });
        assert_eq!(found, Ok(root.path().join("usr/lib/postgresql/17/bin")));
    }

    #[test]
    fn a_link_on_the_path_leads_to_its_fellows() {
        let root = tempfile::tempdir().expect("a directory");
        let real = root.path().join("opt/pg/bin");
        install(&real, &NEEDED);
        let local = root.path().join("usr/local/bin");
        fs::create_dir_all(&local).expect("made");
        symlink(real.join("postgres"), local.join("postgres")).expect("linked");
        let found = find(&Search {
            bin_dir: None,
            path: Some(local.as_os_str()),
            root: root.path(),
        });
        assert_eq!(found.ok(), fs::canonicalize(&real).ok());
    }

    #[test]
    fn what_is_missing_is_named_with_every_place_tried() {
        let root = tempfile::tempdir().expect("a directory");
        let bin = root.path().join("usr/lib/postgresql/17/bin");
        install(&bin, &["postgres", "initdb"]);
        let Err(missing) = find(&Search {
            bin_dir: None,
            path: Some(OsStr::new("/nowhere/bin")),
            root: root.path(),
        }) else {
            panic!("it is not there")
        };
        for part in [
            "/nowhere/bin",
            "17/bin (which has no pg_basebackup, pg_controldata)",
            "/usr/pgsql-*/bin",
            "install PostgreSQL",
        ] {
            assert!(missing.finding.contains(part), "{}", missing.finding);
        }
        let Err(missing) = find(&Search {
            bin_dir: Some(&bin),
            path: None,
            root: root.path(),
        }) else {
            panic!("half is not whole")
        };
        assert!(
            missing.finding.contains("has no pg_basebackup, pg_controldata; write"),
            "{}",
            missing.finding
        );
    }
}

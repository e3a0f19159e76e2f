//! Libraries that PostgreSQL is told to preload: a server that misses one does not start, and says so in its own log only.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::programs::Programs;

const ANSWER_MAX: Duration = Duration::from_secs(5);

const NAMES: &str = "shared_preload_libraries";
const PATH: &str = "dynamic_library_path";

/// The libraries that PostgreSQL is to preload and that are not on this machine; nothing when it is not known where they
/// would be. `rendered` is what we have written into the file `conf`. Files that it includes, and those of ALTER SYSTEM, may
/// say otherwise, so PostgreSQL itself has the last word on what it will read.
pub async fn missing(
    programs: &Programs,
    rendered: &BTreeMap<String, String>,
    data_dir: &Path,
    conf: &Path,
) -> Vec<String> {
    let says = |name: &str| rendered.get(name).cloned();
    let Some(libraries) = says(NAMES) else {
        return Vec::new();
    };
    let path = says(PATH).unwrap_or_else(|| "$libdir".to_owned());
    let Some(lib_dir) = package_dir(programs).await else {
        return Vec::new();
    };
    let missing = not_there(&libraries, &path, &lib_dir);
    if missing.is_empty() {
        return missing;
    }
    let libraries = effective(programs, NAMES, data_dir, conf).await.unwrap_or(libraries);
    let path = effective(programs, PATH, data_dir, conf).await.unwrap_or(path);
    not_there(&libraries, &path, &lib_dir)
}

/// A parameter as the server will have it by its files; nothing where PostgreSQL cannot tell, as by files that it refuses.
async fn effective(programs: &Programs, name: &str, data_dir: &Path, conf: &Path) -> Option<String> {
    let dir = data_dir.display().to_string();
    let conf = format!("config_file={}", conf.display());
    let args = ["-D", &dir, "-c", &conf, "-C", name];
    let output = programs.run("postgres", &args, &[], ANSWER_MAX).await.ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.trim().to_owned())
}

fn not_there(libraries: &str, path: &str, lib_dir: &Path) -> Vec<String> {
    let dirs = search_path(path, lib_dir);
    let libraries = names(libraries).into_iter();
    libraries.filter(|library| !is_there(library, lib_dir, &dirs)).collect()
}

/// The directory that `$libdir` stands for.
async fn package_dir(programs: &Programs) -> Option<PathBuf> {
    let told = programs.run("pg_config", &["--pkglibdir"], &[], ANSWER_MAX).await;
    let told = told.ok().and_then(|output| String::from_utf8(output.stdout).ok());
    let told = told.map(|text| PathBuf::from(text.trim()));
    // Packages put it beside the programs, also where they leave that program out.
    let beside = || Some(programs.path("postgres").parent()?.parent()?.join("lib"));
    told.filter(|dir| dir.is_dir())
        .or_else(|| beside().filter(|dir| dir.join("plpgsql.so").exists()))
}

/// A list as PostgreSQL reads it: commas, blanks, names in double quotes.
fn names(value: &str) -> Vec<String> {
    let names = value.split(',').map(|name| name.trim().trim_matches('"').to_owned());
    names.filter(|name| !name.is_empty()).collect()
}

fn search_path(path: &str, lib_dir: &Path) -> Vec<PathBuf> {
    let lib_dir = lib_dir.display().to_string();
    path.split(':')
        .map(|dir| PathBuf::from(dir.replace("$libdir", &lib_dir)))
        .collect()
}

/// PostgreSQL's rule: a name with a slash is a place, another is looked for in the path; with the ending or without.
fn is_there(library: &str, lib_dir: &Path, dirs: &[PathBuf]) -> bool {
    let named = |path: PathBuf| path.is_file() || PathBuf::from(format!("{}.so", path.display())).is_file();
    if library.contains('/') {
        let place = library.replace("$libdir", &lib_dir.display().to_string());
        return named(PathBuf::from(place));
    }
    dirs.iter().any(|dir| named(dir.join(library)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn what_postgresql_reads_elsewhere_has_the_last_word() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name);
        for name in ["lib", "other"] {
            std::fs::create_dir(at(name)).expect("made");
        }
        std::fs::write(at("other/b.so"), "").expect("written");
        let program = |name: &str, script: &str| {
            std::fs::write(at(name), format!("#!/bin/sh\n{script}\n")).expect("written");
            std::fs::set_permissions(at(name), std::fs::Permissions::from_mode(0o755)).expect("made a program");
        };
        program("pg_config", &format!("echo {}", at("lib").display()));
        let programs = Programs::new(Some(dir.path().to_owned()));
        let rendered = BTreeMap::from([(NAMES.to_owned(), "b".to_owned())]);
        let (data_dir, conf) = (at("data"), at("conf/postgresql.conf"));
        let missing = async || missing(&programs, &rendered, &data_dir, &conf).await;

        program("postgres", "exit 1");
        assert_eq!(missing().await, ["b"], "our own file is all that is known");
        let expected = format!("-D {} -c config_file={} -C", data_dir.display(), conf.display());
        let says = |libraries: &str, path: &str| {
            format!(
                "case \"$*\" in \"{expected} {NAMES}\") echo '{libraries}';; \"{expected} {PATH}\") echo '{path}';; *) exit 1;; esac"
            )
        };
        program("postgres", &says("b", "$libdir"));
        assert_eq!(missing().await, ["b"]);
        program("postgres", &says("b", &format!("$libdir:{}", at("other").display())));
        assert_eq!(missing().await, [""; 0], "the path is in a file that is included");
        program("postgres", &says("", "$libdir"));
        assert_eq!(missing().await, [""; 0], "ALTER SYSTEM names none");
    }

    #[test]
    fn libraries_are_looked_for_where_postgresql_does() {
        let dir = tempfile::tempdir().expect("a directory");
        let lib_dir = dir.path().join("lib");
        let other = dir.path().join("other");
        for dir in [&lib_dir, &other] {
            std::fs::create_dir(dir).expect("made");
        }
        std::fs::write(lib_dir.join("a.so"), "").expect("written");
        std::fs::write(other.join("b.so"), "").expect("written");
        let dirs = search_path(&format!("$libdir:{}", other.display()), &lib_dir);
        let there = |library: &str| is_there(library, &lib_dir, &dirs);
        assert!(there("a") && there("a.so") && there("b") && there("$libdir/a"));
        assert!(!there("c") && !there("$libdir/b"));
        assert_eq!(names(" a, \"b\" ,,$libdir/c"), ["a", "b", "$libdir/c"]);
    }
}

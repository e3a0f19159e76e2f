//! Libraries that PostgreSQL is told to preload: a server that misses one does not start, and says so in its own log only.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::programs::Programs;

const ANSWER_MAX: Duration = Duration::from_secs(5);

/// The libraries that `value`, a `shared_preload_libraries`, names and that are not on this machine; nothing when it is not
/// known where they would be.
pub async fn missing(programs: &Programs, value: &str, path: Option<&str>) -> Vec<String> {
    let libraries = names(value);
    if libraries.is_empty() {
        return Vec::new();
    }
    let Some(lib_dir) = package_dir(programs).await else {
        return Vec::new();
    };
    let dirs = search_path(path.unwrap_or("$libdir"), &lib_dir);
    libraries
        .into_iter()
        .filter(|library| !is_there(library, &lib_dir, &dirs))
        .collect()
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
    use super::*;

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

//! Notices that a file of the configuration has changed. It looks at them every other second: that works on every
//! filesystem and through every way in which files are replaced, symbolic links of mounted secrets included.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use super::Source;
use super::proxy::ProxySection;

const LOOK_EVERY: Duration = Duration::from_secs(2);

/// What tells one state of a file from another; nothing of one that is not there.
type Print = Option<(u64, u64, i64, i64)>;

/// The files of a configuration as they were last seen.
pub(crate) struct FilesWatch {
    paths: Vec<PathBuf>,
    seen: Vec<(PathBuf, Print)>,
}

/// The configuration's own file.
pub(crate) fn own(source: &Source) -> Vec<PathBuf> {
    match source {
        Source::File(path) => vec![path.clone()],
        Source::Environment => Vec::new(),
    }
}

/// The files that the proxy's section names.
pub(crate) fn named_by(section: &ProxySection) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for tls in [&section.client_tls, &section.page.tls].into_iter().flatten() {
        paths.extend([tls.certificate.clone(), tls.private_key.clone()]);
        paths.extend(tls.client_ca.clone());
    }
    paths.extend(section.page.password_file.clone());
    paths.extend(
        section
            .console
            .iter()
            .flat_map(|console| console.password_files.clone()),
    );
    paths.extend(section.server_tls.ca.clone());
    if let Some((certificate, key)) = &section.server_tls.identity {
        paths.extend([certificate.clone(), key.path.clone()]);
    }
    paths
}

impl FilesWatch {
    /// These files as they are now.
    pub(crate) async fn new(paths: Vec<PathBuf>) -> Self {
        let seen = look(paths.clone()).await.unwrap_or_default();
        Self { paths, seen }
    }

    /// The same on a thread that may wait for a disk.
    pub(crate) fn now(paths: Vec<PathBuf>) -> Self {
        let seen = prints(&paths);
        Self { paths, seen }
    }

    /// The files themselves.
    pub(crate) fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// The same files, but those that `before` has as they were then: what changed since, while they were read, counts.
    pub(crate) fn since(mut self, before: &Self) -> Self {
        for (path, print) in &mut self.seen {
            if let Some((_, earlier)) = before.seen.iter().find(|(seen, _)| seen == path) {
                *print = *earlier;
            }
        }
        self
    }

    /// Resolves once they differ from what they were at the beginning, and have stayed the same for one look: whoever
    /// writes them has finished by then, most likely. May be dropped at any time.
    pub(crate) async fn changed(&self) {
        let mut tick = interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tick.tick().await; // The first is at once.
        let mut before = None;
        loop {
            tick.tick().await;
            let Some(now) = look(self.paths.clone()).await else {
                continue;
            };
            if now != self.seen && before.as_ref() == Some(&now) {
                return;
            }
            before = Some(now);
        }
    }
}

/// Off the threads that serve: a disk may be slow.
async fn look(paths: Vec<PathBuf>) -> Option<Vec<(PathBuf, Print)>> {
    let mut looking = JoinSet::new();
    looking.spawn_blocking(move || prints(&paths));
    looking.join_next().await?.ok()
}

fn prints(paths: &[PathBuf]) -> Vec<(PathBuf, Print)> {
    let mut prints = Vec::new();
    for path in paths {
        prints.push((path.clone(), print(path)));
        // A directory is read file by file.
        let Ok(entries) = fs::read_dir(path) else { continue };
        let mut inside: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        inside.sort();
        prints.extend(inside.into_iter().map(|path| (path.clone(), print(&path))));
    }
    prints
}

fn print(path: &Path) -> Print {
    let found = fs::metadata(path).ok()?;
    Some((found.ino(), found.len(), found.mtime(), found.mtime_nsec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_written_replaced_or_removed_looks_different() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("pgherd.yml");
        let look = || prints(&[file.clone(), dir.path().to_owned()]);
        let mut seen = vec![look()];
        fs::write(&file, "a").expect("written");
        seen.push(look());
        fs::write(&file, "ab").expect("written");
        seen.push(look());
        fs::write(dir.path().join("other.yml"), "a").expect("written");
        seen.push(look());
        fs::rename(dir.path().join("other.yml"), &file).expect("renamed");
        seen.push(look());
        fs::remove_file(&file).expect("removed");
        seen.push(look());
        for pair in seen.windows(2) {
            assert_ne!(pair[0], pair[1]);
        }
        assert_eq!(look(), look());
    }
}

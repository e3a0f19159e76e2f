//! Where the keeper keeps its memo when the configuration does not say: a place that outlives the agent, not the machine.

use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};
use rustix::process::getuid;

/// The directory for `member`, by the environment and by what may be written.
pub(crate) fn default_for(member: &str, xdg_runtime_dir: Option<PathBuf>) -> PathBuf {
    choose(
        member,
        xdg_runtime_dir,
        writable,
        &std::env::temp_dir(),
        getuid().as_raw(),
    )
}

fn choose(
    member: &str,
    xdg_runtime_dir: Option<PathBuf>,
    writable: impl Fn(&Path) -> bool,
    temp_dir: &Path,
    uid: u32,
) -> PathBuf {
    // A user's own directory, where there is one, is gone after the last logout, but so are the user's processes.
    if let Some(dir) = xdg_runtime_dir.filter(|dir| dir.is_absolute()) {
        return dir.join("pgherd").join(member);
    }
    let run = Path::new("/run/pgherd");
    if writable(run) {
        return run.join(member);
    }
    // The user's number keeps users apart in a directory that they share.
    temp_dir.join(format!("pgherd-{uid}")).join(member)
}

/// Whether `dir` is writable, or could be made.
fn writable(dir: &Path) -> bool {
    let existing = dir.ancestors().find(|ancestor| ancestor.exists());
    existing.is_some_and(|existing| access(existing, Access::WRITE_OK).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_place_that_can_be_used_is() {
        let temp = Path::new("/tmp");
        assert_eq!(
            choose("c-n", Some("/run/user/7".into()), |_| true, temp, 7),
            Path::new("/run/user/7/pgherd/c-n")
        );
        assert_eq!(choose("c-n", None, |_| true, temp, 7), Path::new("/run/pgherd/c-n"));
        assert_eq!(choose("c-n", None, |_| false, temp, 7), Path::new("/tmp/pgherd-7/c-n"));
    }
}

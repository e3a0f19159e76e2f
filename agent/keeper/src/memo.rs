//! What the agent wants its successor to know: in memory, and in a file for the case that the keeper is started anew.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::protocol::MEMO_BYTES_MAX;

const BOOT_ID_PATH: &str = "/proc/sys/kernel/random/boot_id";

/// The memo with its copy in the runtime directory. The copy counts only until the machine starts anew, for moments on
/// CLOCK_BOOTTIME mean nothing afterwards.
#[derive(Debug)]
pub(crate) struct Memo {
    path: PathBuf,
    boot_id: Vec<u8>,
    bytes: Vec<u8>,
}

impl Memo {
    /// Takes up the copy of this boot, if there is one.
    pub(crate) fn load(runtime_dir: &Path) -> io::Result<Self> {
        Self::load_for(runtime_dir, fs::read(BOOT_ID_PATH)?.trim_ascii().to_vec())
    }

    /// The memo of the keeper before the upgrade, which counts for more than the copy.
    pub(crate) fn take_over(runtime_dir: &Path, bytes: Vec<u8>) -> io::Result<Self> {
        Ok(Self {
            path: runtime_dir.join("memo"),
            boot_id: fs::read(BOOT_ID_PATH)?.trim_ascii().to_vec(),
            bytes,
        })
    }

    fn load_for(runtime_dir: &Path, boot_id: Vec<u8>) -> io::Result<Self> {
        let path = runtime_dir.join("memo");
        let copy = match fs::read(&path) {
            Ok(copy) => copy,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let bytes = copy
            .strip_prefix(boot_id.as_slice())
            .and_then(|rest| rest.strip_prefix(b"\n"));
        let bytes = bytes
            .filter(|bytes| bytes.len() <= MEMO_BYTES_MAX)
            .unwrap_or_default()
            .to_vec();
        Ok(Self { path, boot_id, bytes })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Keeps the memo. An error means that the copy is the old one.
    pub(crate) fn set(&mut self, bytes: Vec<u8>) -> io::Result<()> {
        self.bytes = bytes;
        let beside = self.path.with_extension("new");
        // No fsync: a copy that does not survive the machine's end is not wanted afterwards.
        fs::write(&beside, [&self.boot_id[..], b"\n", &self.bytes].concat())?;
        fs::rename(&beside, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_copy_is_taken_up_in_the_same_boot_only() {
        let dir = tempfile::tempdir().expect("a directory for the test");
        let load = |boot: &[u8]| Memo::load_for(dir.path(), boot.to_vec()).expect("the directory can be read");
        let mut memo = load(b"one");
        assert_eq!(memo.bytes(), b"");
        memo.set(b"lease\n\0 7".to_vec()).expect("the directory can be written");
        assert_eq!(load(b"one").bytes(), b"lease\n\0 7");
        assert_eq!(load(b"two").bytes(), b"");
        assert_eq!(load(b"on").bytes(), b"");
        memo.set(Vec::new()).expect("the directory can be written");
        assert_eq!(load(b"one").bytes(), b"");
    }
}

//! What a data directory says about its server: the number of its postmaster, and its shared memory.

use std::fs;
use std::io;
use std::path::Path;

use rustix::process::Pid;

const FILE_NAME: &str = "postmaster.pid";
/// The line that holds key and number of the shared memory, counted from zero.
const SEGMENT_LINE: usize = 6;
const SEGMENTS_PATH: &str = "/proc/sysvipc/shm";

/// `postmaster.pid`, as a postmaster writes it. A server for one session writes a negative number, and is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LockFile {
    pub(crate) postmaster: Pid,
    /// The number of the System V segment, which a postmaster knows a moment after the rest.
    segment: Option<i32>,
}

/// The System V segment that every process of one server which may write is attached to. PostgreSQL keeps one for this
/// purpose even where its buffers lie elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) id: i32,
    /// The postmaster that made it: another segment may have the number later.
    pub(crate) creator: i32,
}

impl LockFile {
    /// `None` when there is no such file, or it names no postmaster.
    pub(crate) fn read(data_dir: &Path) -> Option<Self> {
        Self::parse(&fs::read_to_string(data_dir.join(FILE_NAME)).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let number = lines.next()?.trim().parse::<i32>().ok().filter(|number| *number > 0)?;
        let segment = lines.nth(SEGMENT_LINE - 1);
        Some(Self {
            postmaster: Pid::from_raw(number)?,
            segment: segment.and_then(|line| line.split_ascii_whitespace().nth(1)?.parse().ok()),
        })
    }

    /// Its segment, if the system knows one that this postmaster has made.
    pub(crate) fn segment(&self) -> Option<Segment> {
        let segment = Segment {
            id: self.segment?,
            creator: self.postmaster.as_raw_nonzero().get(),
        };
        matches!(segment.attachments(), Ok(Some(_))).then_some(segment)
    }
}

impl Segment {
    /// How many processes are attached; `None` when it is gone.
    pub(crate) fn attachments(self) -> io::Result<Option<u64>> {
        Ok(self.attachments_in(&fs::read_to_string(SEGMENTS_PATH)?))
    }

    /// Columns: key, number, permissions, size, creator, last user, attachments.
    fn attachments_in(self, table: &str) -> Option<u64> {
        table.lines().find_map(|line| {
            let mut fields = line.split_ascii_whitespace().skip(1);
            let id = fields.next()?.parse::<i32>().ok()?;
            let creator = fields.nth(2)?.parse::<i32>().ok()?;
            let attachments = fields.nth(1)?.parse().ok()?;
            (id == self.id && creator == self.creator).then_some(attachments)
        })
    }

    /// Whether a process with these mappings (proc_pid_maps(5)) is attached: the number stands where a file has its
    /// inode.
    pub(crate) fn is_mapped_in(self, maps: &[u8]) -> bool {
        let id = self.id.to_string();
        maps.split(|byte| *byte == b'\n').any(|line| {
            let mut fields = line
                .split(|byte| *byte == b' ')
                .filter(|field| !field.is_empty())
                .skip(4);
            fields.next() == Some(id.as_bytes()) && fields.next().is_some_and(|name| name.starts_with(b"/SYSV"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_file_is_read_as_far_as_it_has_been_written() {
        let whole = "4711\n/data\n1763735000\n5432\n/tmp\n127.0.0.1\n  5432001     32768\nready   \n";
        let parsed = LockFile::parse(whole).expect("it names a postmaster");
        assert_eq!(
            (parsed.postmaster.as_raw_nonzero().get(), parsed.segment),
            (4711, Some(32768))
        );
        let begun = LockFile::parse("4711\n/data\n").expect("it names a postmaster");
        assert_eq!(begun.segment, None);
        for none in ["", "-4711\n/data\n", "0\n", "x\n"] {
            assert_eq!(LockFile::parse(none), None, "{none:?}");
        }
    }

    #[test]
    fn a_segment_is_known_by_its_number_and_its_creator() {
        let table = "       key      shmid perms                  size  cpid  lpid nattch   uid\n   \
                     5432001      32768   600                    56  4711  4790      7   110\n";
        let segment = |id, creator| Segment { id, creator };
        assert_eq!(segment(32768, 4711).attachments_in(table), Some(7));
        assert_eq!(segment(32768, 4712).attachments_in(table), None);
        assert_eq!(segment(32769, 4711).attachments_in(table), None);
    }

    #[test]
    fn an_attachment_shows_among_the_mappings() {
        let maps = b"7f1e1c000000-7f1e1c021000 rw-p 00000000 00:00 0 \n\
                     7f1e2a400000-7f1e2a401000 rw-s 00000000 00:01 32768                      /SYSV0052e2c1 (deleted)\n";
        let segment = |id| Segment { id, creator: 1 };
        assert!(segment(32768).is_mapped_in(maps));
        assert!(!segment(3276).is_mapped_in(maps) && !segment(0).is_mapped_in(maps));
    }

    #[test]
    fn the_system_tells_of_its_segments() {
        let none = Segment { id: -1, creator: -1 };
        assert_eq!(none.attachments().expect("/proc has it"), None);
    }
}

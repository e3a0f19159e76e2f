//! The shared word: the deadline as the keeper wrote it last, where the sentinel can read it whatever the keeper does.
//!
//! It is a file in memory that holds the record twice. The keeper writes the first copy, then the second; the sentinel
//! reads the second, then the first. If they are equal, no writing came between. If they stay unequal, the keeper stands
//! still between the two, and the earlier deadline counts.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{self, Errno, pread, pwrite};

use crate::clock::{Boottime, nanos};
use crate::fence::Armed;

const RECORD_BYTES: usize = 40;
/// Where the copies begin.
const COPIES: [u64; 2] = [0, 64];
/// How often a reader that meets a writer looks again. A writing takes microseconds.
const READS_MAX: usize = 64;

/// The keeper's end.
#[derive(Debug)]
pub(crate) struct Word {
    file: OwnedFd,
    sequence: u64,
}

impl Word {
    /// A word that says that nothing is armed.
    pub(crate) fn new() -> io::Result<Self> {
        let mut word = Self {
            file: memfd_create("pgherd-fence", MemfdFlags::CLOEXEC)?,
            sequence: 0,
        };
        word.write(None)?;
        Ok(word)
    }

    /// To be handed to a sentinel.
    pub(crate) fn share(&self) -> io::Result<OwnedFd> {
        rustix::io::fcntl_dupfd_cloexec(&self.file, 3)
    }

    pub(crate) fn write(&mut self, armed: Option<Armed>) -> io::Result<()> {
        self.sequence += 1;
        let record = encode(self.sequence, armed);
        for offset in COPIES {
            if pwrite(&self.file, &record, offset)? != RECORD_BYTES {
                return Err(Errno::IO);
            }
        }
        Ok(())
    }
}

/// What the word says. The file is the one that the keeper shared.
pub(crate) fn read(file: impl AsFd) -> io::Result<Option<Armed>> {
    let mut copies = [[0; RECORD_BYTES]; 2];
    for _ in 0..READS_MAX {
        for (copy, offset) in copies.iter_mut().zip(COPIES).rev() {
            if pread(&file, copy.as_mut_slice(), offset)? != RECORD_BYTES {
                return Err(Errno::IO);
            }
        }
        if copies[0] == copies[1] {
            return Ok(decode(&copies[0]));
        }
    }
    // The first copy may allow more time than the second, or arm what the second does not know of yet.
    Ok(copies.iter().filter_map(decode).min_by_key(|armed| armed.deadline))
}

/// Sequence, whether armed, term, deadline, margin.
fn encode(sequence: u64, armed: Option<Armed>) -> [u8; RECORD_BYTES] {
    let (term, deadline, margin) = armed.map_or((0, 0, 0), |armed| {
        (armed.term, armed.deadline.as_nanos(), nanos(armed.margin))
    });
    let mut record = [0; RECORD_BYTES];
    let fields = [sequence, u64::from(armed.is_some()), term, deadline, margin];
    for (bytes, field) in record.chunks_exact_mut(8).zip(fields) {
        bytes.copy_from_slice(&field.to_ne_bytes());
    }
    record
}

fn decode(record: &[u8; RECORD_BYTES]) -> Option<Armed> {
    let mut fields = [0; RECORD_BYTES / 8];
    for (field, bytes) in fields.iter_mut().zip(record.as_chunks::<8>().0) {
        *field = u64::from_ne_bytes(*bytes);
    }
    let [_, armed, term, deadline, margin] = fields;
    let deadline = Boottime::from_nanos(deadline);
    (armed != 0).then_some(Armed {
        term,
        deadline,
        margin: Duration::from_nanos(margin),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;

    /// All fields are of the same number, so that a mixture of two records shows.
    fn armed(number: u64) -> Armed {
        Armed {
            term: number,
            deadline: Boottime::from_nanos(number),
            margin: Duration::from_nanos(number),
        }
    }

    #[test]
    fn the_last_writing_is_read() {
        let mut word = Word::new().expect("memory files are available");
        let shared = word.share().expect("there are descriptors left");
        assert_eq!(read(&shared), Ok(None));
        word.write(Some(armed(7))).expect("memory is available");
        assert_eq!(read(&shared), Ok(Some(armed(7))));
        word.write(None).expect("memory is available");
        assert_eq!(read(&shared), Ok(None));
    }

    #[test]
    fn a_keeper_that_stands_still_between_the_copies_is_read_as_the_earlier_deadline() {
        let word = Word::new().expect("memory files are available");
        for (first, second, want) in [
            (Some(9), Some(5), Some(5)),
            (Some(9), None, Some(9)),
            (None, Some(5), Some(5)),
        ] {
            for (sequence, (offset, number)) in (1..).zip(COPIES.into_iter().zip([first, second])) {
                pwrite(&word.file, &encode(sequence, number.map(armed)), offset).expect("memory is available");
            }
            assert_eq!(read(&word.file), Ok(want.map(armed)));
        }
    }

    #[test]
    fn no_mixture_of_two_writings_is_ever_read() {
        let mut word = Word::new().expect("memory files are available");
        let shared = word.share().expect("there are descriptors left");
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut last = 0;
                while !done.load(Ordering::Relaxed) {
                    let Some(seen) = read(&shared).expect("memory can be read") else {
                        continue;
                    };
                    assert_eq!(seen, armed(seen.term));
                    assert!(seen.term >= last, "went back from {last} to {}", seen.term);
                    last = seen.term;
                }
            });
            for number in 1..20_000 {
                word.write(Some(armed(number))).expect("memory is available");
            }
            done.store(true, Ordering::Relaxed);
        });
    }
}

//! The shared word: the deadline, or that there is none, as the keeper wrote it last, where the sentinel can read it
//! whatever the keeper does.
//!
//! It is a file in memory that holds the record twice. The keeper writes the first copy, then the second; the sentinel
//! reads the second, then the first. If they are equal, no writing came between. If they stay unequal, the keeper stands
//! still between the two, and the stricter one counts.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{self, Errno, pread, pwrite};

use crate::clock::{Boottime, nanos};
use crate::fence::{Armed, Fence};

const RECORD_BYTES: usize = 40;
/// Where the copies begin.
const COPIES: [u64; 2] = [0, 64];
/// How often a reader that meets a writer looks again. A writing takes microseconds.
const READS_MAX: usize = 64;
const DISARMED: u64 = 0;
const ARMED: u64 = 1;
const PAUSED: u64 = 2;

/// What the sentinel is to go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// No deadline is in force. PostgreSQL still ends with its keeper.
    Disarmed,
    /// PostgreSQL must have ended by a deadline.
    Armed(Armed),
    /// PostgreSQL is left alone, also when the keeper dies.
    Paused,
}

impl Notice {
    pub(crate) fn of(fence: &Fence) -> Self {
        match fence.deadline() {
            Some(armed) => Self::Armed(armed),
            None if fence.is_paused() => Self::Paused,
            None => Self::Disarmed,
        }
    }

    /// Of two that cannot be told apart by age, the one that ends PostgreSQL sooner.
    fn stricter(self, other: Self) -> Self {
        match (self, other) {
            (Self::Armed(one), Self::Armed(two)) if two.deadline < one.deadline => other,
            (Self::Armed(_), _) => self,
            (_, Self::Armed(_)) | (Self::Paused, _) => other,
            (Self::Disarmed, _) => self,
        }
    }
}

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
        word.write(Notice::Disarmed)?;
        Ok(word)
    }

    /// The word of the keeper before the upgrade, as it stands.
    pub(crate) fn take_over(file: OwnedFd) -> io::Result<Self> {
        let mut record = [0; RECORD_BYTES];
        if pread(&file, record.as_mut_slice(), COPIES[0])? != RECORD_BYTES {
            return Err(Errno::IO);
        }
        let sequence = fields(&record)[0];
        Ok(Self { file, sequence })
    }

    /// To be handed to a sentinel.
    pub(crate) fn share(&self) -> io::Result<OwnedFd> {
        rustix::io::fcntl_dupfd_cloexec(&self.file, 3)
    }

    pub(crate) fn write(&mut self, notice: Notice) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let record = encode(self.sequence, notice);
        for offset in COPIES {
            if pwrite(&self.file, &record, offset)? != RECORD_BYTES {
                return Err(Errno::IO);
            }
        }
        Ok(())
    }
}

/// To be handed to the keeper after an upgrade.
impl AsFd for Word {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// What the word says. The file is the one that the keeper shared.
pub(crate) fn read(file: impl AsFd) -> io::Result<Notice> {
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
    Ok(decode(&copies[0]).stricter(decode(&copies[1])))
}

/// Sequence, kind of notice, term, deadline, margin.
fn encode(sequence: u64, notice: Notice) -> [u8; RECORD_BYTES] {
    let (kind, term, deadline, margin) = match notice {
        Notice::Disarmed => (DISARMED, 0, 0, 0),
        Notice::Armed(armed) => (ARMED, armed.term, armed.deadline.as_nanos(), nanos(armed.margin)),
        Notice::Paused => (PAUSED, 0, 0, 0),
    };
    let mut record = [0; RECORD_BYTES];
    let fields = [sequence, kind, term, deadline, margin];
    for (bytes, field) in record.chunks_exact_mut(8).zip(fields) {
        bytes.copy_from_slice(&field.to_ne_bytes());
    }
    record
}

fn decode(record: &[u8; RECORD_BYTES]) -> Notice {
    let [_, kind, term, deadline, margin] = fields(record);
    match kind {
        DISARMED => Notice::Disarmed,
        PAUSED => Notice::Paused,
        _ => Notice::Armed(Armed {
            term,
            deadline: Boottime::from_nanos(deadline),
            margin: Duration::from_nanos(margin),
        }),
    }
}

fn fields(record: &[u8; RECORD_BYTES]) -> [u64; RECORD_BYTES / 8] {
    let mut fields = [0; RECORD_BYTES / 8];
    for (field, bytes) in fields.iter_mut().zip(record.as_chunks::<8>().0) {
        *field = u64::from_ne_bytes(*bytes);
    }
    fields
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;

    /// All fields are of the same number, so that a mixture of two records shows.
    fn armed(number: u64) -> Notice {
        Notice::Armed(Armed {
            term: number,
            deadline: Boottime::from_nanos(number),
            margin: Duration::from_nanos(number),
        })
    }

    #[test]
    fn the_last_writing_is_read() {
        let mut word = Word::new().expect("memory files are available");
        let shared = word.share().expect("there are descriptors left");
        assert_eq!(read(&shared), Ok(Notice::Disarmed));
        for notice in [armed(7), Notice::Paused, Notice::Disarmed] {
            word.write(notice).expect("memory is available");
            assert_eq!(read(&shared), Ok(notice));
        }
        let mut next = Word::take_over(word.file).expect("memory can be read");
        assert_eq!((next.sequence, read(&shared)), (word.sequence, Ok(Notice::Disarmed)));
        next.write(armed(8)).expect("memory is available");
        assert_eq!(read(&shared), Ok(armed(8)));
    }

    #[test]
    fn a_keeper_that_stands_still_between_the_copies_is_read_as_the_stricter_of_the_two() {
        let (disarmed, paused) = (Notice::Disarmed, Notice::Paused);
        let word = Word::new().expect("memory files are available");
        for (first, second, want) in [
            (armed(9), armed(5), armed(5)),
            (armed(5), armed(9), armed(5)),
            (armed(9), disarmed, armed(9)),
            (disarmed, armed(5), armed(5)),
            (paused, armed(5), armed(5)),
            (armed(5), paused, armed(5)),
            (paused, disarmed, disarmed),
            (disarmed, paused, disarmed),
        ] {
            for (sequence, (offset, notice)) in (1..).zip(COPIES.into_iter().zip([first, second])) {
                pwrite(&word.file, &encode(sequence, notice), offset).expect("memory is available");
            }
            assert_eq!(read(&word.file), Ok(want));
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
                    let notice = read(&shared).expect("memory can be read");
                    let Notice::Armed(seen) = notice else { continue };
                    assert_eq!(notice, armed(seen.term));
                    assert!(seen.term >= last, "went back from {last} to {}", seen.term);
                    last = seen.term;
                }
            });
            for number in 1..20_000 {
                word.write(armed(number)).expect("memory is available");
            }
            done.store(true, Ordering::Relaxed);
        });
    }
}

//! Pipes through which the kernel moves bytes from one socket to another without a copy. A thread keeps a few for its
//! sessions; one that no session needs costs two descriptors and no memory.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice};

use crate::counters::{Counted, Gauge};

/// What a pipe holds, where the system allows as much; four of them pass in one turn.
pub(super) const PIPE_BYTES: usize = 256 * 1024;
/// From here on a pipe is worth having.
const PIPE_BYTES_MIN: usize = 64 * 1024;
/// Pipes that a thread keeps for the next session that moves much.
const KEPT_MAX: usize = 8;
/// Pipes in use at a time by one thread: each pins up to its size, and users' pipe pages are limited (pipe(7)).
const OPEN_MAX: usize = 64;
/// Descriptors of one thread's pipes at the most. Those that are kept are taken before any is made.
pub(crate) const PIPE_FILES_MAX: usize = 2 * OPEN_MAX;

thread_local! {
    static POOL: RefCell<Pool> = RefCell::default();
}

#[derive(Default)]
struct Pool {
    #[expect(
        clippy::vec_box,
        reason = "a session has room for a pointer, and taking a pipe allocates nothing"
    )]
    kept: Vec<Box<Ends>>,
    /// Pipes that were taken here: one may end on another thread, with its session.
    open: Gauge,
}

/// Both ends of a pipe, and how many bytes have come in and not gone out.
#[derive(Debug)]
struct Ends {
    read: OwnedFd,
    write: OwnedFd,
    holds: usize,
    /// Its place among those in use, where it was taken.
    place: Option<Counted>,
}

/// A session's pipe, while it has one, with what is in it.
#[derive(Debug, Default)]
pub(super) struct Pipe {
    ends: Option<Box<Ends>>,
}

impl Pipe {
    /// Takes one, if there is none yet; false when too many are in use or the system has none.
    pub(super) fn take(&mut self) -> bool {
        if self.ends.is_none() {
            self.ends = POOL.with_borrow_mut(|pool| {
                let place = pool.open.enter_below(OPEN_MAX)?;
                let mut ends = pool.kept.pop().or_else(make)?;
                ends.place = Some(place);
                Some(ends)
            });
        }
        self.ends.is_some()
    }

    /// Gives it to whoever needs one next.
    pub(super) fn give_back(&mut self) {
        let Some(mut ends) = self.ends.take() else { return };
        ends.place = None;
        // What a broken session has left in its pipe must reach nobody else.
        if ends.holds == 0 {
            POOL.with_borrow_mut(|pool| {
                if pool.kept.len() < KEPT_MAX {
                    pool.kept.push(ends);
                }
            });
        }
    }

    /// Whether there is one.
    pub(super) const fn is_there(&self) -> bool {
        self.ends.is_some()
    }

    /// Bytes that have come in and not gone out.
    pub(super) fn holds(&self) -> usize {
        self.ends.as_ref().map_or(0, |ends| ends.holds)
    }

    /// Moves what has been received, up to what the pipe holds.
    pub(super) fn fill(&mut self, source: impl AsFd) -> io::Result<usize> {
        let Some(ends) = &mut self.ends else { return Ok(0) };
        let moved = splice(source, None, &ends.write, None, PIPE_BYTES, flags())?;
        ends.holds += moved;
        Ok(moved)
    }

    /// Moves what the sink takes, but for the last so many bytes, which follow soon.
    pub(super) fn drain(&mut self, sink: impl AsFd, but_last: usize) -> io::Result<usize> {
        let Some(ends) = &mut self.ends else { return Ok(0) };
        // No segment of its own for the few that follow.
        let more = if but_last > 0 {
            SpliceFlags::MORE
        } else {
            SpliceFlags::empty()
        };
        let count = ends.holds.saturating_sub(but_last);
        let moved = splice(&ends.read, None, sink, None, count, flags() | more)?;
        ends.holds -= moved;
        Ok(moved)
    }

    /// Takes what the pipe holds back into memory.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(ends) = &mut self.ends else { return Ok(0) };
        let count = rustix::io::read(&ends.read, buffer)?;
        ends.holds -= count;
        Ok(count)
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.give_back();
    }
}

fn flags() -> SpliceFlags {
    SpliceFlags::MOVE | SpliceFlags::NONBLOCK
}

fn make() -> Option<Box<Ends>> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
    // A user over the limit for pipe pages gets a smaller one. Where that is so small that little moves at a time, or that it
    // is full with what is held back in it, copying does better.
    let size = fcntl_setpipe_size(&write, PIPE_BYTES).or_else(|_| fcntl_getpipe_size(&write));
    let ends = Ends {
        read,
        write,
        holds: 0,
        place: None,
    };
    size.is_ok_and(|size| size >= PIPE_BYTES_MIN).then(|| Box::new(ends))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn taken() -> Option<Pipe> {
        let mut pipe = Pipe::default();
        pipe.take().then_some(pipe)
    }

    #[test]
    fn what_a_session_left_in_a_pipe_reaches_nobody_else() {
        let (mut client, source) = UnixStream::pair().expect("a pair");
        let (sink, mut server) = UnixStream::pair().expect("a pair");
        client.write_all(b"left").expect("sent");
        let mut left = taken().expect("a pipe");
        assert_eq!(left.fill(&source).expect("moved"), 4);
        drop(left);
        client.write_all(b"next").expect("sent");
        let mut next = taken().expect("a pipe");
        assert_eq!(next.fill(&source).expect("moved"), 4);
        assert_eq!(next.drain(&sink, 0).expect("moved"), 4);
        let mut got = [0; 4];
        server.read_exact(&mut got).expect("received");
        assert_eq!((&got, next.holds()), (b"next", 0));
    }

    #[test]
    fn a_thread_has_a_bounded_number_of_pipes() {
        let mut pipes: Vec<_> = std::iter::from_fn(taken).take(2 * OPEN_MAX).collect();
        assert_eq!(pipes.len(), OPEN_MAX);
        // One that needs none for a while leaves it to others, and takes one again.
        let mut first = pipes.swap_remove(0);
        first.give_back();
        first.give_back();
        let other = taken();
        assert!(other.is_some() && !first.take());
        drop((first, other, pipes));
        POOL.with_borrow(|pool| assert_eq!((pool.open.get(), pool.kept.len()), (0, KEPT_MAX)));
    }

    /// As a session does that is carried by one thread and ends on another.
    #[test]
    fn a_pipe_that_ends_on_another_thread_leaves_its_place_where_it_was_taken() {
        for _ in 0..2 {
            let pipes: Vec<_> = std::iter::from_fn(taken).collect();
            assert_eq!(pipes.len(), OPEN_MAX);
            let elsewhere = std::thread::spawn(move || {
                drop(pipes);
                POOL.with_borrow(|pool| pool.open.get())
            });
            assert_eq!(elsewhere.join().expect("dropped"), 0);
        }
        POOL.with_borrow(|pool| assert_eq!(pool.open.get(), 0));
    }
}

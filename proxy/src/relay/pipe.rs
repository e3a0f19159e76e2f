//! Pipes through which the kernel moves bytes from one socket to another without a copy. A thread keeps a few for its
//! sessions; one that no session needs costs two descriptors and no memory.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

/// What a pipe holds, where the system allows as much; four of them pass in one turn.
pub(super) const PIPE_BYTES: usize = 256 * 1024;
/// Pipes that a thread keeps for the next session that moves much.
const KEPT_MAX: usize = 8;
/// Pipes in use at a time by one thread: each pins up to its size, and users' pipe pages are limited (pipe(7)).
const OPEN_MAX: usize = 64;

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { kept: Vec::new(), open: 0 }) };
}

struct Pool {
    kept: Vec<(OwnedFd, OwnedFd)>,
    open: usize,
}

/// A pipe with what is in it.
#[derive(Debug)]
pub(super) struct Pipe {
    /// Gone only while it is dropped.
    ends: Option<(OwnedFd, OwnedFd)>,
    /// Bytes that have come in and not gone out.
    pub(super) holds: usize,
}

impl Pipe {
    /// A pipe, unless too many are in use or the system has none.
    pub(super) fn take() -> Option<Self> {
        POOL.with_borrow_mut(|pool| {
            if pool.open >= OPEN_MAX {
                return None;
            }
            let ends = pool.kept.pop().or_else(make)?;
            pool.open += 1;
            Some(Self {
                ends: Some(ends),
                holds: 0,
            })
        })
    }

    /// Moves what has been received, up to what the pipe holds.
    pub(super) fn fill(&mut self, source: impl AsFd) -> io::Result<usize> {
        let Some((_, write)) = &self.ends else { return Ok(0) };
        let moved = splice(source, None, write, None, PIPE_BYTES, flags())?;
        self.holds += moved;
        Ok(moved)
    }

    /// Moves what the sink takes.
    pub(super) fn drain(&mut self, sink: impl AsFd) -> io::Result<usize> {
        let Some((read, _)) = &self.ends else { return Ok(0) };
        let moved = splice(read, None, sink, None, self.holds, flags())?;
        self.holds -= moved;
        Ok(moved)
    }

    /// Takes what the pipe holds back into memory.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some((read, _)) = &self.ends else { return Ok(0) };
        let count = rustix::io::read(read, buffer)?;
        self.holds -= count;
        Ok(count)
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let (ends, clean) = (self.ends.take(), self.holds == 0);
        POOL.with_borrow_mut(|pool| {
            pool.open = pool.open.saturating_sub(1);
            // What a broken session has left in its pipe must reach nobody else.
            if let Some(ends) = ends.filter(|_| clean && pool.kept.len() < KEPT_MAX) {
                pool.kept.push(ends);
            }
        });
    }
}

fn flags() -> SpliceFlags {
    SpliceFlags::MOVE | SpliceFlags::NONBLOCK
}

fn make() -> Option<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
    // A user over the limit for pipe pages gets a smaller one, which works as well.
    let _ = fcntl_setpipe_size(&write, PIPE_BYTES);
    Some((read, write))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_a_session_left_in_a_pipe_reaches_nobody_else() {
        let (mut client, source) = UnixStream::pair().expect("a pair");
        let (sink, mut server) = UnixStream::pair().expect("a pair");
        client.write_all(b"left").expect("sent");
        let mut left = Pipe::take().expect("a pipe");
        assert_eq!(left.fill(&source).expect("moved"), 4);
        drop(left);
        client.write_all(b"next").expect("sent");
        let mut next = Pipe::take().expect("a pipe");
        assert_eq!(next.fill(&source).expect("moved"), 4);
        assert_eq!(next.drain(&sink).expect("moved"), 4);
        let mut got = [0; 4];
        server.read_exact(&mut got).expect("received");
        assert_eq!((&got, next.holds), (b"next", 0));
    }

    #[test]
    fn a_thread_has_a_bounded_number_of_pipes() {
        let pipes: Vec<_> = std::iter::from_fn(Pipe::take).take(2 * OPEN_MAX).collect();
        assert_eq!(pipes.len(), OPEN_MAX);
        drop(pipes);
        POOL.with_borrow(|pool| assert_eq!((pool.open, pool.kept.len()), (0, KEPT_MAX)));
    }
}

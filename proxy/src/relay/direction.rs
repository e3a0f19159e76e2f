//! One direction of a session: from a source to a sink.
//!
//! Small messages are received into the thread's buffer and sent at once; only what the sink does not take is kept, at most
//! one buffer. A direction that twice in a row filled most of the buffer moves its bytes through a pipe instead, inside the
//! kernel, until the moves get small again.

use std::io;
use std::pin::pin;
use std::task::{Context, Poll, ready};

use tokio::io::Interest;

use super::pipe::Pipe;
use crate::stream::socket::Socket;
use crate::stream::{Stream, is_transient};

/// What one direction may move through a pipe before others get their turn.
const BYTES_PER_POLL: usize = 1024 * 1024;
/// Copying costs as much more by the byte, and less may be copied accordingly.
const COPY_COSTS: usize = 4;
/// What a receive that brings nothing takes from a turn.
const NOTHING_COSTS: usize = 4096;
/// From here on a receive counts as a large one.
const LARGE: usize = 32 * 1024;
/// So many large ones in a row and a pipe pays.
const LARGE_BEFORE_PIPE: u8 = 2;
/// So many small ones in a row and it pays no longer.
const SMALL_BEFORE_COPY: u8 = 4;

/// Which socket failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    Source,
    Sink,
}

/// What a direction tells of its bytes.
pub(super) trait Hooks {
    /// Whether bytes may pass unseen.
    fn may_splice(&self) -> bool;
    /// These have been received.
    fn received(&mut self, bytes: &[u8]);
    /// These have been sent.
    fn sent(&mut self, bytes: &[u8]);
    /// So many have passed unseen.
    fn spliced(&mut self, count: usize);
    /// How many of the last bytes have to be seen once nothing follows them.
    fn last_seen(&self) -> usize;
    /// Whether the sink is closed once this direction has ended, which tells it as much.
    fn is_last(&self) -> bool;
}

#[derive(Debug)]
struct Rest {
    bytes: Vec<u8>,
    /// How many of them have gone.
    from: usize,
}

impl Rest {
    /// Nothing for no bytes.
    fn new(bytes: Vec<u8>) -> Option<Box<Self>> {
        (!bytes.is_empty()).then(|| Box::new(Self { bytes, from: 0 }))
    }
}

#[derive(Debug, Default)]
pub(super) struct Direction {
    /// The source has said that nothing more comes.
    pub(super) source_finished: bool,
    /// The source's connection broke, although what it sent before is still being received.
    pub(super) source_broke: bool,
    /// And the sink has been told, or is about to be closed.
    pub(super) finished: bool,
    /// What the sink has not taken. In a box, since hardly any direction has one at a time.
    rest: Option<Box<Rest>>,
    /// Large receives in a row, or small moves where bytes go through a pipe.
    run: u8,
    /// Bytes go through a pipe. It is there while it holds some, and others may have it while nothing comes.
    splices: bool,
    pipe: Pipe,
}

impl Direction {
    /// Begins with bytes that were received already.
    pub(super) fn with(rest: Vec<u8>) -> Self {
        Self {
            rest: Rest::new(rest),
            ..Self::default()
        }
    }

    /// Whether everything that was received has been sent.
    pub(super) fn is_drained(&self) -> bool {
        self.rest.is_none() && self.pipe.holds() == 0
    }

    /// Whether its bytes go through a pipe.
    pub(super) const fn splices(&self) -> bool {
        self.splices
    }

    /// Whether nothing of it is on its way or tied to this thread, and more may come.
    pub(super) fn is_at_rest(&self) -> bool {
        self.rest.is_none() && !self.pipe.is_there() && !self.source_finished && !self.source_broke
    }

    /// Moves what can be moved. Ready once the source's end has been passed on, or a socket has failed.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut Stream,
        sink: &mut Stream,
        buffer: &mut [u8],
        hooks: &mut impl Hooks,
    ) -> Poll<Result<(), Broken>> {
        let mut budget = BYTES_PER_POLL;
        while !self.finished {
            ready!(self.poll_rest(cx, sink, hooks))?;
            if self.source_finished {
                if self.source_broke {
                    return Poll::Ready(Err(Broken::Source));
                }
                if !hooks.is_last() || sink.plain().is_none() {
                    ready!(sink.poll_finish(cx)).map_err(|_| Broken::Sink)?;
                }
                self.finished = true;
                break;
            }
            if budget == 0 {
                // Woken after the others, and after whoever has become ready meanwhile.
                let _ = pin!(tokio::task::yield_now()).poll(cx);
                return Poll::Pending;
            }
            match (self.splices, source.plain(), sink.plain()) {
                (true, Some(source), Some(sink)) => {
                    ready!(self.poll_splice(cx, (source, sink), buffer, hooks, &mut budget))?;
                }
                _ => {
                    let copied = self.poll_copy(cx, (source, sink), buffer, hooks, &mut budget);
                    // What TLS has just encrypted and the socket has not taken goes out although nothing more may come.
                    if copied.is_pending() && matches!(sink.poll_flush(cx), Poll::Ready(Err(_))) {
                        return Poll::Ready(Err(Broken::Sink));
                    }
                    ready!(copied)?;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Receives into the buffer and sends from it, until there is a rest, the end, or a reason to take a pipe.
    fn poll_copy(
        &mut self,
        cx: &mut Context<'_>,
        (source, sink): (&mut Stream, &mut Stream),
        buffer: &mut [u8],
        hooks: &mut impl Hooks,
        budget: &mut usize,
    ) -> Poll<Result<(), Broken>> {
        while *budget > 0 {
            ready!(source.poll_receivable(cx)).map_err(|_| Broken::Source)?;
            let count = match source.receive(buffer) {
                Ok(count) => count,
                // Records that hold nothing cost something too, and a peer can send them without end.
                Err(error) if is_transient(&error) => {
                    *budget = budget.saturating_sub(NOTHING_COSTS);
                    continue;
                }
                Err(_) => return Poll::Ready(Err(Broken::Source)),
            };
            let Some(bytes) = buffer.get(..count).filter(|bytes| !bytes.is_empty()) else {
                self.source_finished = true;
                break;
            };
            *budget = budget.saturating_sub(count * COPY_COSTS);
            hooks.received(bytes);
            let sent = sink.send(bytes);
            self.note_sent(bytes, sent, hooks)?;
            self.run = if count >= LARGE { self.run + 1 } else { 0 };
            let takes_pipe = self.run >= LARGE_BEFORE_PIPE && self.take_pipe(source, sink, hooks);
            if takes_pipe || self.rest.is_some() {
                break;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Keeps what the sink has not taken.
    fn note_sent(&mut self, bytes: &[u8], sent: io::Result<usize>, hooks: &mut impl Hooks) -> Result<(), Broken> {
        let sent = match sent {
            Ok(sent) => sent,
            Err(error) if is_transient(&error) => 0,
            Err(_) => return Err(Broken::Sink),
        };
        let (gone, kept) = bytes.split_at(sent);
        hooks.sent(gone);
        self.rest = Rest::new(kept.to_vec());
        Ok(())
    }

    fn take_pipe(&mut self, source: &Stream, sink: &Stream, hooks: &impl Hooks) -> bool {
        self.run = 0;
        let may = source.plain().is_some() && sink.plain().is_some() && hooks.may_splice();
        self.splices = may && self.pipe.take();
        self.splices
    }

    fn leave_pipe(&mut self) {
        (self.splices, self.run) = (false, 0);
        self.pipe.give_back();
    }

    /// Moves through the pipe, until there is the end or the moves are small.
    fn poll_splice(
        &mut self,
        cx: &mut Context<'_>,
        (source, sink): (&Socket, &Socket),
        buffer: &mut [u8],
        hooks: &mut impl Hooks,
        budget: &mut usize,
    ) -> Poll<Result<(), Broken>> {
        while *budget > 0 {
            // The last of a bulk of bytes are worth seeing: they stay until it is known whether others follow.
            let last = hooks.last_seen();
            while self.pipe.holds() > last {
                ready!(sink.poll_writable(cx)).map_err(|_| Broken::Sink)?;
                match sink.try_io(Interest::WRITABLE, || self.pipe.drain(sink, last)) {
                    Ok(moved) => hooks.spliced(moved),
                    Err(error) if is_transient(&error) => {}
                    Err(_) => return Poll::Ready(Err(Broken::Sink)),
                }
            }
            let Poll::Ready(readable) = source.poll_readable(cx) else {
                self.send_held(sink, buffer, hooks)?;
                self.pipe.give_back();
                if self.rest.is_none() {
                    return Poll::Pending;
                }
                break;
            };
            readable.map_err(|_| Broken::Source)?;
            if !self.pipe.take() {
                self.leave_pipe();
                break;
            }
            let moved = match source.try_io(Interest::READABLE, || self.pipe.fill(source)) {
                Ok(0) => {
                    self.send_held(sink, buffer, hooks)?;
                    self.leave_pipe();
                    self.source_finished = true;
                    break;
                }
                Ok(moved) => moved,
                Err(error) if is_transient(&error) => continue,
                Err(_) => {
                    self.send_held(sink, buffer, hooks)?;
                    return Poll::Ready(Err(Broken::Source));
                }
            };
            *budget = budget.saturating_sub(moved);
            if moved >= LARGE {
                self.run = 0;
                continue;
            }
            // What ends a bulk of bytes is short, mostly: it comes back into memory.
            self.run += 1;
            self.send_held(sink, buffer, hooks)?;
            if self.run >= SMALL_BEFORE_COPY && self.pipe.holds() == 0 {
                self.leave_pipe();
            }
            if self.rest.is_some() || !self.splices {
                break;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Takes what the pipe holds back into memory, where it is seen, and sends it.
    fn send_held(&mut self, sink: &Socket, buffer: &mut [u8], hooks: &mut impl Hooks) -> Result<(), Broken> {
        if self.pipe.holds() == 0 {
            return Ok(());
        }
        let count = self.pipe.read(buffer).map_err(|_| Broken::Source)?;
        let bytes = buffer.get(..count).unwrap_or_default();
        hooks.received(bytes);
        let sent = sink.send(bytes);
        self.note_sent(bytes, sent, hooks)
    }

    fn poll_rest(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut Stream,
        hooks: &mut impl Hooks,
    ) -> Poll<Result<(), Broken>> {
        if let Some(rest) = &mut self.rest {
            while let Some(bytes) = rest.bytes.get(rest.from..).filter(|bytes| !bytes.is_empty()) {
                ready!(sink.poll_sendable(cx)).map_err(|_| Broken::Sink)?;
                match sink.send(bytes) {
                    Ok(sent) => {
                        hooks.sent(bytes.get(..sent).unwrap_or_default());
                        rest.from += sent;
                    }
                    Err(error) if is_transient(&error) => {}
                    Err(_) => return Poll::Ready(Err(Broken::Sink)),
                }
            }
            // Freed, not kept: idle sessions own no buffer.
            self.rest = None;
        }
        // What TLS has encrypted and the socket has not taken. That it is still on its way keeps nothing else from coming.
        match sink.poll_flush(cx) {
            Poll::Ready(Err(_)) => Poll::Ready(Err(Broken::Sink)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(())),
        }
    }
}

#[cfg(test)]
mod tests;

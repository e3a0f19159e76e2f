//! The hot path: bytes between a client and its server, both ways, in one future.
//!
//! A worker's sessions share one buffer. What was received is sent at once; only what the other side does not take is kept,
//! at most one buffer per direction, and then nothing more is read from that side. Nothing is parsed once the server's
//! startup answer has passed.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::{Sleep, sleep};

use crate::counters::Sum;
use crate::leaving::Leaving;
use crate::sessions::{Ending, Registration, Word};
use crate::socket;
use crate::wire::backend::{StartupWatch, Tail};

const BUFFER_BYTES: usize = 64 * 1024;
/// What one direction may move before others get their turn.
const BYTES_PER_POLL: usize = 256 * 1024;
/// PostgreSQL never sends after it has closed, so a client that does not follow only holds a place.
const CLIENT_FOLLOWS_MAX: Duration = Duration::from_secs(30);

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER_BYTES]);
}

/// How a relay ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// Both sides have sent everything and said so.
    Finished,
    /// The server closed, and the client took everything but did not close.
    ClientStayed,
    /// The client's connection broke.
    ClientBroke,
    /// The server's connection broke; whether the client has a complete answer is not known.
    ServerBroke,
    /// Somebody outside ended the session.
    Ended(Ending),
}

/// One session's two sockets and what is between them.
pub(crate) struct Relay<'a> {
    pub(crate) client: TcpStream,
    pub(crate) server: TcpStream,
    to_server: Direction,
    to_client: Direction,
    talk: Talk,
    ended: Option<oneshot::Receiver<Word>>,
    /// Between two transactions it is to end; in a box, since hardly any session is asked to.
    leaving: Option<Box<Leaving>>,
    counters: Option<Counters<'a>>,
    client_follows: Option<Pin<Box<Sleep>>>,
}

/// Where bytes are counted.
pub(crate) struct Counters<'a> {
    pub(crate) to_server: &'a Sum,
    pub(crate) to_client: &'a Sum,
}

/// What is known of the conversation.
struct Talk {
    tail: Tail,
    /// The client has sent something since the last byte was sent to it.
    outstanding: bool,
    /// Until the server's startup answer has passed.
    startup: Option<Box<StartupWatch>>,
    registration: Registration,
}

impl Talk {
    fn client_sent(&mut self) {
        self.outstanding = true;
    }

    fn server_sent(&mut self, bytes: &[u8]) {
        let Some(startup) = &mut self.startup else { return };
        if let Some(key) = startup.feed(bytes) {
            self.registration.learn_key(key);
        }
        if startup.is_over() {
            self.startup = None;
        }
    }

    fn client_got(&mut self, bytes: &[u8]) {
        self.tail.push(bytes);
        self.outstanding = false;
    }
}

/// Which socket failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    Source,
    Sink,
}

#[derive(Debug, Default)]
struct Direction {
    /// The source has said that nothing more comes.
    source_finished: bool,
    /// The source's connection broke, although what it sent before is still being received.
    source_broke: bool,
    /// And the sink has been told.
    finished: bool,
    /// What the sink has not taken.
    rest: Vec<u8>,
    rest_from: usize,
}

impl Direction {
    /// Moves what can be moved. Ready once the source's end has been passed on, or a socket has failed.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        source: &TcpStream,
        sink: &TcpStream,
        buffer: &mut [u8],
        hooks: &mut dyn Hooks,
    ) -> Poll<Result<(), Broken>> {
        let mut budget = BYTES_PER_POLL;
        while !self.finished {
            ready!(self.poll_flush(cx, sink, hooks))?;
            if self.source_finished {
                if self.source_broke {
                    return Poll::Ready(Err(Broken::Source));
                }
                socket::finish_sending(sink).map_err(|_| Broken::Sink)?;
                self.finished = true;
                break;
            }
            if budget == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            ready!(source.poll_read_ready(cx)).map_err(|_| Broken::Source)?;
            let count = match receive(source, buffer) {
                Ok(count) => count,
                Err(error) if is_transient(&error) => continue,
                Err(_) => return Poll::Ready(Err(Broken::Source)),
            };
            let Some(bytes) = buffer.get(..count).filter(|bytes| !bytes.is_empty()) else {
                self.source_finished = true;
                continue;
            };
            budget = budget.saturating_sub(count);
            hooks.received(bytes);
            let sent = match sink.try_write(bytes) {
                Ok(sent) => sent,
                Err(error) if is_transient(&error) => 0,
                Err(_) => return Poll::Ready(Err(Broken::Sink)),
            };
            let (gone, kept) = bytes.split_at(sent);
            hooks.sent(gone);
            self.rest.extend_from_slice(kept);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_flush(
        &mut self,
        cx: &mut Context<'_>,
        sink: &TcpStream,
        hooks: &mut dyn Hooks,
    ) -> Poll<Result<(), Broken>> {
        while let Some(bytes) = self.rest.get(self.rest_from..).filter(|bytes| !bytes.is_empty()) {
            ready!(sink.poll_write_ready(cx)).map_err(|_| Broken::Sink)?;
            match sink.try_write(bytes) {
                Ok(sent) => {
                    hooks.sent(bytes.get(..sent).unwrap_or_default());
                    self.rest_from += sent;
                }
                Err(error) if is_transient(&error) => {}
                Err(_) => return Poll::Ready(Err(Broken::Sink)),
            }
        }
        if !self.rest.is_empty() {
            // Freed, not kept: idle sessions own no buffer.
            self.rest = Vec::new();
            self.rest_from = 0;
        }
        Poll::Ready(Ok(()))
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Receives once. A short read means that the socket is drained: reporting it as "would block" spares the second receive
/// that the runtime would otherwise need to find that out. The end of the stream is remembered by the runtime and not lost.
fn receive(stream: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    let mut short = None;
    let result = stream.try_io(Interest::READABLE, || {
        let room = buffer.len();
        let (_, count) = rustix::net::recv(stream, &mut *buffer, rustix::net::RecvFlags::empty())?;
        if (1..room).contains(&count) {
            short = Some(count);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(count)
    });
    short.map_or(result, Ok)
}

/// What a direction tells of its bytes.
trait Hooks {
    fn received(&mut self, bytes: &[u8]);
    fn sent(&mut self, bytes: &[u8]);
}

struct FromClient<'a, 'b>(&'a mut Talk, Option<&'b Counters<'b>>);

impl Hooks for FromClient<'_, '_> {
    fn received(&mut self, _: &[u8]) {
        self.0.client_sent();
    }

    fn sent(&mut self, bytes: &[u8]) {
        if let Some(counters) = self.1 {
            counters.to_server.add(bytes.len() as u64);
        }
    }
}

struct FromServer<'a, 'b>(&'a mut Talk, Option<&'b Counters<'b>>);

impl Hooks for FromServer<'_, '_> {
    fn received(&mut self, bytes: &[u8]) {
        self.0.server_sent(bytes);
    }

    fn sent(&mut self, bytes: &[u8]) {
        self.0.client_got(bytes);
        if let Some(counters) = self.1 {
            counters.to_client.add(bytes.len() as u64);
        }
    }
}

impl<'a> Relay<'a> {
    /// Between two sockets of which the server's has the startup message. Of what it answered, `early` has been received.
    pub(crate) fn new(
        client: TcpStream,
        server: TcpStream,
        early: Vec<u8>,
        registration: Registration,
        ended: oneshot::Receiver<Word>,
        counters: Option<Counters<'a>>,
    ) -> Self {
        let mut relay = Self {
            client,
            server,
            to_server: Direction::default(),
            to_client: Direction::default(),
            talk: Talk {
                tail: Tail::default(),
                outstanding: false,
                startup: Some(Box::default()),
                registration,
            },
            ended: Some(ended),
            leaving: None,
            counters,
            client_follows: None,
        };
        relay.talk.server_sent(&early);
        relay.to_client.rest = early;
        relay
    }

    /// Relays until either side or somebody outside ends it.
    pub(crate) async fn run(&mut self) -> Outcome {
        poll_fn(|cx| self.poll(cx)).await
    }

    /// Whether a message of ours would reach the client between two messages of the server, with no request unanswered.
    pub(crate) fn can_speak(&self) -> bool {
        if !self.to_client.rest.is_empty() {
            return false;
        }
        match &self.talk.startup {
            Some(startup) => startup.at_boundary(),
            None => self.talk.tail.is_ready_for_query() && !self.talk.outstanding,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Outcome> {
        // First, so that a session that has been ended moves nothing more.
        while let Some(ended) = &mut self.ended
            && let Poll::Ready(word) = Pin::new(ended).poll(cx)
        {
            self.ended = None;
            match word {
                Ok(Word::End(ending)) => return Poll::Ready(Outcome::Ended(ending)),
                Ok(Word::Leave(ending, more)) => {
                    self.ended = Some(more);
                    self.leaving = Some(Box::new(Leaving::new(ending)));
                }
                Err(_) => {}
            }
        }
        let moved = BUFFER.with_borrow_mut(|buffer| self.poll_bytes(cx, buffer));
        let is_idle = self.leaving.is_some() && self.is_idle();
        match &mut self.leaving {
            Some(leaving) if moved.is_pending() => leaving.poll(cx, is_idle).map(Outcome::Ended),
            _ => moved,
        }
    }

    /// Whether it looks as if the session were between two transactions.
    fn is_idle(&self) -> bool {
        let nothing_on_its_way = self.to_client.rest.is_empty() && self.to_server.rest.is_empty();
        nothing_on_its_way && self.talk.startup.is_none() && !self.talk.outstanding && self.talk.tail.is_idle()
    }

    fn poll_bytes(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<Outcome> {
        let counters = self.counters.as_ref();
        let mut sent = Poll::Ready(Ok(()));
        if !self.to_client.source_broke {
            let mut hooks = FromClient(&mut self.talk, counters);
            sent = self.to_server.poll(cx, &self.client, &self.server, buffer, &mut hooks);
        }
        // What the server said before it broke still goes out. The failed send has used up the socket's error, so that the
        // next receive shows a plain end, which must not be passed on as one. A server that had closed before is no news.
        if sent == Poll::Ready(Err(Broken::Sink)) && !self.to_client.source_finished {
            self.to_client.source_broke = true;
        }
        let mut hooks = FromServer(&mut self.talk, counters);
        let answered = self.to_client.poll(cx, &self.server, &self.client, buffer, &mut hooks);
        match answered {
            Poll::Ready(Err(Broken::Source)) => Poll::Ready(Outcome::ServerBroke),
            Poll::Ready(Err(Broken::Sink)) => Poll::Ready(Outcome::ClientBroke),
            Poll::Ready(Ok(())) if sent.is_pending() => self.poll_client_follows(cx),
            Poll::Ready(Ok(())) => Poll::Ready(Outcome::Finished),
            Poll::Pending if sent == Poll::Ready(Err(Broken::Source)) => Poll::Ready(Outcome::ClientBroke),
            Poll::Pending => Poll::Pending,
        }
    }

    /// The server has closed and the client knows: it has a while to close too.
    fn poll_client_follows(&mut self, cx: &mut Context<'_>) -> Poll<Outcome> {
        let timer = self
            .client_follows
            .get_or_insert_with(|| Box::pin(sleep(CLIENT_FOLLOWS_MAX)));
        timer.as_mut().poll(cx).map(|()| Outcome::ClientStayed)
    }
}

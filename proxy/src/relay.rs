//! The hot path: bytes between a client and its server, both ways, in one future.
//!
//! A worker's sessions share one buffer. What was received is sent at once; only what the other side does not take is kept,
//! at most one buffer per direction, and then nothing more is read from that side. Nothing is parsed once the server's
//! startup answer has passed.

mod direction;
mod pipe;

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Sleep, sleep};

use self::direction::{Broken, Direction, Hooks};
pub(crate) use self::pipe::PIPE_FILES_MAX;
use crate::client::SessionLine;
use crate::counters::Moved;
use crate::leaving::Leaving;
use crate::sessions::{Ending, Registration, Told, Word};
use crate::stream::socket::Socket;
use crate::stream::{BUFFER_BYTES, Stream};
use crate::wire::backend::{StartupWatch, Tail};

/// PostgreSQL never sends after it has closed, so a client that does not follow only holds a place.
const CLIENT_FOLLOWS_MAX: Duration = Duration::from_secs(30);

/// From so many bytes on, for one question, a client gets much. What is less never waits for a beat.
const FLOOD: u32 = 1024 * 1024;

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
pub(crate) struct Relay {
    pub(crate) client: Stream,
    pub(crate) server: Stream,
    to_server: Direction,
    to_client: Direction,
    talk: Talk,
    ended: Option<Told>,
    /// Between two transactions it is to end; in a box, since hardly any session is asked to.
    leaving: Option<Box<Leaving>>,
    client_follows: Option<Pin<Box<Sleep>>>,
}

/// What is known of the conversation.
struct Talk {
    tail: Tail,
    /// The client has sent something since the last byte was sent to it.
    outstanding: bool,
    /// How often the client has asked, while that matters.
    asked: u8,
    /// How many bytes it has got since, as far as they can be counted.
    flowed: u32,
    /// Until the server's startup answer has passed.
    startup: Option<Box<StartupWatch>>,
    /// What the client is sent is PostgreSQL's protocol, and not TLS that is the server's.
    in_clear: bool,
    registration: Registration,
}

impl Talk {
    fn client_sent(&mut self) {
        self.outstanding = true;
        self.asked = self.asked.saturating_add(1);
        self.flowed = 0;
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
        self.got(bytes.len());
    }

    fn got(&mut self, count: usize) {
        self.outstanding = false;
        self.flowed = self.flowed.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
    }
}

/// With the conversation and its counters, whether the other direction has ended.
struct FromClient<'a>(&'a mut Talk, Option<&'a Moved>, bool);

impl Hooks for FromClient<'_> {
    fn may_splice(&self) -> bool {
        true
    }

    fn received(&mut self, _: &[u8]) {
        self.0.client_sent();
    }

    fn sent(&mut self, bytes: &[u8]) {
        if let Some(moved) = self.1 {
            moved.to_server.add(bytes.len() as u64);
        }
    }

    fn spliced(&mut self, count: usize) {
        self.0.client_sent();
        if let Some(moved) = self.1 {
            moved.to_server.add(count as u64);
        }
    }

    fn last_seen(&self) -> usize {
        0
    }

    fn is_last(&self) -> bool {
        self.2
    }
}

/// The same.
struct FromServer<'a>(&'a mut Talk, Option<&'a Moved>, bool);

impl Hooks for FromServer<'_> {
    fn may_splice(&self) -> bool {
        self.0.startup.is_none()
    }

    fn received(&mut self, bytes: &[u8]) {
        self.0.server_sent(bytes);
    }

    fn sent(&mut self, bytes: &[u8]) {
        self.0.client_got(bytes);
        if let Some(moved) = self.1 {
            moved.to_client.add(bytes.len() as u64);
        }
    }

    fn spliced(&mut self, count: usize) {
        self.0.tail = Tail::default();
        self.0.got(count);
        if let Some(moved) = self.1 {
            moved.to_client.add(count as u64);
        }
    }

    /// Whether the client may be spoken to shows in them.
    fn last_seen(&self) -> usize {
        if self.0.in_clear { Tail::BYTES } else { 0 }
    }

    fn is_last(&self) -> bool {
        self.2
    }
}

impl Relay {
    /// Between two streams of which the server's has the startup message, or, when it is not `in_clear`, the beginning of TLS
    /// between the two. Of what it answered, `early` has been received, and of what the client sent behind that, `more`.
    pub(crate) fn new(
        client: Stream,
        server: Stream,
        (early, more): (Vec<u8>, Vec<u8>),
        registration: Registration,
        ended: Told,
        in_clear: bool,
    ) -> Self {
        let mut relay = Self {
            client,
            server,
            to_server: Direction::default(),
            to_client: Direction::default(),
            talk: Talk {
                tail: Tail::default(),
                outstanding: !more.is_empty(),
                asked: 0,
                flowed: 0,
                startup: in_clear.then(Box::default),
                in_clear,
                registration,
            },
            ended: Some(ended),
            leaving: None,
            client_follows: None,
        };
        relay.talk.server_sent(&early);
        relay.to_client = Direction::with(early);
        relay.to_server = Direction::with(more);
        relay
    }

    /// The same with other sockets, made of its own. When that fails both connections are lost.
    pub(crate) fn with(self, mut change: impl FnMut(Socket) -> io::Result<Socket>) -> io::Result<Self> {
        Ok(Self {
            client: self.client.with(&mut change)?,
            server: self.server.with(&mut change)?,
            ..self
        })
    }

    /// What the log says of this session.
    pub(crate) fn line(&self) -> Option<Arc<SessionLine>> {
        self.talk.registration.line()
    }

    /// Relays until either side or somebody outside ends it. Bytes are counted in `moved`.
    pub(crate) async fn run(&mut self, moved: Option<&Moved>) -> Outcome {
        poll_fn(|cx| self.poll(cx, moved)).await
    }

    /// Whether a message of ours would reach the client between two messages of the server, with no request unanswered.
    pub(crate) fn can_speak(&self) -> bool {
        if !self.talk.in_clear || !self.to_client.is_drained() {
            return false;
        }
        match &self.talk.startup {
            Some(startup) => startup.at_boundary(),
            None => self.talk.tail.is_ready_for_query() && !self.talk.outstanding,
        }
    }

    /// The same, until the client has asked so often, or gets so much, that a carrier does better: then it gives nothing.
    pub(crate) async fn run_until_settled(&mut self, moved: Option<&Moved>, asked: Option<u8>) -> Option<Outcome> {
        poll_fn(|cx| match self.poll(cx, moved) {
            Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
            Poll::Pending if asked.is_some_and(|asked| self.lasts(asked)) && self.is_at_rest() => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        })
        .await
    }

    fn lasts(&self, asked: u8) -> bool {
        self.talk.asked >= asked || self.floods()
    }

    /// Whether the client gets much for one question, in pieces too small for a pipe.
    pub(crate) fn floods(&self) -> bool {
        self.talk.flowed >= FLOOD && self.server.plain().is_some() && !self.to_client.splices()
    }

    /// What the client has got since it asked, or since [`Self::ebbs`].
    pub(crate) const fn flowed(&self) -> u32 {
        self.talk.flowed
    }

    /// It floods no more.
    pub(crate) const fn ebbs(&mut self) {
        self.talk.flowed = 0;
    }

    /// Whether nothing of it is tied to this thread.
    fn is_at_rest(&self) -> bool {
        let streams_rest = self.to_server.is_at_rest() && self.to_client.is_at_rest();
        streams_rest && self.talk.startup.is_none() && self.leaving.is_none() && self.client_follows.is_none()
    }

    /// Relays what can be relayed. To be called whenever either socket is ready for more, or who is behind `cx` was woken.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, moved: Option<&Moved>) -> Poll<Outcome> {
        // First, so that a session that has been ended moves nothing more.
        while let Some(ended) = &mut self.ended
            && let Poll::Ready(word) = Pin::new(ended).poll(cx)
        {
            self.ended = None;
            match word.map(|word| *word) {
                Ok(Word::End(ending)) => return Poll::Ready(Outcome::Ended(ending)),
                Ok(Word::Leave(ending, more)) => {
                    self.ended = Some(more);
                    self.leaving = Some(Box::new(Leaving::new(ending)));
                }
                Err(_) => {}
            }
        }
        self.poll_moving(cx, moved)
    }

    /// The same for who knows that nobody outside has said anything.
    pub(crate) fn poll_moving(&mut self, cx: &mut Context<'_>, moved: Option<&Moved>) -> Poll<Outcome> {
        let moved = BUFFER.with_borrow_mut(|buffer| self.poll_bytes(cx, buffer, moved));
        let is_idle = self.leaving.is_some() && self.is_idle();
        match &mut self.leaving {
            Some(leaving) if moved.is_pending() => leaving.poll(cx, is_idle).map(Outcome::Ended),
            _ => moved,
        }
    }

    /// Whether it looks as if the session were between two transactions.
    fn is_idle(&self) -> bool {
        let nothing_on_its_way = self.talk.in_clear && self.to_client.is_drained() && self.to_server.is_drained();
        nothing_on_its_way && self.talk.startup.is_none() && !self.talk.outstanding && self.talk.tail.is_idle()
    }

    fn poll_bytes(&mut self, cx: &mut Context<'_>, buffer: &mut [u8], moved: Option<&Moved>) -> Poll<Outcome> {
        let mut sent = Poll::Ready(Ok(()));
        if !self.to_client.source_broke {
            let mut hooks = FromClient(&mut self.talk, moved, self.to_client.finished);
            sent = self
                .to_server
                .poll(cx, &mut self.client, &mut self.server, buffer, &mut hooks);
        }
        // What the server said before it broke still goes out. The failed send has used up the socket's error, so that the
        // next receive shows a plain end, which must not be passed on as one. A server that had closed before is no news.
        if sent == Poll::Ready(Err(Broken::Sink)) && !self.to_client.source_finished {
            self.to_client.source_broke = true;
        }
        let mut hooks = FromServer(&mut self.talk, moved, self.to_server.finished);
        let answered = self
            .to_client
            .poll(cx, &mut self.server, &mut self.client, buffer, &mut hooks);
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

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
}

#[derive(Debug, Default)]
pub(super) struct Direction {
    /// The source has said that nothing more comes.
    pub(super) source_finished: bool,
    /// The source's connection broke, although what it sent before is still being received.
    pub(super) source_broke: bool,
    /// And the sink has been told.
    finished: bool,
    /// What the sink has not taken.
    rest: Vec<u8>,
    rest_from: usize,
    /// Large receives in a row, or small moves while there is a pipe.
    run: u8,
    pipe: Option<Box<Pipe>>,
}

impl Direction {
    /// Begins with bytes that were received already.
    pub(super) fn with(rest: Vec<u8>) -> Self {
        Self {
            rest,
            ..Self::default()
        }
    }

    /// Whether everything that was received has been sent.
    pub(super) fn is_drained(&self) -> bool {
        self.rest.is_empty() && self.pipe.as_ref().is_none_or(|pipe| pipe.holds == 0)
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
                ready!(sink.poll_finish(cx)).map_err(|_| Broken::Sink)?;
                self.finished = true;
                break;
            }
            if budget == 0 {
                // Woken after the others, and after whoever has become ready meanwhile.
                let _ = pin!(tokio::task::yield_now()).poll(cx);
                return Poll::Pending;
            }
            match (&self.pipe, source.plain(), sink.plain()) {
                (Some(_), Some(source), Some(sink)) => {
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
                Err(error) if is_transient(&error) => continue,
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
            if takes_pipe || !self.rest.is_empty() {
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
        if !kept.is_empty() {
            self.rest.extend_from_slice(kept);
        }
        Ok(())
    }

    fn take_pipe(&mut self, source: &Stream, sink: &Stream, hooks: &impl Hooks) -> bool {
        self.run = 0;
        if source.plain().is_some() && sink.plain().is_some() && hooks.may_splice() {
            self.pipe = Pipe::take().map(Box::new);
        }
        self.pipe.is_some()
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
            let Some(pipe) = &mut self.pipe else { break };
            while pipe.holds > 0 {
                ready!(sink.poll_writable(cx)).map_err(|_| Broken::Sink)?;
                match sink.try_io(Interest::WRITABLE, || pipe.drain(sink)) {
                    Ok(moved) => hooks.spliced(moved),
                    Err(error) if is_transient(&error) => {}
                    Err(_) => return Poll::Ready(Err(Broken::Sink)),
                }
            }
            ready!(source.poll_readable(cx)).map_err(|_| Broken::Source)?;
            let moved = match source.try_io(Interest::READABLE, || pipe.fill(source)) {
                Ok(0) => {
                    (self.source_finished, self.pipe) = (true, None);
                    break;
                }
                Ok(moved) => moved,
                Err(error) if is_transient(&error) => continue,
                Err(_) => return Poll::Ready(Err(Broken::Source)),
            };
            *budget = budget.saturating_sub(moved);
            if moved >= LARGE {
                self.run = 0;
                continue;
            }
            // What ends a bulk of bytes is short, and the last of them are worth seeing: so it comes back into memory.
            self.run += 1;
            let bytes = match pipe.read(buffer) {
                Ok(count) => buffer.get(..count).unwrap_or_default(),
                Err(_) => return Poll::Ready(Err(Broken::Source)),
            };
            if self.run >= SMALL_BEFORE_COPY && pipe.holds == 0 {
                (self.pipe, self.run) = (None, 0);
            }
            hooks.received(bytes);
            let sent = sink.send(bytes);
            self.note_sent(bytes, sent, hooks)?;
            if !self.rest.is_empty() {
                break;
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_rest(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut Stream,
        hooks: &mut impl Hooks,
    ) -> Poll<Result<(), Broken>> {
        while let Some(bytes) = self.rest.get(self.rest_from..).filter(|bytes| !bytes.is_empty()) {
            ready!(sink.poll_sendable(cx)).map_err(|_| Broken::Sink)?;
            match sink.send(bytes) {
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
        // What TLS has encrypted and the socket has not taken. That it is still on its way keeps nothing else from coming.
        match sink.poll_flush(cx) {
            Poll::Ready(Err(_)) => Poll::Ready(Err(Broken::Sink)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use rustls::pki_types::{PrivateKeyDer, ServerName};
    use rustls::{ClientConfig, RootCertStore, ServerConfig};
    use socket2::SockRef;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpSocket, TcpStream};
    use tokio::task::{JoinSet, yield_now};
    use tokio::time::timeout;
    use tokio_rustls::TlsConnector;

    use super::*;
    use crate::stream::BUFFER_BYTES;
    use crate::stream::tls::TlsStream;

    const PATIENCE: Duration = Duration::from_secs(30);
    const MEGABYTE: usize = 1 << 20;

    /// Counts, and keeps what it was shown.
    struct Count {
        may_splice: bool,
        received: usize,
        sent: usize,
        spliced: usize,
        last: Vec<u8>,
    }

    impl Hooks for Count {
        fn may_splice(&self) -> bool {
            self.may_splice
        }

        fn received(&mut self, bytes: &[u8]) {
            self.received += bytes.len();
        }

        fn sent(&mut self, bytes: &[u8]) {
            self.sent += bytes.len();
            self.last = bytes.to_vec();
        }

        fn spliced(&mut self, count: usize) {
            self.spliced += count;
        }
    }

    struct Rig {
        direction: Direction,
        source: Stream,
        sink: Stream,
        buffer: Vec<u8>,
        hooks: Count,
        polls: usize,
    }

    /// Both ends of a connection; the second takes little at a time where it is `narrow`.
    async fn pair(narrow: bool) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let socket = TcpSocket::new_v4().expect("a socket");
        if narrow {
            socket.set_recv_buffer_size(64 * 1024).expect("set");
        }
        let far = socket.connect(listener.local_addr().expect("bound"));
        let (near, far) = tokio::join!(listener.accept(), far);
        (near.expect("accepted").0, far.expect("connected"))
    }

    /// A direction, who sends into it and who receives from it.
    async fn rig(may_splice: bool, narrow: bool) -> (Rig, TcpStream, TcpStream) {
        let (source, sender) = pair(false).await;
        let (sink, receiver) = pair(narrow).await;
        let rig = Rig {
            direction: Direction::default(),
            source: Stream::Plain(Socket::Tcp(source)),
            sink: Stream::Plain(Socket::Tcp(sink)),
            buffer: vec![0; BUFFER_BYTES],
            hooks: Count {
                may_splice,
                received: 0,
                sent: 0,
                spliced: 0,
                last: Vec::new(),
            },
            polls: 0,
        };
        (rig, sender, receiver)
    }

    /// A sink that speaks TLS over a socket that takes little at a time, and its far end.
    async fn tls_sink() -> (Stream, tokio_rustls::client::TlsStream<TcpStream>) {
        let (near, far) = pair(true).await;
        SockRef::from(&near).set_send_buffer_size(4096).expect("set");
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("signed");
        let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider));
        let builder = builder.with_safe_default_protocol_versions().expect("versions");
        let shown = builder
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key);
        let mut roots = RootCertStore::empty();
        roots.add(made.cert.der().clone()).expect("a certificate");
        let builder = ClientConfig::builder_with_provider(provider);
        let builder = builder.with_safe_default_protocol_versions().expect("versions");
        let connecting = Arc::new(builder.with_root_certificates(roots).with_no_client_auth());
        let name = ServerName::try_from("localhost").expect("a name");
        let (near, far) = tokio::join!(
            TlsStream::accept(Socket::Tcp(near), Arc::new(shown.expect("a pair")), &[]),
            TlsConnector::from(connecting).connect(name, far),
        );
        (Stream::Tls(Box::new(near.expect("TLS"))), far.expect("TLS"))
    }

    impl Rig {
        async fn run(&mut self) -> Result<(), Broken> {
            let ended = poll_fn(|cx| {
                self.polls += 1;
                let (source, sink) = (&mut self.source, &mut self.sink);
                self.direction.poll(cx, source, sink, &mut self.buffer, &mut self.hooks)
            });
            timeout(PATIENCE, ended).await.expect("it ends")
        }

        /// Runs while `others` do something.
        async fn during<T>(&mut self, others: impl Future<Output = T>) -> T {
            tokio::select! {
                ended = self.run() => panic!("it has ended: {ended:?}"),
                done = timeout(PATIENCE, others) => done.expect("in time"),
            }
        }
    }

    fn bytes(count: usize, seed: usize) -> Vec<u8> {
        let byte = |at: usize| u8::try_from((at * 31 + at / 251 + seed) % 256).expect("below 256");
        (0..count).map(byte).collect()
    }

    async fn pass(sender: &mut TcpStream, receiver: &mut TcpStream, bytes: &[u8]) {
        let mut got = vec![0; bytes.len()];
        let (sent, received) = tokio::join!(sender.write_all(bytes), receiver.read_exact(&mut got));
        sent.expect("sent");
        received.expect("received");
        assert!(got == bytes, "other bytes, or in another order");
    }

    /// Sends until nothing is taken any more, and answers with what was.
    async fn stuff(sender: &TcpStream) -> Vec<u8> {
        let all = bytes(64 * MEGABYTE, 5);
        let mut taken = 0;
        while timeout(Duration::from_millis(300), sender.writable()).await.is_ok() {
            if let Ok(count) = sender.try_write(&all[taken..taken + 256 * 1024]) {
                taken += count;
            }
        }
        all[..taken].to_vec()
    }

    #[tokio::test]
    async fn what_is_large_takes_the_pipe_and_what_is_small_leaves_it_in_order() {
        let (mut rig, mut sender, mut receiver) = rig(true, false).await;
        for round in 1..=3 {
            let before = rig.hooks.spliced;
            let large = bytes(8 * MEGABYTE, round);
            rig.during(pass(&mut sender, &mut receiver, &large)).await;
            assert!(
                rig.hooks.spliced - before > MEGABYTE,
                "round {round}: {}",
                rig.hooks.spliced - before
            );
            for index in 0..2 * usize::from(SMALL_BEFORE_COPY) {
                let small = bytes(10, index);
                rig.during(pass(&mut sender, &mut receiver, &small)).await;
                assert_eq!(rig.hooks.last, small, "small ones are seen, also while there is a pipe");
            }
            assert!(rig.direction.pipe.is_none() && rig.direction.is_drained());
        }
        let all = 3 * (8 * MEGABYTE + 20 * usize::from(SMALL_BEFORE_COPY));
        assert_eq!(rig.hooks.sent + rig.hooks.spliced, all);
        assert_eq!(rig.hooks.received, rig.hooks.sent);
        drop(sender);
        assert_eq!(rig.run().await, Ok(()));
        assert_eq!(receiver.read(&mut [0]).await.expect("an orderly end"), 0);
    }

    #[tokio::test]
    async fn what_tls_has_encrypted_goes_out_although_nothing_more_comes() {
        let (mut rig, mut sender, _) = rig(true, false).await;
        let (sink, mut receiver) = tls_sink().await;
        rig.sink = sink;
        for round in 0..20 {
            // In one receive, of which the socket takes a part.
            let some = bytes(60_000, round);
            sender.write_all(&some).await.expect("sent");
            let mut got = vec![0; some.len()];
            let received = rig.during(receiver.read_exact(&mut got)).await;
            received.expect("received");
            assert!(got == some, "other bytes");
        }
        assert_eq!(rig.hooks.spliced, 0);
        drop(sender);
        let mut rest = Vec::new();
        let (ended, read) = tokio::join!(rig.run(), receiver.read_to_end(&mut rest));
        assert_eq!((ended, read.expect("an orderly end")), (Ok(()), 0));
    }

    #[tokio::test]
    async fn nothing_passes_unseen_where_it_may_not() {
        let (mut rig, mut sender, mut receiver) = rig(false, false).await;
        let large = bytes(8 * MEGABYTE, 1);
        rig.during(pass(&mut sender, &mut receiver, &large)).await;
        assert_eq!((rig.hooks.sent, rig.hooks.spliced), (8 * MEGABYTE, 0));
        assert!(rig.direction.pipe.is_none());
    }

    #[tokio::test]
    async fn the_end_of_the_stream_waits_for_what_the_pipe_holds() {
        let (mut rig, sender, mut receiver) = rig(true, true).await;
        let sent = rig.during(stuff(&sender)).await;
        assert!(!rig.direction.is_drained() && rig.direction.pipe.is_some());
        drop(sender);
        let mut got = Vec::new();
        let (ended, read) = tokio::join!(rig.run(), receiver.read_to_end(&mut got));
        assert_eq!(ended, Ok(()));
        read.expect("an orderly end");
        assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
        assert!(rig.direction.is_drained() && rig.direction.pipe.is_none());
    }

    #[tokio::test]
    async fn a_sink_that_breaks_is_told_although_the_pipe_holds_something() {
        let (mut rig, sender, receiver) = rig(true, true).await;
        rig.during(stuff(&sender)).await;
        assert!(rig.direction.pipe.as_ref().is_some_and(|pipe| pipe.holds > 0));
        receiver.set_zero_linger().expect("set");
        drop(receiver);
        assert_eq!(rig.run().await, Err(Broken::Sink));
    }

    #[tokio::test]
    async fn a_source_that_breaks_is_told() {
        let (mut rig, mut sender, mut receiver) = rig(true, false).await;
        rig.during(pass(&mut sender, &mut receiver, &bytes(8 * MEGABYTE, 1)))
            .await;
        sender.set_zero_linger().expect("set");
        drop(sender);
        assert_eq!(rig.run().await, Err(Broken::Source));
    }

    #[tokio::test]
    async fn a_direction_that_moves_much_lets_others_have_their_turn() {
        for (may_splice, cost) in [(false, COPY_COSTS), (true, 1)] {
            let (mut rig, sender, receiver) = rig(may_splice, false).await;
            // Both far ends are always ready: they have threads of their own.
            let (sender, receiver) = (sender.into_std().expect("one"), receiver.into_std().expect("one"));
            let moved = 64 * MEGABYTE;
            let mut threads = JoinSet::new();
            threads.spawn_blocking(move || {
                sender.set_nonblocking(false).expect("set");
                std::io::Write::write_all(&mut &sender, &vec![1; moved]).expect("sent");
            });
            threads.spawn_blocking(move || {
                receiver.set_nonblocking(false).expect("set");
                let all = std::io::copy(&mut &receiver, &mut std::io::sink()).expect("received");
                assert_eq!(all, 64 << 20);
            });
            let turns = Arc::new(AtomicUsize::new(0));
            let mut others = JoinSet::new();
            let counted = Arc::clone(&turns);
            others.spawn(async move {
                loop {
                    counted.fetch_add(1, Ordering::Relaxed);
                    yield_now().await;
                }
            });
            assert_eq!(rig.run().await, Ok(()));
            let turns = turns.load(Ordering::Relaxed);
            // A turn of its own moves no more than the budget and one receive.
            let fewest = moved / ((BYTES_PER_POLL + 256 * 1024 * cost) / cost);
            assert!(rig.polls >= fewest, "{} polls for 64 MB", rig.polls);
            assert!(turns >= fewest, "{turns} turns for another while 64 MB passed");
            drop(rig);
            while let Some(ended) = threads.join_next().await {
                ended.expect("no panic");
            }
        }
    }
}

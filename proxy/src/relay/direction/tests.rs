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
    last_seen: usize,
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

    fn last_seen(&self) -> usize {
        self.last_seen
    }

    fn is_last(&self) -> bool {
        false
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
            last_seen: 6,
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
        assert!(!rig.direction.splices && rig.direction.is_drained());
    }
    let all = 3 * (8 * MEGABYTE + 20 * usize::from(SMALL_BEFORE_COPY));
    assert_eq!(rig.hooks.sent + rig.hooks.spliced, all);
    assert_eq!(rig.hooks.received, rig.hooks.sent);
    drop(sender);
    assert_eq!(rig.run().await, Ok(()));
    assert_eq!(receiver.read(&mut [0]).await.expect("an orderly end"), 0);
}

#[tokio::test]
async fn the_last_bytes_are_seen_and_the_pipe_is_given_back_once_nothing_follows() {
    let (mut rig, mut sender, mut receiver) = rig(true, false).await;
    for _ in 0..100 {
        if !rig.direction.splices {
            rig.during(pass(&mut sender, &mut receiver, &bytes(8 * MEGABYTE, 1)))
                .await;
        }
    }
    for (round, last_seen) in [6, 6, 0, 6, 6].into_iter().enumerate() {
        rig.hooks.last_seen = last_seen;
        let before = rig.hooks.spliced;
        // Moved at once, most likely: it lies in the socket before the direction looks.
        let large = bytes(50_000 + round, round);
        sender.write_all(&large).await.expect("sent");
        let mut got = vec![0; large.len()];
        rig.during(receiver.read_exact(&mut got)).await.expect("received");
        assert!(got == large, "other bytes, or in another order");
        if last_seen > 0 {
            let last = &rig.hooks.last;
            assert!(large.ends_with(last) && last.len() >= last_seen, "{last:?}");
            assert!(!rig.direction.pipe.is_there());
        }
        assert!(rig.direction.splices && rig.direction.is_drained() && rig.hooks.spliced > before);
    }
    assert_eq!(rig.hooks.received, rig.hooks.sent);
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
    assert!(!rig.direction.splices);
}

#[tokio::test]
async fn the_end_of_the_stream_waits_for_what_the_pipe_holds() {
    let (mut rig, sender, mut receiver) = rig(true, true).await;
    let sent = rig.during(stuff(&sender)).await;
    assert!(!rig.direction.is_drained() && rig.direction.splices);
    drop(sender);
    let mut got = Vec::new();
    let (ended, read) = tokio::join!(rig.run(), receiver.read_to_end(&mut got));
    assert_eq!(ended, Ok(()));
    read.expect("an orderly end");
    assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
    assert!(rig.direction.is_drained() && !rig.direction.splices);
}

#[tokio::test]
async fn a_sink_that_breaks_is_told_although_the_pipe_holds_something() {
    let (mut rig, sender, receiver) = rig(true, true).await;
    rig.during(stuff(&sender)).await;
    assert!(rig.direction.pipe.holds() > 0);
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

use std::hash::{DefaultHasher, Hasher};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::fake::*;
use crate::scene::Led;

anywhere!(
    large_transfers_both_ways_at_once_keep_every_byte,
    a_half_closed_session_goes_on_the_other_way,
    a_stalled_reader_stops_the_sender_instead_of_filling_memory,
    a_reset_by_the_server_is_a_reset_for_the_client,
    a_reset_by_the_client_is_a_reset_for_the_server,
    a_server_that_breaks_under_a_send_does_not_end_the_stream_in_order,
    single_bytes_pass_as_they_come,
    much_in_small_pieces_comes_whole_and_what_follows_is_heard,
    bulk_both_ways_keeps_every_byte_and_the_session_is_told_in_words_afterwards,
);

/// Bytes that never repeat at a buffer's length.
fn chunk(index: u64) -> Vec<u8> {
    (0..9973_u64)
        .map(|at| u8::try_from((at * 31 + index * 7 + at / 256) % 256).expect("below 256"))
        .collect()
}

pub(crate) async fn send_all(stream: &mut (impl AsyncWriteExt + Unpin), chunks: u64) -> u64 {
    let mut hash = DefaultHasher::new();
    for index in 0..chunks {
        let bytes = chunk(index);
        hash.write(&bytes);
        stream.write_all(&bytes).await.expect("sent");
    }
    stream.shutdown().await.expect("finished");
    hash.finish()
}

pub(crate) async fn receive_all(stream: &mut (impl AsyncReadExt + Unpin)) -> (u64, usize) {
    let mut hash = DefaultHasher::new();
    let mut buffer = vec![0; 9973];
    let mut total = 0;
    // Hashed in the sender's units, since a hasher may tell writes apart.
    let mut filled = 0;
    loop {
        let count = stream.read(&mut buffer[filled..]).await.expect("received");
        total += count;
        filled += count;
        if filled == buffer.len() {
            hash.write(&buffer);
            filled = 0;
        }
        if count == 0 {
            return (hash.finish(), total);
        }
    }
}

/// Sends until nothing has been taken for a while: then every buffer on the way is full. How much that was.
pub(crate) async fn taken_at_most(stream: &TcpStream) -> usize {
    let mut taken = 0_usize;
    let piece = vec![b'x'; 64 * 1024];
    while let Ok(ready) = tokio::time::timeout(Duration::from_millis(500), stream.writable()).await {
        ready.expect("open");
        match stream.try_write(&piece) {
            Ok(count) => taken += count,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        assert!(
            taken < 64 << 20,
            "{taken} bytes were taken for a client that reads nothing"
        );
    }
    taken
}

/// A session whose sockets take little at a time.
async fn narrow_session(there: CarriedAfter) -> (Led, TcpStream, ServerSession) {
    let mut led = Led::behind(config_there(there, vec![write_listener()])).await;
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("set");
    socket.set_send_buffer_size(4096).expect("set");
    let mut client = socket
        .connect(led.proxy.addresses.listeners[0][0])
        .await
        .expect("the proxy listens");
    client.write_all(&startup()).await.expect("sent");
    let session = led.server.session().await;
    expect_hello(&mut client).await;
    (led, client, session)
}

async fn large_transfers_both_ways_at_once_keep_every_byte(there: CarriedAfter) {
    const CHUNKS: u64 = 3000; // 30 MB
    let (_led, client, session) = narrow_session(there).await;
    let (mut client_reads, mut client_writes) = client.into_split();
    let (mut server_reads, mut server_writes) = session.stream.into_split();
    let transfer = async {
        tokio::join!(
            send_all(&mut client_writes, CHUNKS),
            receive_all(&mut server_reads),
            send_all(&mut server_writes, CHUNKS),
            receive_all(&mut client_reads),
        )
    };
    let (sent_up, (got_up, up), sent_down, (got_down, down)) = within("the transfers end", transfer).await;
    let bytes = usize::try_from(CHUNKS).expect("small") * 9973;
    assert_eq!((up, down), (bytes, bytes));
    assert_eq!((sent_up, sent_down), (got_up, got_down));
}

/// As PostgreSQL sends what it has much of. Nobody asks often here, so that only how much comes makes a session one of those
/// that last.
async fn much_in_small_pieces_comes_whole_and_what_follows_is_heard(there: CarriedAfter) {
    const PIECE: usize = 8 * 1024;
    const PIECES: usize = 1500;
    let mut led = Led::behind(config_there(there.map(|_| u8::MAX), vec![write_listener()])).await;
    let (mut client, mut session) = led.session().await;
    for round in 0..3_u8 {
        exchange(&mut client, &mut session).await;
        let sending = async {
            for piece in 0..PIECES {
                let byte = u8::try_from(piece % 251).expect("small") ^ round;
                session.stream.write_all(&[byte; PIECE]).await.expect("sent");
            }
        };
        let receiving = async {
            let mut got = vec![0; PIECE];
            for piece in 0..PIECES {
                client.read_exact(&mut got).await.expect("received");
                let byte = u8::try_from(piece % 251).expect("small") ^ round;
                assert!(got.iter().all(|other| *other == byte), "piece {piece} of round {round}");
            }
        };
        within("all of it comes", async { tokio::join!(sending, receiving) }).await;
        // The last word of an answer, and the next question's.
        for _ in 0..3 {
            exchange(&mut client, &mut session).await;
        }
        session.stream.write_all(&ready()).await.expect("sent");
        assert_eq!(read_message(&mut client).await, Some((b'Z', b"I".to_vec())));
    }
}

async fn a_half_closed_session_goes_on_the_other_way(there: CarriedAfter) {
    let (_led, mut client, mut session) = narrow_session(there).await;
    client.write_all(b"last words").await.expect("sent");
    client.shutdown().await.expect("half closed");
    let mut got = Vec::new();
    within("the server sees the end", session.stream.read_to_end(&mut got))
        .await
        .expect("an orderly end");
    assert_eq!(got, b"last words");
    let sending = async { send_all(&mut session.stream, 100).await };
    let (sent, (received, total)) =
        within("the answer", async { tokio::join!(sending, receive_all(&mut client)) }).await;
    assert_eq!((sent, 997_300), (received, total));
}

async fn a_stalled_reader_stops_the_sender_instead_of_filling_memory(there: CarriedAfter) {
    let (_led, mut client, session) = narrow_session(there).await;
    let taken = taken_at_most(&session.stream).await;
    drop(session);
    let mut got = Vec::new();
    within("all of it arrives in the end", client.read_to_end(&mut got))
        .await
        .expect("an orderly end");
    assert_eq!(got.len(), taken);
}

async fn a_reset_by_the_server_is_a_reset_for_the_client(there: CarriedAfter) {
    let (_led, mut client, session) = narrow_session(there).await;
    session.stream.set_zero_linger().expect("set");
    drop(session);
    expect_reset(&mut client).await;
}

async fn a_reset_by_the_client_is_a_reset_for_the_server(there: CarriedAfter) {
    let (_led, client, mut session) = narrow_session(there).await;
    client.set_zero_linger().expect("set");
    drop(client);
    expect_reset(&mut session.stream).await;
}

async fn a_server_that_breaks_under_a_send_does_not_end_the_stream_in_order(there: CarriedAfter) {
    let (_led, mut client, session) = narrow_session(there).await;
    session.stream.set_zero_linger().expect("set");
    drop(session);
    // Whichever the proxy notices first, the failed send or the reset.
    if client.write_all(b"more").await.is_err() {
        return; // Reset already, and the socket tells it only once.
    }
    let mut rest = Vec::new();
    let end = within("it ends", client.read_to_end(&mut rest)).await;
    assert!(end.is_err(), "an orderly end after {} bytes", rest.len());
}

/// The names of this process's threads.
fn threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("it runs");
    let name = |task: std::io::Result<std::fs::DirEntry>| std::fs::read_to_string(task.ok()?.path().join("comm")).ok();
    tasks.filter_map(name).map(|name| name.trim().to_owned()).collect()
}

#[tokio::test]
async fn a_session_that_lasts_goes_to_a_carrier_in_its_midst_and_is_fenced_there() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let mut config = config_there(Some(3), vec![write_listener()]);
    config.workers = 1;
    let proxy = Running::start(config, &cluster);
    let mut client = proxy.client().await;
    let mut session = server.session().await;
    expect_hello(&mut client).await;
    let mut carried = Vec::new();
    for _ in 0..6 {
        exchange(&mut client, &mut session).await;
        carried.push(threads().contains(&"carrier-0".to_owned()));
    }
    // Of how many exchanges they were, the first were before, and the last behind it.
    assert_eq!(
        (carried.first(), carried.last()),
        (Some(&false), Some(&true)),
        "{carried:?}"
    );
    session.stream.write_all(&ready()).await.expect("sent");
    assert_eq!(read_message(&mut client).await, Some((b'Z', b"I".to_vec())));
    cluster.no_leader();
    assert_eq!(expect_fatal(&mut client).await.sqlstate, "57P01");
    expect_server_end(&mut session).await;
}

async fn single_bytes_pass_as_they_come(there: CarriedAfter) {
    let (_led, mut client, mut session) = narrow_session(there).await;
    for byte in 0..200_u8 {
        client.write_all(&[byte]).await.expect("sent");
        assert_eq!(
            within("a byte", session.stream.read_u8()).await.expect("received"),
            byte
        );
        session.stream.write_all(&[byte]).await.expect("sent");
        assert_eq!(within("a byte", client.read_u8()).await.expect("received"), byte);
    }
}

const BULK_CHUNK: usize = 65_521;
const BULK_CHUNKS: u64 = 1600; // 100 MB

/// Each chunk has its number in it, so that none can stand for another.
async fn send_bulk(stream: &mut (impl AsyncWriteExt + Unpin)) -> u64 {
    let mut hash = DefaultHasher::new();
    let mut bytes: Vec<u8> = chunk(7).into_iter().cycle().take(BULK_CHUNK).collect();
    for index in 0..BULK_CHUNKS {
        bytes[..8].copy_from_slice(&index.to_be_bytes());
        hash.write(&bytes);
        stream.write_all(&bytes).await.expect("sent");
    }
    hash.finish()
}

async fn receive_bulk(stream: &mut (impl AsyncReadExt + Unpin)) -> u64 {
    let mut hash = DefaultHasher::new();
    let mut bytes = vec![0; BULK_CHUNK];
    for _ in 0..BULK_CHUNKS {
        stream.read_exact(&mut bytes).await.expect("received");
        hash.write(&bytes);
    }
    hash.finish()
}

async fn bulk_both_ways_keeps_every_byte_and_the_session_is_told_in_words_afterwards(there: CarriedAfter) {
    let mut led = Led::behind(config_there(there, vec![write_listener()])).await;
    let (mut client, mut session) = led.session().await;
    {
        let (mut client_reads, mut client_writes) = client.split();
        let (mut server_reads, mut server_writes) = session.stream.split();
        let transfer = async {
            tokio::join!(
                send_bulk(&mut client_writes),
                receive_bulk(&mut server_reads),
                send_bulk(&mut server_writes),
                receive_bulk(&mut client_reads),
            )
        };
        let ended = tokio::time::timeout(Duration::from_secs(100), transfer).await;
        let (sent_up, got_up, sent_down, got_down) = ended.expect("the transfers end");
        assert_eq!((sent_up, sent_down), (got_up, got_down));
    }
    session.stream.write_all(&ready()).await.expect("sent");
    assert_eq!(read_message(&mut client).await, Some((b'Z', b"I".to_vec())));
    led.cluster.no_leader();
    assert_eq!(expect_fatal(&mut client).await.sqlstate, "57P01");
}

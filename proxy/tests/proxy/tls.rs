//! Sessions by TLS that ends at the proxy: their bytes, their ends, and what they cost.

use std::time::Duration;

use pgherd_proxy::tls::ListenerTls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::client::TlsStream;

use crate::certificates::*;
use crate::fake::*;
use crate::relay::{receive_all, send_all, taken_at_most};

/// A server, and a proxy that serves TLS before it.
pub(crate) struct Scene {
    pub(crate) server: Server,
    pub(crate) cluster: Cluster,
    pub(crate) authority: Authority,
    pub(crate) proxy: Running,
}

pub(crate) async fn scene(tls: ListenerTls) -> Scene {
    let server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let authority = Authority::new();
    let proxy = Running::start(tls_config(&authority, tls), &cluster);
    Scene {
        server,
        cluster,
        authority,
        proxy,
    }
}

/// A session by TLS whose client's socket takes little at a time.
async fn narrow(scene: &mut Scene) -> (TlsStream<TcpStream>, ServerSession) {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("set");
    socket.set_send_buffer_size(4096).expect("set");
    let address = scene.proxy.addresses.listeners[0][0];
    let stream = socket.connect(address).await.expect("the proxy listens");
    let mut client = Client::of(&scene.authority).asked(stream).await.expect("TLS");
    client.write_all(&startup()).await.expect("sent");
    let session = scene.server.session().await;
    expect_hello(&mut client).await;
    (client, session)
}

#[tokio::test]
async fn clients_by_tls_and_plain_ones_are_served() {
    let mut scene = scene(ListenerTls::Allow).await;
    for versions in [&rustls::version::TLS13, &rustls::version::TLS12] {
        let client = Client::with(&scene.authority, None, &[versions]);
        let mut stream = client.session(&scene.proxy).await;
        let mut session = scene.server.session().await;
        assert_eq!(session.startup, startup());
        assert_eq!(expect_hello(&mut stream).await, session.key);
        exchange(&mut stream, &mut session).await;
    }
    let mut plain = scene.proxy.client().await;
    let mut session = scene.server.session().await;
    expect_hello(&mut plain).await;
    exchange(&mut plain, &mut session).await;
}

#[tokio::test]
async fn large_transfers_both_ways_at_once_keep_every_byte() {
    const CHUNKS: u64 = 3000; // 30 MB
    let mut scene = scene(ListenerTls::Allow).await;
    let (client, session) = narrow(&mut scene).await;
    let (mut client_reads, mut client_writes) = tokio::io::split(client);
    let (mut server_reads, mut server_writes) = session.stream.into_split();
    let transfer = async {
        tokio::join!(
            send_all(&mut client_writes, CHUNKS),
            receive_all(&mut server_reads),
            send_all(&mut server_writes, CHUNKS),
            receive_all(&mut client_reads),
        )
    };
    let ended = tokio::time::timeout(Duration::from_secs(100), transfer).await;
    let (sent_up, (got_up, up), sent_down, (got_down, down)) = ended.expect("the transfers end");
    let bytes = usize::try_from(CHUNKS).expect("small") * 9973;
    assert_eq!((up, down), (bytes, bytes));
    assert_eq!((sent_up, sent_down), (got_up, got_down));
}

#[tokio::test]
async fn an_answer_that_the_socket_takes_only_in_part_arrives_whole() {
    let mut scene = scene(ListenerTls::Allow).await;
    let (mut client, mut session) = narrow(&mut scene).await;
    // Nothing comes after it, so nothing but the socket itself can bring the rest on its way.
    let sizes = [64 * 1024, 200_000, 3_000_000];
    for size in sizes {
        let (answer, mut got) = (vec![b'x'; size], vec![0; size]);
        // At once: what is not read yet need not have room in the sockets between.
        let both = async { tokio::join!(session.stream.write_all(&answer), client.read_exact(&mut got)) };
        let (sent, received) = within("all of it", both).await;
        sent.expect("sent");
        received.expect("received");
    }
}

#[tokio::test]
async fn a_half_closed_session_goes_on_the_other_way() {
    let mut scene = scene(ListenerTls::Allow).await;
    let (mut client, mut session) = narrow(&mut scene).await;
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

#[tokio::test]
async fn the_servers_end_is_told_inside_tls_and_the_client_may_go_on() {
    let mut scene = scene(ListenerTls::Allow).await;
    let (mut client, mut session) = narrow(&mut scene).await;
    session.stream.shutdown().await.expect("half closed");
    let mut rest = Vec::new();
    // Without a goodbye inside TLS this would be an error.
    within("the end", client.read_to_end(&mut rest))
        .await
        .expect("an orderly end");
    client.write_all(b"still here").await.expect("sent");
    client.shutdown().await.expect("sent");
    within("the rest", session.stream.read_to_end(&mut rest))
        .await
        .expect("an orderly end");
    assert_eq!(rest, b"still here");
}

#[tokio::test]
async fn a_stalled_reader_stops_the_sender_instead_of_filling_memory() {
    let mut scene = scene(ListenerTls::Allow).await;
    let (mut client, session) = narrow(&mut scene).await;
    let taken = taken_at_most(&session.stream).await;
    drop(session);
    let mut got = Vec::new();
    within("all of it arrives in the end", client.read_to_end(&mut got))
        .await
        .expect("an orderly end");
    assert_eq!(got.len(), taken);
}

#[tokio::test]
async fn single_bytes_pass_as_they_come() {
    let mut scene = scene(ListenerTls::Allow).await;
    let (mut client, mut session) = narrow(&mut scene).await;
    for byte in 0..200_u8 {
        client.write_all(&[byte]).await.expect("sent");
        let got = within("a byte", session.stream.read_u8()).await;
        assert_eq!(got.expect("received"), byte);
        session.stream.write_all(&[byte]).await.expect("sent");
        assert_eq!(within("a byte", client.read_u8()).await.expect("received"), byte);
    }
}

#[tokio::test]
async fn what_follows_the_startup_message_in_its_record_reaches_the_server() {
    let mut scene = scene(ListenerTls::Allow).await;
    let stream = scene.proxy.connect().await;
    let mut client = Client::of(&scene.authority).asked(stream).await.expect("TLS");
    // One write is one record.
    let packets = [startup(), b"right behind".to_vec()].concat();
    client.write_all(&packets).await.expect("sent");
    let mut session = scene.server.session().await;
    let mut got = [0; 12];
    within("the rest arrives", session.stream.read_exact(&mut got))
        .await
        .expect("received");
    assert_eq!(&got, b"right behind");
    expect_hello(&mut client).await;
    exchange(&mut client, &mut session).await;
}

#[tokio::test]
async fn an_idle_session_of_an_ended_epoch_is_told_inside_tls() {
    let mut scene = scene(ListenerTls::Require).await;
    let mut client = Client::of(&scene.authority).session(&scene.proxy).await;
    let mut session = scene.server.session().await;
    expect_hello(&mut client).await;
    scene.cluster.no_leader();
    assert_eq!(expect_fatal(&mut client).await.sqlstate, "57P01");
    expect_server_end(&mut session).await;
}

#[tokio::test]
async fn a_session_in_the_middle_of_a_message_is_reset_without_a_word() {
    let mut scene = scene(ListenerTls::Require).await;
    let mut client = Client::of(&scene.authority).session(&scene.proxy).await;
    let mut session = scene.server.session().await;
    expect_hello(&mut client).await;
    session.stream.write_all(b"D\0\0\0\xffhalf").await.expect("sent");
    let mut half = [0; 9];
    within("half a message", client.read_exact(&mut half))
        .await
        .expect("received");
    scene.cluster.no_leader();
    expect_reset(client.get_mut().0).await;
}

#[tokio::test]
async fn broken_records_end_their_own_session_with_an_alert_and_no_other() {
    let mut scene = scene(ListenerTls::Allow).await;
    let mut bystander = Client::of(&scene.authority).session(&scene.proxy).await;
    let mut untouched = scene.server.session().await;
    expect_hello(&mut bystander).await;
    for bytes in [
        b"\x17\x03\x03\x00\x20not at all what comes next here....".as_slice(),
        b"\x16\x03\x03\x00\x04\x14\x00\xff\xff".as_slice(),
        b"\x15\x03\x03\x00\x02\x02\x28".as_slice(),
        &[0xff; 40_000],
    ] {
        let mut client = Client::of(&scene.authority).session(&scene.proxy).await;
        let mut session = scene.server.session().await;
        expect_hello(&mut client).await;
        let raw = client.get_mut().0;
        raw.write_all(bytes).await.expect("sent");
        let mut rest = Vec::new();
        let _ = within("it ends", raw.read_to_end(&mut rest)).await;
        expect_server_end(&mut session).await;
    }
    exchange(&mut bystander, &mut untouched).await;
    expect_no_defect(&scene.proxy).await;
}

/// CPU time of this process, in milliseconds.
fn cpu_millis() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    u64::try_from(time.tv_sec * 1000 + time.tv_nsec / 1_000_000).expect("after the start")
}

#[test]
fn idle_sessions_cost_no_time() {
    // Other tests share this process, and their time would count: so this one runs in a process of its own.
    if std::env::var_os("PGHERD_TEST_ALONE").is_none() {
        let itself = std::env::current_exe().expect("a file");
        let ended = std::process::Command::new(itself)
            .args(["--exact", "tls::idle_sessions_cost_no_time", "--nocapture"])
            .env("PGHERD_TEST_ALONE", "1")
            .output()
            .expect("started");
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(ended.status.success(), "{said}");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let mut scene = scene(ListenerTls::Allow).await;
        let (open, _session) = narrow(&mut scene).await;
        idle("an open session").await;
        let (mut half_closed, _half) = narrow(&mut scene).await;
        half_closed.shutdown().await.expect("half closed");
        idle("a half-closed one").await;
        let (_stalled, stuffed) = narrow(&mut scene).await;
        let piece = vec![b'x'; 64 * 1024];
        while tokio::time::timeout(Duration::from_millis(300), stuffed.stream.writable())
            .await
            .is_ok()
        {
            let _ = stuffed.stream.try_write(&piece);
        }
        idle("one whose client does not read").await;
        scene.cluster.no_leader();
        let mut held = Client::of(&scene.authority).session(&scene.proxy).await;
        idle("a held client").await;
        held.write_all(b"impatient").await.expect("sent");
        idle("a held client that talks").await;
        drop((open, half_closed, held));
    });
}

/// Waits until the process has spent next to nothing for a while: one that spins never does.
async fn idle(what: &str) {
    let mut tick = tokio::time::interval(Duration::from_millis(300));
    tick.tick().await;
    let mut before = cpu_millis();
    until(what, async || {
        tick.tick().await;
        let now = cpu_millis();
        let spent = now - std::mem::replace(&mut before, now);
        (spent < 50).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_held_client_that_says_goodbye_and_goes_is_noticed() {
    let mut scene = scene(ListenerTls::Allow).await;
    scene.cluster.no_leader();
    scene.cluster.confirmed().await;
    let mut one_place = tls_config(&scene.authority, ListenerTls::Allow);
    one_place.hold.clients = 1;
    one_place.hold.timeout = Duration::from_secs(60);
    scene.proxy.reload(one_place).await.expect("a good configuration");
    let client = Client::of(&scene.authority);
    let mut both = [client.session(&scene.proxy).await, client.session(&scene.proxy).await];
    let [first, second] = &mut both;
    // One gets the place; the other is told.
    let held = tokio::select! {
        _ = read_message(first) => second,
        _ = read_message(second) => first,
    };
    held.shutdown().await.expect("sent"); // The goodbye inside TLS is bytes like any others from outside.
    let raw = held.get_mut().0;
    let mut rest = Vec::new();
    let _ = within("its connection is closed", raw.read_to_end(&mut rest)).await;
    let _newcomer = until("its place is free", async || {
        let mut other = client.session(&scene.proxy).await;
        let told = tokio::time::timeout(Duration::from_millis(200), read_message(&mut other)).await;
        told.is_err().then_some(other)
    })
    .await;
}

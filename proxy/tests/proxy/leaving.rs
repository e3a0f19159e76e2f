//! Sessions of readers that end because their member is no longer what they came for, or has more than its part, and the
//! leader as a last resort for a few.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_proxy::OnChange;
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::fake::*;

/// Nothing comes for so long as anything here takes at most.
async fn stays_silent(client: &mut TcpStream, time: Duration) {
    let said = tokio::time::timeout(time, client.read_u8()).await;
    assert!(said.is_err(), "{said:?}");
}

/// The server's side says where the session's transaction is, and the client takes it.
async fn says(client: &mut TcpStream, session: &mut ServerSession, status: &[u8; 1]) {
    session.stream.write_all(&message(b'Z', status)).await.expect("sent");
    assert_eq!(read_message(client).await, Some((b'Z', status.to_vec())));
}

/// A session between a client and this server.
async fn session(proxy: &Running, listener: usize, server: &mut Server) -> (TcpStream, ServerSession) {
    let mut client = proxy.client_of(listener).await;
    let session = server.session().await;
    expect_hello(&mut client).await;
    (client, session)
}

#[tokio::test]
async fn the_leader_takes_only_so_many_readers_in_place_of_the_replicas() {
    let mut leader = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", leader.address);
    let mut limited = read_listener();
    limited.reads.fallback_to_leader = true;
    limited.reads.fallback_max = Some(2);
    let mut config = config(vec![limited, write_listener()]);
    config.hold.clients = 1;
    let proxy = Running::start(config, &cluster);
    // Writers do not count.
    let _writing = session(&proxy, 1, &mut leader).await;
    let (first, _first) = session(&proxy, 0, &mut leader).await;
    let _second = session(&proxy, 0, &mut leader).await;
    let mut held = proxy.client().await;
    stays_silent(&mut held, Duration::from_millis(100)).await;
    let fatal = expect_fatal(&mut proxy.client().await).await;
    let why = "leader n1 takes only 2 readers in their place";
    assert!(fatal.text.contains(why), "{}", fatal.text);
    drop(first);
    drop(_first);
    leader.session().await;
    expect_hello(&mut held).await;
}

#[tokio::test]
async fn readers_of_a_promoted_member_leave_between_two_transactions_and_are_fenced_until_then() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.replica("n2", server.address);
    let mut listener = read_listener();
    listener.reads.on_promoted = Some(OnChange::EndWhenIdle);
    let proxy = Running::start(config(vec![listener]), &cluster);
    let (mut idle, _idle) = session(&proxy, 0, &mut server).await;
    let (mut inside, mut inside_session) = session(&proxy, 0, &mut server).await;
    says(&mut inside, &mut inside_session, b"T").await;
    let (mut never, mut never_session) = session(&proxy, 0, &mut server).await;
    says(&mut never, &mut never_session, b"T").await;
    cluster.writable("n2", server.address);
    let fatal = expect_fatal(&mut idle).await;
    assert_eq!(fatal.sqlstate, "57P01");
    assert!(fatal.text.contains("n2 was promoted"), "{}", fatal.text);
    exchange(&mut inside, &mut inside_session).await;
    stays_silent(&mut inside, Duration::from_millis(200)).await;
    says(&mut inside, &mut inside_session, b"I").await;
    assert!(expect_fatal(&mut inside).await.text.contains("n2 was promoted"));
    // It rests on the leadership from its member's promotion on.
    cluster.no_leader();
    assert!(expect_fatal(&mut never).await.text.contains("leads no longer"));
}

#[tokio::test]
async fn sessions_of_a_replica_that_streams_no_more_end_as_the_listener_says() {
    let (leader, mut replica) = (Server::start().await, Server::start().await);
    let mut cluster = Cluster::new();
    cluster
        .writable("n1", leader.address)
        .replica("n2", replica.address)
        .replica("n3", leader.address)
        .member_leaves("n3");
    let of = |on_stale: OnChange| {
        let mut listener = read_listener();
        listener.reads.on_stale = on_stale;
        listener
    };
    let listeners = vec![of(OnChange::Keep), of(OnChange::EndWhenIdle), of(OnChange::End)];
    let proxy = Running::start(config(listeners), &cluster);
    let (mut kept, mut kept_session) = session(&proxy, 0, &mut replica).await;
    let (mut idle, _idle) = session(&proxy, 1, &mut replica).await;
    let (mut inside, mut inside_session) = session(&proxy, 1, &mut replica).await;
    says(&mut inside, &mut inside_session, b"T").await;
    let (mut busy, _busy) = session(&proxy, 2, &mut replica).await;
    busy.write_all(&message(b'Q', b"select\0")).await.expect("sent");
    // A moment without a stream, as after a change of leader, is nothing.
    let archive = r#","replication_state":"in archive recovery""#;
    cluster.record("n2", replica.address, "replica", archive);
    stays_silent(&mut idle, Duration::from_millis(1_500)).await;
    cluster.replica("n2", replica.address);
    stays_silent(&mut idle, Duration::from_millis(2_500)).await;
    cluster.record("n2", replica.address, "replica", archive);
    let fatal = expect_fatal(&mut idle).await;
    assert_eq!(fatal.sqlstate, "57P01");
    let why = "n2 is no longer what this session came for: it does not stream: in archive recovery";
    assert!(fatal.text.contains(why), "{}", fatal.text);
    expect_reset(&mut busy).await;
    exchange(&mut inside, &mut inside_session).await;
    says(&mut inside, &mut inside_session, b"I").await;
    expect_fatal(&mut inside).await;
    exchange(&mut kept, &mut kept_session).await;
}

#[tokio::test]
async fn a_session_with_a_last_resort_stays_while_newcomers_would_come_there() {
    // A leader that cannot be connected to, although all else says that it is well.
    let leader = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    leader.bind(&any_port.into()).expect("a port");
    let leader_address = leader.local_addr().expect("bound").as_socket().expect("by IP");
    let mut replica = Server::start().await;
    let zone_of = |zone: &str, more: &str| format!(r#"{more},"tags":{{"zone":"{zone}"}}"#);
    let streams = r#","replication_state":"streaming""#;
    let mut cluster = Cluster::new();
    cluster
        .writable("n1", leader_address)
        .record("n2", replica.address, "replica", &zone_of("a", streams));
    let mut listener = read_listener();
    listener.reads.on_stale = OnChange::End;
    let mut of_zone = listener.clone();
    of_zone.reads.tags = [("zone".to_owned(), "a".to_owned())].into();
    let proxy = Running::start(config(vec![listener, of_zone]), &cluster);
    let (mut before, mut before_session) = session(&proxy, 0, &mut replica).await;
    let (mut strays, _strays) = session(&proxy, 1, &mut replica).await;
    cluster.record("n2", replica.address, "replica", &zone_of("b", ""));
    let (mut after, mut after_session) = session(&proxy, 0, &mut replica).await;
    // One that is other in something else ends as ever, and with it all that would.
    let fatal = expect_fatal(&mut strays).await;
    assert!(fatal.text.contains("its tag zone is b, not a"), "{}", fatal.text);
    exchange(&mut before, &mut before_session).await;
    exchange(&mut after, &mut after_session).await;
    says(&mut before, &mut before_session, b"I").await;
    // Once the leader answers, it could be streamed from.
    leader.listen(16).expect("it listens");
    let fatal = expect_fatal(&mut before).await;
    assert!(fatal.text.contains("it does not stream"), "{}", fatal.text);
}

#[tokio::test]
async fn old_sessions_move_to_a_member_that_comes_back_and_no_more_than_its_part() {
    // The keys tell the servers apart.
    let servers = [Server::with_secret_bytes(4).await, Server::with_secret_bytes(5).await];
    let mut cluster = Cluster::new();
    cluster.replica("n2", servers[0].address);
    let mut listener = read_listener();
    listener.reads.rebalance_after = Some(Duration::ZERO);
    let mut config = config(vec![listener]);
    config.slow_start = Duration::ZERO;
    let proxy = Arc::new(Running::start(config, &cluster));
    let open = Arc::new(Mutex::new([0_usize; 2]));
    let mut clients = JoinSet::new();
    for _ in 0..10 {
        let (proxy, open) = (Arc::clone(&proxy), Arc::clone(&open));
        clients.spawn(async move {
            loop {
                let mut client = proxy.client().await;
                let at = expect_hello(&mut client).await.len() - 8;
                open.lock().expect("nobody panicked")[at] += 1;
                let mut said = Vec::new();
                let _ = client.read_to_end(&mut said).await;
                assert!(String::from_utf8_lossy(&said).contains("57P01"), "{said:?}");
                open.lock().expect("nobody panicked")[at] -= 1;
            }
        });
    }
    let opened = async |wanted: [usize; 2]| {
        let reached = async || (*open.lock().expect("nobody panicked") == wanted).then_some(());
        until(&format!("{wanted:?} are open"), reached).await;
    };
    opened([10, 0]).await;
    cluster.replica("n3", servers[1].address);
    opened([7, 3]).await;
    // From here on it is near enough.
    let balanced_at = Boottime::now();
    until("nobody moves any more", async || {
        assert_eq!(*open.lock().expect("nobody panicked"), [7, 3]);
        (Boottime::now().since(balanced_at) > Duration::from_millis(2_500)).then_some(())
    })
    .await;
    assert!(clients.try_join_next().is_none());
}

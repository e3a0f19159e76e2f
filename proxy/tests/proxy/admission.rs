//! Who gets in: limits by user, database, address and member.

use std::net::SocketAddr;
use std::time::Duration;

use pgherd_proxy::{LimitsConfig, QueueConfig, StatsConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::fake::*;

/// Asks for a session as `user`, from a loopback address of its own.
async fn client_from(host: u8, proxy: &Running, listener: usize, user: &str, database: &str) -> TcpStream {
    let mut stream = connect_from(host, proxy, listener).await;
    let body = format!("user\0{user}\0database\0{database}\0\0");
    stream.write_all(&packet(196_608, body.as_bytes())).await.expect("sent");
    stream
}

async fn connect_from(host: u8, proxy: &Running, listener: usize) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(SocketAddr::from(([127, 0, 0, host], 0))).expect("loopback");
    let address = proxy.addresses.listeners[listener][0];
    socket.connect(address).await.expect("the proxy listens")
}

async fn metrics(proxy: &Running) -> String {
    let mut stream = TcpStream::connect(proxy.addresses.stats[0]).await.expect("the page");
    let request = b"GET /metrics HTTP/1.1\r\nhost: test\r\n\r\n";
    stream.write_all(request).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    answer
}

fn limited(limits: LimitsConfig) -> pgherd_proxy::ProxyConfig {
    let mut config = config(vec![write_listener()]);
    config.limits = limits;
    config.stats = Some(StatsConfig {
        address: "127.0.0.1:0".to_owned(),
    });
    config
}

#[tokio::test]
async fn each_limit_refuses_its_own_and_lets_others_in() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let config = limited(LimitsConfig {
        per_user: Some(1),
        per_database: Some(2),
        per_client_address: Some(3),
        ..LimitsConfig::default()
    });
    let proxy = Running::start(config, &cluster);
    let mut ann = client_from(1, &proxy, 0, "ann", "d").await;
    expect_hello(&mut ann).await;
    let ann_at_server = server.session().await;
    let fatal = expect_fatal(&mut client_from(2, &proxy, 0, "ann", "e").await).await;
    assert_eq!(fatal.sqlstate, "53300");
    assert!(
        fatal.text.contains("too many connections for user \"ann\": 1 are open"),
        "{}",
        fatal.text
    );
    assert!(fatal.text.contains("limits.per_user"), "{}", fatal.text);
    let mut bob = client_from(1, &proxy, 0, "bob", "d").await;
    expect_hello(&mut bob).await;
    let fatal = expect_fatal(&mut client_from(1, &proxy, 0, "eve", "d").await).await;
    assert!(fatal.text.contains("database \"d\": 2 are open"), "{}", fatal.text);
    // The database is the user's own name where none was given.
    let mut eve = connect_from(1, &proxy, 0).await;
    eve.write_all(&packet(196_608, b"user\0eve\0\0")).await.expect("sent");
    expect_hello(&mut eve).await;
    let fatal = expect_fatal(&mut client_from(1, &proxy, 0, "sue", "f").await).await;
    assert!(fatal.text.contains("address 127.0.0.1: 3 are open"), "{}", fatal.text);
    expect_hello(&mut client_from(2, &proxy, 0, "sue", "f").await).await;
    let shown = metrics(&proxy).await;
    for limit in ["per_user", "per_database", "per_client_address"] {
        let line = format!("pgherd_limits_rejected_total{{limit=\"{limit}\"}} 1");
        assert!(shown.contains(&line), "{shown}");
    }
    drop((ann, ann_at_server));
    until("ann's place is free", async || {
        let mut again = client_from(2, &proxy, 0, "ann", "e").await;
        matches!(read_message(&mut again).await, Some((b'R', _))).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_limit_that_is_set_later_knows_of_those_before() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let mut config = limited(LimitsConfig::default());
    let mut proxy = Running::start(config.clone(), &cluster);
    let mut ann = client_from(1, &proxy, 0, "ann", "d").await;
    expect_hello(&mut ann).await;
    let mut ann_at_server = server.session().await;
    config.limits.per_user = Some(1);
    proxy.reload(config).await.expect("a good configuration");
    let fatal = expect_fatal(&mut client_from(1, &proxy, 0, "ann", "d").await).await;
    assert_eq!(fatal.sqlstate, "53300");
    exchange(&mut ann, &mut ann_at_server).await;
}

/// One session per member, one client in the queue.
fn one_place(timeout: Duration) -> LimitsConfig {
    LimitsConfig {
        per_member: Some(1),
        queue: QueueConfig { clients: 1, timeout },
        ..LimitsConfig::default()
    }
}

#[tokio::test]
async fn clients_of_a_full_member_wait_in_their_order_and_no_more_than_may() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let mut config = limited(one_place(PATIENCE));
    config.limits.queue.clients = 2;
    let proxy = Running::start(config, &cluster);
    let mut inside = proxy.client().await;
    expect_hello(&mut inside).await;
    let mut session = server.session().await;
    let mut waiting = Vec::new();
    for count in 1..=2 {
        waiting.push(client_from(1, &proxy, 0, &format!("w{count}"), "d").await);
        until("it waits", async || {
            let line = format!("pgherd_node_queue_clients{{node=\"n1\"}} {count}");
            metrics(&proxy).await.contains(&line).then_some(())
        })
        .await;
    }
    let fatal = expect_fatal(&mut proxy.client().await).await;
    assert_eq!(fatal.sqlstate, "53300");
    assert!(
        fatal
            .text
            .contains("too many sessions on n1: 1 are open, and 2 clients wait already"),
        "{}",
        fatal.text
    );
    exchange(&mut inside, &mut session).await;
    drop((inside, session));
    // One after the other, and the first first.
    for (user, mut client) in ["w1", "w2"].into_iter().zip(waiting) {
        expect_hello(&mut client).await;
        let session = server.session().await;
        let startup = String::from_utf8_lossy(&session.startup).into_owned();
        assert!(startup.contains(user), "{startup:?}");
    }
}

#[tokio::test]
async fn the_queues_time_is_bounded_and_a_client_that_leaves_makes_room() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let mut config = limited(one_place(Duration::from_millis(50)));
    let mut proxy = Running::start(config.clone(), &cluster);
    let mut inside = proxy.client().await;
    expect_hello(&mut inside).await;
    let _session = server.session().await;
    let fatal = expect_fatal(&mut proxy.client().await).await;
    assert_eq!(fatal.sqlstate, "53300");
    assert!(fatal.text.contains("none ended in 0."), "{}", fatal.text);
    config.limits.queue.timeout = PATIENCE;
    proxy.reload(config.clone()).await.expect("a good configuration");
    let gone = proxy.client().await;
    let queued = |count: usize| format!("pgherd_node_queue_clients{{node=\"n1\"}} {count}");
    until("it waits", async || {
        metrics(&proxy).await.contains(&queued(1)).then_some(())
    })
    .await;
    drop(gone);
    until("it has left", async || {
        metrics(&proxy).await.contains(&queued(0)).then_some(())
    })
    .await;
    // A higher limit lets those in who wait already.
    let mut waiting = proxy.client().await;
    until("it waits", async || {
        metrics(&proxy).await.contains(&queued(1)).then_some(())
    })
    .await;
    config.limits.per_member = Some(2);
    proxy.reload(config).await.expect("a good configuration");
    expect_hello(&mut waiting).await;
}

#[tokio::test]
async fn a_reader_goes_to_a_replica_that_has_room_and_not_to_the_leader() {
    let (leader, mut one, mut two) = (Server::start().await, Server::start().await, Server::start().await);
    let mut cluster = Cluster::new();
    cluster
        .writable("n1", leader.address)
        .replica("n2", one.address)
        .replica("n3", two.address);
    let mut config = limited(one_place(Duration::from_millis(50)));
    config.listeners = vec![pgherd_proxy::ListenerConfig::read("127.0.0.1:0", None, true)];
    let proxy = Running::start(config, &cluster);
    cluster.confirmed().await;
    let mut readers = vec![proxy.client().await, proxy.client().await];
    for reader in &mut readers {
        expect_hello(reader).await;
    }
    (one.session().await, two.session().await);
    let fatal = expect_fatal(&mut proxy.client().await).await;
    assert!(fatal.text.contains("too many sessions on n"), "{}", fatal.text);
}

#[tokio::test]
async fn a_client_in_the_queue_follows_the_leader() {
    let (mut first, mut second) = (Server::start().await, Server::start().await);
    let mut cluster = Cluster::new();
    cluster.writable("n1", first.address);
    let proxy = Running::start(limited(one_place(PATIENCE)), &cluster);
    let mut inside = proxy.client().await;
    expect_hello(&mut inside).await;
    let _session = first.session().await;
    let mut waiting = proxy.client().await;
    until("it waits", async || {
        let line = "pgherd_node_queue_clients{node=\"n1\"} 1";
        metrics(&proxy).await.contains(line).then_some(())
    })
    .await;
    // Its member still lists its session: only the route moves.
    cluster.writable("n2", second.address);
    expect_hello(&mut waiting).await;
    second.session().await;
}

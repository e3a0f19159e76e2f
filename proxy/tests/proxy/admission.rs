//! Who gets in: limits by user, database, address and member.

use std::net::SocketAddr;
use std::time::Duration;

use pgherd_proxy::{LimitsConfig, QueueConfig, StatsConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::fake::*;

/// Asks for a session as `user`, from a loopback address of its own.
pub(crate) async fn client_from(host: u8, proxy: &Running, listener: usize, user: &str, database: &str) -> TcpStream {
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

/// Waits until the metrics have it: a connection may be closed before it is counted.
pub(crate) async fn shows(proxy: &Running, line: &str) {
    until(line, async || metrics(proxy).await.contains(line).then_some(())).await;
}

pub(crate) async fn metrics(proxy: &Running) -> String {
    let mut stream = TcpStream::connect(proxy.addresses.stats[0]).await.expect("the page");
    let request = b"GET /metrics HTTP/1.1\r\nhost: test\r\n\r\n";
    stream.write_all(request).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    answer
}

pub(crate) fn limited(limits: LimitsConfig) -> pgherd_proxy::ProxyConfig {
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
pub(crate) fn one_place(timeout: Duration) -> LimitsConfig {
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
    one.session().await;
    two.session().await;
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

fn networks(texts: &[&str]) -> Vec<pgherd_proxy::Network> {
    texts.iter().map(|text| text.parse().expect("a network")).collect()
}

#[tokio::test]
async fn one_address_that_says_nothing_does_not_keep_others_out() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let mut config = limited(LimitsConfig::of(40));
    config.hold.clients = 1;
    config.limits.startups_per_client_address = Some(4);
    config.limits.startups = Some(8);
    let proxy = Running::start(config, &cluster);
    let mut flood = Vec::new();
    for _ in 0..100 {
        flood.push(connect_from(2, &proxy, 0).await);
    }
    for _ in 0..3 {
        expect_hello(&mut client_from(1, &proxy, 0, "ann", "d").await).await;
        server.session().await;
    }
    let shown = metrics(&proxy).await;
    let refused = "pgherd_limits_rejected_total{limit=\"startups_per_client_address\"} 96";
    assert!(shown.contains(refused), "{shown}");
    // What was closed is closed at once; what is within the bound may still speak.
    let mut open = 0;
    for stream in &mut flood {
        let read = tokio::time::timeout(Duration::from_millis(20), stream.read_u8()).await;
        open += usize::from(read.is_err());
    }
    assert_eq!(open, 4);
    drop(flood);
    expect_hello(&mut client_from(2, &proxy, 0, "ann", "d").await).await;
}

#[tokio::test]
async fn beyond_a_listeners_startups_clients_wait_in_the_kernels_queue() {
    let server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let mut config = limited(LimitsConfig::default());
    config.limits.startups = Some(2);
    let proxy = Running::start(config, &cluster);
    let silent = [connect_from(2, &proxy, 0).await, connect_from(3, &proxy, 0).await];
    until("both are there", async || {
        let shown = metrics(&proxy).await;
        let mut lines = shown
            .lines()
            .filter(|line| line.starts_with("pgherd_listener_startups{"));
        lines.any(|line| line.ends_with(" 2")).then_some(())
    })
    .await;
    let mut waiting = client_from(1, &proxy, 0, "ann", "d").await;
    let told = tokio::time::timeout(Duration::from_millis(100), read_message(&mut waiting)).await;
    assert!(told.is_err(), "it is not looked at yet");
    drop(silent);
    expect_hello(&mut waiting).await;
    // Sessions are none of them: any number goes on.
    let mut sessions = Vec::new();
    for _ in 0..4 {
        let mut client = client_from(1, &proxy, 0, "ann", "d").await;
        expect_hello(&mut client).await;
        sessions.push(client);
    }
}

#[tokio::test]
async fn a_listener_takes_whom_it_allows() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let mut config = limited(LimitsConfig::default());
    config.listeners.push(write_listener());
    config.listeners[0].allow = networks(&["127.0.0.1", "fd00::/8"]);
    let proxy = Running::start(config, &cluster);
    let mut ann = client_from(1, &proxy, 0, "ann", "d").await;
    let key = expect_hello(&mut ann).await;
    server.session().await;
    let mut stranger = connect_from(2, &proxy, 0).await;
    stranger.write_all(&packet(SSL_REQUEST, b"")).await.expect("sent");
    assert_eq!(within("an answer", stranger.read_u8()).await.expect("an answer"), b'N');
    stranger.write_all(&startup()).await.expect("sent");
    let fatal = expect_fatal(&mut stranger).await;
    assert_eq!(fatal.sqlstate, "28000");
    let said = "no entry of allow for host \"127.0.0.2\", user \"ann\", database \"ann\"";
    assert!(fatal.text.contains(said), "{}", fatal.text);
    shows(&proxy, "{limit=\"allow\"} 1").await;
    // A cancel is closed without a word, and reaches nobody.
    let mut cancel = connect_from(2, &proxy, 0).await;
    cancel.write_all(&packet(CANCEL_REQUEST, &key)).await.expect("sent");
    let mut rest = Vec::new();
    within("it is closed", cancel.read_to_end(&mut rest))
        .await
        .expect("an orderly end");
    assert!(rest.is_empty() && server.has_no_cancel());
    // The other listener takes everyone.
    expect_hello(&mut client_from(2, &proxy, 1, "ann", "d").await).await;
}

/// A proxy in front of ours, at 127.0.0.9, which is trusted, with one connection per client address and one address allowed.
async fn behind_a_proxy(cluster: &Cluster) -> Running {
    let mut config = limited(LimitsConfig {
        per_client_address: Some(1),
        ..LimitsConfig::default()
    });
    config.listeners[0].proxy_protocol = networks(&["127.0.0.8/30"]);
    config.listeners[0].allow = networks(&["10.0.0.0/8", "127.0.0.9"]);
    Running::start(config, cluster)
}

#[tokio::test]
async fn who_a_trusted_proxy_tells_of_is_who_counts() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let proxy = behind_a_proxy(&cluster).await;
    let told = |header: &'static [u8]| {
        let proxy = &proxy;
        async move {
            let mut stream = connect_from(9, proxy, 0).await;
            stream.write_all(&[header, &startup()].concat()).await.expect("sent");
            stream
        }
    };
    let mut first = told(b"PROXY TCP4 10.1.1.1 10.0.0.1 1 5432\r\n").await;
    expect_hello(&mut first).await;
    // The startup message follows byte for byte.
    assert_eq!(server.session().await.startup, startup());
    let fatal = expect_fatal(&mut told(b"PROXY TCP4 10.1.1.1 10.0.0.1 2 5432\r\n").await).await;
    assert!(fatal.text.contains("address 10.1.1.1: 1 are open"), "{}", fatal.text);
    let v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x0a\x01\x01\x02\x0a\0\0\x01\0\x01\x15\x38";
    let mut second = told(v2).await;
    expect_hello(&mut second).await;
    let fatal = expect_fatal(&mut told(b"PROXY TCP4 192.0.2.1 10.0.0.1 1 5432\r\n").await).await;
    assert!(fatal.text.contains("host \"192.0.2.1\""), "{}", fatal.text);
    // The proxy's own checks come from the proxy's own address.
    let mut own = told(b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0").await;
    expect_hello(&mut own).await;
}

#[tokio::test]
async fn a_header_is_required_of_trusted_proxies_and_understood_from_nobody_else() {
    let server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let proxy = behind_a_proxy(&cluster).await;
    for bytes in [startup(), b"PROXY TCP4 10.1.1.1\r\n".to_vec()] {
        let mut stream = connect_from(9, &proxy, 0).await;
        stream.write_all(&bytes).await.expect("sent");
        let mut rest = Vec::new();
        let _ = within("it is closed", stream.read_to_end(&mut rest)).await;
        assert!(rest.is_empty());
    }
    shows(&proxy, "{limit=\"proxy_protocol\"} 2").await;
    let mut stranger = connect_from(1, &proxy, 0).await;
    let header = b"PROXY TCP4 10.1.1.1 10.0.0.1 1 5432\r\n";
    stranger
        .write_all(&[&header[..], &startup()].concat())
        .await
        .expect("sent");
    let fatal = expect_fatal(&mut stranger).await;
    assert_eq!(fatal.sqlstate, "08P01", "{}", fatal.text);
}

#[tokio::test]
async fn operators_get_in_beyond_the_limits_and_no_more_of_them_than_may() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let mut config = limited(LimitsConfig {
        connections: 1,
        per_user: Some(1),
        per_member: Some(1),
        reserved: 2,
        operators: vec!["dba".to_owned()],
        ..LimitsConfig::default()
    });
    config.hold.clients = 1;
    let proxy = Running::start(config, &cluster);
    let mut first = client_from(1, &proxy, 0, "ann", "d").await;
    expect_hello(&mut first).await;
    server.session().await;
    let mut operators = Vec::new();
    for _ in 0..2 {
        let mut operator = client_from(1, &proxy, 0, "dba", "d").await;
        expect_hello(&mut operator).await;
        let mut session = server.session().await;
        exchange(&mut operator, &mut session).await;
        operators.push((operator, session));
    }
    shows(&proxy, "pgherd_reserved_places 2").await;
    for user in ["dba", "bob"] {
        let fatal = expect_fatal(&mut client_from(1, &proxy, 0, user, "d").await).await;
        assert!(
            fatal.text.contains("too many connections to the proxy: 1 are open"),
            "{}",
            fatal.text
        );
    }
    operators.clear();
    until("a place is free again", async || {
        let mut operator = client_from(1, &proxy, 0, "dba", "d").await;
        matches!(read_message(&mut operator).await, Some((b'R', _))).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_flood_beyond_the_limit_keeps_no_operator_out() {
    let server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let mut config = limited(LimitsConfig {
        connections: 1,
        reserved: 1,
        operators: vec!["dba".to_owned()],
        ..LimitsConfig::default()
    });
    config.hold.clients = 1;
    let proxy = Running::start(config, &cluster);
    let mut first = client_from(1, &proxy, 0, "ann", "d").await;
    expect_hello(&mut first).await;
    let mut flood = Vec::new();
    for _ in 0..100 {
        flood.push(connect_from(2, &proxy, 0).await);
    }
    expect_hello(&mut client_from(3, &proxy, 0, "dba", "d").await).await;
    let shown = metrics(&proxy).await;
    assert!(
        shown.contains("pgherd_limits_rejected_total{limit=\"refusals\"}"),
        "{shown}"
    );
}

#[tokio::test]
async fn servers_see_the_name_that_the_proxy_writes_and_all_else_as_it_came() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let mut config = limited(LimitsConfig::default());
    config.application_name = Some("{name} via {address}".parse().expect("a template"));
    let mut proxy = Running::start(config.clone(), &cluster);
    let _client = client_from(3, &proxy, 0, "ann", "d").await;
    let startup = server.session().await.startup;
    let expected = packet(196_608, b"user\0ann\0database\0d\0application_name\0via 127.0.0.3\0\0");
    assert_eq!(startup, expected);
    config.application_name = None;
    proxy.reload(config).await.expect("a good configuration");
    let _client = client_from(3, &proxy, 0, "ann", "d").await;
    assert_eq!(
        server.session().await.startup,
        packet(196_608, b"user\0ann\0database\0d\0\0")
    );
}

//! Whose turn it is at a member, and where a reader waits for its own.

use std::net::SocketAddr;
use std::time::Duration;

use pgherd_proxy::LimitsConfig;
use tokio::io::AsyncWriteExt;

use crate::admission::*;
use crate::fake::*;

/// Waits until so many clients wait, over all members.
async fn waiting(proxy: &Running, count: usize) {
    until(&format!("{count} wait"), async || {
        let shown = metrics(proxy).await;
        let lines = shown
            .lines()
            .filter(|line| line.starts_with("pgherd_node_queue_clients{"));
        let queued = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<usize>().ok());
        (queued.sum::<usize>() == count).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_reader_in_the_queue_takes_whichever_place_is_free_first() {
    // The keys tell the servers apart.
    let servers = [Server::with_secret_bytes(4).await, Server::with_secret_bytes(5).await];
    let mut cluster = Cluster::new();
    cluster
        .replica("n2", servers[0].address)
        .replica("n3", servers[1].address);
    let mut config = limited(one_place(PATIENCE));
    config.listeners = vec![read_listener()];
    let proxy = Running::start(config, &cluster);
    cluster.confirmed().await;
    let mut inside = [None, None];
    for _ in 0..2 {
        let mut reader = proxy.client().await;
        let at = expect_hello(&mut reader).await.len() - 8;
        inside[at] = Some(reader);
    }
    // One in each queue, whichever it was led to first.
    let mut readers = Vec::new();
    for count in 1..=2 {
        readers.push(proxy.client().await);
        waiting(&proxy, count).await;
    }
    let fatal = expect_fatal(&mut proxy.client().await).await;
    assert!(fatal.text.contains("and 1 clients wait already"), "{}", fatal.text);
    // Both get the same place, one after the other, whichever queue they are in.
    let (mut second, mut first) = (readers.pop().expect("two wait"), readers.pop().expect("two wait"));
    break_off(inside[1].take().expect("it is inside"));
    let (at, served, mut other) = tokio::select! {
        key = expect_hello(&mut first) => (key.len(), first, second),
        key = expect_hello(&mut second) => (key.len(), second, first),
    };
    assert_eq!(at, 9);
    break_off(served);
    assert_eq!(expect_hello(&mut other).await.len(), 9);
}

#[tokio::test]
async fn a_reader_whose_turn_to_start_does_not_come_starts_elsewhere() {
    let (silent, silent_address) = silent_server().await;
    let mut cluster = Cluster::new();
    cluster.replica("n2", silent_address);
    let mut config = limited(LimitsConfig::default());
    config.listeners = vec![read_listener()];
    config.limits.startups_per_member = Some(1);
    config.hold.timeout = PATIENCE;
    let proxy = Running::start(config, &cluster);
    let _starting = proxy.client().await;
    let _never = within("it starts", silent.accept()).await.expect("accepted");
    let mut reader = proxy.client().await;
    shows(&proxy, "pgherd_node_startup_queue_clients{node=\"n2\"} 1").await;
    let mut good = Server::start().await;
    cluster.replica("n3", good.address);
    expect_hello(&mut reader).await;
    good.session().await;
}

#[tokio::test]
async fn where_the_leader_is_one_of_them_a_full_one_stops_no_search() {
    let (mut leader, mut replica) = (Server::start().await, Server::start().await);
    let in_zone = |zone: &str| format!(r#","replication_state":"streaming","tags":{{"zone":"{zone}"}}"#);
    let mut cluster = Cluster::new();
    cluster
        .leader_key("n1")
        .record("n1", leader.address, "primary", &in_zone("a"))
        .record("n2", replica.address, "replica", &in_zone("b"));
    let mut config = limited(one_place(PATIENCE));
    let any = pgherd_proxy::ListenerConfig::new("127.0.0.1:0", pgherd_proxy::ListenerRole::Any);
    config.listeners = vec![any];
    config.zone = Some("a".to_owned());
    let proxy = Running::start(config, &cluster);
    cluster.confirmed().await;
    let mut first = proxy.client().await;
    expect_hello(&mut first).await;
    let _at_leader = leader.session().await;
    let mut second = proxy.client().await;
    expect_hello(&mut second).await;
    let at_replica = replica.session().await;
    let mut third = proxy.client().await;
    waiting(&proxy, 1).await;
    drop((second, at_replica));
    expect_hello(&mut third).await;
    replica.session().await;
}

/// A server that takes connections and answers none until the test does.
async fn silent_server() -> (tokio::net::TcpListener, SocketAddr) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    (listener, address)
}

#[tokio::test]
async fn no_more_clients_start_at_a_member_at_once_than_may() {
    let (server, address) = silent_server().await;
    let mut cluster = Cluster::new();
    cluster.no_leader();
    let mut config = limited(LimitsConfig::default());
    config.limits.startups_per_member = Some(2);
    config.hold.timeout = PATIENCE;
    let proxy = Running::start(config, &cluster);
    // Held until there is a leader, in the order in which they came.
    let mut clients = Vec::new();
    for count in 1..=6 {
        clients.push(client_from(1, &proxy, 0, &format!("w{count}"), "d").await);
        until("it is held", async || {
            let shown = metrics(&proxy).await;
            let mut lines = shown.lines().filter(|line| line.starts_with("pgherd_hold_clients{"));
            lines.any(|line| line.ends_with(&format!(" {count}"))).then_some(())
        })
        .await;
    }
    cluster.writable("n1", address);
    let mut served = Vec::new();
    let mut starting = Vec::new();
    for _ in 0..3 {
        while starting.len() < 2 {
            starting.push(within("a client starts", server.accept()).await.expect("accepted").0);
        }
        let more = tokio::time::timeout(Duration::from_millis(50), server.accept()).await;
        assert!(more.is_err(), "a third one starts");
        for mut stream in starting.drain(..) {
            let startup = read_packet(&mut stream).await.expect("a startup message");
            served.push(String::from_utf8_lossy(&startup[13..15]).into_owned());
            stream.write_all(&ready()).await.expect("sent");
            clients.push(stream); // Its session goes on, and is no startup any more.
        }
    }
    served.sort();
    assert_eq!(served, ["w1", "w2", "w3", "w4", "w5", "w6"]);
    until("all have started", async || {
        let shown = metrics(&proxy).await;
        shown.contains("pgherd_node_startups{node=\"n1\"} 0").then_some(())
    })
    .await;
}

#[tokio::test]
async fn servers_that_are_slow_to_speak_keep_nobodys_turn_for_long() {
    let (server, address) = silent_server().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", address);
    let mut config = limited(LimitsConfig::default());
    config.limits.startups_per_member = Some(1);
    config.hold.timeout = PATIENCE;
    let proxy = Running::start(config, &cluster);
    let _first = proxy.client().await;
    let (_slow, _) = within("it starts", server.accept()).await.expect("accepted");
    let mut second = proxy.client().await;
    let (mut stream, _) = within("the next one starts", server.accept()).await.expect("accepted");
    stream.write_all(&ready()).await.expect("sent");
    assert_eq!(read_message(&mut second).await, Some((b'Z', b"I".to_vec())));
}

#[tokio::test]
async fn whose_turn_does_not_come_is_told_why() {
    let (server, address) = silent_server().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", address);
    let mut config = limited(LimitsConfig::default());
    config.limits.startups_per_member = Some(1);
    config.hold.timeout = Duration::from_millis(50);
    let proxy = Running::start(config, &cluster);
    let mut clients = Vec::new();
    for waiting in 0..5 {
        clients.push(proxy.client().await);
        until("it starts or waits", async || {
            let line = format!("pgherd_node_startup_queue_clients{{node=\"n1\"}} {waiting}");
            let one = "pgherd_node_startups{node=\"n1\"} 1";
            let shown = metrics(&proxy).await;
            (shown.contains(&line) && shown.contains(one)).then_some(())
        })
        .await;
    }
    // One that leaves gives its turn back; the last is not served within five seconds by a server that never speaks.
    drop(clients.remove(0));
    let fatal = expect_fatal(clients.last_mut().expect("four are left")).await;
    assert_eq!(fatal.sqlstate, "57P03");
    assert!(
        fatal
            .text
            .contains("too many clients connect to n1 at once: 1 are starting"),
        "{}",
        fatal.text
    );
    drop(server);
}

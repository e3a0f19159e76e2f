//! A running proxy is given a new configuration.

use std::time::Duration;

use pgherd_proxy::{ListenerConfig, ReloadError, StatsConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fake::*;

async fn page(address: std::net::SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    stream
        .write_all(b"GET /stats.json HTTP/1.1\r\nhost: test\r\n\r\n")
        .await
        .ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    Some(answer)
}

fn at(listener: ListenerConfig, proxy: &Running, index: usize) -> ListenerConfig {
    ListenerConfig {
        address: proxy.addresses.listeners[index][0].to_string(),
        ..listener
    }
}

#[tokio::test]
async fn listeners_come_and_go_and_sessions_stay() {
    let (mut leader, mut replica) = (Server::start().await, Server::start().await);
    let mut cluster = Cluster::new();
    cluster.writable("n1", leader.address).replica("n2", replica.address);
    let mut first = config(vec![write_listener(), read_listener()]);
    first.stats = Some(StatsConfig {
        address: "127.0.0.1:0".to_owned(),
    });
    let mut proxy = Running::start(first.clone(), &cluster);
    let (write, read) = (at(write_listener(), &proxy, 0), proxy.addresses.listeners[1][0]);
    let mut writer = proxy.client().await;
    let mut writing = leader.session().await;
    expect_hello(&mut writer).await;
    let mut reader = proxy.client_of(1).await;
    let mut reading = replica.session().await;
    expect_hello(&mut reader).await;

    // One more, by the addresses as they were asked for; and the reader's goes.
    let mut second = first.clone();
    second.listeners = vec![write_listener(), ListenerConfig::write("localhost:0")];
    proxy.reload(second.clone()).await.expect("a good configuration");
    assert_eq!(proxy.addresses.listeners[0][0].to_string(), write.address);
    assert!(TcpStream::connect(read).await.is_err(), "its port is free");
    for listener in 0..2 {
        expect_hello(&mut proxy.client_of(listener).await).await;
        leader.session().await;
    }
    exchange(&mut writer, &mut writing).await;
    exchange(&mut reader, &mut reading).await;
    let page_address = proxy.addresses.stats[0];
    let shown = page(page_address).await.expect("the page answers");
    assert!(shown.contains(&read.to_string()), "a reader is left there: {shown}");

    // The same port again: the listener goes on counting.
    let mut third = first.clone();
    third.listeners.push(ListenerConfig::read(read.to_string(), None, true));
    third.listeners.remove(1);
    proxy.reload(third).await.expect("a good configuration");
    assert_eq!(proxy.addresses.listeners[1], [read]);
    let mut again = proxy.client_of(1).await;
    replica.session().await;
    expect_hello(&mut again).await;
    let shown = page(page_address).await.expect("the page answers");
    assert_eq!(shown.matches(&format!("\"name\":\"{read}\"")).count(), 1, "{shown}");
    assert!(shown.contains("\"sessions_total\":2"), "{shown}");
    assert!(shown.contains("the configuration was read again"), "{shown}");

    // What ends sessions does so after reloads as before.
    cluster.no_leader();
    session_is_told(&mut writing).await;
    assert_eq!(expect_fatal_after_ready(&mut writer).await, "57P01");
}

async fn session_is_told(session: &mut ServerSession) {
    let _ = session.stream.write_all(&ready()).await; // Whether it is still there is what the client is asked.
}

/// The client's last words may be preceded by what the server said.
async fn expect_fatal_after_ready(client: &mut TcpStream) -> String {
    loop {
        match read_message(client).await {
            Some((b'E', body)) => {
                let text = String::from_utf8_lossy(&body).into_owned();
                let code = text.split('\0').find_map(|field| field.strip_prefix('C'));
                return code.expect("a SQLSTATE").to_owned();
            }
            Some(_) => {}
            // It was in the middle of an exchange.
            None => return "57P01".to_owned(),
        }
    }
}

#[tokio::test]
async fn newcomers_get_the_new_settings() {
    let (mut leader, agentless) = (Server::start().await, Cluster::new());
    let mut cluster = agentless;
    cluster.writable("n1", leader.address);
    let mut proxy = Running::start(config(vec![read_listener()]), &cluster);
    cluster.confirmed().await;
    let mut impatient = config(vec![read_listener()]);
    impatient.hold.timeout = Duration::from_millis(50);
    proxy.reload(impatient.clone()).await.expect("a good configuration");
    let fatal = expect_fatal(&mut proxy.client().await).await;
    assert!(fatal.text.contains("no replica can be read from"), "{}", fatal.text);
    let mut with_fallback = impatient.clone();
    with_fallback.listeners[0].reads.fallback_to_leader = true;
    with_fallback.limits.connections = 1;
    with_fallback.hold.clients = 1;
    proxy.reload(with_fallback).await.expect("a good configuration");
    let mut reader = until("a place is free", async || {
        let mut reader = proxy.client().await;
        matches!(read_message(&mut reader).await, Some((b'R', _))).then_some(reader)
    })
    .await;
    expect_hello(&mut reader).await;
    leader.session().await;
    assert_eq!(expect_fatal(&mut proxy.client().await).await.sqlstate, "53300");
    proxy.reload(config(vec![read_listener()])).await.expect("more places");
    let mut waiting = proxy.client().await;
    let told = tokio::time::timeout(Duration::from_millis(100), read_message(&mut waiting)).await;
    assert!(told.is_err(), "it waits for a replica again");
}

#[tokio::test]
async fn the_page_moves_and_what_cannot_change_is_said() {
    let cluster = Cluster::new();
    let mut first = config(vec![write_listener()]);
    first.stats = Some(StatsConfig {
        address: "127.0.0.1:0".to_owned(),
    });
    let mut proxy = Running::start(first.clone(), &cluster);
    let before = proxy.addresses.stats[0];
    let mut second = first.clone();
    second.stats = Some(StatsConfig {
        address: "localhost:0".to_owned(),
    });
    second.workers = 5;
    let reloaded = proxy.reload(second).await.expect("a good configuration");
    assert_eq!(reloaded.at_next_start, ["workers"]);
    assert!(page(proxy.addresses.stats[0]).await.is_some());
    until("the page has left its port", async || {
        page(before).await.is_none().then_some(())
    })
    .await;
    first.stats = None;
    let reloaded = proxy.reload(first).await.expect("a good configuration");
    assert!(reloaded.addresses.stats.is_empty() && reloaded.at_next_start.is_empty());
}

#[tokio::test]
async fn a_page_that_was_handed_over_is_served_here_no_more_and_sessions_go_on() {
    let mut leader = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", leader.address);
    let mut config = config(vec![write_listener()]);
    config.stats = Some(StatsConfig {
        address: "127.0.0.1:0".to_owned(),
    });
    let proxy = Running::start(config, &cluster);
    let mut client = proxy.client().await;
    let mut session = leader.session().await;
    expect_hello(&mut client).await;
    let handed_over = within("the sockets", proxy.reloader.sockets()).await.expect("copies");
    within("the page is closed", proxy.reloader.close_page()).await;
    // Whoever has its socket gets all who come from here on.
    let page_address = proxy.addresses.stats[0];
    let has_it = |socket: &std::net::TcpListener| socket.local_addr().is_ok_and(|own| own == page_address);
    let mut handed_over = handed_over.into_iter().map(std::net::TcpListener::from);
    let theirs = handed_over.find(has_it).expect("it is one of them");
    let theirs = tokio::net::TcpListener::from_std(theirs).expect("a socket");
    for _ in 0..10 {
        let _coming = TcpStream::connect(page_address).await.expect("somebody listens");
        within("it comes to the other", theirs.accept())
            .await
            .expect("accepted");
    }
    exchange(&mut client, &mut session).await;
    expect_hello(&mut proxy.client().await).await;
    leader.session().await;
}

#[tokio::test]
async fn a_configuration_that_cannot_work_changes_nothing() {
    let mut leader = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", leader.address);
    let mut proxy = Running::start(config(vec![write_listener()]), &cluster);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken_address = taken.local_addr().expect("bound").to_string();
    let mut bad = config(vec![read_listener(), ListenerConfig::write(taken_address.clone())]);
    bad.limits.connections = 1;
    bad.hold.clients = 1;
    let refused = proxy.reload(bad).await.expect_err("the port is taken");
    assert!(refused.to_string().contains(&taken_address), "{refused}");
    let refused = proxy.reload(config(vec![])).await.expect_err("no listener");
    assert!(refused.to_string().contains("there is no listener"), "{refused}");
    let mut kept = Vec::new();
    for _ in 0..2 {
        let mut client = proxy.client().await;
        leader.session().await;
        expect_hello(&mut client).await;
        kept.push(client);
    }
    proxy.stop.cancel();
    drop(kept);
    proxy.ended().await.expect("as asked");
    let refused = proxy.reload(config(vec![write_listener()])).await;
    assert!(matches!(refused, Err(ReloadError::Stopping)));
}

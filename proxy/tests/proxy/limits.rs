use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;

use crate::fake::*;

#[tokio::test]
async fn a_connection_over_the_limit_hears_why_and_a_cancel_still_passes() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let mut config = config(vec![write_listener()]);
    config.limits.connections = 1;
    config.hold.clients = 1;
    let proxy = Running::start(config, &cluster);
    let mut first = proxy.client().await;
    let key = expect_hello(&mut first).await;
    let session = server.session().await;
    let fatal = expect_fatal(&mut proxy.client().await).await;
    assert_eq!(fatal.sqlstate, "53300");
    let mut canceller = proxy.connect().await;
    canceller.write_all(&packet(CANCEL_REQUEST, &key)).await.expect("sent");
    server.cancel().await;
    drop((first, session));
    // The place is free once the proxy has seen the end.
    until("a place is free", async || {
        let mut client = proxy.client().await;
        matches!(read_message(&mut client).await, Some((b'R', _))).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_stop_refuses_newcomers_then_cuts_what_has_not_ended() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let mut proxy = Running::start(config(vec![write_listener()]), &cluster);
    let mut idle = proxy.client().await;
    let _idle_session = server.session().await;
    expect_hello(&mut idle).await;
    proxy.stop.cancel();
    let fatal = expect_fatal(&mut idle).await;
    assert_eq!(fatal.sqlstate, "57P01");
    assert!(fatal.text.contains("the proxy stops"), "{}", fatal.text);
    proxy.ended().await.expect("as asked");
    assert!(
        tokio::net::TcpStream::connect(proxy.addresses.listeners[0][0])
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_drain_lets_sessions_end_by_themselves() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let mut config = config(vec![write_listener()]);
    config.drain = PATIENCE;
    let mut proxy = Running::start(config, &cluster);
    let mut client = proxy.client().await;
    let mut session = server.session().await;
    expect_hello(&mut client).await;
    proxy.stop.cancel();
    until("the port is closed", async || {
        tokio::net::TcpStream::connect(proxy.addresses.listeners[0][0])
            .await
            .err()
    })
    .await;
    exchange(&mut client, &mut session).await;
    drop(client);
    let mut rest = Vec::new();
    within("the server hears", session.stream.read_to_end(&mut rest))
        .await
        .expect("an orderly end");
    drop(session);
    proxy.ended().await.expect("as asked");
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let cluster = Cluster::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("bound").to_string();
    let config = config(vec![pgherd_proxy::ListenerConfig::write(address.clone())]);
    let Err(error) = pgherd_proxy::Proxy::bind(config, cluster.handle.clone()) else {
        panic!("the port is taken")
    };
    assert!(error.to_string().contains(&address), "{error}");
}

#[tokio::test]
async fn a_proxy_that_is_dropped_leaves_no_session_without_a_fence() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let mut proxy = Running::start(config(vec![write_listener()]), &cluster);
    let mut client = proxy.client().await;
    let _session = server.session().await;
    expect_hello(&mut client).await;
    proxy.running.abort_all();
    assert_eq!(expect_fatal(&mut client).await.sqlstate, "57P01");
}

use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;

use crate::fake::*;

#[tokio::test]
async fn a_held_client_is_released_when_a_leader_becomes_writable() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.no_leader();
    let proxy = Running::start(config(vec![write_listener()]), &cluster);
    let mut client = proxy.client().await;
    cluster.leader_key("n1").record("n1", server.address, "promoted", "");
    assert!(
        tokio::time::timeout(Duration::from_millis(100), server_session(&mut server))
            .await
            .is_err()
    );
    cluster.record("n1", server.address, "primary", "");
    let mut session = server.session().await;
    expect_hello(&mut client).await;
    exchange(&mut client, &mut session).await;
}

async fn server_session(server: &mut Server) -> ServerSession {
    server.session().await
}

#[tokio::test]
async fn a_hold_that_expires_is_refused_with_the_reason() {
    let server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.no_leader();
    let mut config = config(vec![write_listener()]);
    config.hold.timeout = Duration::from_millis(50);
    let proxy = Running::start(config, &cluster);
    let fatal = expect_fatal(&mut proxy.client().await).await;
    assert_eq!(fatal.sqlstate, "57P03");
    assert!(fatal.text.contains("there is no leader"), "{}", fatal.text);
    cluster.leader_key("n1").record("n1", server.address, "promoted", "");
    let fatal = expect_fatal(&mut proxy.client().await).await;
    assert!(
        fatal.text.contains("leader n1 is not writable yet: role promoted"),
        "{}",
        fatal.text
    );
    cluster.record("n1", server.address, "standby_leader", "");
    let fatal = expect_fatal(&mut proxy.client().await).await;
    assert!(fatal.text.contains("standby cluster"), "{}", fatal.text);
}

#[tokio::test]
async fn a_leader_that_does_not_answer_is_tried_again_while_the_view_names_it() {
    // Bound and closed again: refused until the server comes back on the same port.
    let port = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = port.local_addr().expect("bound");
    drop(port);
    let mut cluster = Cluster::new();
    cluster.writable("n1", address);
    let proxy = Running::start(config(vec![write_listener()]), &cluster);
    let mut client = proxy.client().await;
    assert!(
        tokio::time::timeout(Duration::from_millis(100), read_message(&mut client))
            .await
            .is_err()
    );
    let listener = until("the port is free again", async || TcpListener::bind(address).await.ok()).await;
    let (mut server, _) = within("it is dialled again", listener.accept())
        .await
        .expect("accepted");
    server.write_all(&ready()).await.expect("sent");
    assert_eq!(read_message(&mut client).await, Some((b'Z', b"I".to_vec())));
}

#[tokio::test]
async fn a_dial_is_given_up_when_the_leader_changes() {
    // Listens, never accepts, and its queue is full: connecting to it hangs.
    let full = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    let any: std::net::SocketAddr = "127.0.0.1:0".parse().expect("an address");
    full.bind(&any.into()).expect("a port");
    full.listen(0).expect("listens");
    let address = full
        .local_addr()
        .expect("bound")
        .as_socket()
        .expect("an internet address");
    let _first = tokio::net::TcpStream::connect(address).await.expect("the only place");
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", address);
    let proxy = Running::start(config(vec![write_listener()]), &cluster);
    let mut client = proxy.client().await;
    cluster.writable("n2", server.address);
    server.session().await;
    expect_hello(&mut client).await;
}

#[tokio::test]
async fn no_more_clients_are_held_than_allowed() {
    let mut cluster = Cluster::new();
    cluster.no_leader();
    let mut config = config(vec![write_listener()]);
    config.hold.clients = 1;
    let proxy = Running::start(config, &cluster);
    let mut clients = [proxy.client().await, proxy.client().await];
    let [first, second] = &mut clients;
    let refused = tokio::select! {
        fatal = expect_fatal(first) => fatal,
        fatal = expect_fatal(second) => fatal,
    };
    assert_eq!(refused.sqlstate, "53300");
}

#[tokio::test]
async fn a_held_client_that_leaves_gives_its_place_back() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.no_leader();
    let mut config = config(vec![write_listener()]);
    config.hold.clients = 1;
    let proxy = Running::start(config, &cluster);
    drop(proxy.client().await);
    let mut client = until("a place to wait is free", async || {
        let mut client = proxy.client().await;
        let answered = tokio::time::timeout(Duration::from_millis(100), read_message(&mut client)).await;
        answered.is_err().then_some(client)
    })
    .await;
    cluster.writable("n1", server.address);
    server.session().await;
    expect_hello(&mut client).await;
}

#[tokio::test]
async fn readers_try_the_other_replica_and_never_the_leader() {
    let port = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let dead = port.local_addr().expect("bound");
    drop(port);
    let (leader, mut replica) = (Server::start().await, Server::start().await);
    let mut cluster = Cluster::new();
    cluster
        .writable("n1", leader.address)
        .replica("n2", dead)
        .replica("n3", replica.address);
    let proxy = Running::start(config(vec![read_listener()]), &cluster);
    for _ in 0..8 {
        let mut client = proxy.client().await;
        expect_hello(&mut client).await;
        replica.session().await;
    }
}

#[tokio::test]
async fn a_promoted_replica_gets_no_reader_any_more() {
    let (mut first, mut second) = (Server::start().await, Server::start().await);
    let mut cluster = Cluster::new();
    cluster.replica("n1", first.address);
    let proxy = Running::start(config(vec![read_listener()]), &cluster);
    expect_hello(&mut proxy.client().await).await;
    first.session().await;
    cluster.leader_key("n1").replica("n2", second.address);
    for _ in 0..4 {
        expect_hello(&mut proxy.client().await).await;
        second.session().await;
    }
}

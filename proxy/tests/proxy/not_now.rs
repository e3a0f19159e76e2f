//! Servers that are there and take no connections.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::fake::*;

async fn listener() -> (TcpListener, std::net::SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    (listener, address)
}

#[tokio::test]
async fn a_writer_is_kept_from_a_leader_that_starts_up_until_it_takes_connections() {
    let (server, address) = listener().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", address);
    let proxy = Running::start(config(vec![write_listener()]), &cluster);
    let mut client = proxy.client().await;
    for _ in 0..3 {
        assert_eq!(turn_away(&server, &starting_up()).await, startup());
    }
    let (mut session, _) = within("it is tried again", server.accept()).await.expect("accepted");
    assert_eq!(read_packet(&mut session).await, Some(startup()));
    session.write_all(&ready()).await.expect("sent");
    assert_eq!(read_message(&mut client).await, Some((b'Z', b"I".to_vec())));
}

#[tokio::test]
async fn when_the_hold_expires_the_client_is_told_the_servers_own_reason() {
    let (server, address) = listener().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", address);
    let mut config = config(vec![write_listener()]);
    config.hold.timeout = Duration::from_millis(300);
    let proxy = Running::start(config, &cluster);
    let mut client = proxy.client().await;
    let refusing = async {
        loop {
            turn_away(&server, &starting_up()).await;
        }
    };
    let fatal = tokio::select! {
        fatal = expect_fatal(&mut client) => fatal,
        () = refusing => unreachable!("it refuses for ever"),
    };
    assert_eq!(fatal.sqlstate, "57P03");
    let reason = "n1 takes no connections now: the database system is starting up";
    assert!(fatal.text.contains(reason), "{}", fatal.text);
}

#[tokio::test]
async fn a_reader_is_sent_to_another_replica_at_once() {
    let (starting, address) = listener().await;
    let mut replica = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.replica("n2", address).replica("n3", replica.address);
    let mut config = config(vec![read_listener()]);
    config.hold.clients = 0;
    cluster.confirmed().await;
    let proxy = Running::start(config, &cluster);
    let refusing = async {
        loop {
            turn_away(&starting, &starting_up()).await;
        }
    };
    let reading = async {
        for _ in 0..8 {
            expect_hello(&mut proxy.client().await).await;
            replica.session().await;
        }
    };
    tokio::select! {
        () = reading => {}
        () = refusing => unreachable!("it refuses for ever"),
    }
}

#[tokio::test]
async fn readers_of_a_cluster_that_starts_up_are_told_why() {
    let (starting, address) = listener().await;
    let mut cluster = Cluster::new();
    cluster.replica("n2", address);
    let mut config = config(vec![read_listener()]);
    config.hold.clients = 0;
    cluster.confirmed().await;
    let proxy = Running::start(config, &cluster);
    let mut client = proxy.client().await;
    turn_away(&starting, &starting_up()).await;
    let fatal = expect_fatal(&mut client).await;
    assert!(fatal.text.contains("n2 takes no connections now"), "{}", fatal.text);
}

#[tokio::test]
async fn every_other_first_word_is_the_clients() {
    let (server, address) = listener().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", address);
    let proxy = Running::start(config(vec![write_listener()]), &cluster);
    let answers = [
        message(b'E', b"SFATAL\0VFATAL\0C28000\0Mno entry for host\0\0"),
        [message(b'v', &[0; 8]), message(b'R', &[0; 4])].concat(),
        message(b'E', &[b'M'; 10_000]),
        b"Ecould not fork new process for connection\0".to_vec(),
        b"E\0\0".to_vec(),
    ];
    for answer in answers {
        let mut client = proxy.client().await;
        turn_away(&server, &answer).await;
        let mut got = Vec::new();
        within("the answer", client.read_to_end(&mut got))
            .await
            .expect("an orderly end");
        assert_eq!(got, answer);
    }
}

#[tokio::test]
async fn a_client_whose_server_has_not_answered_yet_moves_to_the_next_leader() {
    let (silent, address) = listener().await;
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", address);
    let proxy = Running::start(config(vec![write_listener()]), &cluster);
    let mut client = proxy.client().await;
    let _unanswered = within("a session is asked for", silent.accept())
        .await
        .expect("accepted");
    cluster.writable("n2", server.address);
    server.session().await;
    expect_hello(&mut client).await;
}

#[tokio::test]
async fn reads_go_on_while_nobody_leads_and_the_replica_does_not_stream() {
    let (leader, mut replica) = (Server::start().await, Server::start().await);
    let mut cluster = Cluster::new();
    let archive = r#","replication_state":"in archive recovery""#;
    cluster
        .writable("n1", leader.address)
        .record("n2", replica.address, "replica", archive);
    let proxy = Running::start(config(vec![read_listener()]), &cluster);
    let mut client = proxy.client().await;
    assert!(
        tokio::time::timeout(Duration::from_millis(100), read_message(&mut client))
            .await
            .is_err()
    );
    cluster.no_leader();
    replica.session().await;
    expect_hello(&mut client).await;
}

#[tokio::test]
async fn reads_go_on_while_the_leader_cannot_be_connected_to() {
    let (dead, address) = listener().await;
    drop(dead);
    let mut replica = Server::start().await;
    let mut cluster = Cluster::new();
    cluster
        .writable("n1", address)
        .record("n2", replica.address, "replica", "");
    let mut fallback = read_listener();
    fallback.reads.fallback_to_leader = true;
    let proxy = Running::start(config(vec![read_listener(), fallback]), &cluster);
    for listener in 0..2 {
        expect_hello(&mut proxy.client_of(listener).await).await;
        replica.session().await;
    }
}

#[tokio::test]
async fn a_reader_waits_for_the_only_leader_while_it_starts_up() {
    let (server, address) = listener().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", address);
    let mut fallback = read_listener();
    fallback.reads.fallback_to_leader = true;
    let proxy = Running::start(config(vec![fallback]), &cluster);
    let mut client = proxy.client().await;
    for _ in 0..3 {
        turn_away(&server, &starting_up()).await;
    }
    let (mut session, _) = within("it is tried again", server.accept()).await.expect("accepted");
    assert_eq!(read_packet(&mut session).await, Some(startup()));
    session.write_all(&ready()).await.expect("sent");
    assert_eq!(read_message(&mut client).await, Some((b'Z', b"I".to_vec())));
}

#[tokio::test]
async fn a_leader_that_is_back_keeps_waiting_readers_from_a_replica_that_does_not_stream() {
    let (dead, address) = listener().await;
    drop(dead);
    let (other, stranded) = listener().await;
    let mut replica = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", address).record("n2", stranded, "replica", "");
    let proxy = Running::start(config(vec![read_listener()]), &cluster);
    let mut client = proxy.client().await;
    turn_away(&other, &starting_up()).await;
    let leader = until("the port is free again", async || TcpListener::bind(address).await.ok()).await;
    let refusing = async {
        loop {
            turn_away(&other, &starting_up()).await;
        }
    };
    tokio::select! {
        asked = within("the leader is asked again", leader.accept()) => drop(asked),
        () = refusing => unreachable!("it refuses for ever"),
    }
    cluster.replica("n3", replica.address);
    replica.session().await;
    expect_hello(&mut client).await;
    let tried = tokio::time::timeout(Duration::ZERO, other.accept()).await;
    assert!(tried.is_err(), "the leader had answered");
}

use pgherd_proxy::OnChange;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::fake::*;

async fn send_cancel(proxy: &Running, listener: usize, key: &[u8]) -> Vec<u8> {
    let request = packet(CANCEL_REQUEST, key);
    let mut canceller = proxy.connect_to(listener).await;
    canceller.write_all(&request).await.expect("sent");
    let mut answer = Vec::new();
    let _ = within("it is closed", canceller.read_to_end(&mut answer)).await;
    assert!(answer.is_empty(), "PostgreSQL never answers a cancel request");
    request
}

#[tokio::test]
async fn a_cancel_reaches_the_server_of_its_session_from_any_connection() {
    // Long keys as of protocol 3.2 on one, short ones on the other.
    let mut servers = [Server::start().await, Server::with_secret_bytes(32).await];
    let mut cluster = Cluster::new();
    cluster.replica("n1", servers[0].address);
    let proxy = Running::start(config(vec![read_listener(), write_listener()]), &cluster);
    let mut first = proxy.client().await;
    let first_key = expect_hello(&mut first).await;
    let _first_session = servers[0].session().await;
    cluster.leader_key("n1").replica("n2", servers[1].address);
    let mut second = proxy.client().await;
    let second_key = expect_hello(&mut second).await;
    let _second_session = servers[1].session().await;
    // Four times each, so that both workers get some.
    for _ in 0..4 {
        let request = send_cancel(&proxy, 1, &first_key).await;
        assert_eq!(servers[0].cancel().await, request);
        let request = send_cancel(&proxy, 1, &second_key).await;
        assert_eq!(servers[1].cancel().await, request);
    }
    assert!(servers.iter_mut().all(Server::has_no_cancel));
}

#[tokio::test]
async fn an_unknown_key_goes_to_the_leader_or_to_every_replica() {
    let (mut leader, mut replica) = (Server::start().await, Server::start().await);
    let mut cluster = Cluster::new();
    cluster.writable("n1", leader.address).replica("n2", replica.address);
    let proxy = Running::start(config(vec![write_listener(), read_listener()]), &cluster);
    let request = send_cancel(&proxy, 0, b"pid.secret").await;
    assert_eq!(leader.cancel().await, request);
    assert!(replica.has_no_cancel());
    let request = send_cancel(&proxy, 1, b"pid.secret").await;
    assert_eq!(replica.cancel().await, request);
    assert!(leader.has_no_cancel());
}

#[tokio::test]
async fn an_unknown_key_goes_wherever_readers_may_be() {
    let (mut leader, mut replica) = (Server::start().await, Server::start().await);
    let mut cluster = Cluster::new();
    cluster
        .writable("n1", leader.address)
        // Its sessions may go on, although it gets no newcomers.
        .record("n2", replica.address, "replica", r#","tags":{"noloadbalance":true}"#);
    let mut with_fallback = read_listener();
    with_fallback.reads.fallback_to_leader = true;
    let mut kept = read_listener();
    kept.reads.on_promoted = Some(OnChange::Keep);
    let proxy = Running::start(config(vec![with_fallback, kept]), &cluster);
    cluster.confirmed().await;
    for listener in 0..2 {
        let request = send_cancel(&proxy, listener, b"pid.secret").await;
        assert_eq!(leader.cancel().await, request);
        assert_eq!(replica.cancel().await, request);
    }
}

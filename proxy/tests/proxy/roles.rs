//! Listeners for other kinds of readers than those who take any replica.

use std::time::Duration;

use pgherd_proxy::{ListenerConfig, ListenerRole};

use crate::fake::*;

fn listener(role: ListenerRole) -> ListenerConfig {
    ListenerConfig::new("127.0.0.1:0", role)
}

#[tokio::test]
async fn readers_get_the_kind_of_member_that_their_listener_is_for() {
    let (mut leader, mut sync, mut other) = (Server::start().await, Server::start().await, Server::start().await);
    let mut cluster = Cluster::new();
    cluster
        .writable("n1", leader.address)
        .replica("n2", sync.address)
        .record(
            "n3",
            other.address,
            "replica",
            r#","replication_state":"streaming","tags":{"purpose":"reports"}"#,
        )
        .sync(r#"{"leader":"n1","sync_standby":"n2"}"#);
    let mut tagged = listener(ListenerRole::Any);
    tagged.reads.tags.insert("purpose".to_owned(), "reports".to_owned());
    let listeners = vec![listener(ListenerRole::Sync), listener(ListenerRole::Async), tagged];
    let proxy = Running::start(config(listeners), &cluster);
    for _ in 0..4 {
        for index in 0..3 {
            expect_hello(&mut proxy.client_of(index).await).await;
            let server = if index == 0 { &mut sync } else { &mut other };
            server.session().await;
        }
    }
    // Nobody went to the leader, who is left when the others go.
    cluster.member_leaves("n3");
    let mut any = config(vec![listener(ListenerRole::Any)]);
    any.hold.clients = 0;
    let proxy = Running::start(any, &cluster);
    cluster.member_leaves("n2");
    expect_hello(&mut proxy.client().await).await;
    leader.session().await;
}

#[tokio::test]
async fn a_refusal_says_of_each_member_why_it_is_not_the_kind() {
    let server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster
        .writable("n1", server.address)
        .replica("n2", server.address)
        .replica("n3", server.address)
        .sync(r#"{"leader":"n1","sync_standby":"n2"}"#);
    cluster.confirmed().await;
    let mut tagged = listener(ListenerRole::Sync);
    tagged.reads.tags.insert("purpose".to_owned(), "reports".to_owned());
    let mut config = config(vec![tagged, listener(ListenerRole::StandbyLeader)]);
    config.hold.clients = 0;
    let proxy = Running::start(config, &cluster);
    let fatal = expect_fatal(&mut proxy.client().await).await;
    assert_eq!(fatal.sqlstate, "57P03");
    let why = "n1: it leads; n2: it has no tag purpose, reports is asked for; n3: it is not synchronous";
    assert!(fatal.text.contains(why), "{}", fatal.text);
    let fatal = expect_fatal(&mut proxy.client_of(1).await).await;
    assert!(fatal.text.contains("this is no standby cluster"), "{}", fatal.text);
}

#[tokio::test]
async fn the_leader_among_any_is_fenced_and_the_replicas_are_not() {
    let (mut leader, mut replica) = (Server::start().await, Server::start().await);
    let mut cluster = Cluster::new();
    cluster.writable("n1", leader.address);
    let mut config = config(vec![listener(ListenerRole::Any)]);
    config.slow_start = Duration::ZERO;
    let proxy = Running::start(config, &cluster);
    let mut on_leader = proxy.client().await;
    let _leading = leader.session().await;
    expect_hello(&mut on_leader).await;
    cluster.replica("n2", replica.address);
    // The leader has a session already.
    let mut on_replica = proxy.client().await;
    let mut following = replica.session().await;
    expect_hello(&mut on_replica).await;
    cluster.no_leader();
    assert_eq!(expect_fatal(&mut on_leader).await.sqlstate, "57P01");
    exchange(&mut on_replica, &mut following).await;
}

#[tokio::test]
async fn the_leader_of_a_standby_cluster_is_reached_by_a_listener_of_its_own() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster
        .leader_key("n1")
        .record("n1", server.address, "standby_leader", "");
    let listeners = vec![listener(ListenerRole::StandbyLeader), write_listener()];
    let proxy = Running::start(config(listeners), &cluster);
    let mut client = proxy.client().await;
    let _session = server.session().await;
    expect_hello(&mut client).await;
    cluster.no_leader();
    assert_eq!(expect_fatal(&mut client).await.sqlstate, "57P01");
}

#[tokio::test]
async fn a_replica_that_the_leader_has_been_past_for_too_long_gets_nobody() {
    let (mut stuck, mut other) = (Server::start().await, Server::start().await);
    let mut cluster = Cluster::new();
    cluster.optime(100).replica_at("n2", stuck.address, 100);
    cluster.confirmed().await;
    let mut limited = listener(ListenerRole::Read);
    limited.reads.max_lag_time = Some(Duration::from_millis(300));
    let mut config = config(vec![limited]);
    config.hold.clients = 0;
    let proxy = Running::start(config, &cluster);
    expect_hello(&mut proxy.client().await).await;
    stuck.session().await;
    cluster.optime(200);
    let refusal = until("the time is up", async || {
        let mut client = proxy.client().await;
        let (kind, body) = read_message(&mut client).await.expect("an answer");
        (kind == b'E').then(|| String::from_utf8_lossy(&body).into_owned())
    })
    .await;
    assert!(refusal.contains("s behind, 0.3 s allowed"), "{refusal}");
    // Another one that has come far enough is read from, and so is this one, when it has.
    cluster.replica_at("n3", other.address, 200);
    expect_hello(&mut proxy.client().await).await;
    other.session().await;
    cluster.member_leaves("n3").replica_at("n2", stuck.address, 200);
    expect_hello(&mut proxy.client().await).await;
}

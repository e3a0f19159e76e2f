use std::time::Duration;

use pgherd_cluster::event::{Event, EventId, Kind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::fake::*;
use crate::scene::Led;

anywhere!(
    an_idle_session_of_an_ended_epoch_is_told,
    the_event_that_a_client_is_told_is_the_clusters_where_one_was_told_and_else_this_proxys,
    a_session_that_has_just_taken_many_rows_is_told,
    a_session_in_the_middle_of_a_message_is_reset_without_a_word,
    a_session_with_an_unanswered_request_is_reset_without_a_word,
    the_same_holder_with_a_new_key_is_another_epoch_and_a_rebound_lease_is_not,
    a_lapsed_warrant_ends_writers_although_nothing_else_happens,
    a_reader_on_the_leader_is_fenced_like_a_writer,
    a_client_that_has_not_logged_in_yet_is_told_between_two_messages,
    a_promoted_replica_loses_its_readers_the_idle_ones_with_a_word,
    readers_who_may_be_on_the_leader_stay_through_a_promotion_and_are_fenced_from_then_on,
);

async fn an_idle_session_of_an_ended_epoch_is_told(there: CarriedAfter) {
    let (mut first, mut second) = (Server::start().await, Server::start().await);
    let mut cluster = Cluster::new();
    cluster.writable("n1", first.address);
    let proxy = Running::start(config_there(there, vec![write_listener()]), &cluster);
    let mut client = proxy.client().await;
    let mut session = first.session().await;
    expect_hello(&mut client).await;
    cluster.writable("n2", second.address);
    let fatal = expect_fatal(&mut client).await;
    assert_eq!(fatal.sqlstate, "57P01");
    assert!(fatal.text.contains("n2 leads now"), "{}", fatal.text);
    assert!(
        fatal.text.contains("may or may not have been committed"),
        "{}",
        fatal.text
    );
    expect_server_end(&mut session).await;
    expect_hello(&mut proxy.client().await).await;
    second.session().await;
}

async fn the_event_that_a_client_is_told_is_the_clusters_where_one_was_told_and_else_this_proxys(there: CarriedAfter) {
    let mut led = Led::behind(config_there(there, vec![write_listener()])).await;
    let (mut client, _session) = led.session().await;
    let holding = led.cluster.handle.load().epoch().map(ToString::to_string);
    let event = EventId::new(1000, "n3");
    let told = Event {
        from: holding,
        ..Event::new(event.clone(), 1000, "n3", Kind::Leader, "n1 has given the lead up")
    };
    led.cluster
        .put(&format!("pgherd/events/{event}"), told.to_json().to_string());
    led.cluster.no_leader();
    let fatal = expect_fatal(&mut client).await;
    assert!(fatal.text.contains(&format!("Event {event}.")), "{}", fatal.text);

    let address = led.server.address;
    led.cluster.writable("n1", address);
    let (mut client, _session) = led.session().await;
    led.cluster.no_leader();
    let fatal = expect_fatal(&mut client).await;
    let own = fatal.text.split_once("Event ").and_then(|(_, rest)| rest.get(..14));
    let own = own.and_then(EventId::parse).expect("the name of an event");
    assert!(own > event, "{own} is this proxy's own");
}

async fn a_session_that_has_just_taken_many_rows_is_told(there: CarriedAfter) {
    let mut led = Led::behind(config_there(there, vec![write_listener()])).await;
    let (mut client, mut session) = led.session().await;
    for row_bytes in [60_000, 50_000, 40_001] {
        let rows = [message(b'D', &vec![7; row_bytes]).repeat(100), ready()].concat();
        let mut taken = vec![0; rows.len()];
        let (sent, received) = within("the rows pass", async {
            tokio::join!(session.stream.write_all(&rows), client.read_exact(&mut taken))
        })
        .await;
        sent.expect("sent");
        received.expect("received");
        assert!(taken == rows, "other bytes");
    }
    led.cluster.no_leader();
    assert_eq!(expect_fatal(&mut client).await.sqlstate, "57P01");
}

async fn a_session_in_the_middle_of_a_message_is_reset_without_a_word(there: CarriedAfter) {
    let mut led = Led::behind(config_there(there, vec![write_listener()])).await;
    let (mut client, mut session) = led.session().await;
    session.stream.write_all(b"D\0\0\0\xffhalf").await.expect("sent");
    let mut half = [0; 9];
    within("half a message", client.read_exact(&mut half))
        .await
        .expect("received");
    led.cluster.no_leader();
    expect_reset(&mut client).await;
}

async fn a_session_with_an_unanswered_request_is_reset_without_a_word(there: CarriedAfter) {
    let mut led = Led::behind(config_there(there, vec![write_listener()])).await;
    let (mut client, mut session) = led.session().await;
    client.write_all(&message(b'Q', b"commit\0")).await.expect("sent");
    let mut query = [0; 12];
    within("the query", session.stream.read_exact(&mut query))
        .await
        .expect("received");
    led.cluster.no_leader();
    expect_reset(&mut client).await;
}

async fn the_same_holder_with_a_new_key_is_another_epoch_and_a_rebound_lease_is_not(there: CarriedAfter) {
    let mut led = Led::behind(config_there(there, vec![write_listener()])).await;
    let (mut client, mut session) = led.session().await;
    led.cluster.rebind_lease();
    exchange(&mut client, &mut session).await;
    session.stream.write_all(&ready()).await.expect("sent");
    assert_eq!(read_message(&mut client).await, Some((b'Z', b"I".to_vec())));
    led.cluster.leader_key("n1");
    assert_eq!(expect_fatal(&mut client).await.sqlstate, "57P01");
}

async fn a_lapsed_warrant_ends_writers_although_nothing_else_happens(there: CarriedAfter) {
    let (mut leader, mut replica) = (Server::start().await, Server::start().await);
    let mut cluster = Cluster::new();
    cluster.writable("n1", leader.address).replica("n2", replica.address);
    let proxy = Running::start(config_there(there, vec![write_listener(), read_listener()]), &cluster);
    let mut writer = proxy.client().await;
    let _writing = leader.session().await;
    expect_hello(&mut writer).await;
    let mut reader = proxy.client_of(1).await;
    let mut reading = replica.session().await;
    expect_hello(&mut reader).await;
    cluster.stop_confirming().await;
    let fatal = expect_fatal(&mut writer).await;
    assert_eq!(fatal.sqlstate, "57P01");
    assert!(fatal.text.contains("no longer certain"), "{}", fatal.text);
    exchange(&mut reader, &mut reading).await;
    // Held on the lapsed warrant, released by a new proof that no change of the view announces.
    let mut held = proxy.client().await;
    assert!(
        tokio::time::timeout(Duration::from_millis(100), read_message(&mut held))
            .await
            .is_err()
    );
    cluster.keep_confirming();
    let _released = leader.session().await;
    expect_hello(&mut held).await;
}

async fn a_reader_on_the_leader_is_fenced_like_a_writer(there: CarriedAfter) {
    let mut leader = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", leader.address);
    let mut listener = read_listener();
    listener.reads.fallback_to_leader = true;
    let proxy = Running::start(config_there(there, vec![listener]), &cluster);
    let mut client = proxy.client().await;
    let _session = leader.session().await;
    expect_hello(&mut client).await;
    cluster.no_leader();
    assert_eq!(expect_fatal(&mut client).await.sqlstate, "57P01");
}

async fn a_client_that_has_not_logged_in_yet_is_told_between_two_messages(there: CarriedAfter) {
    // A server that asks for a password and waits.
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.local_addr().expect("bound"));
    let proxy = Running::start(config_there(there, vec![write_listener()]), &cluster);
    let mut client = proxy.client().await;
    let (mut session, _) = within("a session", server.accept()).await.expect("accepted");
    session.write_all(&message(b'R', &[0, 0, 0, 3])).await.expect("sent");
    assert_eq!(read_message(&mut client).await, Some((b'R', vec![0, 0, 0, 3])));
    cluster.no_leader();
    assert_eq!(expect_fatal(&mut client).await.sqlstate, "57P01");
}

async fn a_promoted_replica_loses_its_readers_the_idle_ones_with_a_word(there: CarriedAfter) {
    let (mut promoted, mut other) = (Server::start().await, Server::start().await);
    let mut cluster = Cluster::new();
    cluster.replica("n2", promoted.address);
    let proxy = Running::start(config_there(there, vec![read_listener()]), &cluster);
    let mut idle = proxy.client().await;
    let mut idle_session = promoted.session().await;
    expect_hello(&mut idle).await;
    let mut busy = proxy.client().await;
    let mut busy_session = promoted.session().await;
    expect_hello(&mut busy).await;
    busy.write_all(&message(b'Q', b"select\0")).await.expect("sent");
    let mut query = [0; 12];
    within("the query", busy_session.stream.read_exact(&mut query))
        .await
        .expect("received");
    cluster.replica("n3", other.address).leader_key("n3");
    // Another's promotion is not theirs.
    exchange(&mut idle, &mut idle_session).await;
    idle_session.stream.write_all(&ready()).await.expect("sent");
    assert_eq!(read_message(&mut idle).await, Some((b'Z', b"I".to_vec())));
    cluster.leader_key("n2");
    let fatal = expect_fatal(&mut idle).await;
    assert_eq!(fatal.sqlstate, "57P01");
    assert!(fatal.text.contains("\nDn2 was promoted"), "{}", fatal.text);
    expect_reset(&mut busy).await;
    expect_server_end(&mut idle_session).await;
    expect_server_end(&mut busy_session).await;
    expect_hello(&mut proxy.client().await).await;
    other.session().await;
}

async fn readers_who_may_be_on_the_leader_stay_through_a_promotion_and_are_fenced_from_then_on(there: CarriedAfter) {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.replica("n2", server.address);
    let mut listener = read_listener();
    listener.reads.fallback_to_leader = true;
    let proxy = Running::start(config_there(there, vec![listener]), &cluster);
    let mut client = proxy.client().await;
    let mut session = server.session().await;
    expect_hello(&mut client).await;
    cluster.writable("n2", server.address);
    // The next one goes to the leader by the same view, so the fence has been told of it.
    let mut next = proxy.client().await;
    let _next = server.session().await;
    expect_hello(&mut next).await;
    exchange(&mut client, &mut session).await;
    session.stream.write_all(&ready()).await.expect("sent");
    assert_eq!(read_message(&mut client).await, Some((b'Z', b"I".to_vec())));
    cluster.no_leader();
    assert_eq!(expect_fatal(&mut client).await.sqlstate, "57P01");
    assert_eq!(expect_fatal(&mut next).await.sqlstate, "57P01");
}

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::fake::*;
use crate::scene::Led;

#[tokio::test]
async fn the_startup_message_arrives_byte_for_byte() {
    let mut led = Led::start().await;
    let mut client = led.proxy.client().await;
    let mut session = led.server.session().await;
    assert_eq!(session.startup, startup());
    assert_eq!(expect_hello(&mut client).await, session.key);
    exchange(&mut client, &mut session).await;
}

#[tokio::test]
async fn what_follows_the_startup_message_at_once_reaches_the_server() {
    let mut led = Led::start().await;
    let mut client = led.proxy.connect().await;
    client
        .write_all(&[startup(), b"right behind".to_vec()].concat())
        .await
        .expect("sent");
    let mut session = led.server.session().await;
    let mut got = [0; 12];
    within("the rest arrives", session.stream.read_exact(&mut got))
        .await
        .expect("received");
    assert_eq!(&got, b"right behind");
}

#[tokio::test]
async fn encryption_is_refused_politely_and_the_session_goes_on() {
    let mut led = Led::start().await;
    let mut client = led.proxy.connect().await;
    for request in [80_877_104, SSL_REQUEST] {
        client.write_all(&packet(request, b"")).await.expect("sent");
        assert_eq!(within("an answer", client.read_u8()).await.expect("an answer"), b'N');
    }
    client.write_all(&startup()).await.expect("sent");
    assert_eq!(led.server.session().await.startup, startup());
}

#[tokio::test]
async fn bytes_behind_an_ssl_request_are_refused() {
    let cluster = Cluster::new();
    let proxy = Running::start(config(vec![write_listener()]), &cluster);
    let mut client = proxy.connect().await;
    client
        .write_all(&[packet(SSL_REQUEST, b""), startup()].concat())
        .await
        .expect("sent");
    let fatal = expect_fatal(&mut client).await;
    assert_eq!(fatal.sqlstate, "08P01");
}

#[tokio::test]
async fn other_protocols_are_refused_with_a_word() {
    let cluster = Cluster::new();
    let proxy = Running::start(config(vec![write_listener()]), &cluster);
    let mut old = proxy.connect().await;
    old.write_all(&packet(131_072, b"user\0ann\0\0")).await.expect("sent");
    let fatal = expect_fatal(&mut old).await;
    assert_eq!(fatal.sqlstate, "0A000");
    assert!(
        fatal.text.contains("unsupported frontend protocol 2.0"),
        "{}",
        fatal.text
    );
}

#[tokio::test]
async fn garbage_ends_its_own_connection_and_no_other() {
    let mut led = Led::start().await;
    let (mut client, mut session) = led.session().await;
    let garbage: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"\x00\x00\x00\x00",
        b"\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x00\x00\x00\x08\x00\x03\x00\x00",
    ];
    for bytes in garbage {
        let mut other = led.proxy.connect().await;
        other.write_all(bytes).await.expect("sent");
        let mut rest = Vec::new();
        let _ = within("it is closed", other.read_to_end(&mut rest)).await;
    }
    exchange(&mut client, &mut session).await;
}

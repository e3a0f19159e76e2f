//! TLS between the proxy and members.

use std::path::PathBuf;
use std::time::Duration;

use pgherd_proxy::ProxyConfig;
use pgherd_proxy::tls::{ListenerTls, ServerTlsConfig, ServerTlsMode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::certificates::*;
use crate::fake::*;

fn connecting(mode: ServerTlsMode, ca: Option<PathBuf>) -> ProxyConfig {
    let mut config = config(vec![write_listener()]);
    config.hold.timeout = Duration::from_millis(300);
    config.server_tls = ServerTlsConfig {
        mode,
        ca,
        identity: None,
    };
    config
}

/// Whether a session came to the member, and then whether by TLS.
async fn comes(member: &mut Member, config: ProxyConfig) -> Option<bool> {
    let cluster = member.leads();
    let proxy = Running::start(config, &cluster);
    let mut client = proxy.client().await;
    match read_message(&mut client).await {
        Some((b'R', _)) => {
            let mut came = member.came().await;
            assert_eq!(came.session.startup, startup());
            expect_hello(&mut client).await;
            exchange(&mut client, &mut came.session).await;
            Some(came.by_tls)
        }
        other => {
            let (kind, body) = other.expect("a last message");
            assert!(kind == b'E' && String::from_utf8_lossy(&body).contains("n1 cannot be connected to"));
            assert!(member.has_none());
            None
        }
    }
}

#[tokio::test]
async fn members_are_connected_to_as_configured() {
    use ServerTlsMode::{Disable, Prefer, Require, VerifyCa, VerifyFull};
    let authority = Authority::new();
    let strangers = Authority::new();
    let mut members = [
        Member::start(None).await,
        Member::start(Some(&authority.issue("127.0.0.1"))).await,
        Member::start(Some(&authority.issue("elsewhere.test"))).await,
        Member::start(Some(&strangers.issue("127.0.0.1"))).await,
    ];
    let (plain, right, misnamed, unknown) = (0, 1, 2, 3);
    let known = || Some(authority.ca());
    for (member, mode, ca, expected) in [
        (plain, Disable, None, Some(false)),
        (plain, Prefer, None, Some(false)),
        (plain, Require, None, None),
        (plain, VerifyFull, known(), None),
        (right, Disable, None, Some(false)),
        (right, Prefer, None, Some(true)),
        (right, Require, None, Some(true)),
        (right, VerifyCa, known(), Some(true)),
        (right, VerifyFull, known(), Some(true)),
        (misnamed, Require, known(), Some(true)),
        (misnamed, VerifyCa, known(), Some(true)),
        (misnamed, VerifyFull, known(), None),
        (unknown, Prefer, known(), Some(true)),
        (unknown, Require, None, Some(true)),
        // As libpq: a CA that is given is used.
        (unknown, Require, known(), None),
        (unknown, VerifyCa, known(), None),
        (unknown, VerifyFull, known(), None),
    ] {
        let came = comes(&mut members[member], connecting(mode, ca)).await;
        assert_eq!(came, expected, "{mode:?}, member {member}");
    }
}

#[tokio::test]
async fn a_self_signed_certificate_is_its_own_ca_when_it_is_exactly_that() {
    use ServerTlsMode::{VerifyCa, VerifyFull};
    let directory = Authority::new();
    let (one, other) = (
        directory.self_signed("127.0.0.1"),
        directory.self_signed("elsewhere.test"),
    );
    let mut member = Member::start(Some(&one)).await;
    let mut misnamed = Member::start(Some(&other)).await;
    let its_own = |files: &Files| Some(files.certificate.clone());
    assert_eq!(
        comes(&mut member, connecting(VerifyFull, its_own(&one))).await,
        Some(true)
    );
    assert_eq!(comes(&mut member, connecting(VerifyFull, its_own(&other))).await, None);
    assert_eq!(
        comes(&mut misnamed, connecting(VerifyCa, its_own(&other))).await,
        Some(true)
    );
    assert_eq!(
        comes(&mut misnamed, connecting(VerifyFull, its_own(&other))).await,
        None
    );
}

#[tokio::test]
async fn a_client_by_tls_gets_a_plain_hop_where_tls_is_preferred() {
    let authority = Authority::new();
    let mut member = Member::start(Some(&authority.issue("127.0.0.1"))).await;
    let cluster = member.leads();
    let mut config = tls_config(&authority, ListenerTls::Allow);
    config.server_tls.mode = ServerTlsMode::Prefer;
    let proxy = Running::start(config, &cluster);
    let mut by_tls = Client::of(&authority).session(&proxy).await;
    assert!(!member.came().await.by_tls);
    expect_hello(&mut by_tls).await;
    let mut plain = proxy.client().await;
    assert!(member.came().await.by_tls);
    expect_hello(&mut plain).await;
}

#[tokio::test]
async fn tls_on_both_sides_of_a_session_is_refused_where_it_would_be_required() {
    let authority = Authority::new();
    for mode in [
        ServerTlsMode::Require,
        ServerTlsMode::VerifyCa,
        ServerTlsMode::VerifyFull,
    ] {
        let mut config = tls_config(&authority, ListenerTls::Allow);
        config.server_tls.mode = mode;
        config.server_tls.ca = Some(authority.ca());
        let refused = config.check().expect_err("nobody could log in").to_string();
        assert!(refused.contains("SCRAM cannot pass"), "{refused}");
        config.listeners[0].tls = ListenerTls::Passthrough;
        assert_eq!(config.check(), Ok(()));
    }
}

#[tokio::test]
async fn cancel_requests_go_to_members_as_sessions_do() {
    let authority = Authority::new();
    let mut member = Member::start(Some(&authority.issue("127.0.0.1"))).await;
    let cluster = member.leads();
    for (mode, expected) in [(ServerTlsMode::Disable, false), (ServerTlsMode::VerifyFull, true)] {
        let proxy = Running::start(connecting(mode, Some(authority.ca())), &cluster);
        let mut client = proxy.client().await;
        let came = member.came().await;
        let known = expect_hello(&mut client).await;
        assert_eq!(came.by_tls, expected);
        let of_another_proxy = vec![0, 0, 0, 9, 9, 9, 9, 9];
        for key in [known, of_another_proxy] {
            let request = packet(CANCEL_REQUEST, &key);
            let mut canceller = proxy.connect().await;
            canceller.write_all(&request).await.expect("sent");
            let cancelled = member.came().await;
            assert_eq!((cancelled.by_tls, cancelled.session.startup), (expected, request));
        }
    }
}

#[tokio::test]
async fn a_plain_client_is_not_offered_what_only_tls_can_bind() {
    let authority = Authority::new();
    let names = |list: &[u8]| message(b'R', &[&[0, 0, 0, 10][..], list].concat());
    let offer = names(b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0");
    let (mut member, scram) = Member::asking(&authority.issue("127.0.0.1"), offer).await;
    let cluster = member.leads();
    let proxy = Running::start(connecting(ServerTlsMode::Require, None), &cluster);
    let mut client = proxy.client().await;
    let expected = names(b"SCRAM-SHA-256\0\0")[5..].to_vec();
    assert_eq!(read_message(&mut client).await, Some((b'R', expected)));
    assert!(member.came().await.by_tls);
    // By TLS from end to end it is the client's own choice.
    let mut listener = write_listener();
    listener.tls = ListenerTls::Passthrough;
    let passing = Running::start(config(vec![listener]), &cluster);
    let mut client = Client::of(&authority).session(&passing).await;
    assert_eq!(read_message(&mut client).await, Some((b'R', scram[5..].to_vec())));
}

#[tokio::test]
async fn nor_is_it_when_the_member_takes_longer_than_others_would_be_tried_for() {
    let authority = Authority::new();
    let names = |list: &[u8]| message(b'R', &[&[0, 0, 0, 10][..], list].concat());
    let offer = names(b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0");
    let (member, hesitation) = Member::hesitating(&authority.issue("127.0.0.1"), offer).await;
    let cluster = member.leads();
    let proxy = Running::start(connecting(ServerTlsMode::Require, None), &cluster);
    let mut client = proxy.client().await;
    hesitation.asked().await;
    // The word of a member without TLS is waited for only while others would be tried. After that its client is relayed.
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let mut theirs = Cluster::new();
    theirs.writable("n1", silent.local_addr().expect("bound"));
    let plain = Running::start(connecting(ServerTlsMode::Disable, None), &theirs);
    let mut later = plain.client().await;
    later.write_all(&ready()).await.expect("sent");
    let (mut stream, _) = within("the later client's member", silent.accept())
        .await
        .expect("accepted");
    read_packet(&mut stream).await.expect("the startup message");
    let mut relayed = [0; 6];
    let relaying = within("it is relayed", stream.read_exact(&mut relayed)).await;
    assert!(relaying.is_ok() && relayed[..] == ready()[..]);
    hesitation.is_over();
    let expected = names(b"SCRAM-SHA-256\0\0")[5..].to_vec();
    assert_eq!(read_message(&mut client).await, Some((b'R', expected)));
}

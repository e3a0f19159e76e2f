//! Who gets in by TLS and who does not, certificates, reloads, and TLS that passes through to the server.

use std::path::Path;

use pgherd_proxy::tls::{ClientCertificates, ListenerTls, MinVersion};
use pgherd_proxy::{Proxy, ProxyConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::rustls::ProtocolVersion;

use crate::certificates::*;
use crate::fake::*;
use crate::tls::{Scene, scene};

#[tokio::test]
async fn where_tls_is_required_a_plain_session_is_refused_and_a_cancel_request_is_not() {
    let mut scene = scene(ListenerTls::Require).await;
    let fatal = expect_fatal(&mut scene.proxy.client().await).await;
    assert_eq!(fatal.sqlstate, "28000");
    assert!(fatal.text.contains("sslmode=require"), "{}", fatal.text);
    let mut client = Client::of(&scene.authority).session(&scene.proxy).await;
    let session = scene.server.session().await;
    expect_hello(&mut client).await;
    let request = packet(CANCEL_REQUEST, &session.key);
    let mut canceller = scene.proxy.connect().await;
    canceller.write_all(&request).await.expect("sent");
    assert_eq!(scene.server.cancel().await, request);
}

#[tokio::test]
async fn long_cancel_keys_pass_in_plaintext_and_by_tls() {
    let mut server = Server::with_secret_bytes(256).await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let authority = Authority::new();
    let proxy = Running::start(tls_config(&authority, ListenerTls::Require), &cluster);
    let client = Client::of(&authority);
    let mut stream = client.session(&proxy).await;
    let session = server.session().await;
    assert_eq!(expect_hello(&mut stream).await, session.key);
    let request = packet(CANCEL_REQUEST, &session.key);
    let mut plain = proxy.connect().await;
    plain.write_all(&request).await.expect("sent");
    assert_eq!(server.cancel().await, request);
    let mut encrypted = client.asked(proxy.connect().await).await.expect("TLS");
    encrypted.write_all(&request).await.expect("sent");
    assert_eq!(server.cancel().await, request);
    // A close without a farewell would be an error here, as it is to libpq.
    let mut answer = Vec::new();
    let ended = within("it is ended", encrypted.read_to_end(&mut answer)).await;
    assert_eq!(ended.expect("a farewell"), 0);
}

#[tokio::test]
async fn direct_tls_is_taken_with_alpn_only() {
    let mut scene = scene(ListenerTls::Require).await;
    let mut client = Client::of(&scene.authority);
    let mut stream = client.handshake(scene.proxy.connect().await).await.expect("TLS");
    stream.write_all(&startup()).await.expect("sent");
    let mut session = scene.server.session().await;
    expect_hello(&mut stream).await;
    exchange(&mut stream, &mut session).await;
    client.config.alpn_protocols.clear();
    let mut stream = client.handshake(scene.proxy.connect().await).await.expect("TLS");
    let fatal = expect_fatal(&mut stream).await;
    assert_eq!(fatal.sqlstate, "08P01");
    assert!(fatal.text.contains("ALPN"), "{}", fatal.text);
    client.config.alpn_protocols = vec![b"h2".to_vec()];
    let refused = client
        .handshake(scene.proxy.connect().await)
        .await
        .expect_err("an alert");
    assert!(refused.to_string().contains("NoApplicationProtocol"), "{refused}");
    // Who asks first need not say.
    client.config.alpn_protocols.clear();
    let mut stream = client.session(&scene.proxy).await;
    let mut session = scene.server.session().await;
    expect_hello(&mut stream).await;
    exchange(&mut stream, &mut session).await;
}

#[tokio::test]
async fn bytes_behind_a_request_for_tls_are_refused() {
    let scene = scene(ListenerTls::Allow).await;
    let mut client = scene.proxy.connect().await;
    let both = [packet(SSL_REQUEST, b""), startup()].concat();
    client.write_all(&both).await.expect("sent");
    assert_eq!(expect_fatal(&mut client).await.sqlstate, "08P01");
}

#[tokio::test]
async fn a_second_request_for_tls_inside_it_is_refused() {
    let scene = scene(ListenerTls::Allow).await;
    let client = Client::of(&scene.authority);
    let mut stream = client.asked(scene.proxy.connect().await).await.expect("TLS");
    stream.write_all(&packet(SSL_REQUEST, b"")).await.expect("sent");
    assert_eq!(expect_fatal(&mut stream).await.sqlstate, "08P01");
}

#[tokio::test]
async fn garbage_instead_of_a_handshake_ends_its_own_connection_and_no_other() {
    let mut scene = scene(ListenerTls::Allow).await;
    let mut client = Client::of(&scene.authority).session(&scene.proxy).await;
    let mut session = scene.server.session().await;
    expect_hello(&mut client).await;
    // Half a handshake message, then a record of another kind, which must not come between its halves.
    let torn = b"\x16\x03\x01\x00\x06\x01\x00\x40\x00\x03\x03\x17\x03\x03\x00\x01x";
    let oversized = [b"\x16\x03\x01\x40\x00\x01\xff\xff\xff".as_slice(), &[0; 16_400]].concat();
    for bytes in [
        &startup()[..],
        b"\x16\x03\x01\xff\xff",
        torn,
        &oversized,
        &[0x16; 70_000],
    ] {
        let mut other = scene.proxy.connect().await;
        other.write_all(&packet(SSL_REQUEST, b"")).await.expect("sent");
        assert_eq!(within("an answer", other.read_u8()).await.expect("an answer"), b'S');
        other.write_all(bytes).await.expect("sent");
        let _ = other.shutdown().await;
        let mut rest = Vec::new();
        let _ = within("it is closed", other.read_to_end(&mut rest)).await;
    }
    exchange(&mut client, &mut session).await;
    expect_no_defect(&scene.proxy).await;
}

async fn with(change: impl FnOnce(&mut ProxyConfig, &Authority)) -> Scene {
    let server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let authority = Authority::new();
    let mut config = tls_config(&authority, ListenerTls::Require);
    change(&mut config, &authority);
    let proxy = Running::start(config, &cluster);
    Scene {
        server,
        cluster,
        authority,
        proxy,
    }
}

fn asking(config: &mut ProxyConfig, authority: &Authority, wanted: ClientCertificates, map_users: bool) {
    let tls = config.client_tls.as_mut().expect("TLS");
    tls.client_ca = Some(authority.ca());
    tls.client_certificates = wanted;
    tls.map_users = map_users;
}

const BOTH: [&rustls::SupportedProtocolVersion; 2] = [&rustls::version::TLS13, &rustls::version::TLS12];

/// What becomes of a client that shows this: an alert's name, or nothing when it was served.
async fn refusal(scene: &mut Scene, client: &Client) -> Option<String> {
    let mut stream = match client.asked(scene.proxy.connect().await).await {
        Ok(stream) => stream,
        Err(error) => return Some(error.to_string()), // TLS 1.2 knows before anything is sent.
    };
    let _ = stream.write_all(&startup()).await;
    let _ = stream.flush().await;
    let mut first = [0; 1];
    match within("an answer", stream.read_exact(&mut first)).await {
        Ok(_) => {
            scene.server.session().await;
            None
        }
        Err(error) => Some(error.to_string()),
    }
}

#[tokio::test]
async fn client_certificates_are_asked_for_as_configured() {
    let others = Authority::new();
    let stranger = others.issue("ann");
    for wanted in [ClientCertificates::Optional, ClientCertificates::Required] {
        let mut scene = with(|config, authority| asking(config, authority, wanted, false)).await;
        let good = scene.authority.issue("ann");
        for version in BOTH {
            let client = |files| Client::with(&scene.authority, files, &[version]);
            let (nothing, known, unknown) = (client(None), client(Some(&good)), client(Some(&stranger)));
            let without = refusal(&mut scene, &nothing).await;
            match wanted {
                ClientCertificates::Required => {
                    let told = without.expect("refused");
                    assert!(
                        told.contains("CertificateRequired") || told.contains("HandshakeFailure"),
                        "{told}"
                    );
                }
                _ => assert_eq!(without, None),
            }
            assert_eq!(refusal(&mut scene, &known).await, None);
            let told = refusal(&mut scene, &unknown).await.expect("another CA's is refused");
            assert!(told.contains("UnknownCA") || told.contains("DecryptError"), "{told}");
        }
    }
}

#[tokio::test]
async fn a_certificate_is_for_the_user_whom_it_names() {
    let optional = ClientCertificates::Optional;
    let mut scene = with(|config, authority| asking(config, authority, optional, true)).await;
    let (ann, bob) = (scene.authority.issue("ann"), scene.authority.issue("bob"));
    let mut stream = Client::with(&scene.authority, Some(&ann), &BOTH)
        .session(&scene.proxy)
        .await;
    scene.server.session().await;
    expect_hello(&mut stream).await;
    let mut stream = Client::with(&scene.authority, Some(&bob), &BOTH)
        .session(&scene.proxy)
        .await;
    let fatal = expect_fatal(&mut stream).await;
    assert_eq!(fatal.sqlstate, "28000");
    assert!(fatal.text.contains("The certificate is for bob."), "{}", fatal.text);
    let mut stream = Client::of(&scene.authority).session(&scene.proxy).await;
    expect_hello(&mut stream).await;
}

#[tokio::test]
async fn the_oldest_version_is_as_configured() {
    let scene = with(|config, _| {
        config.client_tls.as_mut().expect("TLS").min_version = MinVersion::Tls13;
    })
    .await;
    let old = Client::with(&scene.authority, None, &[&rustls::version::TLS12]);
    let refused = old.asked(scene.proxy.connect().await).await.expect_err("an alert");
    assert!(refused.to_string().contains("ProtocolVersion"), "{refused}");
    let new = Client::of(&scene.authority).session(&scene.proxy).await;
    assert_eq!(new.get_ref().1.protocol_version(), Some(ProtocolVersion::TLSv1_3));
}

#[tokio::test]
async fn a_reload_takes_new_certificates_and_drops_nobody() {
    let mut scene = scene(ListenerTls::Require).await;
    let client = Client::of(&scene.authority);
    let mut before = client.session(&scene.proxy).await;
    let mut session = scene.server.session().await;
    expect_hello(&mut before).await;
    let shown_to = |stream: &tokio_rustls::client::TlsStream<_>| {
        stream.get_ref().1.peer_certificates().expect("one is shown")[0].clone()
    };
    // The same files with another pair in them.
    let config = tls_config(&scene.authority, ListenerTls::Require);
    scene.proxy.reload(config.clone()).await.expect("a good configuration");
    let mut after = client.session(&scene.proxy).await;
    let mut next = scene.server.session().await;
    expect_hello(&mut after).await;
    assert_ne!(shown_to(&before), shown_to(&after));
    exchange(&mut before, &mut session).await;
    exchange(&mut after, &mut next).await;
    let files = config.client_tls.clone().expect("TLS");
    std::fs::write(&files.certificate, "-----BEGIN NOTHING-----").expect("written");
    let refused = scene.proxy.reload(config).await.expect_err("a broken file");
    assert!(
        refused.to_string().contains(&files.certificate.display().to_string()),
        "{refused}"
    );
    let again = client.session(&scene.proxy).await;
    assert_eq!(shown_to(&again), shown_to(&after));
    exchange(&mut before, &mut session).await;
}

#[tokio::test]
async fn files_that_cannot_be_used_are_told_before_a_port_is_bound() {
    let authority = Authority::new();
    let cluster = Cluster::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let refused = |change: &dyn Fn(&mut pgherd_proxy::tls::ClientTlsConfig)| {
        let mut config = tls_config(&authority, ListenerTls::Allow);
        // A port that is taken: whoever binds first would say so.
        config.listeners[0].address = listener.local_addr().expect("bound").to_string();
        change(config.client_tls.as_mut().expect("TLS"));
        let Err(refused) = Proxy::bind(config, cluster.handle.clone()) else {
            panic!("it was bound");
        };
        refused.to_string()
    };
    let others = authority.issue("other");
    let told = refused(&|tls| tls.private_key.clone_from(&others.key));
    assert!(told.contains("other.key is not the key of"), "{told}");
    let told = refused(&|tls| tls.private_key = "/nowhere/at.all".into());
    assert!(told.contains("/nowhere/at.all: No such file"), "{told}");
    let told = refused(&|tls| tls.private_key.clone_from(&tls.certificate));
    assert!(told.contains("no private key in PEM is in it"), "{told}");
    let told = refused(&|tls| tls.certificate.clone_from(&tls.private_key));
    assert!(told.contains("no certificate in PEM is in it"), "{told}");
    let told = refused(&|tls| tls.certificate = Path::new("/").to_owned());
    assert!(told.contains("/: "), "{told}");
}

async fn passing() -> (Member, Cluster, Running, Authority) {
    let authority = Authority::new();
    let member = Member::start(Some(&authority.issue("127.0.0.1"))).await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", member.address);
    let mut listener = write_listener();
    listener.tls = ListenerTls::Passthrough;
    let proxy = Running::start(config(vec![listener]), &cluster);
    (member, cluster, proxy, authority)
}

#[tokio::test]
async fn tls_may_pass_through_to_the_server_and_the_fence_resets_it() {
    let (mut member, mut cluster, proxy, authority) = passing().await;
    let client = Client::of(&authority);
    let mut asked = client.session(&proxy).await;
    let mut first = member.came().await;
    expect_hello(&mut asked).await;
    let begun = std::time::Instant::now();
    let mut direct = client.handshake(proxy.connect().await).await.expect("TLS");
    direct.write_all(&startup()).await.expect("sent");
    let mut second = member.came().await;
    expect_hello(&mut direct).await;
    assert!(
        begun.elapsed() < std::time::Duration::from_secs(3),
        "it waited for the server's word"
    );
    assert!(first.by_tls && second.by_tls);
    exchange(&mut asked, &mut first.session).await;
    exchange(&mut direct, &mut second.session).await;
    let mut plain = proxy.client().await;
    let third = member.came().await;
    assert!(!third.by_tls);
    expect_hello(&mut plain).await;
    cluster.no_leader();
    expect_reset(asked.get_mut().0).await;
    expect_reset(direct.get_mut().0).await;
    assert_eq!(expect_fatal(&mut plain).await.sqlstate, "57P01");
}

#[tokio::test]
async fn a_server_without_tls_says_so_itself_through_the_proxy() {
    let mut member = Member::start(None).await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", member.address);
    let mut listener = write_listener();
    listener.tls = ListenerTls::Passthrough;
    let proxy = Running::start(config(vec![listener]), &cluster);
    let mut client = proxy.connect().await;
    client.write_all(&packet(SSL_REQUEST, b"")).await.expect("sent");
    assert_eq!(within("an answer", client.read_u8()).await.expect("an answer"), b'N');
    client.write_all(&startup()).await.expect("sent");
    let mut came = member.came().await;
    assert!(!came.by_tls);
    expect_hello(&mut client).await;
    exchange(&mut client, &mut came.session).await;
}

//! The page behind TLS.

use std::sync::Arc;

use pgherd_proxy::StatsConfig;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::certificates::*;
use crate::fake::*;

#[tokio::test]
async fn the_page_shows_its_certificate_and_a_reload_the_next_one() {
    let authority = Authority::new();
    let cluster = Cluster::new();
    let mut config = config(vec![write_listener()]);
    config.stats = Some(StatsConfig {
        address: "127.0.0.1:0".to_owned(),
    });
    config.page_tls = Some(shown(&authority.issue("page.test")));
    let mut proxy = Running::start(config.clone(), &cluster);
    let page = proxy.addresses.stats[0];
    let health = async |name: &'static str| {
        let mut roots = RootCertStore::empty();
        roots.add(authority.own.clone()).expect("a CA");
        let builder = ClientConfig::builder_with_provider(provider());
        let builder = builder.with_safe_default_protocol_versions().expect("versions");
        let mut client = builder.with_root_certificates(roots).with_no_client_auth();
        client.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let stream = TcpStream::connect(page).await.expect("the page listens");
        let name = ServerName::try_from(name).expect("a name");
        let mut stream = TlsConnector::from(Arc::new(client)).connect(name, stream).await.ok()?;
        let request = b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n";
        stream.write_all(request).await.expect("sent");
        let mut answer = Vec::new();
        let _ = within("an answer", stream.read_to_end(&mut answer)).await; // Its end may come without a farewell.
        Some(String::from_utf8_lossy(&answer).starts_with("HTTP/1.1 200"))
    };
    assert_eq!(health("page.test").await, Some(true));
    assert_eq!(health("next.test").await, None, "another name");
    config.page_tls = Some(shown(&authority.issue("next.test")));
    proxy.reload(config).await.expect("applied");
    assert_eq!(health("next.test").await, Some(true));
    let mut plain = TcpStream::connect(page).await.expect("the page listens");
    plain
        .write_all(b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n")
        .await
        .expect("sent");
    let mut answer = Vec::new();
    let _ = within("the end", plain.read_to_end(&mut answer)).await;
    assert!(!String::from_utf8_lossy(&answer).contains("200 OK"));
}

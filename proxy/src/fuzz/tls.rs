//! How connections begin with a listener that has a certificate.

use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use pgherd_cluster::tls::{ALPN, ServerTlsConfig, ServerTlsMode, connect, provider};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio_rustls::TlsConnector;

use super::{choice, wait};
use crate::handshake::{self, Arrived, HandshakeError, Offer, Wish};
use crate::stream::socket::Socket;
use crate::tls::ListenerTls;
use crate::wire::startup::{FirstPacket, packet_bytes};

/// More than this is not sent at once: it must fit between two sockets.
const SAID_BYTES_MAX: usize = 16 * 1024;
const IDENTITY: &[u8] = include_bytes!("identity.pem");

/// The listener's side.
static ACCEPT: LazyLock<Option<Arc<ServerConfig>>> = LazyLock::new(|| {
    let chain = CertificateDer::from_pem_slice(IDENTITY).ok()?;
    let key = PrivateKeyDer::from_pem_slice(IDENTITY).ok()?;
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .ok()?;
    let mut config = builder.with_no_client_auth().with_single_cert(vec![chain], key).ok()?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Some(Arc::new(config))
});

/// The side of a client that believes anybody.
static CONNECT: LazyLock<Option<ClientConfig>> = LazyLock::new(|| {
    let anybody = ServerTlsConfig {
        mode: ServerTlsMode::Require,
        ..ServerTlsConfig::default()
    };
    connect(&anybody, ALPN).ok()
});

/// How a client comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comes {
    /// It asks for TLS, and says what is no handshake that could be finished.
    Asking,
    /// It says so at once.
    AtOnce,
    /// It asks for TLS and speaks it.
    ByTls,
    /// It speaks it at once, naming the protocol or not.
    Directly { with_alpn: bool },
}

/// Bytes in the place of a handshake, or inside one that was finished.
pub(super) fn opening(input: &[u8]) {
    let (how, said) = choice(input);
    if said.len() > SAID_BYTES_MAX {
        return;
    }
    let tls = [ListenerTls::Allow, ListenerTls::Require][how % 2];
    let comes = match how / 2 % 4 {
        0 => Comes::Asking,
        1 => Comes::AtOnce,
        2 => Comes::ByTls,
        _ => Comes::Directly {
            with_alpn: how & 8 == 0,
        },
    };
    wait(async {
        let Ok((near, far)) = UnixStream::pair() else {
            panic!("no sockets")
        };
        let accept = ACCEPT.clone();
        assert!(accept.is_some(), "the certificate is there");
        let reading = handshake::read(Socket::Unix(near), Offer { tls, accept });
        // Kept until all is read: what a client leaves unread when it goes breaks the connection.
        let (arrived, _client) = tokio::join!(reading, client(far, comes, said));
        match comes {
            Comes::Asking | Comes::AtOnce => stays_outside(arrived, comes, tls),
            Comes::Directly { with_alpn: false } => {
                assert!(
                    matches!(
                        arrived,
                        Ok(Arrived {
                            wish: Wish::Refused(_),
                            ..
                        })
                    ),
                    "it might be another protocol's client"
                );
            }
            Comes::ByTls | Comes::Directly { with_alpn: true } => inside(arrived, said).await,
        }
    });
}

/// Says all that it has to say. The listener may have ended the connection before that.
async fn client(mut stream: UnixStream, comes: Comes, said: &[u8]) -> Box<dyn AsyncRead> {
    if matches!(comes, Comes::Asking | Comes::ByTls) {
        let asked = stream.write_all(&FirstPacket::ssl_request()).await;
        assert!(asked.is_ok() && stream.read_u8().await.is_ok_and(|answer| answer == b'S'));
    }
    if matches!(comes, Comes::Asking | Comes::AtOnce) {
        let _ = stream.write_all(said).await;
        let _ = stream.shutdown().await;
        return Box::new(stream);
    }
    let (Some(mut config), Ok(name)) = (CONNECT.clone(), ServerName::try_from("localhost")) else {
        panic!("no TLS")
    };
    if comes == (Comes::Directly { with_alpn: false }) {
        config.alpn_protocols.clear();
    }
    let Ok(mut stream) = TlsConnector::from(Arc::new(config)).connect(name, stream).await else {
        panic!("no handshake")
    };
    let _ = stream.write_all(said).await;
    let _ = stream.shutdown().await;
    Box::new(stream)
}

/// Nobody gets through TLS who cannot answer the server's side of it.
fn stays_outside(arrived: Result<Arrived, HandshakeError>, comes: Comes, tls: ListenerTls) {
    let Ok(Arrived { stream, wish, .. }) = arrived else {
        return;
    };
    assert!(stream.plain().is_some(), "TLS without a handshake");
    let in_plaintext = match wish {
        Wish::Refused(_) => return,
        Wish::Packet(FirstPacket::Cancel { .. }) => true,
        Wish::Packet(FirstPacket::Startup { .. }) => tls == ListenerTls::Allow,
        Wish::Packet(_) | Wish::Passthrough(_) => false,
    };
    assert!(in_plaintext && comes == Comes::AtOnce);
}

/// The first packet inside is what the pure reader takes it for, and all that is behind it is handed on.
async fn inside(arrived: Result<Arrived, HandshakeError>, said: &[u8]) {
    let total = said.first_chunk().map(|head| packet_bytes(*head));
    let first = match total {
        // Too little ever comes.
        None => return assert!(arrived.is_err()),
        Some(Ok(total)) if said.len() < total => return assert!(arrived.is_err()),
        Some(Ok(total)) => FirstPacket::decode(Bytes::copy_from_slice(&said[..total])).ok(),
        Some(Err(_)) => None,
    };
    let Ok(Arrived { mut stream, wish, more }) = arrived else {
        panic!("it says something, and gets no answer")
    };
    match (wish, first) {
        (
            Wish::Packet(FirstPacket::Startup { bytes, .. } | FirstPacket::Cancel { bytes, .. }),
            Some(FirstPacket::Startup { bytes: expected, .. } | FirstPacket::Cancel { bytes: expected, .. }),
        ) => {
            assert_eq!(bytes, expected);
            let mut handed_on = [&bytes[..], &more].concat();
            let mut chunk = [0; 1024];
            while let Ok(count @ 1..) = stream.read(&mut chunk).await {
                handed_on.extend_from_slice(&chunk[..count]);
            }
            assert_eq!(handed_on, said, "what is behind the packet is not handed on");
        }
        (Wish::Refused(_), None | Some(FirstPacket::Ssl | FirstPacket::GssEnc)) => {}
        (Wish::Refused(why), Some(packet)) => panic!("{packet:?} is refused: {why}"),
        (Wish::Packet(packet), first) => panic!("{packet:?} instead of {first:?}"),
        (Wish::Passthrough(_), _) => panic!("TLS ends here"),
    }
}

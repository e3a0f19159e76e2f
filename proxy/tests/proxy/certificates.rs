//! Certificates of the test's own, in files, and both ends of TLS for the test to play.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use pgherd_proxy::tls::{ClientCertificates, ClientTlsConfig, ListenerTls, MinVersion};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::fake::*;

pub(crate) fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// A certificate and its key, in files.
#[derive(Clone)]
pub(crate) struct Files {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

impl Files {
    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        let read = CertificateDer::pem_file_iter(&self.certificate).expect("PEM");
        read.collect::<Result<_, _>>().expect("PEM")
    }

    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::from_pem_file(&self.key).expect("PEM")
    }
}

/// A CA and a directory for what it issues.
pub(crate) struct Authority {
    pub(crate) directory: TempDir,
    issuer: Issuer<'static, KeyPair>,
    pub(crate) own: CertificateDer<'static>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "the test's CA");
        let own = params.self_signed(&key).expect("signed");
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(directory.path().join("ca.pem"), own.pem()).expect("written");
        Self {
            directory,
            issuer: Issuer::new(params, key),
            own: own.der().clone(),
        }
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// A certificate for a host, or for a user when the name is no host's.
    pub(crate) fn issue(&self, name: &str) -> Files {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        self.write(name, &certificate.pem(), &key)
    }

    /// One that nobody else has signed.
    pub(crate) fn self_signed(&self, name: &str) -> Files {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.self_signed(&key).expect("signed");
        self.write(&format!("self-{name}"), &certificate.pem(), &key)
    }

    fn write(&self, name: &str, certificate: &str, key: &KeyPair) -> Files {
        let files = Files {
            certificate: self.directory.path().join(format!("{name}.crt")),
            key: self.directory.path().join(format!("{name}.key")),
        };
        std::fs::write(&files.certificate, certificate).expect("written");
        std::fs::write(&files.key, key.serialize_pem()).expect("written");
        files
    }
}

/// What the proxy is told to show.
pub(crate) fn shown(files: &Files) -> ClientTlsConfig {
    ClientTlsConfig {
        certificate: files.certificate.clone(),
        private_key: files.key.clone(),
        client_ca: None,
        client_certificates: ClientCertificates::Ignored,
        map_users: false,
        min_version: MinVersion::Tls12,
    }
}

/// One listener for writers that treats TLS so, with a certificate for 127.0.0.1.
pub(crate) fn tls_config(authority: &Authority, tls: ListenerTls) -> pgherd_proxy::ProxyConfig {
    let mut listener = write_listener();
    listener.tls = tls;
    let mut config = config(vec![listener]);
    config.client_tls = Some(shown(&authority.issue("127.0.0.1")));
    config.stats = Some(pgherd_proxy::StatsConfig {
        address: "127.0.0.1:0".to_owned(),
    });
    config
}

/// No connection has ended by a panic, which a client could not tell from a refusal.
pub(crate) async fn expect_no_defect(proxy: &Running) {
    let mut page = TcpStream::connect(proxy.addresses.stats[0]).await.expect("the page");
    page.write_all(b"GET /metrics HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
        .await
        .expect("sent");
    let mut shown = String::new();
    let read = within("the metrics", page.read_to_string(&mut shown)).await;
    read.expect("an orderly end");
    assert!(shown.contains("\npgherd_panics_total 0\n"), "{shown}");
}

/// How the test's client connects.
pub(crate) struct Client {
    pub(crate) config: ClientConfig,
}

impl Client {
    /// One that trusts this authority.
    pub(crate) fn of(authority: &Authority) -> Self {
        Self::with(authority, None, &[&rustls::version::TLS13, &rustls::version::TLS12])
    }

    pub(crate) fn with(
        authority: &Authority,
        identity: Option<&Files>,
        versions: &[&'static rustls::SupportedProtocolVersion],
    ) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(authority.own.clone()).expect("a CA");
        let builder = ClientConfig::builder_with_provider(provider());
        let builder = builder.with_protocol_versions(versions).expect("versions");
        let builder = builder.with_root_certificates(roots);
        let mut config = match identity {
            None => builder.with_no_client_auth(),
            Some(files) => builder
                .with_client_auth_cert(files.chain(), files.private_key())
                .expect("an identity"),
        };
        config.alpn_protocols = vec![b"postgresql".to_vec()];
        Self { config }
    }

    pub(crate) async fn handshake(&self, stream: TcpStream) -> std::io::Result<client::TlsStream<TcpStream>> {
        let name = ServerName::try_from("127.0.0.1").expect("an address");
        let connector = TlsConnector::from(Arc::new(self.config.clone()));
        within("a handshake", connector.connect(name, stream)).await
    }

    /// By SSLRequest, as drivers do; nothing has been said inside TLS yet.
    pub(crate) async fn asked(&self, mut stream: TcpStream) -> std::io::Result<client::TlsStream<TcpStream>> {
        stream.write_all(&packet(SSL_REQUEST, b"")).await?;
        let answer = within("an answer to the request for TLS", stream.read_u8()).await?;
        assert_eq!(answer, b'S');
        self.handshake(stream).await
    }

    /// A session by TLS whose startup message has been sent.
    pub(crate) async fn session(&self, proxy: &Running) -> client::TlsStream<TcpStream> {
        let mut stream = self.asked(proxy.connect().await).await.expect("TLS");
        stream.write_all(&startup()).await.expect("sent");
        stream.flush().await.expect("sent");
        stream
    }
}

/// The end of a member's connection, whichever way it came.
pub(crate) type Carried = Box<dyn Io>;

/// A session that reached a member.
pub(crate) struct Came {
    pub(crate) by_tls: bool,
    pub(crate) session: ServerSession<Carried>,
}

const KEY: [u8; 8] = [0, 0, 0, 1, 1, 2, 3, 4];

/// A member that has been asked, and answers when the test lets it.
pub(crate) struct Hesitation {
    asked: Semaphore,
    allowed: Semaphore,
}

impl Hesitation {
    const fn new() -> Self {
        Self {
            asked: Semaphore::const_new(0),
            allowed: Semaphore::const_new(0),
        }
    }

    pub(crate) async fn asked(&self) {
        within("the member is asked", Self::passed(&self.asked)).await;
    }

    pub(crate) fn is_over(&self) {
        self.allowed.add_permits(1);
    }

    async fn passed(gate: &Semaphore) {
        gate.acquire().await.expect("it is never closed").forget();
    }
}

/// How a member answers a startup message.
#[derive(Clone)]
struct Manner {
    hello: Vec<u8>,
    hesitates: Option<Arc<Hesitation>>,
    demands_tls: bool,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            hello: [message(b'R', &[0; 4]), message(b'K', &KEY), ready()].concat(),
            hesitates: None,
            demands_tls: false,
        }
    }
}

/// A server that may speak TLS itself.
pub(crate) struct Member {
    pub(crate) address: SocketAddr,
    came: mpsc::Receiver<Came>,
    _tasks: JoinSet<()>,
}

impl Member {
    /// Offers TLS with this certificate, or none at all.
    pub(crate) async fn start(files: Option<&Files>) -> Self {
        Self::with(files, Manner::default()).await
    }

    /// Has no line for plaintext in its pg_hba.conf.
    pub(crate) async fn demanding_tls(files: &Files) -> Self {
        let manner = Manner {
            demands_tls: true,
            ..Manner::default()
        };
        Self::with(Some(files), manner).await
    }

    /// Its answer to a startup message is this question, which is handed back too.
    pub(crate) async fn asking(files: &Files, question: Vec<u8>) -> (Self, Vec<u8>) {
        let manner = Manner {
            hello: question.clone(),
            ..Manner::default()
        };
        (Self::with(Some(files), manner).await, question)
    }

    /// It asks only when it is allowed to.
    pub(crate) async fn hesitating(files: &Files, question: Vec<u8>) -> (Self, Arc<Hesitation>) {
        let hesitation = Arc::new(Hesitation::new());
        let manner = Manner {
            hello: question,
            hesitates: Some(Arc::clone(&hesitation)),
            ..Manner::default()
        };
        (Self::with(Some(files), manner).await, hesitation)
    }

    async fn with(files: Option<&Files>, manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (sender, came) = mpsc::channel(100);
        let acceptor = files.map(|files| {
            let builder = ServerConfig::builder_with_provider(provider());
            let builder = builder.with_safe_default_protocol_versions().expect("versions");
            let mut config = builder
                .with_no_client_auth()
                .with_single_cert(files.chain(), files.private_key())
                .expect("an identity");
            config.alpn_protocols = vec![b"postgresql".to_vec()];
            TlsAcceptor::from(Arc::new(config))
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut answering = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, manner, sender) = (acceptor.clone(), manner.clone(), sender.clone());
                answering.spawn(answer(stream, acceptor, manner, sender));
            }
        });
        Self {
            address,
            came,
            _tasks: tasks,
        }
    }

    /// A cluster that it leads, named n1.
    pub(crate) fn leads(&self) -> Cluster {
        let mut cluster = Cluster::new();
        cluster.writable("n1", self.address);
        cluster
    }

    pub(crate) async fn came(&mut self) -> Came {
        within("a session reaches the member", self.came.recv())
            .await
            .expect("the member runs")
    }

    pub(crate) fn has_none(&mut self) -> bool {
        self.came.try_recv().is_err()
    }
}

async fn answer(stream: TcpStream, acceptor: Option<TlsAcceptor>, manner: Manner, came: mpsc::Sender<Came>) {
    let Some((by_tls, mut stream)) = settle(stream, acceptor).await else {
        return;
    };
    let Some(startup) = read_packet(&mut stream).await else {
        return;
    };
    if let Some(hesitation) = &manner.hesitates {
        hesitation.asked.add_permits(1);
        Hesitation::passed(&hesitation.allowed).await;
    }
    let key = KEY.to_vec();
    if manner.demands_tls && !by_tls {
        let refusal = b"SFATAL\0VFATAL\0C28000\0Mno pg_hba.conf entry, no encryption\0\0";
        let _ = stream.write_all(&message(b'E', refusal)).await;
        return;
    }
    // PostgreSQL never answers a cancel request.
    let hello = match startup[4..8] == CANCEL_REQUEST.to_be_bytes() {
        true => Vec::new(),
        false => manner.hello,
    };
    if stream.write_all(&hello).await.is_ok() && stream.flush().await.is_ok() {
        let session = ServerSession { startup, key, stream };
        let _ = came.send(Came { by_tls, session }).await;
    }
}

/// Plain, by request, or directly.
async fn settle(mut stream: TcpStream, acceptor: Option<TlsAcceptor>) -> Option<(bool, Carried)> {
    let mut head = [0; 8];
    loop {
        let count = stream.peek(&mut head).await.ok()?;
        match (&acceptor, count) {
            (_, 0) => return None,
            (Some(acceptor), _) if head[0] == 0x16 => {
                let accepted: server::TlsStream<TcpStream> = acceptor.accept(stream).await.ok()?;
                return Some((true, Box::new(accepted)));
            }
            (_, 8) if head[4..] == SSL_REQUEST.to_be_bytes() => {
                stream.read_exact(&mut head).await.ok()?;
                let said = if acceptor.is_some() { b'S' } else { b'N' };
                stream.write_all(&[said]).await.ok()?;
            }
            (_, 8) => return Some((false, Box::new(stream))),
            _ => tokio::task::yield_now().await,
        }
    }
}

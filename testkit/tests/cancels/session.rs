//! The least of PostgreSQL's protocol that a race needs: keys and cancel requests are the test's own to send.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use pgherd_testkit::sql::{DATABASE, SUPERUSER};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

const ANSWER_MAX: Duration = Duration::from_secs(30);
const PROTOCOL: u32 = 196_608;
const SSL_REQUEST: u32 = 80_877_103;
const CANCEL_REQUEST: u32 = 80_877_102;

/// Whose certificates are believed.
pub(super) fn believer(ca: &Path) -> Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca)?)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// How a listener is come to.
#[derive(Clone)]
pub(super) struct Way {
    address: SocketAddr,
    tls: Option<(TlsConnector, ServerName<'static>)>,
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

impl Way {
    pub(super) const fn plain(address: SocketAddr) -> Self {
        Self { address, tls: None }
    }

    pub(super) fn by_tls(address: SocketAddr, connector: &TlsConnector, name: Ipv4Addr) -> Self {
        let name = ServerName::IpAddress(std::net::IpAddr::V4(name).into());
        Self {
            address,
            tls: Some((connector.clone(), name)),
        }
    }

    pub(super) const fn address(&self) -> SocketAddr {
        self.address
    }

    async fn open(&self) -> Result<Box<dyn Stream>> {
        let mut socket = TcpStream::connect(self.address).await?;
        socket.set_nodelay(true)?;
        let Some((connector, name)) = &self.tls else {
            return Ok(Box::new(socket));
        };
        socket.write_all(&packet(SSL_REQUEST, &[])).await?;
        ensure!(socket.read_u8().await? == b'S', "TLS is not offered");
        Ok(Box::new(connector.connect(name.clone(), socket).await?))
    }

    /// Sends a cancel request, and waits until it is let go: then the matter is over.
    pub(super) async fn cancel(&self, key: &[u8]) -> Result<()> {
        let cancel = async {
            let mut stream = self.open().await?;
            stream.write_all(&packet(CANCEL_REQUEST, key)).await?;
            stream.flush().await?;
            let mut nothing = Vec::new();
            // Over TLS the end may come without a farewell, and that is no news.
            let _ = stream.read_to_end(&mut nothing).await;
            ensure!(nothing.is_empty(), "a cancel request was answered");
            Ok(())
        };
        timeout(ANSWER_MAX, cancel).await.context("a cancel request")?
    }

    /// Begins a session with a server that asks for no password.
    pub(super) async fn connect(&self) -> Result<Session> {
        let connect = async {
            let mut stream = self.open().await?;
            let parameters = format!("user\0{SUPERUSER}\0database\0{DATABASE}\0\0");
            stream.write_all(&packet(PROTOCOL, parameters.as_bytes())).await?;
            stream.flush().await?;
            let mut session = Session {
                stream,
                key: Vec::new(),
            };
            loop {
                match session.message().await? {
                    (b'K', key) => session.key = key,
                    (b'Z', _) => return Ok(session),
                    (b'R' | b'S' | b'N', _) => {}
                    (kind, body) => bail!("{}: {}", char::from(kind), String::from_utf8_lossy(&body)),
                }
            }
        };
        timeout(ANSWER_MAX, connect).await.context("a session")?
    }
}

fn packet(code: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(8 + body.len()).unwrap_or(u32::MAX);
    [&length.to_be_bytes()[..], &code.to_be_bytes(), body].concat()
}

pub(super) struct Session {
    stream: Box<dyn Stream>,
    key: Vec<u8>,
}

impl Session {
    /// What a cancel request must carry.
    pub(super) fn key(&self) -> &[u8] {
        &self.key
    }

    async fn message(&mut self) -> Result<(u8, Vec<u8>)> {
        let kind = self.stream.read_u8().await?;
        let length = usize::try_from(self.stream.read_u32().await?)?;
        let mut body = vec![0; length.saturating_sub(4)];
        self.stream.read_exact(&mut body).await?;
        Ok((kind, body))
    }

    /// Asks, and says whether there was an answer: nothing when the statement was cancelled. The answer must end with `last`.
    pub(super) async fn ask(&mut self, text: &str, last: &str) -> Result<bool> {
        let ask = async {
            let length = u32::try_from(text.len() + 5)?;
            let query = [&[b'Q'][..], &length.to_be_bytes(), text.as_bytes(), &[0]].concat();
            self.stream.write_all(&query).await?;
            self.stream.flush().await?;
            let (mut rows, mut cancelled) = (0, false);
            loop {
                match self.message().await? {
                    (b'D', row) => {
                        ensure!(
                            row.ends_with(last.as_bytes()),
                            "an answer to something else than {text}"
                        );
                        rows += 1;
                    }
                    (b'E', body) => {
                        let said = String::from_utf8_lossy(&body).into_owned();
                        ensure!(said.split('\0').any(|field| field == "C57014"), "{text}: {said}");
                        ensure!(said.contains("due to user request"), "{said}");
                        cancelled = true;
                    }
                    (b'Z', _) => {
                        // A cancel may still come between the row and the end of the statement.
                        let whole = rows == 1 || (rows == 0 && cancelled);
                        ensure!(whole, "{rows} rows, cancelled: {cancelled}");
                        return Ok(!cancelled);
                    }
                    (b'T' | b'C' | b'S' | b'N', _) => {}
                    (kind, body) => bail!("{}: {}", char::from(kind), String::from_utf8_lossy(&body)),
                }
            }
        };
        timeout(ANSWER_MAX, ask).await.context("an answer")?
    }
}

//! TLS of our own SQL connections, in libpq's words: `sslmode`, `sslrootcert`, `sslcert`, `sslkey`.

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use pgherd_cluster::tls::{self, KeyFile, ServerTlsConfig, ServerTlsMode};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::config::SslMode;
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};
use tokio_rustls::TlsConnector;

use crate::config::ConnectionOptions;

/// What `sslmode` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Nobody has said: without TLS to our own server unless it insists, with TLS to others where they have it.
    Unset,
    /// As PostgreSQL's client calls it.
    Is(SslMode),
}

impl Mode {
    pub(super) fn of(options: &ConnectionOptions) -> Self {
        match options.get("sslmode") {
            None => Self::Unset,
            Some("disable") => Self::Is(SslMode::Disable),
            Some("require" | "verify-ca" | "verify-full") => Self::Is(SslMode::Require),
            Some(_) => Self::Is(SslMode::Prefer),
        }
    }
}

/// Makes TLS connections to PostgreSQL.
#[derive(Clone)]
pub(super) struct Connector(Arc<ClientConfig>);

impl Connector {
    /// Reads the files that the options name.
    ///
    /// # Errors
    /// When one cannot be read or used; names it.
    pub(super) fn new(options: &ConnectionOptions) -> io::Result<Self> {
        let config = believed(options)?;
        let connect = tls::connect(&config, tls::ALPN).map_err(io::Error::other)?;
        Ok(Self(Arc::new(connect)))
    }
}

/// Whom we believe and what we show, by libpq's rules: the server's certificate is not looked at unless a mode that
/// verifies is set, or CAs are named beside `require`; its name counts for `verify-full` only.
fn believed(options: &ConnectionOptions) -> io::Result<ServerTlsConfig> {
    let mode = match options.get("sslmode") {
        Some("require") => ServerTlsMode::Require,
        Some("verify-ca") => ServerTlsMode::VerifyCa,
        Some("verify-full") => ServerTlsMode::VerifyFull,
        _ => ServerTlsMode::Prefer,
    };
    // Where they are not used they need not be there, as with libpq.
    let ca = options.get("sslrootcert").filter(|_| mode >= ServerTlsMode::Require);
    if mode >= ServerTlsMode::VerifyCa && ca.is_none() {
        return Err(io::Error::other("sslmode verifies, and no sslrootcert says by what"));
    }
    let key = options.get("sslkey").map(|path| KeyFile::from(PathBuf::from(path)));
    Ok(ServerTlsConfig {
        mode,
        ca: ca.map(PathBuf::from),
        identity: options.get("sslcert").map(PathBuf::from).zip(key),
    })
}

impl<S> MakeTlsConnect<S> for Connector
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Stream = Stream<S>;
    type TlsConnect = Handshake;
    type Error = io::Error;

    fn make_tls_connect(&mut self, domain: &str) -> io::Result<Handshake> {
        let name =
            ServerName::try_from(domain.to_owned()).map_err(|error| io::Error::other(format!("{domain}: {error}")))?;
        Ok(Handshake {
            connector: TlsConnector::from(Arc::clone(&self.0)),
            name,
        })
    }
}

/// A handshake that is to be made.
pub(super) struct Handshake {
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl<S> TlsConnect<S> for Handshake
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Stream = Stream<S>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Stream<S>>> + Send>>;

    fn connect(self, stream: S) -> Self::Future {
        Box::pin(async move {
            self.connector
                .connect(self.name, stream)
                .await
                .map(|tls| Stream(Box::new(tls)))
        })
    }
}

/// A connection under TLS.
pub(super) struct Stream<S>(Box<tokio_rustls::client::TlsStream<S>>);

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Stream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Stream<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream for Stream<S> {
    fn channel_binding(&self) -> ChannelBinding {
        // The end point's hash depends on how its certificate is signed; SCRAM does without.
        ChannelBinding::none()
    }
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::record::Address;
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::task::JoinSet;
    use tokio_rustls::TlsAcceptor;

    use super::*;
    use crate::config::Credentials;
    use crate::postgres::target::Target;

    fn options(pairs: &[(&str, &str)]) -> ConnectionOptions {
        let owned = pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        ConnectionOptions(owned.collect())
    }

    #[test]
    fn modes_are_libpqs() {
        for (mode, expected) in [
            (None, Mode::Unset),
            (Some("disable"), Mode::Is(SslMode::Disable)),
            (Some("allow"), Mode::Is(SslMode::Prefer)),
            (Some("prefer"), Mode::Is(SslMode::Prefer)),
            (Some("require"), Mode::Is(SslMode::Require)),
            (Some("verify-full"), Mode::Is(SslMode::Require)),
        ] {
            let pairs: Vec<(&str, &str)> = mode.into_iter().map(|mode| ("sslmode", mode)).collect();
            assert_eq!(Mode::of(&options(&pairs)), expected, "{mode:?}");
        }
    }

    #[test]
    fn who_verifies_must_be_told_by_what_and_files_are_named() {
        assert!(Connector::new(&options(&[("sslmode", "require")])).is_ok());
        let refused = |pairs: &[(&str, &str)]| {
            let made = Connector::new(&options(pairs)).err();
            made.map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(refused(&[("sslmode", "verify-ca")]).contains("sslrootcert"));
        let missing = refused(&[("sslmode", "verify-full"), ("sslrootcert", "/nowhere/ca.pem")]);
        assert!(missing.starts_with("/nowhere/ca.pem: "), "{missing}");
    }

    /// A server with a certificate that is its own CA and made out to another name. Lets in whoever comes by TLS.
    async fn serve_one(listener: TcpListener, certificate: CertificateDer<'static>, key: PrivateKeyDer<'static>) {
        let builder = rustls::ServerConfig::builder_with_provider(tls::provider());
        let builder = builder.with_safe_default_protocol_versions().expect("versions");
        let config = builder.with_no_client_auth().with_single_cert(vec![certificate], key);
        let acceptor = TlsAcceptor::from(Arc::new(config.expect("a pair")));
        let (mut stream, _) = listener.accept().await.expect("a client");
        let mut request = [0; 8];
        stream.read_exact(&mut request).await.expect("a request for TLS");
        stream.write_all(b"S").await.expect("written");
        let Ok(mut stream) = acceptor.accept(stream).await else {
            return;
        };
        let mut startup = vec![0; stream.read_u32().await.expect("a length") as usize - 4];
        stream.read_exact(&mut startup).await.expect("a startup message");
        stream
            .write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I")
            .await
            .expect("let in");
        stream.flush().await.expect("let in");
        // Until the client has seen it and goes.
        let _ = stream.read_u8().await;
    }

    #[tokio::test]
    async fn a_server_whose_certificate_is_the_configured_ca_itself_is_believed() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("server.crt");
        let own = |name: &str| {
            let key = KeyPair::generate().expect("a key");
            let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            (params.self_signed(&key).expect("signed"), key)
        };
        let (ours, key) = own("db.example");
        std::fs::write(&file, ours.pem()).expect("written");
        let (strangers, strange_key) = own("db.example");
        let rootcert = file.to_str().expect("a path");
        for (mode, served, believed) in [
            ("verify-ca", (&ours, &key), true),
            // It is made out to another name than the one that is connected to.
            ("verify-full", (&ours, &key), false),
            ("verify-ca", (&strangers, &strange_key), false),
            ("require", (&strangers, &strange_key), false),
        ] {
            let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
            let address = Address {
                host: "127.0.0.1".to_owned(),
                port: listener.local_addr().expect("an address").port(),
            };
            let der = PrivateKeyDer::try_from(served.1.serialize_der()).expect("a key");
            let mut server = JoinSet::new();
            server.spawn(serve_one(listener, served.0.der().clone(), der));
            let user = Credentials {
                username: "u".to_owned(),
                password: None,
            };
            let options = options(&[("sslmode", mode), ("sslrootcert", rootcert)]);
            let target = Target::new(&address, "postgres", &user).with_options(&options);
            let connected = target.connect().await.map(|_| ());
            assert_eq!(connected.is_ok(), believed, "{mode}: {connected:?}");
            server.join_all().await;
        }
    }
}

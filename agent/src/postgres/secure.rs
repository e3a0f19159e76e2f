//! TLS of our own SQL connections, in libpq's words: `sslmode`, `sslrootcert`, `sslcert`, `sslkey`.

use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
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
        let other = |error: &dyn std::fmt::Display| io::Error::other(error.to_string());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| other(&error))?;
        let check = Arc::new(Check::new(options, provider)?);
        let builder = builder.dangerous().with_custom_certificate_verifier(check);
        let (Some(certificate), Some(key)) = (options.get("sslcert"), options.get("sslkey")) else {
            return Ok(Self(Arc::new(builder.with_no_client_auth())));
        };
        let private = PrivateKeyDer::from_pem_file(key).map_err(|error| in_file(key, &error))?;
        let config = builder.with_client_auth_cert(certificates(certificate)?, private);
        Ok(Self(Arc::new(config.map_err(|error| in_file(certificate, &error))?)))
    }
}

fn in_file(path: impl AsRef<Path>, error: &dyn std::fmt::Display) -> io::Error {
    io::Error::other(format!("{}: {error}", path.as_ref().display()))
}

fn certificates(path: &str) -> io::Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(path).map_err(|error| in_file(path, &error))?;
    let all: Result<Vec<_>, _> = read.collect();
    all.map_err(|error| in_file(path, &error))
}

/// Whether the server is believed, by libpq's rules: not looked at unless a mode that verifies is set, or a file with CAs
/// is named; the name counts for `verify-full` only.
#[derive(Debug)]
struct Check {
    chain: Option<Arc<WebPkiServerVerifier>>,
    any_name: bool,
    provider: Arc<CryptoProvider>,
}

impl Check {
    fn new(options: &ConnectionOptions, provider: Arc<CryptoProvider>) -> io::Result<Self> {
        let mode = options.get("sslmode");
        let verifies = matches!(mode, Some("verify-ca" | "verify-full"));
        let roots = options
            .get("sslrootcert")
            .filter(|_| verifies || mode == Some("require"));
        if verifies && roots.is_none() {
            return Err(io::Error::other("sslmode verifies, and no sslrootcert says by what"));
        }
        let chain = roots.map(|path| {
            let mut store = RootCertStore::empty();
            for anchor in certificates(path)? {
                store.add(anchor).map_err(|error| in_file(path, &error))?;
            }
            let built = WebPkiServerVerifier::builder_with_provider(Arc::new(store), Arc::clone(&provider)).build();
            built.map_err(|error| in_file(path, &error))
        });
        Ok(Self {
            chain: chain.transpose()?,
            any_name: mode != Some("verify-full"),
            provider,
        })
    }
}

impl ServerCertVerifier for Check {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else {
            return Ok(ServerCertVerified::assertion());
        };
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if self.any_name => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl<S> MakeTlsConnect<S> for Connector
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Stream = Stream<S>;
    type TlsConnect = Handshake;
    type Error = io::Error;

    fn make_tls_connect(&mut self, domain: &str) -> io::Result<Handshake> {
        let name = ServerName::try_from(domain.to_owned()).map_err(|error| in_file(domain, &error))?;
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
    use super::*;

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
}

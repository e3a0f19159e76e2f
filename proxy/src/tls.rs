//! Certificates and keys: what clients are shown, which of theirs are taken, and whom the proxy believes to be a server.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme, SupportedProtocolVersion,
};

/// What PostgreSQL 17 and its clients agree on where TLS is spoken without asking first.
pub(crate) const ALPN: &[u8] = b"postgresql";

/// How a listener treats its clients' wish for TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ListenerTls {
    /// They are told that there is none.
    #[default]
    Off,
    /// Who wants it gets it.
    Allow,
    /// Who does not is refused; a cancel request is taken all the same, since psql sends it in plaintext.
    Require,
    /// It is the server's: the bytes pass untouched, and channel binding works.
    Passthrough,
}

/// Whether the proxy asks clients for a certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientCertificates {
    /// It does not.
    #[default]
    Ignored,
    /// Who shows one must show a good one.
    Optional,
    /// Nobody gets in without.
    Required,
}

/// The oldest version of TLS that is spoken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MinVersion {
    /// TLS 1.2.
    #[default]
    Tls12,
    /// TLS 1.3.
    Tls13,
}

static SINCE_TLS12: [&SupportedProtocolVersion; 2] = [&rustls::version::TLS13, &rustls::version::TLS12];
static SINCE_TLS13: [&SupportedProtocolVersion; 1] = [&rustls::version::TLS13];

impl MinVersion {
    const fn versions(self) -> &'static [&'static SupportedProtocolVersion] {
        match self {
            Self::Tls12 => &SINCE_TLS12,
            Self::Tls13 => &SINCE_TLS13,
        }
    }
}

/// How the proxy shows itself to clients that connect by TLS. Files are in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientTlsConfig {
    /// The proxy's certificate, followed by those that lead to a CA.
    pub certificate: PathBuf,
    /// Its key.
    pub private_key: PathBuf,
    /// The CAs of clients' certificates.
    pub client_ca: Option<PathBuf>,
    /// Whether they are asked for one.
    pub client_certificates: ClientCertificates,
    /// Whether a certificate is for the user only whose name it carries as its common name.
    pub map_users: bool,
    /// The oldest version spoken.
    pub min_version: MinVersion,
}

/// How the proxy connects to members, in libpq's words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ServerTlsMode {
    /// In plaintext.
    #[default]
    Disable,
    /// By TLS where the member offers it.
    Prefer,
    /// By TLS only, whoever the member is.
    Require,
    /// By TLS only, and its certificate leads to a CA that we know.
    VerifyCa,
    /// The same, and it is made out to the name that we connect to.
    VerifyFull,
}

impl ServerTlsMode {
    /// The word in the configuration.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Disable => "disable",
            Self::Prefer => "prefer",
            Self::Require => "require",
            Self::VerifyCa => "verify-ca",
            Self::VerifyFull => "verify-full",
        }
    }
}

/// What the proxy shows members, and whom it believes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerTlsConfig {
    /// How.
    pub mode: ServerTlsMode,
    /// The CAs of members' certificates, in PEM.
    pub ca: Option<PathBuf>,
    /// The proxy's own certificate and key, for members that ask for one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Why TLS cannot be spoken as configured.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsConfigError {
    /// A file cannot be read, or is not PEM, or has nothing of what it is for.
    #[error("{path}: {what}", path = path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Key and certificate are of two different pairs.
    #[error("{key} is not the key of {certificate}", key = key.display(), certificate = certificate.display())]
    Mismatch {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's.
        key: PathBuf,
    },
    /// Something else that rustls does not take.
    #[error("{0}")]
    Other(String),
}

/// What sessions that begin now use. Those that go on keep theirs.
#[derive(Clone, Default)]
pub(crate) struct TlsSettings {
    /// For clients.
    pub(crate) accept: Option<Arc<ServerConfig>>,
    pub(crate) map_users: bool,
    /// For members.
    pub(crate) connect: Option<Arc<ClientConfig>>,
    pub(crate) server_mode: ServerTlsMode,
    /// For who looks at the page.
    pub(crate) page: Option<Arc<ServerConfig>>,
}

impl TlsSettings {
    /// Reads every file.
    pub(crate) fn load(clients: Option<&ClientTlsConfig>, servers: &ServerTlsConfig) -> Result<Self, TlsConfigError> {
        let accept = clients.map(accept).transpose()?.map(Arc::new);
        let connect = match servers.mode {
            ServerTlsMode::Disable => None,
            _ => Some(Arc::new(connect(servers)?)),
        };
        Ok(Self {
            accept,
            map_users: clients.is_some_and(|clients| clients.map_users),
            connect,
            server_mode: servers.mode,
            page: None,
        })
    }

    /// The same with what the page shows.
    pub(crate) fn with_page(self, page: Option<&ClientTlsConfig>) -> Result<Self, TlsConfigError> {
        let mut config = page.map(accept).transpose()?;
        if let Some(config) = &mut config {
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
        }
        let page = config.map(Arc::new);
        Ok(Self { page, ..self })
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn other(error: impl std::fmt::Display) -> TlsConfigError {
    TlsConfigError::Other(error.to_string())
}

fn in_file(path: &Path, error: &rustls::pki_types::pem::Error) -> TlsConfigError {
    let what = match error {
        rustls::pki_types::pem::Error::Io(error) => error.to_string(),
        rustls::pki_types::pem::Error::NoItemsFound => "no private key in PEM is in it".to_owned(),
        error => format!("it is not PEM: {error}"),
    };
    TlsConfigError::File {
        path: path.to_owned(),
        what,
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsConfigError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let certificates = read.map_err(|error| in_file(path, &error))?;
    if certificates.is_empty() {
        return Err(TlsConfigError::File {
            path: path.to_owned(),
            what: "no certificate in PEM is in it".to_owned(),
        });
    }
    Ok(certificates)
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsConfigError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| in_file(path, &error))
}

/// Certificate and key of one pair.
fn identity(certificate: &Path, private_key: &Path) -> Result<CertifiedKey, TlsConfigError> {
    let chain = certificates(certificate)?;
    let certified = CertifiedKey::from_der(chain, key(private_key)?, &provider());
    certified.map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => TlsConfigError::Mismatch {
            certificate: certificate.to_owned(),
            key: private_key.to_owned(),
        },
        error => TlsConfigError::File {
            path: private_key.to_owned(),
            what: format!("not a key that can be used: {error}"),
        },
    })
}

fn roots(path: &Path) -> Result<(RootCertStore, Vec<CertificateDer<'static>>), TlsConfigError> {
    let anchors = certificates(path)?;
    let mut roots = RootCertStore::empty();
    for anchor in &anchors {
        roots.add(anchor.clone()).map_err(|error| TlsConfigError::File {
            path: path.to_owned(),
            what: format!("a certificate in it is not one: {error}"),
        })?;
    }
    Ok((roots, anchors))
}

fn accept(config: &ClientTlsConfig) -> Result<ServerConfig, TlsConfigError> {
    let certified = identity(&config.certificate, &config.private_key)?;
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(config.min_version.versions())
        .map_err(other)?;
    let builder = match (&config.client_ca, config.client_certificates) {
        (_, ClientCertificates::Ignored) => builder.with_no_client_auth(),
        (None, _) => return Err(other("clients are asked for a certificate, and no CA is given")),
        (Some(path), wanted) => {
            let (roots, _) = roots(path)?;
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
            let verifier = match wanted {
                ClientCertificates::Optional => verifier.allow_unauthenticated(),
                _ => verifier,
            };
            builder.with_client_cert_verifier(verifier.build().map_err(other)?)
        }
    };
    let resolver = rustls::sign::SingleCertAndKey::from(certified);
    let mut accept = builder.with_cert_resolver(Arc::new(resolver));
    accept.alpn_protocols = vec![ALPN.to_vec()];
    // PostgreSQL's clients do not resume sessions: what it takes to offer that would be paid for nothing.
    accept.send_tls13_tickets = 0;
    accept.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(accept)
}

fn connect(config: &ServerTlsConfig) -> Result<ClientConfig, TlsConfigError> {
    let checks = config.mode >= ServerTlsMode::VerifyCa;
    let (chain, anchors) = match (&config.ca, checks) {
        (Some(path), _) => {
            let (roots, anchors) = roots(path)?;
            let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider());
            (Some(verifier.build().map_err(other)?), anchors)
        }
        (None, false) => (None, Vec::new()),
        (None, true) => return Err(other("members' certificates are to be verified, and no CA is given")),
    };
    let check = ServerCheck {
        // As libpq does: a CA that is given is used, whatever is asked for at least.
        chain: chain.filter(|_| checks || config.mode == ServerTlsMode::Require),
        anchors,
        names: config.mode == ServerTlsMode::VerifyFull,
        provider: provider(),
    };
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(check));
    let mut connect = match &config.identity {
        None => builder.with_no_client_auth(),
        Some((certificate, private_key)) => {
            let certified = identity(certificate, private_key)?;
            let resolver = rustls::sign::SingleCertAndKey::from(certified);
            builder.with_client_cert_resolver(Arc::new(resolver))
        }
    };
    connect.alpn_protocols = vec![ALPN.to_vec()];
    connect.resumption = rustls::client::Resumption::disabled();
    Ok(connect)
}

/// Whom we believe to be a member.
#[derive(Debug)]
struct ServerCheck {
    /// Nothing when anybody is believed.
    chain: Option<Arc<WebPkiServerVerifier>>,
    /// What was given as CAs: a certificate that is one of them needs no chain.
    anchors: Vec<CertificateDer<'static>>,
    names: bool,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for ServerCheck {
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
        if self.anchors.iter().any(|anchor| anchor == end_entity) {
            if self.names {
                let parsed = rustls::server::ParsedCertificate::try_from(end_entity)?;
                rustls::client::verify_server_name(&parsed, server_name)?;
            }
            return Ok(ServerCertVerified::assertion());
        }
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            // The name is looked at last, so everything else was good.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.names => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        None
    }
}

/// What rustls says of a certificate, for somebody who has to mend it.
pub(crate) fn explain(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(other))
            if other.to_string().contains("CaUsedAsEndEntity") =>
        {
            "its certificate is a CA's own: issue one with CA:FALSE, or give exactly this one as the CA".to_owned()
        }
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "its certificate leads to no CA that is known here".to_owned()
        }
        rustls::Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            "its certificate has expired".to_owned()
        }
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => "its certificate is made out to another name".to_owned(),
        error => error.to_string(),
    }
}

//! TLS towards members, of whichever kind: their PostgreSQL and their REST interfaces. Whom we believe, and what we show them.

mod clients;
mod key;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme,
    SupportedCipherSuite,
};

pub use self::clients::client_check;
pub use self::key::KeyFile;

/// What PostgreSQL 17 and its clients agree on where TLS is spoken without asking first.
pub const ALPN: &[u8] = b"postgresql";

/// How members are connected to, in libpq's words.
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

/// What members are shown, and whom we believe to be one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerTlsConfig {
    /// How.
    pub mode: ServerTlsMode,
    /// The CAs of members' certificates, in PEM.
    pub ca: Option<PathBuf>,
    /// Our own certificate and key, for members that ask for one.
    pub identity: Option<(PathBuf, KeyFile)>,
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

/// The one provider of cryptography in this program.
///
/// Of the ciphers of TLS 1.2 ChaCha20 comes first: rustls ends a connection of TLS 1.2 by AES after 2^24 records, which a busy
/// session sends within hours, for it cannot renew its keys as one of TLS 1.3 does.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| match suite {
        SupportedCipherSuite::Tls13(_) => 0,
        SupportedCipherSuite::Tls12(_) if suite.suite().as_str().is_some_and(|name| name.contains("CHACHA20")) => 1,
        SupportedCipherSuite::Tls12(_) => 2,
    });
    Arc::new(provider)
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

/// Certificate and key of one pair.
///
/// # Errors
/// When a file cannot be used, or they are of two pairs.
pub fn identity(certificate: &Path, private_key: &KeyFile) -> Result<CertifiedKey, TlsConfigError> {
    let chain = certificates(certificate)?;
    let certified = CertifiedKey::from_der(chain, private_key.read()?, &provider());
    certified.map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => TlsConfigError::Mismatch {
            certificate: certificate.to_owned(),
            key: private_key.path.clone(),
        },
        error => TlsConfigError::File {
            path: private_key.path.clone(),
            what: format!("not a key that can be used: {error}"),
        },
    })
}

/// The CAs in a file, and their certificates as they are.
///
/// # Errors
/// When the file cannot be used.
pub fn roots(path: &Path) -> Result<(RootCertStore, Vec<CertificateDer<'static>>), TlsConfigError> {
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

/// For connections to members that speak `protocol`.
///
/// # Errors
/// When a file cannot be used, or certificates are to be verified by no CA.
pub fn connect(config: &ServerTlsConfig, protocol: &[u8]) -> Result<ClientConfig, TlsConfigError> {
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
    connect.alpn_protocols = vec![protocol.to_vec()];
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
#[must_use]
pub fn explain(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(other))
            if other.to_string().contains("CaUsedAsEndEntity") =>
        {
            "its certificate is a CA's own: issue one with CA:FALSE, or give exactly this one as the CA".to_owned()
        }
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "its certificate leads to no CA that is known here".to_owned()
        }
        // As after a CA was made anew.
        rustls::Error::InvalidCertificate(CertificateError::BadSignature) => {
            "its certificate is signed by another CA than the one of that name that is known here".to_owned()
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

/// The same of a handshake that failed, whatever it failed by.
#[must_use]
pub fn explain_handshake(error: &std::io::Error) -> String {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    tls.map_or_else(|| error.to_string(), explain)
}

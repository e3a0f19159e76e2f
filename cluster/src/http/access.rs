//! How members' REST interfaces are reached: by TLS or not, and with what they want to see.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::record::Address;

/// The port of members' REST interfaces where none is written.
const REST_PORT: u16 = 8008;

/// Where a REST interface is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// Host and port.
    pub address: Address,
    /// Whether it speaks TLS.
    pub tls: bool,
}

impl Endpoint {
    /// Reads `http://host:port`, `https://host:port` or `host:port`; what follows is ignored, and so is a user.
    #[must_use]
    pub fn of(url: &str) -> Option<Self> {
        let tls = match url.split_once("://") {
            Some((scheme, _)) if scheme.eq_ignore_ascii_case("https") => true,
            Some((scheme, _)) if scheme.eq_ignore_ascii_case("http") => false,
            Some(_) => return None,
            None => false,
        };
        let address = Address::of_url(url, REST_PORT)?;
        Some(Self { address, tls })
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}", if self.tls { "https" } else { "http" }, self.address)
    }
}

/// What a REST interface is shown, and whom we believe to be one. Cheap to copy.
#[derive(Clone, Default)]
pub struct Access {
    pub(super) tls: Option<Arc<ClientConfig>>,
    pub(super) authorization: Option<Arc<str>>,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (tls, authorization) = (self.tls.is_some(), self.authorization.is_some());
        write!(f, "Access {{ tls: {tls}, authorization: {authorization} }}")
    }
}

/// The files and words that an [`Access`] is made of: those of `ctl` in a `patroni.yml`.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct AccessConfig {
    /// The CAs that members' certificates lead to, in PEM.
    pub cacert: Option<PathBuf>,
    /// Our own certificate and its key, in PEM.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Whether members are believed without a look at their certificates.
    pub insecure: bool,
    /// An `Authorization` header.
    pub authorization: Option<String>,
}

impl std::fmt::Debug for AccessConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            cacert,
            identity,
            insecure,
            ..
        } = self;
        write!(
            f,
            "AccessConfig {{ {cacert:?}, {identity:?}, insecure: {insecure}, .. }}"
        )
    }
}

impl AccessConfig {
    /// Reads the files. Without `cacert` and not `insecure` there is no TLS.
    ///
    /// # Errors
    /// When one cannot be read or used; names it.
    pub fn load(&self) -> io::Result<Access> {
        let tls = (self.cacert.is_some() || self.insecure).then(|| self.client_config());
        Ok(Access {
            tls: tls.transpose()?.map(Arc::new),
            authorization: self.authorization.as_deref().map(Arc::from),
        })
    }

    fn client_config(&self) -> io::Result<ClientConfig> {
        let other = |error: &dyn std::fmt::Display| io::Error::other(error.to_string());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| other(&error))?;
        let chain = match (&self.cacert, self.insecure) {
            (Some(path), false) => {
                let mut roots = RootCertStore::empty();
                for anchor in certificates(path)? {
                    roots.add(anchor).map_err(|error| in_file(path, &error))?;
                }
                let built = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build();
                Some(built.map_err(|error| in_file(path, &error))?)
            }
            _ => None,
        };
        let check = Arc::new(MemberCheck { chain, provider });
        let builder = builder.dangerous().with_custom_certificate_verifier(check);
        let Some((certificate, key)) = &self.identity else {
            return Ok(builder.with_no_client_auth());
        };
        let private = PrivateKeyDer::from_pem_file(key).map_err(|error| in_file(key, &error))?;
        builder
            .with_client_auth_cert(certificates(certificate)?, private)
            .map_err(|error| in_file(certificate, &error))
    }
}

fn in_file(path: &std::path::Path, error: &dyn std::fmt::Display) -> io::Error {
    io::Error::other(format!("{}: {error}", path.display()))
}

fn certificates(path: &std::path::Path) -> io::Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(path).map_err(|error| in_file(path, &error))?;
    let all: Result<Vec<_>, _> = read.collect();
    let all = all.map_err(|error| in_file(path, &error))?;
    if all.is_empty() {
        return Err(in_file(path, &"has no certificate in PEM"));
    }
    Ok(all)
}

/// Whether a member is who it should be. Who asked for no look gets none, as with patronictl's `insecure`.
#[derive(Debug)]
struct MemberCheck {
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for MemberCheck {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match &self.chain {
            Some(chain) => chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now),
            None => Ok(ServerCertVerified::assertion()),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_read_from_any_url_of_http() {
        for (text, expected) in [
            ("http://10.0.0.1:8008/patroni", Some("http://10.0.0.1:8008")),
            ("https://db.example.com", Some("https://db.example.com:8008")),
            ("10.0.0.1:9", Some("http://10.0.0.1:9")),
            ("HTTPS://[fd00::1]:1/x?y", Some("https://[fd00::1]:1")),
            ("postgres://10.0.0.1:5432", None),
            ("", None),
        ] {
            assert_eq!(
                Endpoint::of(text).map(|it| it.to_string()).as_deref(),
                expected,
                "{text}"
            );
        }
    }

    #[test]
    fn no_secret_is_shown() {
        let config = AccessConfig {
            authorization: Some("Basic c2VjcmV0".to_owned()),
            ..AccessConfig::default()
        };
        let access = config.load().expect("nothing to read");
        assert!(!format!("{config:?} {access:?}").contains("c2V"));
    }
}

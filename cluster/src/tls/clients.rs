//! Whom servers of ours believe to be a client.

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, SignatureScheme};

use super::{TlsConfigError, other, provider, roots};

/// Believes clients whose certificates lead to a CA in a file, or are in that file themselves; who shows none is let in
/// where they are not `required`.
///
/// # Errors
/// When the file cannot be used.
pub fn client_check(path: &Path, required: bool) -> Result<Arc<dyn ClientCertVerifier>, TlsConfigError> {
    let (roots, anchors) = roots(path)?;
    let chain = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
    let chain = if required { chain } else { chain.allow_unauthenticated() };
    Ok(Arc::new(ClientCheck {
        chain: chain.build().map_err(other)?,
        anchors,
    }))
}

#[derive(Debug)]
struct ClientCheck {
    chain: Arc<dyn ClientCertVerifier>,
    /// A certificate that is one of these needs no chain: as one that is its own CA, which `OpenSSL` believes too.
    anchors: Vec<CertificateDer<'static>>,
}

impl ClientCertVerifier for ClientCheck {
    fn offer_client_auth(&self) -> bool {
        self.chain.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.chain.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        if self.anchors.iter().any(|anchor| anchor == end_entity) {
            return Ok(ClientCertVerified::assertion());
        }
        self.chain.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

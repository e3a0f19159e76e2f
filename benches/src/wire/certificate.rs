//! A certificate for the proxies that end TLS, and clients that believe it.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use pgherd_testkit::Site;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::client::Resumption;
use rustls::{ClientConfig, RootCertStore};

/// Whose certificate it is.
pub(crate) const NAME: &str = "localhost";
/// What PostgreSQL 17 and its clients agree on where TLS is spoken without asking first.
const ALPN: &[u8] = b"postgresql";

/// Files in PEM, of an ECDSA key, and what a client needs.
pub(crate) struct Certificate {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    /// Both in one, as HAProxy wants them.
    pub(crate) both: PathBuf,
    pub(crate) client: Arc<ClientConfig>,
}

impl Certificate {
    pub(crate) fn make(site: &Site) -> Result<Self> {
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed([NAME.to_owned()])?;
        let (certificate, key) = (cert.pem(), signing_key.serialize_pem());
        let mut roots = RootCertStore::empty();
        roots.add(cert.der().clone())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        client.alpn_protocols = vec![ALPN.to_vec()];
        // Every handshake is a whole one.
        client.resumption = Resumption::disabled();
        Ok(Self {
            both: site.write_file("tls.both", &format!("{certificate}{key}"))?,
            certificate: site.write_file("tls.crt", &certificate)?,
            key: site.write_file("tls.key", &key)?,
            client: Arc::new(client),
        })
    }
}

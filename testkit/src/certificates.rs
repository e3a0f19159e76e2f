//! Certificates of a test's own: a CA, and what it issues to proxies and members.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};

use crate::site::Site;

/// A CA whose certificate lies in the site's directory.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    file: PathBuf,
}

/// A certificate and its key, in PEM files that belong to whom everything runs as. Nobody else may read the key.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl Authority {
    /// Makes one.
    ///
    /// # Errors
    /// When its certificate cannot be made or written.
    pub fn new(site: &Site) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Python's clients insist on it.
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, "the test's CA");
        let file = site.write_file("ca.crt", &params.self_signed(&key)?.pem())?;
        Ok(Self {
            issuer: Issuer::new(params, key),
            file,
        })
    }

    /// The file of its own certificate, for whoever is to believe it.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Issues a certificate for a server that is reached at any of these addresses, in files that begin with `name`.
    ///
    /// # Errors
    /// When it cannot be made or written.
    pub fn issue(&self, site: &Site, name: &str, addresses: &[Ipv4Addr]) -> Result<Certificate> {
        let key = KeyPair::generate()?;
        let names: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names)?;
        params.use_authority_key_identifier_extension = true;
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.signed_by(&key, &self.issuer)?;
        let written = Certificate {
            certificate: site.write_file(&format!("{name}.crt"), &certificate.pem())?,
            key: site.write_file(&format!("{name}.key"), &key.serialize_pem())?,
        };
        fs::set_permissions(&written.key, fs::Permissions::from_mode(0o600))
            .with_context(|| format!("closing {}", written.key.display()))?;
        Ok(written)
    }
}

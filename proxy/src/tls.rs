//! Certificates and keys: what clients are shown, and which of theirs are taken. Whom the proxy believes to be a member is
//! [`pgherd_cluster::tls`]'s to say.

use std::path::PathBuf;
use std::sync::Arc;

pub(crate) use pgherd_cluster::tls::{ALPN, explain};
pub use pgherd_cluster::tls::{ServerTlsConfig, ServerTlsMode, TlsConfigError};
use pgherd_cluster::tls::{client_check, connect, identity, provider};
use rustls::server::NoServerSessionStorage;
use rustls::{ClientConfig, ServerConfig, SupportedProtocolVersion};

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
            _ => Some(Arc::new(connect(servers, ALPN)?)),
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

fn other(error: impl std::fmt::Display) -> TlsConfigError {
    TlsConfigError::Other(error.to_string())
}

fn accept(config: &ClientTlsConfig) -> Result<ServerConfig, TlsConfigError> {
    let certified = identity(&config.certificate, &config.private_key.clone().into())?;
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(config.min_version.versions())
        .map_err(other)?;
    let builder = match (&config.client_ca, config.client_certificates) {
        (_, ClientCertificates::Ignored) => builder.with_no_client_auth(),
        (None, _) => return Err(other("clients are asked for a certificate, and no CA is given")),
        (Some(path), wanted) => {
            let required = wanted != ClientCertificates::Optional;
            builder.with_client_cert_verifier(client_check(path, required)?)
        }
    };
    let resolver = rustls::sign::SingleCertAndKey::from(certified);
    let mut accept = builder.with_cert_resolver(Arc::new(resolver));
    accept.alpn_protocols = vec![ALPN.to_vec()];
    // The provider's order has a reason.
    accept.ignore_client_order = true;
    // PostgreSQL's clients do not resume sessions: what it takes to offer that would be paid for nothing.
    accept.send_tls13_tickets = 0;
    accept.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(accept)
}

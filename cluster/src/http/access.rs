//! How members' REST interfaces are reached: by TLS or not, and with what they want to see.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::ClientConfig;

use crate::record::Address;
use crate::tls::{KeyFile, ServerTlsConfig, ServerTlsMode, TlsConfigError, connect};

/// The port of members' REST interfaces where none is written.
const REST_PORT: u16 = 8008;
/// What a REST interface speaks inside TLS.
const HTTP: &[u8] = b"http/1.1";

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

impl Access {
    /// The `Authorization` header for `endpoint`. Addresses are learnt from what members tell, so whoever asks for TLS shows no
    /// credentials to one that is reached without: it may be anybody's.
    pub(super) fn authorization_for(&self, endpoint: &Endpoint) -> Option<&str> {
        let in_the_clear = !endpoint.tls && self.tls.is_some();
        self.authorization.as_deref().filter(|_| !in_the_clear)
    }
}

/// The files and words that an [`Access`] is made of: those of `ctl` in a `patroni.yml`.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct AccessConfig {
    /// The CAs that members' certificates lead to, in PEM.
    pub cacert: Option<PathBuf>,
    /// Our own certificate and its key, in PEM.
    pub identity: Option<(PathBuf, KeyFile)>,
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
    pub fn load(&self) -> Result<Access, TlsConfigError> {
        let tls = (self.cacert.is_some() || self.insecure).then(|| connect(&self.tls(), HTTP));
        Ok(Access {
            tls: tls.transpose()?.map(Arc::new),
            authorization: self.authorization.as_deref().map(Arc::from),
        })
    }

    /// Who asked for no look at certificates gets none, as with patronictl's `insecure`.
    fn tls(&self) -> ServerTlsConfig {
        let (mode, ca) = if self.insecure {
            (ServerTlsMode::Require, None)
        } else {
            (ServerTlsMode::VerifyFull, self.cacert.clone())
        };
        ServerTlsConfig {
            mode,
            ca,
            identity: self.identity.clone(),
        }
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
    fn who_asks_for_tls_shows_no_credentials_in_plaintext() {
        let presented = |insecure: bool, url: &str| {
            let config = AccessConfig {
                insecure,
                authorization: Some("Basic c2VjcmV0".to_owned()),
                ..AccessConfig::default()
            };
            let access = config.load().expect("nothing to read");
            access.authorization_for(&Endpoint::of(url).expect("a URL")).is_some()
        };
        assert!(presented(true, "https://10.0.0.1:8008") && !presented(true, "http://10.0.0.1:8008"));
        assert!(presented(false, "http://10.0.0.1:8008"));
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

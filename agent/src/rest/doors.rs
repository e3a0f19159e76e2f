//! Who gets in: TLS, clients' certificates, addresses, credentials. Made anew when the configuration or its files change.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use pgherd_cluster::tls::{client_check, identity, provider};
use pgherd_cluster::view::View;
use rustls::ServerConfig;
use rustls::sign::SingleCertAndKey;
use tokio::net::lookup_host;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::access::Guard;
use super::answer::{Answer, sentence, unauthorized};
use crate::config::{Allow, RestConfig, RestTls, VerifyClient};

/// How long a name of the list may take to be looked up.
const LOOKUP_MAX: Duration = Duration::from_secs(2);

/// The entrance of one REST interface.
pub struct Doors {
    guard: Guard,
    allow: Allow,
    verify_client: VerifyClient,
    acceptor: Option<TlsAcceptor>,
    headers: HeaderMap,
    /// The one user, where credentials are demanded.
    user: Option<String>,
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Client {
    pub(super) address: Option<IpAddr>,
    /// Whether it has shown a certificate that leads to one of our CAs.
    pub(super) certified: bool,
}

impl Doors {
    /// Reads the files that the configuration names.
    ///
    /// # Errors
    /// When one cannot be read or used; names it.
    pub fn new(config: &RestConfig) -> io::Result<Self> {
        let acceptor = config.tls.as_ref().map(server_config).transpose()?;
        let mut headers = HeaderMap::new();
        for (name, value) in &config.headers {
            // The binary has refused what is no header.
            if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
                headers.insert(name, value);
            }
        }
        Ok(Self {
            guard: Guard::new(config.credentials.as_ref()),
            allow: config.allow.clone(),
            verify_client: config.tls.as_ref().map(|tls| tls.verify_client).unwrap_or_default(),
            acceptor: acceptor.map(|config| TlsAcceptor::from(Arc::new(config))),
            headers,
            user: config.credentials.as_ref().map(|one| one.username.clone()),
        })
    }

    /// Who has passed [`Self::check`], for the journal.
    pub(super) fn actor(&self, client: Client) -> String {
        let address = client.address.map(|address| address.to_canonical().to_string());
        let address = address.unwrap_or_else(|| "an unknown address".to_owned());
        match &self.user {
            Some(user) => format!("{user} at {address}"),
            None => address,
        }
    }

    pub(super) fn acceptor(&self) -> Option<TlsAcceptor> {
        self.acceptor.clone()
    }

    /// Puts the configured headers over those of an answer.
    pub(super) fn dress(&self, answer: &mut Answer) {
        for (name, value) in &self.headers {
            answer.headers_mut().insert(name.clone(), value.clone());
        }
    }

    /// Whether a request that changes something may pass; if not, what it is told. Patroni's order and words. What members
    /// ask each other is for all of them, listed or not.
    pub(super) async fn check(
        &self,
        client: Client,
        headers: &HeaderMap,
        view: &View,
        among_members: bool,
    ) -> Result<(), Answer> {
        if !among_members && !self.allows(client.address, view).await {
            return Err(sentence(403, "Access is denied"));
        }
        if self.verify_client != VerifyClient::None && !client.certified {
            return Err(sentence(403, "client certificate required"));
        }
        self.guard.check(headers.get(AUTHORIZATION)).map_err(unauthorized)
    }

    async fn allows(&self, address: Option<IpAddr>, view: &View) -> bool {
        let Allow { list, include_members } = &self.allow;
        if list.is_empty() && !include_members {
            return true;
        }
        let Some(address) = address.map(|address| address.to_canonical()) else {
            return false;
        };
        for entry in list {
            if stands_for(entry, address).await {
                return true;
            }
        }
        let members = view.members.values().filter(|_| *include_members);
        for member in members.filter_map(|member| member.record.api_address()) {
            if stands_for(&member.host, address).await {
                return true;
            }
        }
        false
    }
}

/// Whether an entry of a list, an address, a network or a name, stands for an address.
async fn stands_for(entry: &str, address: IpAddr) -> bool {
    if let Some(within) = in_network(entry, address) {
        return within;
    }
    match timeout(LOOKUP_MAX, lookup_host((entry, 0))).await {
        Ok(Ok(mut found)) => found.any(|found| found.ip().to_canonical() == address),
        Ok(Err(_)) | Err(_) => false,
    }
}

/// Whether an address is, or lies in, what is written as an address or `address/bits`; nothing for a name.
fn in_network(entry: &str, address: IpAddr) -> Option<bool> {
    let (network, bits) = match entry.split_once('/') {
        Some((network, bits)) => (network, Some(bits.parse::<u32>().ok()?)),
        None => (entry, None),
    };
    let network: IpAddr = network.parse().ok()?;
    Some(match (network.to_canonical(), address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            let kept = bits.unwrap_or(32).min(32);
            let mask = u32::MAX.checked_shl(32 - kept).unwrap_or(0);
            network.to_bits() & mask == address.to_bits() & mask
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => {
            let kept = bits.unwrap_or(128).min(128);
            let mask = u128::MAX.checked_shl(128 - kept).unwrap_or(0);
            network.to_bits() & mask == address.to_bits() & mask
        }
        _ => false,
    })
}

fn server_config(tls: &RestTls) -> io::Result<ServerConfig> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?;
    let builder = match (&tls.client_ca, tls.verify_client) {
        (Some(path), VerifyClient::Optional | VerifyClient::Required) => {
            let required = tls.verify_client == VerifyClient::Required;
            builder.with_client_cert_verifier(client_check(path, required).map_err(io::Error::other)?)
        }
        _ => builder.with_no_client_auth(),
    };
    let certified = identity(&tls.certificate, &tls.key).map_err(io::Error::other)?;
    Ok(builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(certified))))
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::view;
    use super::*;
    use crate::config::tests::agent;

    fn doors(list: &[&str], include_members: bool) -> Doors {
        let mut config = agent().restapi;
        config.allow = Allow {
            list: list.iter().map(|entry| (*entry).to_owned()).collect(),
            include_members,
        };
        Doors::new(&config).expect("no files")
    }

    #[test]
    fn networks_hold_their_addresses() {
        let within = |entry: &str, address: &str| in_network(entry, address.parse().expect("an address"));
        for (entry, address, expected) in [
            ("10.0.0.1", "10.0.0.1", Some(true)),
            ("10.0.0.1", "10.0.0.2", Some(false)),
            ("10.0.0.0/24", "10.0.0.77", Some(true)),
            ("10.0.0.0/24", "10.0.1.77", Some(false)),
            ("0.0.0.0/0", "192.0.2.1", Some(true)),
            ("fd00::/8", "fd12::1", Some(true)),
            ("fd00::/8", "fe80::1", Some(false)),
            ("10.0.0.0/8", "fd00::1", Some(false)),
            ("localhost", "127.0.0.1", None),
        ] {
            assert_eq!(within(entry, address), expected, "{entry} {address}");
        }
    }

    #[tokio::test]
    async fn only_who_is_listed_may_change_things() {
        let (headers, view) = (HeaderMap::new(), view());
        let check = async |doors: &Doors, address: &str| {
            let client = Client {
                address: address.parse().ok(),
                certified: false,
            };
            doors.check(client, &headers, &view, false).await.is_ok()
        };
        assert!(check(&doors(&[], false), "192.0.2.1").await);
        let listed = doors(&["192.0.2.0/24", "localhost"], false);
        assert!(check(&listed, "192.0.2.1").await && check(&listed, "::ffff:192.0.2.1").await);
        assert!(check(&listed, "127.0.0.1").await, "by name");
        assert!(!check(&listed, "127.0.3.1").await);
        let member_asks = Client {
            address: "192.0.2.9".parse().ok(),
            certified: false,
        };
        let closed = doors(&["10.0.0.1"], false);
        assert!(closed.check(member_asks, &headers, &view, true).await.is_ok());
        let members = doors(&[], true);
        assert!(check(&members, "127.0.3.1").await && !check(&members, "192.0.2.1").await);
    }

    #[tokio::test]
    async fn who_must_show_a_certificate_is_not_let_in_without() {
        let mut doors = doors(&[], false);
        doors.verify_client = VerifyClient::Optional;
        let check = async |certified| {
            let client = Client {
                address: "127.0.0.1".parse().ok(),
                certified,
            };
            doors.check(client, &HeaderMap::new(), &view(), false).await.is_ok()
        };
        assert!(check(true).await && !check(false).await);
    }
}

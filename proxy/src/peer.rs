//! Where a client is, as far as its connection tells.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use crate::network::Network;

/// The other end of a client's connection, or what the proxy in front of us told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    Ip(SocketAddr),
    /// On this host, through a unix socket.
    Unix,
}

impl Peer {
    /// Its address, in the family that it is of.
    pub(crate) fn address(&self) -> Option<IpAddr> {
        match self {
            Self::Ip(address) => Some(address.ip().to_canonical()),
            Self::Unix => None,
        }
    }

    /// Whether one of `networks` has it.
    pub(crate) fn is_in(&self, networks: &[Network]) -> bool {
        let address = self.address();
        address.is_some_and(|address| networks.iter().any(|network| network.contains(address)))
    }

    /// Whether a listener that allows `networks` takes it: nothing allows everyone, and whoever is on this host may come in
    /// by the permissions of the socket.
    pub(crate) fn is_allowed(&self, networks: &[Network]) -> bool {
        networks.is_empty() || self.address().is_none() || self.is_in(networks)
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => SocketAddr::new(address.ip().to_canonical(), address.port()).fmt(f),
            Self::Unix => f.write_str("unix"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whom_a_listener_takes() {
        let peer = |text: &str| Peer::Ip(text.parse().expect("an address"));
        let ours = ["10.0.0.0/8".parse().expect("a network")];
        assert!(peer("10.1.1.1:5").is_allowed(&ours) && peer("[::ffff:10.1.1.1]:5").is_allowed(&ours));
        assert!(!peer("11.1.1.1:5").is_allowed(&ours) && peer("11.1.1.1:5").is_allowed(&[]));
        assert!(Peer::Unix.is_allowed(&ours) && !Peer::Unix.is_in(&ours));
        assert_eq!(peer("[::ffff:10.1.1.1]:5").to_string(), "10.1.1.1:5");
    }
}

//! Whom a standby streams from.

use pgherd_cluster::record::{Address, StandbyCluster};

/// Whom a standby streams from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upstream {
    /// Another member.
    Member(Address),
    /// The cluster that this one follows.
    Remote(StandbyCluster),
}

impl Upstream {
    /// Everybody that may be connected to; nobody where only an archive is read.
    #[must_use]
    pub fn addresses(&self) -> Vec<Address> {
        match self {
            Self::Member(address) => vec![address.clone()],
            Self::Remote(section) => section.addresses(),
        }
    }

    /// The cluster that is followed, when it is that.
    #[must_use]
    pub const fn remote(&self) -> Option<&StandbyCluster> {
        match self {
            Self::Member(_) => None,
            Self::Remote(section) => Some(section),
        }
    }

    /// The part of a connection string that says where to; nothing where nobody is connected to.
    ///
    /// Of several hosts the one is meant that takes writes, since the slot is there.
    #[must_use]
    pub fn place(&self) -> Option<String> {
        let addresses = self.addresses();
        let hosts: Vec<&str> = addresses.iter().map(|address| address.host.as_str()).collect();
        let ports: Vec<String> = addresses.iter().map(|address| address.port.to_string()).collect();
        let several = if addresses.len() > 1 {
            " target_session_attrs=read-write"
        } else {
            ""
        };
        let host = super::settings::quote(&hosts.join(","));
        (!addresses.is_empty()).then(|| format!("host={host} port={}{several}", ports.join(",")))
    }
}

impl From<Address> for Upstream {
    fn from(address: Address) -> Self {
        Self::Member(address)
    }
}

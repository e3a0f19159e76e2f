//! Hosts and ports.

/// The parts of a member's address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// A name or a literal address, without brackets.
    pub host: String,
    /// The TCP port.
    pub port: u16,
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl Address {
    /// Reads `host:port`, `[v6]:port` or a bare host with `port_default`.
    #[must_use]
    pub fn parse(text: &str, port_default: u16) -> Option<Self> {
        if let Some(rest) = text.strip_prefix('[') {
            let (host, rest) = rest.split_once(']')?;
            let port = match rest.strip_prefix(':') {
                Some(port) => port.parse().ok()?,
                None if rest.is_empty() => port_default,
                None => return None,
            };
            return Some(Self {
                host: host.to_owned(),
                port,
            });
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) if !host.contains(':') => (host, port.parse().ok()?),
            Some(_) | None => (text, port_default), // A bare IPv6 address has several colons.
        };
        (!host.is_empty()).then(|| Self {
            host: host.to_owned(),
            port,
        })
    }

    pub(crate) fn of_url(url: &str, port_default: u16) -> Option<Self> {
        let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
        let authority = rest.split(['/', '?']).next()?;
        let host_port = authority.rsplit_once('@').map_or(authority, |(_, host_port)| host_port);
        Self::parse(host_port, port_default)
    }
}

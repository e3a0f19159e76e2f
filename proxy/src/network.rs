//! Networks of client addresses, as `allow` and `proxy_protocol` list them. Pure.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// An address and how many of its leading bits count. An IPv4 network that is written within IPv6 is the IPv4 network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

/// Why a text is no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// Neither IPv4 nor IPv6.
    #[error("is not an address or a network; write one such as 10.0.0.0/8, 192.0.2.7 or fd00::/8")]
    Address,
    /// More bits than the address has, or no number.
    #[error("has no such prefix; write a number from 0 to {max} after the slash")]
    Prefix {
        /// Bits of such an address.
        max: u8,
    },
    /// Most likely another network was meant.
    #[error("has address bits beyond its prefix; write {network}, or {address} for that one address")]
    HostBits {
        /// The network that it lies in.
        network: Network,
        /// The address alone.
        address: IpAddr,
    },
}

/// The bits of an address, and how many there are.
fn bits(address: IpAddr) -> (u128, u8) {
    match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()), 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    }
}

impl Network {
    /// Whether `address` is one of its addresses. An IPv4 client of an IPv6 socket is an IPv4 client.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let ((own, width), (other, other_width)) = (bits(self.address), bits(address.to_canonical()));
        let ignored = u32::from(width.saturating_sub(self.prefix));
        width == other_width && (own ^ other).checked_shr(ignored).unwrap_or_default() == 0
    }

    /// The network of `prefix` bits that `address` lies in.
    #[must_use]
    pub fn around(address: IpAddr, prefix: u8) -> Self {
        let address = address.to_canonical();
        let (own, width) = bits(address);
        let prefix = prefix.min(width);
        let ignored = u32::from(width - prefix);
        let kept = own.checked_shr(ignored).and_then(|kept| kept.checked_shl(ignored));
        let kept = kept.unwrap_or_default();
        let address = match address {
            IpAddr::V4(_) => IpAddr::V4(u32::try_from(kept).unwrap_or_default().into()),
            IpAddr::V6(_) => IpAddr::V6(kept.into()),
        };
        Self { address, prefix }
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let (address, prefix) = match text.trim().split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text.trim(), None),
        };
        let written: IpAddr = address.parse().map_err(|_| NetworkError::Address)?;
        let (_, max) = bits(written);
        let prefix = match prefix {
            // Digits alone: a sign or a space is no number here.
            Some(digits) if digits.bytes().all(|digit| digit.is_ascii_digit()) => {
                digits.parse().ok().filter(|prefix| *prefix <= max)
            }
            Some(_) => None,
            None => Some(max),
        };
        let prefix = prefix.ok_or(NetworkError::Prefix { max })?;
        let address = written.to_canonical();
        let (_, width) = bits(address);
        // Of an IPv4 address within IPv6, the first 96 bits are always the same.
        let prefix = prefix.checked_sub(max - width).ok_or(NetworkError::Prefix { max })?;
        let network = Self::around(address, prefix);
        if network.address == address {
            Ok(network)
        } else {
            Err(NetworkError::HostBits { network, address })
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn network(text: &str) -> Network {
        text.parse().expect("a network")
    }

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn a_network_has_its_addresses_and_no_others() {
        for (text, inside, outside) in [
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.0"),
            ("192.0.2.7", "192.0.2.7", "192.0.2.6"),
            ("0.0.0.0/0", "255.255.255.255", "::1"),
            ("::/0", "fe80::1", "10.0.0.1"),
            ("fd00::/8", "fdff::1", "fe00::"),
            ("10.0.0.0/8", "::ffff:10.1.2.3", "::ffff:11.1.2.3"),
            ("::ffff:10.0.0.0/104", "10.1.2.3", "11.1.2.3"),
            ("::1", "::1", "::2"),
        ] {
            assert!(network(text).contains(address(inside)), "{text} {inside}");
            assert!(!network(text).contains(address(outside)), "{text} {outside}");
        }
    }

    #[test]
    fn a_text_that_is_none_is_told_why() {
        for (text, expected) in [
            ("office", "is not an address or a network"),
            ("", "is not an address or a network"),
            ("10.0.0/8", "is not an address or a network"),
            ("10.0.0.0/33", "a number from 0 to 32"),
            ("10.0.0.0/", "a number from 0 to 32"),
            ("10.0.0.0/+8", "a number from 0 to 32"),
            ("::/129", "a number from 0 to 128"),
            ("::ffff:10.0.0.0/95", "a number from 0 to 128"),
            ("10.0.0.1/8", "write 10.0.0.0/8, or 10.0.0.1 for that one address"),
            ("fd00::1/64", "write fd00::/64, or fd00::1"),
        ] {
            let error = text.parse::<Network>().expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn every_address_lies_in_the_network_around_it(octets: [u8; 16], prefix: u8, four: bool) {
            let address = if four {
                IpAddr::from([octets[0], octets[1], octets[2], octets[3]])
            } else {
                IpAddr::from(octets)
            };
            let around = Network::around(address, prefix);
            prop_assert!(around.contains(address));
            prop_assert_eq!(around.to_string().parse(), Ok(around));
        }
    }
}

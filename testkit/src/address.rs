//! Loopback addresses: each site has a block of 256 of its own, so that clusters run side by side on equal ports. A site
//! on a network has that network's.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, bail};

/// PostgreSQL's port on a member's address.
pub const POSTGRES_PORT: u16 = 15_432;
/// The REST port on a member's address.
pub const REST_PORT: u16 = 18_008;
/// The clients' port on an etcd member's address.
pub const ETCD_CLIENT_PORT: u16 = 12_379;
/// The peers' port on an etcd member's address.
pub const ETCD_PEER_PORT: u16 = 12_380;
/// The write listener's port on a proxy's address.
pub const WRITE_PORT: u16 = 15_432;
/// The read listener's port on a proxy's address.
pub const READ_PORT: u16 = 15_433;
/// The stats page's port on a proxy's address.
pub const STATS_PORT: u16 = 18_080;

/// Whoever listens here holds the block. The ports lie below the range that the kernel gives to outgoing connections.
const HOLDING_PORT: u16 = 19_999;
/// Blocks `127.1.0.0/24` to `127.250.255.0/24`.
const BLOCKS: u32 = 250 * 256;
const TRIES: u32 = 200;

/// The addresses `127.x.y.0` to `127.x.y.255`, held by a listening socket until this is dropped; or a network's.
#[derive(Debug)]
pub struct AddressBlock {
    subnet: [u8; 3],
    _held: Option<TcpListener>,
}

impl AddressBlock {
    /// Takes a block that nobody holds, beginning at one derived from the process's number.
    ///
    /// # Errors
    /// When no free block is found, as on a system whose loopback interface has only one address.
    pub fn take() -> Result<Self> {
        static TAKEN: AtomicU32 = AtomicU32::new(0);
        for _ in 0..TRIES {
            let nth = TAKEN.fetch_add(1, Ordering::Relaxed);
            let block = std::process::id().wrapping_mul(7).wrapping_add(nth) % BLOCKS;
            let (Ok(x), Ok(y)) = (u8::try_from(1 + block / 256), u8::try_from(block % 256)) else {
                continue;
            };
            if let Ok(held) = TcpListener::bind((Ipv4Addr::new(127, x, y, 254), HOLDING_PORT)) {
                return Ok(Self {
                    subnet: [127, x, y],
                    _held: Some(held),
                });
            }
        }
        bail!("no free block of loopback addresses in {TRIES} tries")
    }

    /// The addresses of a network that nobody else uses.
    #[must_use]
    pub const fn of(subnet: [u8; 3]) -> Self {
        Self { subnet, _held: None }
    }

    fn ip(&self, host: u8) -> Ipv4Addr {
        let [one, two, three] = self.subnet;
        Ipv4Addr::new(one, two, three, host)
    }

    /// The address of member `index`, counted from 0.
    #[must_use]
    pub fn member(&self, index: u8) -> Ipv4Addr {
        self.ip(1 + index)
    }

    /// The address of etcd member `index`, counted from 0.
    #[must_use]
    pub fn etcd(&self, index: u8) -> Ipv4Addr {
        self.ip(101 + index)
    }

    /// The address of proxy `index`, counted from 0.
    #[must_use]
    pub fn proxy(&self, index: u8) -> Ipv4Addr {
        self.ip(201 + index)
    }

    /// An address of the block on which nothing is ever started.
    #[must_use]
    pub fn nobody(&self) -> Ipv4Addr {
        self.ip(253)
    }
}

/// `ip:port`.
#[must_use]
pub fn at(ip: Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::from((ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_blocks_share_no_address() {
        let (one, other) = (AddressBlock::take().unwrap(), AddressBlock::take().unwrap());
        assert_ne!(one.member(0), other.member(0));
    }
}

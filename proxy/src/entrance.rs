//! A connection before anything is known of it but its address: how many there may be, and what it begins with.
//!
//! A connection that says nothing costs a place for as long as a startup may take, so one address must not have all of them.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tracing::debug;

use crate::admission::{Counts, Place};
use crate::config::ListenerConfig;
use crate::gate::Pass;
use crate::handshake::{self, Arrived, HandshakeError, Offer};
use crate::network::Network;
use crate::peer::Peer;
use crate::shared::Shared;
use crate::stream::socket::Socket;
use crate::wire::proxy_header::{BadHeader, HEADER_BYTES_MAX, Header, header};

/// Whoever has one address of such a network has all of them.
const NETWORK_BITS_V6: u8 = 64;

/// Connections that have not yet said what they come for, by where they are from.
#[derive(Debug, Default)]
pub(crate) struct Entrance(Counts<Network>);

impl Entrance {
    /// A place for one more from `address`, unless there are as many as may be.
    pub(crate) fn enter(&self, address: IpAddr, limit: Option<usize>) -> Option<Place<Network>> {
        let address = address.to_canonical();
        let bits = if address.is_ipv4() { 32 } else { NETWORK_BITS_V6 };
        self.0.enter(Network::around(address, bits), limit).ok()
    }
}

/// The places of a connection that has not yet said what it comes for.
pub(crate) struct Starting {
    /// Among those of its address; nothing while that is a trusted proxy's.
    pub(crate) from_address: Option<Place<Network>>,
    /// Among those of its listener.
    pub(crate) _on_listener: Pass,
}

/// Why a connection is closed before it has said what it comes for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpeningError {
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error(transparent)]
    Header(#[from] BadHeader),
    #[error("too many connections from {0} have not said yet what they come for")]
    TooMany(Peer),
}

/// The label in metrics of what [`Entrance`] bounds.
pub(crate) const STARTUPS: &str = "startups_per_client_address";

/// A connection whose beginning is read.
pub(crate) struct Opening {
    pub(crate) shared: Arc<Shared>,
    pub(crate) config: Arc<ListenerConfig>,
    /// Who the client is; known for good once the beginning was read.
    pub(crate) peer: Peer,
    pub(crate) starting: Starting,
}

impl Opening {
    /// Reads what a trusted proxy tells of the client, and then what the client comes for. Nothing beyond that is read.
    pub(crate) async fn read(&mut self, client: Socket, offer: Offer) -> Result<Arrived, OpeningError> {
        if self.peer.is_in(&self.config.proxy_protocol)
            && let Some(told) = read_header(&client).await?
        {
            debug!(proxy = %self.peer, client = %Peer::Ip(told), "a proxy tells who its client is");
            self.peer = Peer::Ip(told);
            let limit = self.shared.config.load().limits.startups_per_client_address;
            let place = self.shared.entrance.enter(told.ip(), limit);
            self.starting.from_address = Some(place.ok_or(OpeningError::TooMany(self.peer))?);
        }
        Ok(handshake::read(client, offer).await?)
    }
}

/// Reads exactly a header.
pub(crate) async fn read_header(client: &Socket) -> Result<Option<SocketAddr>, OpeningError> {
    let mut bytes = [0; HEADER_BYTES_MAX];
    let mut have = 0;
    loop {
        let missing = match header(bytes.get(..have).unwrap_or_default())? {
            Header::Complete(told) => return Ok(told),
            Header::Incomplete(missing) => missing,
        };
        // What comes in parts is looked at in parts: a client that sends none is not waited for.
        let room = bytes.get_mut(have..have + missing).unwrap_or_default();
        match client.read(room).await.map_err(HandshakeError::Io)? {
            0 => return Err(HandshakeError::Io(io::ErrorKind::UnexpectedEof.into()).into()),
            count => have += count,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixStream;

    use super::*;

    #[test]
    fn addresses_are_counted_apart_and_those_of_one_v6_network_together() {
        let entrance = Entrance::default();
        let enter = |text: &str| entrance.enter(text.parse().expect("an address"), Some(1));
        let _first = enter("10.0.0.1").expect("room");
        assert!(enter("::ffff:10.0.0.1").is_none(), "the same address");
        assert!(enter("10.0.0.2").is_some());
        let six = enter("fd00::1").expect("room");
        assert!(enter("fd00::2").is_none() && enter("fd00:0:0:1::2").is_some());
        drop(six);
        assert!(enter("fd00::2").is_some());
    }

    /// A socket that has received this, and whose other end has closed.
    async fn received(bytes: &[u8]) -> Socket {
        let (mut writer, reader) = UnixStream::pair().expect("a pair");
        writer.write_all(bytes).await.expect("it fits");
        Socket::Unix(reader)
    }

    #[tokio::test]
    async fn a_header_that_ends_early_is_no_header() {
        let cut = received(b"PROXY TCP4 10.1.2.3").await;
        let read = read_header(&cut).await;
        assert!(matches!(read, Err(OpeningError::Handshake(HandshakeError::Io(_)))));
        let whole = received(b"PROXY TCP4 10.1.2.3 10.0.0.1 12345 5432\r\nand more").await;
        let told = read_header(&whole).await.expect("a header");
        assert_eq!(told, Some("10.1.2.3:12345".parse().expect("an address")));
        let mut rest = [0; 9];
        assert_eq!(whole.read(&mut rest).await.expect("what follows"), 8);
        assert!(rest.starts_with(b"and more"));
    }
}

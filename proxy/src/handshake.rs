//! Reading the first packets of a connection, in bounds, and TLS before them.
//!
//! Whatever has come is received at once, and what is beyond the packet that says what the client wants is handed on: two
//! system calls less for each connection than reading a length, a body, and then looking whether there is more.

use std::io;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use rustls::ServerConfig;

use crate::stream::Stream;
use crate::stream::socket::Socket;
use crate::stream::tls::{TlsError, TlsStream};
use crate::tls::{ALPN, ListenerTls};
use crate::wire::startup::{FirstPacket, Malformed, begins_tls, packet_bytes};

/// The answers to a request for encryption.
const NOT_OFFERED: &[u8] = b"N";
const OFFERED: &[u8] = b"S";
const HEAD_BYTES: usize = 4;
/// Few startup messages are longer.
const CHUNK_BYTES: usize = 512;

#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("TLS: {0}")]
    Tls(TlsError),
    /// The listener takes no session in plaintext.
    #[error("TLS is required")]
    TlsRequired,
}

/// What a listener offers.
pub(crate) struct Offer {
    pub(crate) tls: ListenerTls,
    /// With which certificate, where TLS ends here.
    pub(crate) accept: Option<Arc<ServerConfig>>,
}

/// What a client came for, and how it is spoken with from here on.
pub(crate) struct Arrived {
    pub(crate) stream: Stream,
    pub(crate) wish: Wish,
    /// What it has sent behind that.
    pub(crate) more: Vec<u8>,
}

pub(crate) enum Wish {
    /// A session or a cancellation.
    Packet(FirstPacket),
    /// TLS, and it is the server's to speak: these bytes have been received.
    Passthrough(Bytes),
    /// Nothing that is taken here; the stream is there to say so.
    Refused(HandshakeError),
}

/// Reads packets until one says what the client came for.
pub(crate) async fn read(socket: Socket, offer: Offer) -> Result<Arrived, HandshakeError> {
    let mut beginning = Beginning::new(Stream::Plain(socket));
    match read_wish(&mut beginning, &offer).await {
        Ok(Next::Wish(wish)) => Ok(beginning.arrived(wish)),
        Ok(Next::Tls { direct }) => accept(beginning, offer, direct).await,
        Err(error @ (HandshakeError::Malformed(_) | HandshakeError::TlsRequired)) => {
            Ok(beginning.arrived(Wish::Refused(error)))
        }
        Err(error) => Err(error),
    }
}

enum Next {
    Wish(Wish),
    /// A TLS handshake begins with what has been received.
    Tls {
        direct: bool,
    },
}

/// What a connection begins with.
struct Beginning {
    stream: Stream,
    /// Received, and not looked at yet.
    received: BytesMut,
}

impl Beginning {
    fn new(stream: Stream) -> Self {
        Self {
            stream,
            received: BytesMut::new(),
        }
    }

    fn arrived(self, wish: Wish) -> Arrived {
        Arrived {
            stream: self.stream,
            wish,
            more: self.received.into(),
        }
    }

    /// Receives until there are `count` bytes; what comes with them is kept.
    async fn fill(&mut self, count: usize) -> io::Result<()> {
        let mut chunk = [0; CHUNK_BYTES];
        while self.received.len() < count {
            match self.stream.read(&mut chunk).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => self.received.extend_from_slice(chunk.get(..count).unwrap_or_default()),
            }
        }
        Ok(())
    }

    /// How the next packet begins, which is left where it is.
    async fn head(&mut self) -> io::Result<[u8; HEAD_BYTES]> {
        self.fill(HEAD_BYTES).await?;
        self.received
            .first_chunk()
            .copied()
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    async fn packet(&mut self, head: [u8; HEAD_BYTES]) -> Result<FirstPacket, HandshakeError> {
        let total = packet_bytes(head)?;
        self.fill(total).await?;
        Ok(FirstPacket::decode(self.received.split_to(total).freeze())?)
    }
}

async fn read_wish(beginning: &mut Beginning, offer: &Offer) -> Result<Next, HandshakeError> {
    let (mut asked_ssl, mut asked_gss) = (false, false);
    loop {
        let head = beginning.head().await?;
        if begins_tls(head) {
            return match (offer.tls, asked_ssl) {
                (ListenerTls::Off, _) | (ListenerTls::Passthrough, true) => Err(Malformed::DirectTls.into()),
                (ListenerTls::Passthrough, false) => {
                    Ok(Next::Wish(Wish::Passthrough(beginning.received.split().freeze())))
                }
                (ListenerTls::Allow | ListenerTls::Require, asked) => Ok(Next::Tls { direct: !asked }),
            };
        }
        let packet = beginning.packet(head).await?;
        let asked = match packet {
            FirstPacket::Ssl => &mut asked_ssl,
            FirstPacket::GssEnc => &mut asked_gss,
            FirstPacket::Startup { .. } if offer.tls == ListenerTls::Require => {
                return Err(HandshakeError::TlsRequired);
            }
            FirstPacket::Cancel { .. } | FirstPacket::Startup { .. } => return Ok(Next::Wish(Wish::Packet(packet))),
        };
        if std::mem::replace(asked, true) {
            return Err(Malformed::Repeated.into());
        }
        // It would be taken for part of the encrypted stream.
        if !beginning.received.is_empty() {
            return Err(Malformed::EarlyData.into());
        }
        match (&packet, offer.tls) {
            (FirstPacket::Ssl, ListenerTls::Passthrough) => {
                return Ok(Next::Wish(Wish::Passthrough(FirstPacket::ssl_request())));
            }
            (FirstPacket::Ssl, ListenerTls::Allow | ListenerTls::Require) => {
                beginning.stream.write_all(OFFERED).await?;
                beginning.head().await?;
                return Ok(Next::Tls { direct: false });
            }
            _ => beginning.stream.write_all(NOT_OFFERED).await?,
        }
    }
}

/// Speaks TLS, and reads the one packet that may follow inside it.
async fn accept(beginning: Beginning, offer: Offer, direct: bool) -> Result<Arrived, HandshakeError> {
    let Beginning { stream, received } = beginning;
    let (Stream::Plain(socket), Some(config)) = (stream, offer.accept) else {
        return Err(Malformed::DirectTls.into());
    };
    let tls = TlsStream::accept(socket, config, &received)
        .await
        .map_err(HandshakeError::Tls)?;
    drop(received);
    // Without it another protocol's client could be led here: PostgreSQL asks for it in the same case.
    let agreed = !direct || tls.alpn() == Some(ALPN);
    let mut beginning = Beginning::new(Stream::Tls(Box::new(tls)));
    let read = match agreed {
        true => read_inside(&mut beginning).await,
        false => Err(Malformed::NoAlpn.into()),
    };
    match read {
        Ok(packet) => Ok(beginning.arrived(Wish::Packet(packet))),
        Err(error @ HandshakeError::Malformed(_)) => Ok(beginning.arrived(Wish::Refused(error))),
        Err(error) => Err(error),
    }
}

async fn read_inside(beginning: &mut Beginning) -> Result<FirstPacket, HandshakeError> {
    let head = beginning.head().await?;
    match beginning.packet(head).await? {
        FirstPacket::Ssl | FirstPacket::GssEnc => Err(Malformed::Repeated.into()),
        packet => Ok(packet),
    }
}

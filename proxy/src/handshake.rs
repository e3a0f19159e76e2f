//! Reading the first packets of a connection, exactly and in bounds, and TLS before them.

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
}

pub(crate) enum Wish {
    /// A session or a cancellation.
    Packet(FirstPacket),
    /// TLS, and it is the server's to speak: these bytes have been received.
    Passthrough(Bytes),
    /// Nothing that is taken here; the stream is there to say so.
    Refused(HandshakeError),
}

/// Reads packets until one says what the client came for. Reads nothing beyond it, so that what follows reaches the server
/// through the relay.
pub(crate) async fn read(socket: Socket, offer: Offer) -> Result<Arrived, HandshakeError> {
    let mut stream = Stream::Plain(socket);
    match read_wish(&mut stream, &offer).await {
        Ok(Next::Wish(wish)) => Ok(Arrived { stream, wish }),
        Ok(Next::Tls { early, direct }) => accept(stream, offer, &early, direct).await,
        Err(error @ (HandshakeError::Malformed(_) | HandshakeError::TlsRequired)) => Ok(Arrived {
            stream,
            wish: Wish::Refused(error),
        }),
        Err(error) => Err(error),
    }
}

enum Next {
    Wish(Wish),
    /// A TLS handshake begins, of which this has been received.
    Tls {
        early: [u8; HEAD_BYTES],
        direct: bool,
    },
}

async fn read_wish(stream: &mut Stream, offer: &Offer) -> Result<Next, HandshakeError> {
    let (mut asked_ssl, mut asked_gss) = (false, false);
    loop {
        let mut head = [0; HEAD_BYTES];
        stream.read_exact(&mut head).await?;
        if begins_tls(head) {
            return match (offer.tls, asked_ssl) {
                (ListenerTls::Off, _) => Err(Malformed::DirectTls.into()),
                (ListenerTls::Passthrough, false) => Ok(Next::Wish(Wish::Passthrough(Bytes::copy_from_slice(&head)))),
                (ListenerTls::Passthrough, true) => Err(Malformed::DirectTls.into()),
                (ListenerTls::Allow | ListenerTls::Require, direct) => Ok(Next::Tls {
                    early: head,
                    direct: !direct,
                }),
            };
        }
        let packet = read_rest(stream, head).await?;
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
        if stream.socket().peek_now(&mut [0]).is_ok_and(|count| count > 0) {
            return Err(Malformed::EarlyData.into());
        }
        match (&packet, offer.tls) {
            (FirstPacket::Ssl, ListenerTls::Passthrough) => {
                return Ok(Next::Wish(Wish::Passthrough(FirstPacket::ssl_request())));
            }
            (FirstPacket::Ssl, ListenerTls::Allow | ListenerTls::Require) => {
                stream.write_all(OFFERED).await?;
                let mut early = [0; HEAD_BYTES];
                stream.read_exact(&mut early).await?;
                return Ok(Next::Tls { early, direct: false });
            }
            _ => stream.write_all(NOT_OFFERED).await?,
        }
    }
}

/// Speaks TLS, and reads the one packet that may follow inside it.
async fn accept(stream: Stream, offer: Offer, early: &[u8], direct: bool) -> Result<Arrived, HandshakeError> {
    let (Stream::Plain(socket), Some(config)) = (stream, offer.accept) else {
        return Err(Malformed::DirectTls.into());
    };
    let tls = TlsStream::accept(socket, config, early)
        .await
        .map_err(HandshakeError::Tls)?;
    // Without it another protocol's client could be led here: PostgreSQL asks for it in the same case.
    let agreed = !direct || tls.alpn() == Some(ALPN);
    let mut stream = Stream::Tls(Box::new(tls));
    let refused = |stream, error: HandshakeError| {
        Ok(Arrived {
            stream,
            wish: Wish::Refused(error),
        })
    };
    if !agreed {
        return refused(stream, Malformed::NoAlpn.into());
    }
    let mut head = [0; HEAD_BYTES];
    stream.read_exact(&mut head).await?;
    match read_rest(&mut stream, head).await {
        Ok(FirstPacket::Ssl | FirstPacket::GssEnc) => refused(stream, Malformed::Repeated.into()),
        Ok(packet) => Ok(Arrived {
            stream,
            wish: Wish::Packet(packet),
        }),
        Err(error @ HandshakeError::Malformed(_)) => refused(stream, error),
        Err(error) => Err(error),
    }
}

async fn read_rest(stream: &mut Stream, head: [u8; HEAD_BYTES]) -> Result<FirstPacket, HandshakeError> {
    let total = packet_bytes(head)?;
    let mut packet = BytesMut::zeroed(total);
    let (start, body) = packet.split_at_mut(head.len());
    start.copy_from_slice(&head);
    stream.read_exact(body).await?;
    Ok(FirstPacket::decode(packet.freeze())?)
}

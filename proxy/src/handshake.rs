//! Reading the first packets of a connection, exactly and in bounds.

use std::io;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::wire::startup::{FirstPacket, Malformed, packet_bytes};

/// The answer to a request for encryption that is not offered.
const NOT_OFFERED: &[u8] = b"N";

#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// Reads packets until one says what the client came for: a session or a cancellation. Reads nothing beyond it, so that
/// what follows reaches the server through the relay.
pub(crate) async fn read(stream: &mut TcpStream) -> Result<FirstPacket, HandshakeError> {
    let (mut asked_ssl, mut asked_gss) = (false, false);
    loop {
        let packet = read_packet(stream).await?;
        let asked = match packet {
            FirstPacket::Ssl => &mut asked_ssl,
            FirstPacket::GssEnc => &mut asked_gss,
            FirstPacket::Cancel { .. } | FirstPacket::Startup { .. } => return Ok(packet),
        };
        if std::mem::replace(asked, true) {
            return Err(Malformed::Repeated.into());
        }
        if has_more(stream) {
            return Err(Malformed::EarlyData.into());
        }
        // TLS begins here, once it is offered.
        stream.write_all(NOT_OFFERED).await?;
    }
}

async fn read_packet(stream: &mut TcpStream) -> Result<FirstPacket, HandshakeError> {
    let mut header = [0; 4];
    stream.read_exact(&mut header).await?;
    let total = packet_bytes(header)?;
    let mut packet = BytesMut::zeroed(total);
    let (head, body) = packet.split_at_mut(header.len());
    head.copy_from_slice(&header);
    stream.read_exact(body).await?;
    Ok(FirstPacket::decode(packet.freeze())?)
}

/// Whether the client has already sent more.
fn has_more(stream: &TcpStream) -> bool {
    let mut byte = [0; 1];
    let peeked = rustix::net::recv(
        stream,
        &mut byte,
        rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT,
    );
    peeked.is_ok_and(|(_, count)| count > 0)
}

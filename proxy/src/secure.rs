//! TLS between the proxy and a member, and what a client's certificate says.

use std::io;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::record::Address;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::time::timeout;
use tracing::warn;
use x509_parser::parse_x509_certificate;

use crate::seldom::Seldom;
use crate::stream::Stream;
use crate::stream::socket::Socket;
use crate::stream::tls::{TlsError, TlsStream};
use crate::tls::{ServerTlsMode, TlsSettings, explain};
use crate::wire::startup::FirstPacket;

/// For a member to answer, and for the handshake.
const SECURE_MAX: Duration = Duration::from_millis(2500);

/// Each connection of a client could be reason for one.
static NO_TLS: Seldom = Seldom::new();

/// Speaks TLS with a member as the configuration says.
///
/// # Errors
/// When the member does not offer what is required, is not who it should be, or says nothing in time.
pub(crate) async fn secure(socket: Socket, to: &Address, tls: &TlsSettings, client_by_tls: bool) -> io::Result<Stream> {
    let plain = Stream::Plain(socket);
    // A client that speaks TLS with us would bind its password exchange to our certificate, and the member to its own.
    if client_by_tls && tls.server_mode >= ServerTlsMode::Require {
        // It came before the configuration became this one.
        return Err(io::Error::other(
            "server_tls requires TLS, which a client that speaks TLS with the proxy cannot have",
        ));
    }
    let Some(config) = tls.connect.clone().filter(|_| !client_by_tls) else {
        return Ok(plain);
    };
    let spoken = timeout(SECURE_MAX, async {
        let (offered, plain) = is_offered(plain).await?;
        let Stream::Plain(socket) = plain else {
            return Ok(plain); // It is plain.
        };
        if !offered {
            return match tls.server_mode {
                ServerTlsMode::Prefer | ServerTlsMode::Disable => Ok(Stream::Plain(socket)),
                _ => Err(io::Error::other("it does not offer TLS, which server_tls requires").into()),
            };
        }
        let name = ServerName::try_from(to.host.clone()).map_err(io::Error::other)?;
        let stream = TlsStream::connect(socket, config, name).await?;
        Ok(Stream::Tls(Box::new(stream)))
    });
    match spoken.await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(TlsError::Io(error))) => Err(error),
        Ok(Err(TlsError::Tls(error))) => {
            let why = explain(&error);
            if let Some(kept_back) = NO_TLS.admits(Boottime::now()) {
                warn!(member = %to, why, kept_back, "no TLS with a member");
            }
            Err(io::Error::new(io::ErrorKind::InvalidData, why))
        }
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no TLS in {} s", SECURE_MAX.as_secs_f64()),
        )),
    }
}

/// Asks the member.
async fn is_offered(mut server: Stream) -> Result<(bool, Stream), TlsError> {
    server.write_all(&FirstPacket::ssl_request()).await?;
    let mut answer = [0; 1];
    // Not a byte more: what follows an S is TLS.
    server.read_exact(&mut answer).await?;
    match answer {
        [b'S'] => Ok((true, server)),
        [b'N'] => Ok((false, server)),
        _ => Err(io::Error::other("it answers the request for TLS with neither S nor N").into()),
    }
}

/// The common name in a certificate's subject. One with several is for nobody: which of them counts is not agreed upon.
pub(crate) fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, parsed) = parse_x509_certificate(certificate).ok()?;
    let mut names = parsed.subject().iter_common_name();
    let name = names.next().filter(|_| names.next().is_none())?;
    Some(name.as_str().ok()?.to_owned())
}

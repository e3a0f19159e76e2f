//! A session with a host that is asked by SQL, by TLS where that is configured or the host takes none without.

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::{JoinSet, spawn_blocking};
use tokio_postgres::config::SslMode;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, Error, NoTls};
use tokio_rustls::TlsConnector;

use crate::http::Wire;
use crate::record::Address;
use crate::resolve::resolve;
use crate::tls::{ALPN, ServerTlsConfig, ServerTlsMode, connect, explain_handshake};

/// Asks a server whether it speaks TLS, see "SSL Session Encryption" of PostgreSQL's protocol.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// A connection that has been let in, and what moves its bytes.
pub(super) struct Session {
    pub(super) client: Client,
    _moving: JoinSet<()>,
}

/// Why there is none.
enum Refused {
    /// The server has said so.
    ByServer(Error),
    Otherwise(String),
}

impl Refused {
    /// What a server says that has no line in `pg_hba.conf` for us; perhaps it has one for who speaks TLS.
    fn may_want_tls(&self) -> bool {
        matches!(self, Self::ByServer(error) if error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION))
    }
}

impl From<Refused> for String {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::ByServer(error) => said(&error),
            Refused::Otherwise(what) => what,
        }
    }
}

impl Session {
    /// Logs in at `host`. No wait in it has a limit of its own: whoever asks has one.
    ///
    /// # Errors
    /// What the host said, or why it could not be asked. Never a password.
    pub(super) async fn open(host: &Address, login: &Config, tls: &ServerTlsConfig) -> Result<Self, String> {
        if tls.mode != ServerTlsMode::Disable {
            return Ok(Self::secured(host, login, tls).await?);
        }
        match Self::over(tcp(host).await?, login).await {
            Err(refused) if refused.may_want_tls() => {
                let required = ServerTlsConfig {
                    mode: ServerTlsMode::Require,
                    ..tls.clone()
                };
                // What it said first says more than what became of the second try.
                Ok(Self::secured(host, login, &required).await.map_err(|_| refused)?)
            }
            opened => Ok(opened?),
        }
    }

    async fn secured(host: &Address, login: &Config, tls: &ServerTlsConfig) -> Result<Self, Refused> {
        let stream = by_tls(host, tls).await.map_err(Refused::Otherwise)?;
        Self::over(stream, login).await
    }

    async fn over(stream: Box<dyn Wire>, login: &Config) -> Result<Self, Refused> {
        let mut login = login.clone();
        login.ssl_mode(SslMode::Disable); // If there is to be TLS, it is there.
        let (client, connection) = login.connect_raw(stream, NoTls).await.map_err(Refused::ByServer)?;
        let mut moving = JoinSet::new();
        moving.spawn(async move {
            let _ = connection.await; // Who asks hears of it.
        });
        Ok(Self {
            client,
            _moving: moving,
        })
    }
}

/// Connects to a PostgreSQL server, by TLS as far as that is asked for: what comes next is the startup message. No wait in it
/// has a limit of its own.
///
/// # Errors
/// Why it cannot be reached, or not as asked.
pub async fn reach_postgres(
    host: &Address,
    tls: &ServerTlsConfig,
) -> Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<>, String> {
    match tls.mode {
        ServerTlsMode::Disable => Ok(tcp(host).await?),
        _ => by_tls(host, tls).await,
    }
}

async fn tcp(host: &Address) -> Result<Box<dyn Wire>, Refused> {
    let connected = async { TcpStream::connect(&resolve(host).await?[..]).await };
    match connected.await {
        Ok(stream) => Ok(Box::new(stream)),
        Err(error) => Err(Refused::Otherwise(error.to_string())),
    }
}

async fn by_tls(host: &Address, tls: &ServerTlsConfig) -> Result<Box<dyn Wire>, String> {
    let mut stream = tcp(host).await?;
    let broken = |error: std::io::Error| format!("asking for TLS: {error}");
    stream.write_all(&SSL_REQUEST).await.map_err(broken)?;
    // Not a byte more: what follows an S is TLS.
    match stream.read_u8().await.map_err(broken)? {
        b'S' => {}
        b'N' if tls.mode == ServerTlsMode::Prefer => return Ok(stream),
        b'N' => return Err("it does not offer TLS, which is required".to_owned()),
        _ => return Err("it answers the request for TLS with neither S nor N".to_owned()),
    }
    let files = tls.clone();
    // Read anew each time: certificates are changed while this goes on.
    let config = spawn_blocking(move || connect(&files, ALPN)).await;
    let config = config
        .map_err(|error| error.to_string())?
        .map_err(|error| error.to_string())?;
    let name = ServerName::try_from(host.host.clone()).map_err(|error| error.to_string())?;
    match TlsConnector::from(std::sync::Arc::new(config))
        .connect(name, stream)
        .await
    {
        Ok(stream) => Ok(Box::new(stream)),
        Err(error) => Err(format!("no TLS: {}", explain_handshake(&error))),
    }
}

/// What PostgreSQL said, rather than that it said something.
pub(super) fn said(error: &Error) -> String {
    match error.as_db_error() {
        Some(db) => db.message().to_owned(),
        None => match std::error::Error::source(error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        },
    }
}

//! Who may come in to the console.

use std::io;

use bytes::{Bytes, BytesMut};
use rustix::process::geteuid;

use super::scram::{self, Exchange, Failed, Verifier};
use super::show::AS_PGBOUNCER;
use crate::shared::Shared;
use crate::stream::Stream;
use crate::stream::socket::Socket;
use crate::wire::console::{Answers, Asked, BadMessage, Block, HEAD_BYTES, decode, head, sasl_initial};
use crate::wire::error_response::Fatal;
use crate::wire::startup::parameters;

const CHUNK_BYTES: usize = 4096;
/// What a SCRAM exchange needs is far less.
const LOGIN_BYTES_MAX: usize = 2048;

/// Why somebody is not let in.
pub(super) enum LoginError {
    /// It went away, or said too little in time.
    Gone,
    /// With what it is told.
    Refused(Fatal),
}

/// Why no message could be read.
pub(super) enum ReadError {
    /// The connection has ended.
    Gone,
    Bad(BadMessage),
}

impl From<io::Error> for ReadError {
    fn from(_: io::Error) -> Self {
        Self::Gone
    }
}

/// A client of the console, spoken with in whole messages.
pub(super) struct Guest {
    stream: Stream,
    received: BytesMut,
    /// The last word of the exchange, which is said together with the welcome.
    last_word: Answers,
}

impl Guest {
    pub(super) fn new(stream: Stream, more: Vec<u8>) -> Self {
        Self {
            stream,
            received: BytesMut::from(more.as_slice()),
            last_word: Answers::default(),
        }
    }

    pub(super) fn into_stream(self) -> Stream {
        self.stream
    }

    /// Waits until something has come. May be dropped at any time.
    pub(super) async fn something(&mut self) -> Result<(), ReadError> {
        self.fill(1).await
    }

    async fn fill(&mut self, count: usize) -> Result<(), ReadError> {
        let mut chunk = [0; CHUNK_BYTES];
        while self.received.len() < count {
            match self.stream.read(&mut chunk).await? {
                0 => return Err(ReadError::Gone),
                read => self.received.extend_from_slice(chunk.get(..read).unwrap_or_default()),
            }
        }
        Ok(())
    }

    /// The next message. May be dropped at any time.
    pub(super) async fn message(&mut self) -> Result<Asked, ReadError> {
        self.fill(HEAD_BYTES).await?;
        let first = self.received.first_chunk().copied().unwrap_or_default();
        let (kind, body) = head(first).map_err(ReadError::Bad)?;
        self.fill(HEAD_BYTES + body).await?;
        let body = self.received.split_to(HEAD_BYTES + body).split_off(HEAD_BYTES);
        decode(kind, body.freeze()).map_err(ReadError::Bad)
    }

    pub(super) async fn send(&mut self, answers: &mut Answers) -> io::Result<()> {
        let bytes = answers.take();
        self.stream.write_all(&bytes).await
    }

    /// Whether it may do more than look, once it is known who it is; it has not been welcomed then.
    pub(super) async fn log_in(&mut self, shared: &Shared, user: &str, startup: &Bytes) -> Result<bool, LoginError> {
        let mut answers = Answers::default();
        negotiate(&mut answers, startup);
        let config = shared.config.load_full();
        let Some(console) = &config.console else {
            return Err(LoginError::Gone); // A reload has just taken it away.
        };
        if console.peers && self.is_trusted_peer() {
            self.last_word = answers;
            return Ok(true);
        }
        let known = console.users.iter().find(|known| known.name == user);
        let verifier = known.map_or_else(|| Verifier::of_nobody(user), |known| known.verifier.clone());
        let exchange = self.scram(&mut answers, verifier).await;
        match exchange {
            Ok(()) => {}
            Err(Some(Failed::Proof)) => return Err(refused(user)),
            Err(Some(Failed::Malformed)) => return Err(LoginError::Refused(malformed())),
            Err(None) => return Err(LoginError::Gone),
        }
        // Whoever does not exist has a verifier that no proof fits.
        let Some(known) = known else {
            return Err(refused(user));
        };
        self.last_word = answers;
        Ok(known.admin)
    }

    /// Whether the kernel says that the other end is a process of root or of our own user.
    fn is_trusted_peer(&self) -> bool {
        let Some(Socket::Unix(socket)) = self.stream.plain() else {
            return false;
        };
        let uid = socket.peer_cred().map(|peer| peer.uid());
        uid.is_ok_and(|uid| uid == 0 || uid == geteuid().as_raw())
    }

    async fn scram(&mut self, answers: &mut Answers, verifier: Verifier) -> Result<(), Option<Failed>> {
        answers.ask_for_scram();
        self.send(answers).await.map_err(|_| None)?;
        let first = self.word().await?;
        let initial = sasl_initial(&first).filter(|(mechanism, _)| mechanism == "SCRAM-SHA-256");
        let (_, client_first) = initial.ok_or(Some(Failed::Malformed))?;
        let nonce = scram::nonce().ok_or(None)?;
        let exchange = Exchange::begin(&client_first, verifier, &nonce)?;
        answers.scram(exchange.server_first(), false);
        self.send(answers).await.map_err(|_| None)?;
        let client_final = self.word().await?;
        let server_final = exchange.finish(&client_final)?;
        answers.scram(server_final, true);
        Ok(())
    }

    async fn word(&mut self) -> Result<Bytes, Option<Failed>> {
        match self.message().await {
            Ok(Asked::Password(body)) if body.len() <= LOGIN_BYTES_MAX => Ok(body),
            Ok(Asked::Terminate) | Err(ReadError::Gone) => Err(None),
            Ok(_) | Err(ReadError::Bad(_)) => Err(Some(Failed::Malformed)),
        }
    }

    /// Tells the client that it is in.
    pub(super) async fn welcome(&mut self) -> io::Result<()> {
        let mut answers = std::mem::take(&mut self.last_word);
        let version = format!("{AS_PGBOUNCER}/bouncer");
        answers.welcome(&[
            ("server_version", &version),
            ("server_encoding", "UTF8"),
            ("client_encoding", "UTF8"),
            ("DateStyle", "ISO, MDY"),
            ("TimeZone", "GMT"),
            ("integer_datetimes", "on"),
            ("standard_conforming_strings", "on"),
            ("is_superuser", "off"),
        ]);
        answers.ready(Block::None);
        self.send(&mut answers).await
    }
}

/// Says what of the startup message is not spoken here, if there is any.
fn negotiate(answers: &mut Answers, startup: &Bytes) {
    let minor = startup.get(6..8).unwrap_or_default();
    let named = parameters(startup).unwrap_or_default();
    let options: Vec<String> = named
        .iter()
        .filter(|(key, _)| key.starts_with(b"_pq_."))
        .map(|(key, _)| String::from_utf8_lossy(key).into_owned())
        .collect();
    if minor != [0, 0] || !options.is_empty() {
        answers.speak_three_zero(options);
    }
}

/// The words of PostgreSQL, for whoever does not exist as for a wrong password.
fn refused(user: &str) -> LoginError {
    let fatal = Fatal::new("28P01", format!("password authentication failed for user \"{user}\""))
        .hint("This is the proxy's own console: its users are in proxy.console.users, not in PostgreSQL.");
    LoginError::Refused(fatal)
}

fn malformed() -> Fatal {
    Fatal::new("08P01", "the console asks for SCRAM-SHA-256, and this is none")
}

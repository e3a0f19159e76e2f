//! TLS over a socket, by rustls without its buffers: ciphertext is received, decrypted, encrypted and sent in buffers that
//! all sessions of a thread share. A session keeps only what is neither whole nor taken: part of a record that comes, and
//! what the socket has not taken.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};
use rustls::{ClientConfig, ServerConfig};
use tokio::time::timeout;

use super::socket::Socket;
use super::{BUFFER_BYTES, is_transient};

/// What encryption adds to [`BUFFER_BYTES`], with room: a header, a type and a tag for each 16 KiB.
const RECORDS_OVERHEAD: usize = 4 * 1024;
/// More of a record that is not whole than any record has.
const RECORD_BYTES_MAX: usize = 5 + 16 * 1024 + 2048;

/// For a client to take an alert and close.
const ALERT_MAX: Duration = Duration::from_secs(1);

thread_local! {
    static CIPHERTEXT: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER_BYTES + RECORDS_OVERHEAD]);
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Tls(#[from] rustls::Error),
}

enum Side {
    Server(UnbufferedServerConnection),
    Client(UnbufferedClientConnection),
}

/// What is done where data may be sent.
type Act<'a> = dyn FnMut(&mut dyn Traffic) + 'a;

impl Side {
    fn step(&mut self, ciphertext: &mut [u8], step: &mut Step<'_>, act: &mut Act<'_>) -> Result<(), rustls::Error> {
        match self {
            Self::Server(connection) => step.act(connection.process_tls_records(ciphertext), act),
            Self::Client(connection) => step.act(connection.process_tls_records(ciphertext), act),
        }
    }

    fn has_to_send(&self) -> bool {
        match self {
            Self::Server(connection) => connection.wants_write(),
            Self::Client(connection) => connection.wants_write(),
        }
    }

    /// Steps until the protocol waits for more or for data to send. After an error nothing may be asked of this side again:
    /// what it remembers of the ciphertext is not there any more.
    fn drive(
        &mut self,
        ciphertext: &mut [u8],
        step: &mut Step<'_>,
        act: &mut Act<'_>,
    ) -> Result<Looked, rustls::Error> {
        let mut used = 0;
        loop {
            let stepped = self.step(ciphertext.get_mut(used..).unwrap_or_default(), step, act);
            used += step.discard;
            if let Err(error) = stepped {
                // What the peer is told of it. Without ciphertext, and only while there is such: any other step would look
                // for what it has seen before.
                while self.has_to_send() && self.step(&mut [], step, act).is_ok() {}
                return Err(error);
            }
            if let Some(stage) = step.waits {
                let plain = step.plain_count;
                return Ok(Looked { used, plain, stage });
            }
        }
    }
}

/// How far the protocol has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// More of the handshake is to come.
    Handshake,
    /// Data may be sent.
    Open,
}

/// An encrypted connection.
pub(crate) struct TlsStream {
    socket: Socket,
    side: Side,
    /// Part of a record.
    incoming: Vec<u8>,
    /// Decrypted, and not asked for yet; only while less than a buffer is asked for, at the beginning of a session.
    plain: Vec<u8>,
    plain_from: usize,
    /// Encrypted, and not taken by the socket.
    outgoing: Vec<u8>,
    outgoing_from: usize,
    /// The peer has said that nothing more comes.
    peer_finished: bool,
    /// And so have we.
    finished: bool,
    /// Something that was received was not as it should be, and nothing more can be.
    broken: bool,
}

/// What came of looking at received ciphertext.
struct Looked {
    used: usize,
    plain: usize,
    stage: Stage,
}

impl TlsStream {
    fn new(socket: Socket, side: Side, early: &[u8]) -> Self {
        Self {
            socket,
            side,
            incoming: early.to_vec(),
            plain: Vec::new(),
            plain_from: 0,
            outgoing: Vec::new(),
            outgoing_from: 0,
            peer_finished: false,
            finished: false,
            broken: false,
        }
    }

    /// The server's part of a handshake. `early` has been received already. The caller sets the deadline.
    ///
    /// # Errors
    /// When the connection breaks, or the client is not understood or not accepted; it has been told by an alert.
    pub(crate) async fn accept(socket: Socket, config: Arc<ServerConfig>, early: &[u8]) -> Result<Self, TlsError> {
        let side = Side::Server(UnbufferedServerConnection::new(config)?);
        let mut stream = Self::new(socket, side, early);
        match stream.handshake().await {
            Ok(()) => Ok(stream),
            Err(error) => {
                if matches!(error, TlsError::Tls(_)) {
                    stream.linger().await;
                }
                Err(error)
            }
        }
    }

    /// Closes so that an alert arrives: closing with something unread would reset the connection, and the alert with it.
    async fn linger(&self) {
        let _ = self.socket.finish_sending();
        let mut ignored = [0; 1024];
        let received = poll_fn(|cx| {
            loop {
                ready!(self.socket.poll_readable(cx))?;
                match self.socket.receive(&mut ignored) {
                    Ok(0) => return Poll::Ready(Ok::<_, io::Error>(())),
                    Ok(_) => {}
                    Err(error) if is_transient(&error) => {}
                    Err(error) => return Poll::Ready(Err(error)),
                }
            }
        });
        // Whether it was heard changes nothing.
        let _ = timeout(ALERT_MAX, received).await;
    }

    /// The client's part of a handshake.
    ///
    /// # Errors
    /// When the connection breaks, or the server is not understood or not trusted; it has been told by an alert.
    pub(crate) async fn connect(
        socket: Socket,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> Result<Self, TlsError> {
        let side = Side::Client(UnbufferedClientConnection::new(config, name)?);
        let mut stream = Self::new(socket, side, &[]);
        stream.handshake().await?;
        Ok(stream)
    }

    /// The certificate that the peer showed for itself.
    pub(crate) fn peer_certificate(&self) -> Option<&CertificateDer<'static>> {
        let certificates = match &self.side {
            Side::Server(connection) => connection.peer_certificates(),
            Side::Client(connection) => connection.peer_certificates(),
        };
        certificates?.first()
    }

    /// What protocol was agreed on.
    pub(crate) fn alpn(&self) -> Option<&[u8]> {
        match &self.side {
            Side::Server(connection) => connection.alpn_protocol(),
            Side::Client(connection) => connection.alpn_protocol(),
        }
    }

    /// The same over another socket, made of its own.
    pub(crate) fn with(self, change: impl FnOnce(Socket) -> io::Result<Socket>) -> io::Result<Self> {
        Ok(Self {
            socket: change(self.socket)?,
            ..self
        })
    }

    pub(crate) const fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Whether something has been decrypted that nobody has asked for yet.
    pub(crate) const fn has_plain(&self) -> bool {
        self.plain_from < self.plain.len()
    }

    async fn handshake(&mut self) -> Result<(), TlsError> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let mut incoming = std::mem::take(&mut self.incoming);
            let looked = self.look(&mut incoming, &mut buffer);
            incoming.drain(..looked.as_ref().map_or(0, |looked| looked.used));
            self.incoming = incoming;
            let flushed = poll_fn(|cx| self.poll_flush(cx)).await; // An alert, too.
            let looked = looked?;
            flushed?;
            self.plain
                .extend_from_slice(buffer.get(..looked.plain).unwrap_or_default());
            if looked.stage == Stage::Open {
                return Ok(());
            }
            if self.peer_finished {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            let (socket, incoming) = (&self.socket, &mut self.incoming);
            if incoming.len() > BUFFER_BYTES {
                return Err(io::Error::other("a TLS handshake of more than 64 KiB").into());
            }
            let count = poll_fn(|cx| {
                loop {
                    ready!(socket.poll_readable(cx))?;
                    match socket.receive(&mut buffer) {
                        Err(error) if is_transient(&error) => {}
                        received => return Poll::Ready(received),
                    }
                }
            })
            .await?;
            if count == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            incoming.extend_from_slice(buffer.get(..count).unwrap_or_default());
        }
    }

    /// Works off whole records: what they say goes to `plain`, which has room for all of it, and answers to `outgoing`.
    fn look(&mut self, ciphertext: &mut [u8], plain: &mut [u8]) -> Result<Looked, rustls::Error> {
        self.drive(ciphertext, plain, &mut |_| ())
    }

    fn drive(&mut self, ciphertext: &mut [u8], plain: &mut [u8], act: &mut Act<'_>) -> Result<Looked, rustls::Error> {
        if self.broken {
            return Err(rustls::Error::General("this TLS session has failed before".to_owned()));
        }
        let mut step = Step {
            plain,
            outgoing: &mut self.outgoing,
            peer_finished: &mut self.peer_finished,
            discard: 0,
            plain_count: 0,
            waits: None,
        };
        let looked = self.side.drive(ciphertext, &mut step, act);
        self.broken = looked.is_err();
        looked
    }

    pub(crate) fn poll_receivable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.has_plain() || self.peer_finished {
            return Poll::Ready(Ok(()));
        }
        self.socket.poll_readable(cx)
    }

    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.has_plain() {
            if buffer.len() >= BUFFER_BYTES {
                return self.decrypt(buffer);
            }
            self.decrypt_some()?;
        }
        let rest = self.plain.get(self.plain_from..).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        for (to, from) in buffer.iter_mut().zip(rest) {
            *to = *from;
        }
        self.plain_from += count;
        if !self.has_plain() {
            (self.plain, self.plain_from) = (Vec::new(), 0);
        }
        Ok(count)
    }

    /// Receives once and keeps what it says, in no more memory than that takes.
    fn decrypt_some(&mut self) -> io::Result<()> {
        let mut whole = vec![0; BUFFER_BYTES];
        let count = self.decrypt(&mut whole)?;
        (self.plain, self.plain_from) = (whole.get(..count).unwrap_or_default().to_vec(), 0);
        Ok(())
    }

    /// Ready when something has been decrypted that nobody has asked for yet, and then true, or at the end of the stream.
    pub(crate) fn poll_there(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        while !self.has_plain() {
            ready!(self.poll_receivable(cx))?;
            match self.decrypt_some() {
                Ok(()) if self.has_plain() => break,
                Ok(()) => return Poll::Ready(Ok(false)),
                Err(error) if is_transient(&error) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(true))
    }

    /// Receives once and decrypts what is whole.
    fn decrypt(&mut self, plain: &mut [u8]) -> io::Result<usize> {
        if self.peer_finished {
            return Ok(0);
        }
        CIPHERTEXT.with_borrow_mut(|ciphertext| {
            let kept = self.incoming.len();
            // So that what is decrypted fits.
            let (head, room) = ciphertext
                .get_mut(..BUFFER_BYTES)
                .and_then(|buffer| buffer.split_at_mut_checked(kept))
                .filter(|_| kept <= RECORD_BYTES_MAX)
                .ok_or_else(|| io::Error::other("a TLS record that does not end"))?;
            head.copy_from_slice(&self.incoming);
            let count = self.socket.receive(room)?;
            if count == 0 && kept > 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if count == 0 {
                // Not every client says goodbye before it closes.
                self.peer_finished = true;
                return Ok(0);
            }
            let all = kept + count;
            let bytes = ciphertext.get_mut(..all).unwrap_or_default();
            let looked = self.look(bytes, plain);
            // An answer or an alert: if it does not go out now, it does with what is sent next.
            self.flush_now();
            let looked = looked.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let rest = bytes.get(looked.used..).unwrap_or_default();
            if rest.is_empty() {
                self.incoming = Vec::new();
            } else {
                self.incoming = rest.to_vec();
            }
            if looked.plain == 0 && !self.peer_finished {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(looked.plain)
        })
    }

    /// Takes up to a buffer, encrypts it, and sends what the socket takes of that. Nothing is taken while something is left
    /// from before.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.flush_now();
        if self.has_outgoing() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let bytes = bytes.get(..bytes.len().min(BUFFER_BYTES)).unwrap_or_default();
        CIPHERTEXT.with_borrow_mut(|ciphertext| {
            let count = self.with_traffic(&mut |traffic| traffic.encrypt(bytes, ciphertext))?;
            let encrypted = ciphertext.get(..count).unwrap_or_default();
            let before = self.outgoing.len(); // A key update goes first.
            let sent = if before > 0 {
                0
            } else {
                match self.socket.send(encrypted) {
                    Ok(sent) => sent,
                    Err(error) if is_transient(&error) => 0,
                    Err(error) => return Err(error),
                }
            };
            self.outgoing
                .extend_from_slice(encrypted.get(sent..).unwrap_or_default());
            Ok(bytes.len())
        })
    }

    /// Brings the protocol to where data may be sent, and there does `act`.
    fn with_traffic<T>(&mut self, act: &mut dyn FnMut(&mut dyn Traffic) -> Result<T, EncryptError>) -> io::Result<T> {
        let mut incoming = std::mem::take(&mut self.incoming);
        let mut acted = None;
        let looked = self.drive(&mut incoming, &mut [], &mut |traffic| acted = Some(act(traffic)));
        incoming.drain(..looked.as_ref().map_or(0, |looked| looked.used));
        self.incoming = incoming;
        looked.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        match acted {
            Some(acted) => acted.map_err(|error| io::Error::other(error.to_string())),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    const fn has_outgoing(&self) -> bool {
        self.outgoing_from < self.outgoing.len()
    }

    /// What goes out at once; an error shows where the next thing is sent.
    fn flush_now(&mut self) {
        while let Some(rest) = self.outgoing.get(self.outgoing_from..).filter(|rest| !rest.is_empty()) {
            match self.socket.send(rest) {
                Ok(sent) => self.outgoing_from += sent,
                Err(_) => return,
            }
        }
        self.forget_sent();
    }

    fn forget_sent(&mut self) {
        if !self.outgoing.is_empty() {
            (self.outgoing, self.outgoing_from) = (Vec::new(), 0);
        }
    }

    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.socket.poll_send_all(cx, &self.outgoing, &mut self.outgoing_from))?;
        self.forget_sent();
        Poll::Ready(Ok(()))
    }

    pub(crate) fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.finished {
            self.finished = true;
            let mut alert = [0; 256]; // With room for a key update that goes first.
            let count = self.with_traffic(&mut |traffic| traffic.close(&mut alert))?;
            self.outgoing.extend_from_slice(alert.get(..count).unwrap_or_default());
        }
        ready!(self.poll_flush(cx))?;
        Poll::Ready(self.socket.finish_sending())
    }
}

/// Where data may be sent, on either side of a connection.
trait Traffic {
    fn encrypt(&mut self, bytes: &[u8], ciphertext: &mut [u8]) -> Result<usize, EncryptError>;
    fn close(&mut self, ciphertext: &mut [u8]) -> Result<usize, EncryptError>;
}

impl<Data> Traffic for rustls::unbuffered::WriteTraffic<'_, Data> {
    fn encrypt(&mut self, bytes: &[u8], ciphertext: &mut [u8]) -> Result<usize, EncryptError> {
        Self::encrypt(self, bytes, ciphertext)
    }

    fn close(&mut self, ciphertext: &mut [u8]) -> Result<usize, EncryptError> {
        self.queue_close_notify(ciphertext)
    }
}

/// One step of the protocol, and where its results go.
struct Step<'a> {
    plain: &'a mut [u8],
    outgoing: &'a mut Vec<u8>,
    peer_finished: &'a mut bool,
    /// How much of the ciphertext is not needed any more.
    discard: usize,
    plain_count: usize,
    /// Where the protocol stands, once it waits.
    waits: Option<Stage>,
}

impl Step<'_> {
    fn act<Data>(&mut self, status: UnbufferedStatus<'_, '_, Data>, act: &mut Act<'_>) -> Result<(), rustls::Error> {
        let UnbufferedStatus { discard, state, .. } = status;
        self.discard = discard;
        match state? {
            ConnectionState::ReadTraffic(mut traffic) => {
                while let Some(record) = traffic.next_record() {
                    let record = record?;
                    self.discard += record.discard;
                    let place = self
                        .plain
                        .get_mut(self.plain_count..self.plain_count + record.payload.len());
                    let place = place.ok_or_else(|| rustls::Error::General("no room for a record".to_owned()))?;
                    place.copy_from_slice(record.payload);
                    self.plain_count += record.payload.len();
                }
            }
            ConnectionState::EncodeTlsData(mut data) => {
                let at = self.outgoing.len();
                let needed = match data.encode(&mut []) {
                    Err(EncodeError::InsufficientSize(size)) => size.required_size,
                    Ok(_) | Err(EncodeError::AlreadyEncoded) => 0,
                };
                self.outgoing.resize(at + needed, 0);
                let encoded = self.outgoing.get_mut(at..).map(|room| data.encode(room));
                if needed > 0 && !matches!(encoded, Some(Ok(_))) {
                    return Err(rustls::Error::General("a handshake message was not encoded".to_owned()));
                }
            }
            // It is in `outgoing`, from where it goes in its order.
            ConnectionState::TransmitTlsData(data) => data.done(),
            ConnectionState::BlockedHandshake => self.waits = Some(Stage::Handshake),
            ConnectionState::WriteTraffic(mut traffic) => {
                act(&mut traffic);
                self.waits = Some(Stage::Open);
            }
            ConnectionState::PeerClosed => *self.peer_finished = true,
            ConnectionState::Closed => self.waits = Some(Stage::Open),
            // Not offered.
            _ => return Err(rustls::Error::General("unexpected early data".to_owned())),
        }
        Ok(())
    }
}

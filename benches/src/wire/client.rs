//! A client of its own, without a library between the measurement and the socket: whole requests are bytes made beforehand,
//! and an answer is over with the server's word that it is ready.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use super::certificate;

const READ_BYTES: usize = 256 * 1024;
/// For anything that should take far less.
const PATIENCE: Duration = Duration::from_secs(30);
/// `ReadyForQuery`, idle: the last that a server says to every request.
pub(crate) const READY: [u8; 6] = *b"Z\0\0\0\x05I";
const COPY_MESSAGE_BYTES: usize = 64 * 1024;
const COPY_LINE_BYTES: usize = 1024;

/// One message of the protocol.
fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend_from_slice(&length(body.len() + 4));
    bytes.extend_from_slice(body);
    bytes
}

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes()
}

/// A simple query.
pub(crate) fn simple(text: &str) -> Vec<u8> {
    message(b'Q', format!("{text}\0").as_bytes())
}

/// Makes the statement that [`prepared`] runs.
pub(crate) fn prepare(text: &str) -> Vec<u8> {
    let mut bytes = message(b'P', format!("s\0{text}\0\0\0").as_bytes());
    bytes.extend_from_slice(&message(b'S', b""));
    bytes
}

/// Runs the statement that was prepared.
pub(crate) fn prepared() -> Vec<u8> {
    let mut bytes = message(b'B', b"\0s\0\0\0\0\0\0\0");
    bytes.extend_from_slice(&message(b'E', b"\0\0\0\0\0"));
    bytes.extend_from_slice(&message(b'S', b""));
    bytes
}

/// The first that a client says.
pub(crate) fn startup() -> Vec<u8> {
    let body = b"\0\x03\0\0user\0postgres\0database\0postgres\0\0";
    let mut bytes = length(body.len() + 4).to_vec();
    bytes.extend_from_slice(body);
    bytes
}

/// Where to connect to, and how.
#[derive(Clone)]
pub(crate) struct Door {
    pub(crate) address: SocketAddr,
    /// With TLS, and then whether the server is asked for it in plaintext first.
    pub(crate) tls: Option<(Arc<ClientConfig>, Asked)>,
}

/// How TLS begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// By PostgreSQL's question.
    First,
    /// At once.
    Never,
}

/// An open connection, whatever carries it.
pub(crate) enum Stream {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Stream {
    fn open(door: &Door) -> Result<Self> {
        let mut stream = TcpStream::connect(door.address).with_context(|| format!("connecting to {}", door.address))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let Some((config, asked)) = &door.tls else {
            return Ok(Self::Plain(stream));
        };
        if *asked == Asked::First {
            stream.write_all(b"\0\0\0\x08\x04\xd2\x16\x2f")?;
            let mut answer = [0];
            stream.read_exact(&mut answer)?;
            ensure!(&answer == b"S", "{} takes no TLS", door.address);
        }
        let connection = ClientConnection::new(Arc::clone(config), certificate::NAME.try_into()?)?;
        Ok(Self::Tls(Box::new(StreamOwned::new(connection, stream))))
    }

    /// What is left of it when it carries no TLS.
    pub(crate) fn plain(self) -> Option<TcpStream> {
        match self {
            Self::Plain(stream) => Some(stream),
            Self::Tls(_) => None,
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

/// A connection on which the server is ready.
pub(crate) struct Client {
    stream: Stream,
    buffer: Vec<u8>,
}

impl Client {
    pub(crate) fn connect(door: &Door) -> Result<Self> {
        let mut client = Self {
            stream: Stream::open(door)?,
            buffer: vec![0; READ_BYTES],
        };
        let address = door.address;
        client
            .ask(&startup())
            .with_context(|| format!("startup at {address}"))?;
        Ok(client)
    }

    /// As [`Client::connect`], for the many that stay idle: without a buffer of its own once it is open.
    pub(crate) fn connect_idle(door: &Door, request: &[u8]) -> Result<Stream> {
        let mut client = Self::connect(door)?;
        client.ask(request)?;
        Ok(client.stream)
    }

    /// Sends a request and takes the whole answer. How many bytes that had.
    pub(crate) fn ask(&mut self, request: &[u8]) -> Result<usize> {
        self.stream.write_all(request)?;
        self.stream.flush()?;
        self.answer()
    }

    /// Takes an answer until the server is ready.
    fn answer(&mut self) -> Result<usize> {
        let mut total = 0;
        let mut end = [0; READY.len()];
        loop {
            let count = self.stream.read(&mut self.buffer)?;
            ensure!(count > 0, "the connection was closed within an answer");
            let bytes = self.buffer.get(..count).unwrap_or_default();
            ensure!(
                total > 0 || bytes.first() != Some(&b'E'),
                "an error: {}",
                String::from_utf8_lossy(bytes)
            );
            total += count;
            if bytes.ends_with(&READY) {
                return Ok(total);
            }
            if let Some(last) = bytes.last_chunk() {
                end = *last;
            } else {
                end.rotate_left(count);
                if let Some(slot) = end.get_mut(READY.len() - count..) {
                    slot.copy_from_slice(bytes);
                }
            }
            if end == READY {
                return Ok(total);
            }
        }
    }

    /// Copies at least so many MiB in. How many bytes those were.
    pub(crate) fn copy_in(&mut self, statement: &[u8], mebibytes: usize) -> Result<usize> {
        self.stream.write_all(statement)?;
        self.stream.flush()?;
        let mut head = [0; 5];
        self.stream.read_exact(&mut head)?;
        ensure!(
            head.starts_with(b"G"),
            "no invitation to copy, but a {:?}",
            char::from(head[0])
        );
        let rest = u32::from_be_bytes([head[1], head[2], head[3], head[4]]).saturating_sub(4);
        let mut columns = vec![0; usize::try_from(rest)?];
        self.stream.read_exact(&mut columns)?;
        let mut line = vec![b'x'; COPY_LINE_BYTES - 1];
        line.push(b'\n');
        let one = message(b'd', &line.repeat(COPY_MESSAGE_BYTES / COPY_LINE_BYTES));
        let several = one.repeat(4);
        let times = (mebibytes << 20).div_ceil(several.len());
        for _ in 0..times {
            self.stream.write_all(&several)?;
        }
        self.stream.write_all(&message(b'c', b""))?;
        self.stream.flush()?;
        self.answer()?;
        Ok(times * several.len())
    }

    /// Says that it ends, and closes.
    pub(crate) fn end(mut self) -> Result<()> {
        self.stream.write_all(&message(b'X', b""))?;
        Ok(self.stream.flush()?)
    }

    /// Asks the same again and again for a time. How long each took, in nanoseconds.
    pub(crate) fn ping_pong(&mut self, request: &[u8], span: Duration) -> Result<Vec<u64>> {
        let mut times = Vec::with_capacity(1 << 16);
        let began = Instant::now();
        let mut before = began;
        while before.duration_since(began) < span {
            self.ask(request)?;
            let after = Instant::now();
            times.push(u64::try_from(after.duration_since(before).as_nanos()).unwrap_or(u64::MAX));
            before = after;
        }
        Ok(times)
    }
}

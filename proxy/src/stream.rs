//! A connection's bytes, whatever carries them: TCP, a unix socket, or TLS over one of them.
//!
//! What is plain is read and written by one system call each. TLS works in buffers that all sessions of a thread share, so
//! that an idle session owns none.

pub(crate) mod socket;
pub(crate) mod tls;

use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll, ready};

use self::socket::Socket;
use self::tls::TlsStream;

/// What the relay and TLS move at a time.
pub(crate) const BUFFER_BYTES: usize = 64 * 1024;

/// A client's or a server's connection.
pub(crate) enum Stream {
    Plain(Socket),
    Tls(Box<TlsStream>),
}

impl Stream {
    /// Ready when [`Self::receive`] may have something.
    pub(crate) fn poll_receivable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(socket) => socket.poll_readable(cx),
            Self::Tls(stream) => stream.poll_receivable(cx),
        }
    }

    /// Receives once; 0 at the end of the stream. A TLS record that is not whole yet is `WouldBlock`.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.receive(buffer),
            Self::Tls(stream) => stream.receive(buffer),
        }
    }

    /// Ready when [`Self::send`] may take something. What was taken before has gone out by then.
    pub(crate) fn poll_sendable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(socket) => socket.poll_writable(cx),
            Self::Tls(stream) => stream.poll_flush(cx),
        }
    }

    /// Sends what is taken at once.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.send(bytes),
            Self::Tls(stream) => stream.send(bytes),
        }
    }

    /// Ready once everything that was taken is the kernel's.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(_) => Poll::Ready(Ok(())),
            Self::Tls(stream) => stream.poll_flush(cx),
        }
    }

    /// Says that nothing more will be sent.
    pub(crate) fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(socket) => Poll::Ready(socket.finish_sending()),
            Self::Tls(stream) => stream.poll_finish(cx),
        }
    }

    /// The socket, when its bytes are the session's own.
    pub(crate) fn plain(&self) -> Option<&Socket> {
        match self {
            Self::Plain(socket) => Some(socket),
            Self::Tls(_) => None,
        }
    }

    /// The socket below.
    pub(crate) fn socket(&self) -> &Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => stream.socket(),
        }
    }

    /// The same with another socket below, made of its own. When that fails the connection is lost.
    pub(crate) fn with(self, change: impl FnOnce(Socket) -> io::Result<Socket>) -> io::Result<Self> {
        Ok(match self {
            Self::Plain(socket) => Self::Plain(change(socket)?),
            Self::Tls(stream) => Self::Tls(Box::new(stream.with(change)?)),
        })
    }

    /// Ends the connection by a reset, which no reader takes for the end of a complete stream.
    pub(crate) fn reset(self) {
        self.socket().reset_on_close();
    }

    /// At least one byte; 0 at the end of the stream. May be dropped at any time.
    pub(crate) async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        poll_fn(|cx| {
            loop {
                ready!(self.poll_receivable(cx))?;
                match self.receive(buffer) {
                    Err(error) if is_transient(&error) => {
                        // TLS may owe an answer before more comes.
                        if let Poll::Ready(Err(error)) = self.poll_flush(cx) {
                            return Poll::Ready(Err(error));
                        }
                    }
                    read => return Poll::Ready(read),
                }
            }
        })
        .await
    }

    /// Fills the buffer.
    ///
    /// # Errors
    /// `UnexpectedEof` when the stream ends before.
    pub(crate) async fn read_exact(&mut self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            let count = self.read(buffer).await?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            buffer = buffer.split_at_mut(count).1;
        }
        Ok(())
    }

    /// Sends everything.
    pub(crate) async fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        poll_fn(|cx| {
            while !bytes.is_empty() {
                ready!(self.poll_sendable(cx))?;
                match self.send(bytes) {
                    Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
                    Err(error) if is_transient(&error) => {}
                    Err(error) => return Poll::Ready(Err(error)),
                }
            }
            self.poll_flush(cx)
        })
        .await
    }

    /// Says that nothing more will be sent, and waits until that is on its way.
    pub(crate) async fn finish(&mut self) -> io::Result<()> {
        poll_fn(|cx| self.poll_finish(cx)).await
    }

    /// Ready when something is there to be received, and then true, or at the end of the stream. Takes nothing away.
    pub(crate) fn poll_there(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        match self {
            Self::Plain(socket) => socket.poll_peek(cx, &mut [0]).map_ok(|count| count > 0),
            Self::Tls(stream) => stream.poll_there(cx),
        }
    }
}

pub(crate) fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

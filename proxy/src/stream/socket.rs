//! TCP and unix sockets as one, and the options of those that carry sessions.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::net::{RecvFlags, SendFlags};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

/// A peer that went away without a word while nothing is in flight is noticed within a minute.
///
/// TCP_USER_TIMEOUT is left alone on purpose: Linux counts the time that a peer's receive window is closed against it, even
/// while the peer acknowledges every probe, so it would end sessions whose client reads slowly and COPYs that wait for a
/// lock; and where it is set, it overrides the number of keepalive probes.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(30))
    .with_interval(Duration::from_secs(10))
    .with_retries(3);

/// Small messages go out at once, and a dead peer is noticed. What a listening socket is set to, those that it accepts are.
pub(crate) fn tune(socket: &SockRef<'_>) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&KEEPALIVE)
}

/// A connected socket on this thread's runtime.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// The same call on whichever kind it is.
macro_rules! each {
    ($self:expr, $stream:ident => $call:expr) => {
        match $self {
            Socket::Tcp($stream) => $call,
            Socket::Unix($stream) => $call,
        }
    };
}

impl Socket {
    pub(crate) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_read_ready(cx))
    }

    pub(crate) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_write_ready(cx))
    }

    /// Receives once. A short read means that the socket is drained: reporting it as "would block" spares the second receive
    /// that the runtime would otherwise need to find that out. The end of the stream is remembered by the runtime and not
    /// lost.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut short = None;
        let room = buffer.len();
        let receive = || {
            let (_, count) = rustix::net::recv(self.as_fd(), &mut *buffer, RecvFlags::empty())?;
            if (1..room).contains(&count) {
                short = Some(count);
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(count)
        };
        let result = self.try_io(Interest::READABLE, receive);
        short.map_or(result, Ok)
    }

    /// Sends once, by a system call of its own: the C library's is a point where a thread may be cancelled, and asks each
    /// time whether it is.
    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        self.try_io(Interest::WRITABLE, || {
            Ok(rustix::net::send(self.as_fd(), bytes, SendFlags::NOSIGNAL)?)
        })
    }

    /// Does `call`, which ends with `WouldBlock` when the socket is not ready any more.
    pub(crate) fn try_io<T>(&self, interest: Interest, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        each!(self, stream => stream.try_io(interest, call))
    }

    /// Sends what was kept of a buffer; ready when it has gone.
    pub(crate) fn poll_send_all(&self, cx: &mut Context<'_>, bytes: &[u8], from: &mut usize) -> Poll<io::Result<()>> {
        while let Some(rest) = bytes.get(*from..).filter(|rest| !rest.is_empty()) {
            ready!(self.poll_writable(cx))?;
            match self.send(rest) {
                Ok(sent) => *from += sent,
                Err(error) if super::is_transient(&error) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Says that nothing more will be sent.
    pub(crate) fn finish_sending(&self) -> io::Result<()> {
        SockRef::from(&self.as_fd()).shutdown(Shutdown::Write)
    }

    /// From now on closing resets the connection. A unix socket knows no reset.
    pub(crate) fn reset_on_close(&self) {
        if let Self::Tcp(stream) = self {
            // A socket that refuses the option is gone already.
            let _ = stream.set_zero_linger();
        }
    }

    /// At least one byte; 0 at the end. May be dropped at any time.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            each!(self, stream => stream.readable().await)?;
            match self.receive(buffer) {
                Err(error) if super::is_transient(&error) => {}
                read => return read,
            }
        }
    }

    /// Ready when something can be received, which is left there; 0 at the end.
    pub(crate) fn poll_peek(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.poll_readable(cx))?;
            let peek = || {
                let (_, count) = rustix::net::recv(self.as_fd(), &mut *buffer, RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
                Ok(count)
            };
            match self.try_io(Interest::READABLE, peek) {
                Err(error) if super::is_transient(&error) => {}
                peeked => return Poll::Ready(peeked),
            }
        }
    }
}

/// One on its way from one thread to another.
#[derive(Debug)]
pub(crate) enum Travelling {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

impl Socket {
    /// Leaves this thread's runtime.
    pub(crate) fn leave(self) -> io::Result<Travelling> {
        Ok(match self {
            Self::Tcp(stream) => Travelling::Tcp(stream.into_std()?),
            Self::Unix(stream) => Travelling::Unix(stream.into_std()?),
        })
    }

    /// Joins this thread's runtime.
    pub(crate) fn arrive(travelling: Travelling) -> io::Result<Self> {
        Ok(match travelling {
            Travelling::Tcp(stream) => Self::Tcp(TcpStream::from_std(stream)?),
            Travelling::Unix(stream) => Self::Unix(UnixStream::from_std(stream)?),
        })
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        each!(self, stream => stream.as_fd())
    }
}

//! TCP and unix sockets as one, and the options of those that carry sessions.

use std::future::poll_fn;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use rustix::net::{RecvFlags, SendFlags};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

/// A peer that went away without a word while nothing is in flight is noticed within a minute: after this time, and so many
/// questions.
///
/// TCP_USER_TIMEOUT is left alone on purpose: Linux counts the time that a peer's receive window is closed against it, even
/// while the peer acknowledges every probe, so it would end sessions whose client reads slowly and COPYs that wait for a
/// lock; and where it is set, it overrides the number of keepalive probes.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(IDLE_MAX))
    .with_interval(Duration::from_secs(INTERVAL_MAX))
    .with_retries(RETRIES);
const IDLE_MAX: u64 = 30;
const INTERVAL_MAX: u64 = 10;
const RETRIES: u32 = 3;
/// Each connection asks this much earlier, at the most.
const IDLE_SPREAD: u64 = 11;
const INTERVAL_SPREAD: u64 = 6;

/// Small messages go out at once, and a dead peer is noticed. What a listening socket is set to, those that it accepts are.
pub(crate) fn tune(socket: &SockRef<'_>) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&KEEPALIVE)
}

/// Gives a connection that was accepted times of its own among those that [`tune`] allows. Linux rounds such timers to two seconds, so
/// thousands that began together would ask together, each time anew; the loopback device queues a thousand packets
/// (`net.core.netdev_max_backlog`) and drops the rest, and whose question was dropped four times would be taken for dead.
pub(crate) fn spread(socket: impl AsFd) -> io::Result<()> {
    let (idle, interval) = times(number(&socket));
    rustix::net::sockopt::set_tcp_keepidle(&socket, idle)?;
    rustix::net::sockopt::set_tcp_keepintvl(&socket, interval)?;
    Ok(())
}

/// Both at once, for a connection that was not accepted.
pub(crate) fn tune_apart(socket: impl AsFd) -> io::Result<()> {
    let (idle, interval) = times(number(&socket));
    let socket = SockRef::from(&socket);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&KEEPALIVE.with_time(idle).with_interval(interval))
}

fn number(socket: impl AsFd) -> u64 {
    u64::try_from(socket.as_fd().as_raw_fd()).unwrap_or(0)
}

/// Descriptors are given one after the other, and so are these.
const fn times(number: u64) -> (Duration, Duration) {
    let idle = IDLE_MAX - number % IDLE_SPREAD;
    let interval = INTERVAL_MAX - number / IDLE_SPREAD % INTERVAL_SPREAD;
    (Duration::from_secs(idle), Duration::from_secs(interval))
}

/// A connected socket, on this thread's runtime or with a carrier.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
    Carried(Carried),
}

/// The same call on whichever kind it is.
macro_rules! each {
    ($self:expr, $stream:ident => $call:expr) => {
        match $self {
            Socket::Tcp($stream) => $call,
            Socket::Unix($stream) => $call,
            Socket::Carried($stream) => $call,
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
        let is_tcp = match self {
            Self::Tcp(_) => true,
            Self::Unix(_) => false,
            Self::Carried(stream) => matches!(stream.socket, Travelling::Tcp(_)),
        };
        if is_tcp {
            // A socket that refuses the option is gone already.
            let _ = SockRef::from(&self.as_fd()).set_linger(Some(Duration::ZERO));
        }
    }

    /// At least one byte; 0 at the end. May be dropped at any time.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            poll_fn(|cx| self.poll_readable(cx)).await?;
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
            Self::Carried(stream) => stream.socket,
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

impl AsFd for Travelling {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

/// One with a carrier, which tells it what the kernel says of it. Nobody is woken: the carrier polls the session itself.
#[derive(Debug)]
pub(crate) struct Carried {
    socket: Travelling,
    /// What it is ready for, as far as is known. Only the carrier's thread looks at it: an atomic is what may be moved there.
    ready: AtomicU8,
}

impl Carried {
    const READABLE: u8 = 1;
    const WRITABLE: u8 = 2;
    /// What does not go away by reading or writing.
    const READ_ENDS: u8 = 4;
    const WRITE_ENDS: u8 = 8;
    /// The kernel is asked to tell when it takes more.
    const ASKED_FOR_ROOM: u8 = 16;
    /// It is asked not to tell of what comes.
    const UNHEARD: u8 = 32;

    /// What comes is not known yet: who watches the socket from now on is told.
    ///
    /// A unix socket tells of room whenever its peer has read anything, which would wake the carrier once more for each
    /// answer. It is asked only once it has taken too little. TCP tells only then anyway.
    pub(crate) fn new(socket: Travelling) -> Self {
        let asked = match &socket {
            Travelling::Tcp(_) => Self::ASKED_FOR_ROOM,
            Travelling::Unix(_) => 0,
        };
        Self {
            socket,
            ready: AtomicU8::new(Self::WRITABLE | asked),
        }
    }

    /// What the kernel is to tell, at each edge.
    pub(crate) fn interest(&self) -> EventFlags {
        let mut interest = EventFlags::RDHUP | EventFlags::ET;
        interest.set(EventFlags::IN, self.is_listened_to());
        interest.set(EventFlags::OUT, self.is_any(Self::ASKED_FOR_ROOM));
        interest
    }

    /// Whether the kernel tells of what comes, and not only that nothing more does.
    pub(crate) fn is_listened_to(&self) -> bool {
        !self.is_any(Self::UNHEARD)
    }

    /// What the kernel has to be asked for changes with it.
    pub(crate) fn listen(&self, tells: bool) {
        let ready = self.ready.load(Ordering::Relaxed);
        self.set(match tells {
            true => ready & !Self::UNHEARD,
            false => ready | Self::UNHEARD,
        });
    }

    /// Whether the kernel has to be asked for more than before, from now on.
    pub(crate) fn begins_to_ask(&self) -> bool {
        let begins = !self.is_any(Self::WRITABLE | Self::WRITE_ENDS | Self::ASKED_FOR_ROOM);
        if begins {
            self.set(self.ready.load(Ordering::Relaxed) | Self::ASKED_FOR_ROOM);
        }
        begins
    }

    fn is_any(&self, of: u8) -> bool {
        self.ready.load(Ordering::Relaxed) & of != 0
    }

    fn set(&self, ready: u8) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    /// Notes what the kernel says. Edges are never lost: a new one comes after what was found not to be ready.
    pub(crate) fn note(&self, events: EventFlags) {
        let mut ready = self.ready.load(Ordering::Relaxed);
        if events.contains(EventFlags::IN) {
            ready |= Self::READABLE;
        }
        if events.contains(EventFlags::OUT) {
            ready |= Self::WRITABLE;
        }
        if events.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            ready |= Self::READ_ENDS;
        }
        if events.intersects(EventFlags::HUP | EventFlags::ERR) {
            ready |= Self::WRITE_ENDS;
        }
        self.set(ready);
    }

    fn poll_read_ready(&self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.is_any(Self::READABLE | Self::READ_ENDS) {
            true => Poll::Ready(Ok(())),
            false => Poll::Pending,
        }
    }

    fn poll_write_ready(&self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.is_any(Self::WRITABLE | Self::WRITE_ENDS) {
            true => Poll::Ready(Ok(())),
            false => Poll::Pending,
        }
    }

    fn try_io<T>(&self, interest: Interest, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let (wanted, ends) = match interest.is_writable() {
            true => (Self::WRITABLE, Self::WRITE_ENDS),
            false => (Self::READABLE, Self::READ_ENDS),
        };
        if !self.is_any(wanted | ends) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let done = call();
        if matches!(&done, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
            self.set(self.ready.load(Ordering::Relaxed) & !wanted);
        }
        done
    }
}

impl AsFd for Carried {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Socket {
    /// Leaves this thread's runtime for a carrier.
    pub(crate) fn settle(self) -> io::Result<Self> {
        Ok(Self::Carried(Carried::new(self.leave()?)))
    }

    /// Joins this thread's runtime, if it was with a carrier.
    pub(crate) fn unsettle(self) -> io::Result<Self> {
        match self {
            Self::Carried(stream) => Self::arrive(stream.socket),
            other => Ok(other),
        }
    }

    /// The part of it that a carrier tells.
    pub(crate) const fn carried(&self) -> Option<&Carried> {
        match self {
            Self::Carried(stream) => Some(stream),
            Self::Tcp(_) | Self::Unix(_) => None,
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        each!(self, stream => stream.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn connections_that_begin_together_ask_apart_and_notice_a_death_within_a_minute() {
        let mut together = BTreeMap::new();
        for number in 0..20_000 {
            let (idle, interval) = times(number);
            assert!(idle >= Duration::from_secs(20) && interval >= Duration::from_secs(5));
            assert!(idle + interval * RETRIES <= Duration::from_secs(60));
            *together.entry((idle, interval)).or_insert(0) += 1;
        }
        let most = together.values().max().copied().unwrap_or_default();
        assert!(most <= 20_000 / 60, "{most} of them ask again together");
    }
}

//! Options of the sockets that carry sessions.

use std::io;
use std::net::Shutdown;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// A peer that went away without a word while nothing is in flight is noticed within a minute.
///
/// TCP_USER_TIMEOUT is left alone on purpose: Linux counts the time that a peer's receive window is closed against it, even
/// while the peer acknowledges every probe, so it would end sessions whose client reads slowly and COPYs that wait for a
/// lock; and where it is set, it overrides the number of keepalive probes.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(30))
    .with_interval(Duration::from_secs(10))
    .with_retries(3);

/// Small messages go out at once, and a dead peer is noticed.
pub(crate) fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_tcp_keepalive(&KEEPALIVE)
}

/// Ends a connection by a reset, which no reader takes for the end of a complete stream.
pub(crate) fn reset(stream: TcpStream) {
    // A socket that refuses the option is gone already.
    let _ = stream.set_zero_linger();
    drop(stream);
}

/// Says that nothing more will be sent.
pub(crate) fn finish_sending(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).shutdown(Shutdown::Write)
}

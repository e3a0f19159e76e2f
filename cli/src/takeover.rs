//! A new proxy takes the listening sockets of the running one over, which then drains: no client finds the port closed.
//!
//! The running proxy listens on a unix socket that only its own user may open. Whoever connects gets copies of the sockets;
//! once it has said that it serves, the old proxy stops accepting. Until then the old one serves on, so a new program that
//! fails changes nothing.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pgherd_proxy::{Inherited, Reloader};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use tokio::net::UnixListener;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// More listening sockets than any configuration has, and fewer than one message may carry.
const SOCKETS_MAX: usize = 128;
/// After an error of accept, such as no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// For the other side to take or send a message.
const MESSAGE_MAX: Duration = Duration::from_secs(5);
/// For the new proxy to serve, from when it has the sockets.
const READY_MAX: Duration = Duration::from_secs(60);
const READY: u8 = b'R';
/// What the old proxy answers: from then on it accepts no more.
const YOURS: u8 = b'Y';

/// What the running proxy offers.
pub(crate) struct Offer {
    path: PathBuf,
    listener: UnixListener,
}

impl Offer {
    /// Listens at `path`, in place of whoever listened there before.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub(crate) fn at(path: &Path) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            // In a directory that others may write to, anybody could have put a socket of his own.
            let found = fs::symlink_metadata(dir)?;
            let own = rustix::process::geteuid().as_raw();
            if !found.is_dir() || found.uid() != own || found.mode() & 0o022 != 0 {
                return Err(io::Error::other(format!(
                    "{} is not a directory that only this user may write to",
                    dir.display()
                )));
            }
        }
        // Renamed into place, so that there is no moment without one.
        let fresh = path.with_extension(format!("new-{}", std::process::id()));
        let _ = fs::remove_file(&fresh); // Of a process that had our number once.
        let listener = UnixListener::bind(&fresh)?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))?;
        fs::rename(&fresh, path)?;
        Ok(Self {
            path: path.to_owned(),
            listener,
        })
    }

    /// Hands the sockets to whoever asks, and cancels `stop` once they are served elsewhere.
    pub(crate) async fn run(self, reloader: Reloader, stop: CancellationToken) {
        let own = rustix::process::geteuid().as_raw();
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot hear whether another proxy wants to take over");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            if !stream
                .peer_cred()
                .is_ok_and(|peer| peer.uid() == own || peer.uid() == 0)
            {
                continue;
            }
            let handed = async {
                let sockets = reloader.sockets().await?;
                let stream = stream.into_std()?;
                let mut handing = JoinSet::new();
                handing.spawn_blocking(move || hand_over(stream, &sockets));
                let handed = handing.join_next().await.and_then(Result::ok);
                handed.unwrap_or_else(|| Err(io::Error::other("a defect")))
            };
            match handed.await {
                Ok(()) => {
                    tracing::info!("another proxy has taken the ports over");
                    stop.cancel();
                    return;
                }
                Err(error) => tracing::warn!(
                    %error,
                    socket = %self.path.display(),
                    "a proxy that wanted to take over did not: this one serves on"
                ),
            }
        }
    }
}

/// The running proxy's side: resolves well when the other one serves.
fn hand_over(mut stream: UnixStream, sockets: &[TcpListener]) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(MESSAGE_MAX))?;
    stream.set_read_timeout(Some(READY_MAX))?;
    let sockets: Vec<BorrowedFd<'_>> = sockets.iter().take(SOCKETS_MAX).map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&sockets));
    let version = [1]; // Of this protocol.
    sendmsg(&stream, &[IoSlice::new(&version)], &mut control, SendFlags::NOSIGNAL)?;
    let mut said = [0];
    stream.read_exact(&mut said)?;
    if said == [READY] {
        stream.write_all(&[YOURS])
    } else {
        Err(io::Error::other("it answered with something else"))
    }
}

/// What the new proxy has got.
pub(crate) struct Taken {
    pub(crate) sockets: Inherited,
    stream: UnixStream,
}

impl Taken {
    /// Asks the proxy that listens at `path` for its sockets; nothing when there is none.
    ///
    /// # Errors
    /// When there is one and it does not hand them over.
    pub(crate) fn from(path: &Path) -> io::Result<Option<Self>> {
        let stream = match UnixStream::connect(path) {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        // Whoever else listens there could listen on the ports that he hands over, too.
        let peer = socket_peercred(&stream)?.uid;
        if peer != rustix::process::geteuid() && !peer.is_root() {
            return Err(io::Error::other("somebody else listens there"));
        }
        stream.set_read_timeout(Some(MESSAGE_MAX))?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut version = [0];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(&stream, &mut [IoSliceMut::new(&mut version)], &mut control, flags)?;
        if received.bytes == 0 || version != [1] {
            return Err(io::Error::other("the running proxy did not hand its sockets over"));
        }
        let mut sockets = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                sockets.extend(received.map(|socket: OwnedFd| TcpListener::from(socket)));
            }
        }
        let sockets = Inherited::new(sockets);
        Ok(Some(Self { sockets, stream }))
    }

    /// Says that this process serves now, and waits until the other has heard it; false when that one has ended meanwhile.
    ///
    /// # Errors
    /// When it is there and has not heard it: it serves on, so this process must not.
    pub(crate) fn ready(mut stream: UnixStream) -> io::Result<bool> {
        stream.set_write_timeout(Some(MESSAGE_MAX))?;
        let mut answer = [0];
        match stream.write_all(&[READY]).and_then(|()| stream.read_exact(&mut answer)) {
            Ok(()) if answer == [YOURS] => Ok(true),
            Ok(()) => Err(io::Error::other("it answered with something else")),
            Err(error) if has_gone(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The sockets, and with whom to speak once they are served.
    pub(crate) fn split(self) -> (Inherited, UnixStream) {
        (self.sockets, self.stream)
    }
}

fn has_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_go_over_and_the_old_one_hears_when_they_are_served() {
        let sockets =
            [TcpListener::bind("127.0.0.1:0"), TcpListener::bind("127.0.0.1:0")].map(|it| it.expect("a port"));
        let addresses = sockets.each_ref().map(|socket| socket.local_addr().expect("bound"));
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("takeover.sock");
        assert!(Taken::from(&path).expect("no error").is_none(), "nobody is there");
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("bound");
        std::thread::scope(|scope| {
            let old = scope.spawn(|| hand_over(listener.accept().expect("somebody asks").0, &sockets));
            let taken = Taken::from(&path).expect("handed over").expect("somebody is there");
            let (inherited, stream) = taken.split();
            assert_eq!(inherited.addresses(), addresses);
            assert!(Taken::ready(stream).expect("told"));
            old.join().expect("no panic").expect("it heard");
            // One that goes away without a word leaves the old one in place.
            let old = scope.spawn(|| hand_over(listener.accept().expect("somebody asks").0, &sockets));
            drop(Taken::from(&path).expect("handed over"));
            assert!(old.join().expect("no panic").is_err());
            // An old one that dies leaves the new one to serve.
            let old = scope.spawn(|| drop(listener.accept().expect("somebody asks")));
            let stream = UnixStream::connect(&path).expect("it listens");
            old.join().expect("no panic");
            assert!(!Taken::ready(stream).expect("it has gone"));
        });
    }
}

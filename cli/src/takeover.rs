//! A new proxy takes the listening sockets of the running one over, which then drains: no client finds the port closed.
//!
//! The running proxy listens on a unix socket that only its own user may open. Whoever connects gets copies of the sockets;
//! once it has said that it serves, the old proxy stops accepting. Until then the old one serves on, so a new program that
//! fails changes nothing.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
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
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::config::proxy::ProxySection;
use crate::config::{ClusterConfig, Document, runtime_dir};

/// More listening sockets than any configuration has, and fewer than one message may carry.
const SOCKETS_MAX: usize = 128;
/// After an error of accept, such as no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// For the other side to take or send a message.
const MESSAGE_MAX: Duration = Duration::from_secs(5);
/// For the page to close, behind a reload that may be on its way.
const PAGE_MAX: Duration = Duration::from_secs(5);
/// For the new proxy to serve, from when it has the sockets.
const READY_MAX: Duration = Duration::from_secs(60);
const READY: u8 = b'R';
/// What the old proxy answers: from then on it accepts no more.
const YOURS: u8 = b'Y';

/// The most bytes that the path of a unix socket has: unix(7), without the zero at its end.
const PATH_BYTES_MAX: usize = 107;
/// A socket is made under a name of its own, which is the longer of the two where the other is very short.
const FRESH_NAME_BYTES: usize = ".4194304".len();

/// Where a proxy with this configuration is taken over, unless no socket can be there, which is noted in `document`.
pub(crate) fn path_in(document: &Document, found: Option<&(ProxySection, ClusterConfig)>) -> Option<PathBuf> {
    let (section, cluster) = found?;
    let path = path_for(section, cluster);
    match too_long(&path) {
        None => Some(path),
        Some(bytes) => {
            let whose = if section.takeover.is_some() {
                ""
            } else {
                "the default, "
            };
            document.error(format!(
                "proxy.takeover: {whose}\"{}\", takes {bytes} bytes, and the path of a unix socket may have \
                 {PATH_BYTES_MAX}; write a shorter one, such as /run/pgherd/takeover.sock",
                path.display()
            ));
            None
        }
    }
}

fn path_for(section: &ProxySection, cluster: &ClusterConfig) -> PathBuf {
    section.takeover.clone().unwrap_or_else(|| {
        // Another one for each proxy on this host: no two of them listen on one address.
        let first = section.listeners.first();
        let address = first.map_or(String::new(), |listener| listener.address.to_string());
        let dir = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
        let name = format!("proxy-{}-{}", cluster.scope, address.replace(['/', ':'], "-"));
        runtime_dir::default_for(&name, dir.map(PathBuf::from)).join("takeover.sock")
    })
}

/// How many bytes a path needs that needs too many.
fn too_long(path: &Path) -> Option<usize> {
    let name = path.file_name().map_or(0, OsStr::len);
    let bytes = path.as_os_str().len() + FRESH_NAME_BYTES.saturating_sub(name);
    (bytes > PATH_BYTES_MAX).then_some(bytes)
}

fn dir_of(path: &Path) -> Option<&Path> {
    let dir = path.parent()?;
    Some(if dir.as_os_str().is_empty() {
        Path::new(".")
    } else {
        dir
    })
}

/// Resolves when the place is another; never, once nobody can change it.
async fn moved(paths: &mut watch::Receiver<PathBuf>) {
    if paths.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Lets whoever is started next take this proxy over, at the newest of `paths`. Ends with the process.
pub(crate) async fn offer(reloader: Reloader, stop: CancellationToken, mut paths: watch::Receiver<PathBuf>) {
    loop {
        let path = paths.borrow_and_update().clone();
        match Offer::at(&path) {
            Ok(offer) => offer.run(&reloader, &stop, &mut paths).await,
            Err(error) => {
                tracing::warn!(%error, "no other proxy can take over by {}", path.display());
                moved(&mut paths).await;
            }
        }
    }
}

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
        if let Some(dir) = dir_of(path) {
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
        let fresh = path.with_file_name(format!(".{}", std::process::id()));
        let _ = fs::remove_file(&fresh); // Of a process that had our number once.
        let listener = UnixListener::bind(&fresh)?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))?;
        fs::rename(&fresh, path)?;
        Ok(Self {
            path: path.to_owned(),
            listener,
        })
    }

    /// Hands the sockets to whoever asks, and cancels `stop` once they are served elsewhere. Returns when the place is
    /// another, never in the middle of a takeover.
    pub(crate) async fn run(self, reloader: &Reloader, stop: &CancellationToken, paths: &mut watch::Receiver<PathBuf>) {
        let own = rustix::process::geteuid().as_raw();
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = moved(paths) => return,
            };
            let stream = match accepted {
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
                    reloader.set_files_ours(false).await;
                    // Before the drain, which would go on showing the page of a proxy that nobody comes to any more.
                    let _ = timeout(PAGE_MAX, reloader.close_page()).await;
                    stop.cancel();
                    return std::future::pending().await;
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
fn hand_over(mut stream: UnixStream, sockets: &[OwnedFd]) -> io::Result<()> {
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
                sockets.extend(received);
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
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_path_is_too_long_where_no_socket_fits() {
        let long = |name: &str, bytes: usize| format!("/{}/{name}", "d".repeat(bytes - 2 - name.len()));
        assert_eq!(too_long(Path::new(&long("takeover.sock", 107))), None);
        assert_eq!(too_long(Path::new(&long("takeover.sock", 108))), Some(108));
        // It must be made under another name first.
        assert_eq!(too_long(Path::new(&long("t", 100))), None);
        assert_eq!(too_long(Path::new(&long("t", 101))), Some(108));
    }

    #[tokio::test]
    async fn a_socket_is_made_where_its_path_is_as_long_as_may_be() {
        let dir = tempfile::tempdir().expect("a directory");
        let inside = dir
            .path()
            .join("d".repeat(PATH_BYTES_MAX - "/takeover.sock".len() - 1 - dir.path().as_os_str().len()));
        let path = inside.join("takeover.sock");
        assert_eq!(path.as_os_str().len(), PATH_BYTES_MAX);
        let _offer = Offer::at(&path).expect("it fits");
        UnixStream::connect(&path).expect("it listens");
    }

    #[test]
    fn sockets_go_over_and_the_old_one_hears_when_they_are_served() {
        let sockets =
            [TcpListener::bind("127.0.0.1:0"), TcpListener::bind("127.0.0.1:0")].map(|it| it.expect("a port"));
        let addresses = sockets.each_ref().map(|socket| socket.local_addr().expect("bound"));
        let sockets = sockets.map(OwnedFd::from);
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

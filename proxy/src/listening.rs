//! Sockets that listen, of either family.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use socket2::{Domain, SockRef};

use crate::peer::Peer;
use crate::stream::socket::{Socket, spread};
use crate::unix::{SocketFile, UnixName};

/// A socket that listens.
#[derive(Debug)]
pub(crate) enum Listening {
    Tcp(TcpListener),
    Unix {
        listener: UnixListener,
        /// Its file, when this process is to remove it; copies have none.
        file: Option<SocketFile>,
    },
}

impl Listening {
    /// One that another process has opened; nothing for a socket that clients could not use.
    pub(crate) fn of(socket: OwnedFd) -> Option<Self> {
        let domain = SockRef::from(&socket).domain();
        // A service manager's waits.
        SockRef::from(&socket).set_nonblocking(true).ok()?;
        match domain {
            Ok(Domain::IPV4 | Domain::IPV6) => Some(Self::Tcp(socket.into())),
            Ok(Domain::UNIX) => Some(Self::Unix {
                listener: socket.into(),
                file: None,
            }),
            Ok(_) | Err(_) => None,
        }
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(listener) => Self::Tcp(listener.try_clone()?),
            Self::Unix { listener, .. } => Self::Unix {
                listener: listener.try_clone()?,
                file: None,
            },
        })
    }

    /// Its address, when it has one.
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok(),
            Self::Unix { .. } => None,
        }
    }

    /// The name of a unix socket, as in the configuration.
    pub(crate) fn name(&self) -> Option<String> {
        match self {
            Self::Tcp(_) => None,
            Self::Unix { listener, .. } => UnixName::of_socket(listener),
        }
    }

    /// One of another process, with the file that becomes this one's once it is claimed. That of a service manager's has no
    /// lock file, and stays its own.
    pub(crate) fn with_file_of_another(self) -> Self {
        match self {
            Self::Unix { listener, file: None } => {
                let file = UnixName::of_socket(&listener).and_then(|name| SocketFile::of_another(&name));
                Self::Unix { listener, file }
            }
            other => other,
        }
    }

    /// Whether this process has to do with its file.
    pub(crate) const fn has_file(&self) -> bool {
        matches!(self, Self::Unix { file: Some(_), .. })
    }

    /// On this thread's runtime, with the file that goes when it does.
    pub(crate) fn ready(self) -> io::Result<(Ready, Option<SocketFile>)> {
        Ok(match self {
            Self::Tcp(listener) => (Ready::Tcp(tokio::net::TcpListener::from_std(listener)?), None),
            Self::Unix { listener, file } => (Ready::Unix(tokio::net::UnixListener::from_std(listener)?), file),
        })
    }
}

impl From<Listening> for OwnedFd {
    fn from(listening: Listening) -> Self {
        match listening {
            Listening::Tcp(listener) => listener.into(),
            Listening::Unix { listener, .. } => listener.into(),
        }
    }
}

/// One that clients are accepted on.
pub(crate) enum Ready {
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener),
}

impl Ready {
    /// The next client. Cancel safe.
    pub(crate) async fn accept(&self) -> io::Result<(Socket, Peer)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                // Who has gone already is noticed in any case.
                let _ = spread(&stream);
                Ok((Socket::Tcp(stream), Peer::Ip(peer)))
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                Ok((Socket::Unix(stream), Peer::Unix))
            }
        }
    }
}

//! The agent's end of the socket to its keeper.

use std::env;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::sockopt::socket_type;
use rustix::net::{RecvFlags, SendFlags, SocketType, recv, send};
use rustix::process::{Signal, set_parent_process_death_signal};
use rustix::stdio::{dup2_stdin, stdin};

use crate::protocol::{Report, Request};

/// The environment variable that tells an agent of its keeper: its value `stdin` says where the socket is.
pub const LINK_ENV: &str = "PGHERD_KEEPER_LINK";
/// No report comes near it.
const REPORT_BYTES_MAX: usize = 8 * 1024;

/// The agent's end of the link to its keeper. Each call is one non-blocking system call, from any thread.
#[derive(Debug)]
pub struct KeeperLink(OwnedFd);

impl KeeperLink {
    /// Takes the link over from standard input, which becomes /dev/null, so that no tool of the agent inherits it.
    /// Returns `None` when the process was not started by a keeper.
    ///
    /// From here on the kernel ends this process when its keeper dies: the next keeper brings an agent of its own.
    ///
    /// # Errors
    /// When standard input is not a keeper's socket, for instance because the link was taken before.
    pub fn from_stdin() -> io::Result<Option<Self>> {
        if env::var_os(LINK_ENV).is_none_or(|value| value != "stdin") {
            return Ok(None);
        }
        if socket_type(stdin())? != SocketType::SEQPACKET {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "standard input is not a keeper's socket",
            ));
        }
        let link = stdin().try_clone_to_owned()?;
        dup2_stdin(File::open("/dev/null")?)?;
        // A keeper that died before this call shows as the end of the link.
        set_parent_process_death_signal(Some(Signal::KILL))?;
        Ok(Some(Self(link)))
    }

    /// Sends one request, whole or not at all.
    ///
    /// # Errors
    /// `WouldBlock` when the keeper does not read, `InvalidInput` when the request is too long, `BrokenPipe` when the
    /// keeper is gone.
    pub fn send(&self, request: &Request) -> io::Result<()> {
        let mut message = Vec::with_capacity(128);
        request
            .encode(&mut message)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        send(&self.0, &message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
        Ok(())
    }

    /// Receives one report; `None` when none has arrived.
    ///
    /// # Errors
    /// `UnexpectedEof` when the keeper is gone: the agent must exit, for its fence is now the sentinel's alone.
    /// `InvalidData` when the keeper speaks another version of the protocol.
    pub fn try_recv(&self) -> io::Result<Option<Report>> {
        let mut buffer = [0; REPORT_BYTES_MAX];
        match recv(&self.0, &mut buffer[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) | Err(Errno::CONNRESET) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((length, _)) => match Report::decode(&buffer[..length]) {
                Ok(report) => Ok(Some(report)),
                Err(malformed) => Err(io::Error::new(io::ErrorKind::InvalidData, malformed)),
            },
            Err(Errno::AGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// For waiting until a report can be received; with tokio, through `AsyncFd`.
impl AsFd for KeeperLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

//! How a keeper's state and descriptors pass through an exec.
//!
//! A number of a descriptor means nothing to safe code, except for the standard streams. So all that is handed over waits
//! in a socket that the next keeper finds as its standard input: the sealed state, the shared word, the lock, the agent's
//! socket, the watchdog's device and the pidfd of an adopted postmaster. What waits there stays open, and so the lock stays
//! held and the watchdog running.

use std::convert::Infallible;
use std::env;
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::id;

use nix::unistd::execve;
use rustix::cmsg_space;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::{Errno, pread};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::stdio::{dup2_stdin, stdin};

use crate::state::{STATE_BYTES_MAX, State};

/// The environment variable that tells a keeper that it goes on for another: it holds the number of this very process.
pub(crate) const STATE_ENV: &str = "PGHERD_KEEPER_STATE";

/// State, word, lock, the agent's socket, the watchdog, and an adopted postmaster.
const FDS_MAX: usize = 6;

/// What the next keeper receives.
pub(crate) struct Estate {
    pub(crate) state: State,
    pub(crate) word: OwnedFd,
    pub(crate) lock: OwnedFd,
    pub(crate) link: Option<OwnedFd>,
    pub(crate) watchdog: Option<OwnedFd>,
    pub(crate) adopted: Option<OwnedFd>,
}

/// Whether this process goes on for another keeper.
pub(crate) fn is_successor() -> bool {
    env::var_os(STATE_ENV).is_some_and(|pid| pid == OsStr::new(&id().to_string()))
}

/// Puts the state where nobody can change it any more.
pub(crate) fn seal(state: &State) -> io::Result<OwnedFd> {
    let bytes = state
        .encode()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(memfd_create("pgherd-keeper-state", flags)?);
    file.write_all(&bytes)?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    fcntl_add_seals(&file, seals)?;
    Ok(file.into())
}

/// Reads what `seal` has written.
pub(crate) fn unseal(file: impl AsFd) -> io::Result<State> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 8192];
    loop {
        let offset = bytes.len();
        match pread(&file, chunk.as_mut_slice(), offset as u64) {
            Ok(0) => break,
            Ok(length) => bytes.extend_from_slice(&chunk[..length]),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if bytes.len() > STATE_BYTES_MAX {
            return Err(Errno::FBIG.into());
        }
    }
    State::decode(&bytes).map_err(|malformed| io::Error::new(io::ErrorKind::InvalidData, malformed))
}

/// A socket out of which `receive` takes these: state, word, lock, and perhaps the others, in their order.
pub(crate) fn pack(fds: &[BorrowedFd<'_>]) -> io::Result<OwnedFd> {
    let (theirs, ours) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::INVAL.into());
    }
    sendmsg(&ours, &[IoSlice::new(&[0])], &mut control, SendFlags::DONTWAIT)?;
    Ok(theirs)
}

/// Takes over what waits on standard input, which becomes /dev/null.
pub(crate) fn receive() -> io::Result<Estate> {
    let mut fds = unpack(stdin())?.into_iter();
    close_stdin()?;
    let mut next = || fds.next().ok_or_else(|| io::Error::from(Errno::BADMSG));
    let state = unseal(next()?)?;
    let (word, lock) = (next()?, next()?);
    let mut next_if = |there: bool| there.then(&mut next).transpose();
    let link = next_if(state.linked)?;
    let watchdog = next_if(state.watchdog.is_running())?;
    let adopted = next_if(state.postmaster.is_some_and(|postmaster| postmaster.adopted))?;
    Ok(Estate {
        state,
        word,
        lock,
        link,
        watchdog,
        adopted,
    })
}

fn unpack(socket: impl AsFd) -> io::Result<Vec<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, flags)?;
    let mut fds = Vec::with_capacity(FDS_MAX);
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    Ok(fds)
}

/// Becomes the program, with the socket as standard input. Returns only if that fails, and then has changed nothing but
/// that standard input is /dev/null.
pub(crate) fn replace(program: &Path, args: &[OsString], socket: OwnedFd) -> io::Result<Infallible> {
    let program = CString::new(program.as_os_str().as_bytes())?;
    let mut argv = vec![program.clone()];
    for arg in args {
        argv.push(CString::new(arg.as_bytes())?);
    }
    let mut env = vec![CString::new(format!("{STATE_ENV}={}", id()))?];
    for (name, value) in env::vars_os().filter(|(name, _)| name != STATE_ENV) {
        env.push(CString::new([name.as_bytes(), b"=", value.as_bytes()].concat())?);
    }
    dup2_stdin(&socket)?;
    let failed = execve(&program, &argv, &env);
    close_stdin()?;
    Ok(failed?)
}

fn close_stdin() -> io::Result<()> {
    Ok(dup2_stdin(File::open("/dev/null")?)?)
}

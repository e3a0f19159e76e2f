//! The agent as the keeper sees it: a service, a socket to it, and what it has not read yet.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use crate::child::{Child, Service};
use crate::clock::Boottime;
use crate::link::LINK_ENV;
use crate::protocol::{MESSAGE_BYTES_MAX, Malformed, Report, Request};

/// Reports that wait for an agent that does not read, beyond what the socket holds.
pub(crate) const OUTBOX_MAX: usize = 64;
/// How long the start of an agent waits for what the last one left behind to end. What then still runs hangs in the
/// kernel, and the new agent is told of it.
const SWEEP_MAX: Duration = Duration::from_secs(5);
const SWEEP_PAUSE: Duration = Duration::from_millis(10);

/// What the agent sent.
#[derive(Debug)]
pub(crate) enum Received {
    Nothing,
    Request(Request),
    /// It will not send anything more.
    Closed,
    Malformed(Malformed),
}

/// What an agent that leaves on purpose said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Farewell {
    pub(crate) code: u8,
    pub(crate) keep_postgres: bool,
}

/// The ending of what a dead agent left behind.
#[derive(Clone, Copy, Debug)]
struct Sweep {
    again_at: Boottime,
    until: Boottime,
}

/// The place of the agent, which one process after the other fills.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) service: Service,
    pub(crate) link: Option<OwnedFd>,
    pub(crate) outbox: VecDeque<Vec<u8>>,
    sweep: Option<Sweep>,
    buffer: Vec<u8>,
    /// Set when the agent is about to leave.
    pub(crate) leaving: Option<Farewell>,
}

impl Seat {
    pub(crate) fn new(now: Boottime) -> Self {
        Self::taken(Service::new(now), None, VecDeque::new())
    }

    /// The place with its agent as it was before an upgrade.
    pub(crate) fn taken(service: Service, link: Option<OwnedFd>, outbox: VecDeque<Vec<u8>>) -> Self {
        let buffer = vec![0; MESSAGE_BYTES_MAX + 1];
        Self {
            service,
            link,
            outbox,
            sweep: None,
            buffer,
            leaving: None,
        }
    }

    /// Starts an agent with its socket as standard input.
    pub(crate) fn start(&mut self, command: &mut Command, now: Boottime) -> io::Result<()> {
        let child = Self::spawn(command).map(|(child, link)| {
            self.link = Some(link);
            child
        });
        self.leaving = None;
        self.service.started(child, now)
    }

    fn spawn(command: &mut Command) -> io::Result<(Child, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let child = Child::spawn(command.stdin(theirs).env(LINK_ENV, "stdin"))?;
        Ok((child, ours))
    }

    /// The agent has been reaped. What it left behind is swept away before the next one starts.
    pub(crate) fn vacate(&mut self, now: Boottime) {
        self.close();
        self.sweep = Some(Sweep {
            again_at: now,
            until: now.plus(SWEEP_MAX),
        });
    }

    /// Ends the agent; another one is started once this has been reaped.
    pub(crate) fn dismiss(&mut self) {
        self.service.kill();
        self.close();
    }

    /// Nothing more is received from this agent, and nothing sent to it.
    fn close(&mut self) {
        self.link = None;
        self.outbox.clear();
    }

    /// Whether something of the last agent may be left. `kill` ends what it finds and returns how many it found.
    pub(crate) fn sweep(&mut self, now: Boottime, kill: impl FnOnce() -> rustix::io::Result<usize>) -> bool {
        let Some(sweep) = &mut self.sweep else { return false };
        if now < sweep.again_at {
            return true;
        }
        sweep.again_at = now.plus(SWEEP_PAUSE);
        if kill() == Ok(0) || now >= sweep.until {
            self.sweep = None;
        }
        self.sweep.is_some()
    }

    pub(crate) fn wake_at(&self) -> Option<Boottime> {
        self.sweep_at().or(self.service.wake_at())
    }

    /// When `sweep` has something to do, if anything may be left of the last agent.
    pub(crate) fn sweep_at(&self) -> Option<Boottime> {
        self.sweep.map(|sweep| sweep.again_at)
    }

    /// Sends the report, or keeps it until the agent reads again. Without an agent it is dropped: the next one is told
    /// how things are then. An agent that lets too many gather is ended for the same reason, for none may be lost.
    pub(crate) fn report(&mut self, report: &Report) {
        let mut message = Vec::with_capacity(64);
        if self.link.is_none() || report.encode(&mut message).is_err() {
            return;
        }
        if self.outbox.len() == OUTBOX_MAX {
            self.dismiss();
            return;
        }
        self.outbox.push_back(message);
        self.flush();
    }

    /// Sends as much as the socket takes.
    pub(crate) fn flush(&mut self) {
        let Some(link) = &self.link else { return };
        while let Some(message) = self.outbox.front() {
            match send(link, message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(_) => drop(self.outbox.pop_front()),
                Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS) => return,
                // It has closed its end. Its last requests can still be received.
                Err(_) => return self.outbox.clear(),
            }
        }
    }

    pub(crate) fn receive(&mut self) -> Received {
        let Some(link) = &self.link else {
            return Received::Nothing;
        };
        match recv(link, self.buffer.as_mut_slice(), RecvFlags::DONTWAIT) {
            Ok((0, _)) | Err(Errno::CONNRESET) => Received::Closed,
            Ok((length, _)) if length > MESSAGE_BYTES_MAX => Received::Malformed(Malformed::Trailing { bytes: 1 }),
            Ok((length, _)) => {
                Request::decode(&self.buffer[..length]).map_or_else(Received::Malformed, Received::Request)
            }
            Err(_) => Received::Nothing,
        }
    }

    /// What to wait for on the socket.
    pub(crate) fn poll_fd(&self) -> Option<PollFd<'_>> {
        let events = if self.outbox.is_empty() {
            PollFlags::IN
        } else {
            PollFlags::IN | PollFlags::OUT
        };
        self.link
            .as_ref()
            .map(|link| PollFd::from_borrowed_fd(link.as_fd(), events))
    }
}

//! The loop: who can go on, goes on.

use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use crate::connection::{Connection, Shared, Waits};

/// What an event of the listener is marked with; a connection's has its place.
const LISTENER: u64 = u64::MAX;
const EVENTS: usize = 256;
const LOOK_EVERY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

pub(crate) struct Server<'a> {
    listener: &'a TcpListener,
    epoll: OwnedFd,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    shared: Shared,
}

impl<'a> Server<'a> {
    pub(crate) fn new(listener: &'a TcpListener) -> Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC).context("making an epoll")?;
        epoll::add(&epoll, listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        Ok(Self {
            listener,
            epoll,
            connections: Vec::new(),
            free: Vec::new(),
            shared: Shared::new(),
        })
    }

    pub(crate) fn serve(&mut self, stop: &AtomicBool) -> Result<()> {
        let mut events = Vec::with_capacity(EVENTS);
        while !stop.load(Ordering::Relaxed) {
            match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&LOOK_EVERY)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("waiting for clients"),
            }
            for event in events.drain(..) {
                match event.data.u64() {
                    LISTENER => self.accept(),
                    place => self.turn(usize::try_from(place).unwrap_or(usize::MAX)),
                }
            }
        }
        Ok(())
    }

    /// Takes whoever waits at the door. One that cannot be taken is dropped, and so is closed.
    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if stream
                .set_nonblocking(true)
                .and_then(|()| stream.set_nodelay(true))
                .is_err()
            {
                continue;
            }
            let place = self.free.pop().unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            let data = EventData::new_u64(place as u64);
            if epoll::add(&self.epoll, &stream, data, EventFlags::IN).is_err() {
                self.free.push(place);
                continue;
            }
            if let Some(slot) = self.connections.get_mut(place) {
                *slot = Some(Connection::new(stream));
            }
        }
    }

    fn turn(&mut self, place: usize) {
        let Some(slot) = self.connections.get_mut(place) else {
            return;
        };
        let Some(connection) = slot else { return };
        // What one connection has not sent belongs to no other.
        let waits = match connection.turn(&mut self.shared) {
            Ok(waits) => look(&self.epoll, connection, place, waits).map_or(Waits::Over, |()| waits),
            Err(_) => Waits::Over,
        };
        self.shared.forget();
        if waits == Waits::Over {
            *slot = None; // Closing takes it out of the epoll.
            self.free.push(place);
        }
    }
}

fn look(epoll: &OwnedFd, connection: &mut Connection, place: usize, waits: Waits) -> io::Result<()> {
    let flags = match waits {
        _ if waits == connection.waits => return Ok(()),
        Waits::ToRead => EventFlags::IN,
        Waits::ToWrite => EventFlags::OUT,
        Waits::Over => return Ok(()),
    };
    epoll::modify(epoll, &connection.stream, EventData::new_u64(place as u64), flags)?;
    connection.waits = waits;
    Ok(())
}

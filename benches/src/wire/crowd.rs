//! Many clients in one thread, each with one question under way.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use super::client::{Client, Door, READY};

const ANSWER_BYTES: usize = 4096;
const WAIT: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Clients that are let in, and what each of them asks.
pub(crate) struct Crowd {
    clients: Vec<TcpStream>,
    request: Vec<u8>,
}

impl Crowd {
    /// Connects so many; `first` is said by each once, and answered.
    pub(crate) fn gather(door: &Door, size: usize, first: &[u8], request: &[u8]) -> Result<Self> {
        let client = |_| {
            let stream = Client::connect_idle(door, first)?;
            stream.plain().context("a crowd speaks without TLS")
        };
        let clients = (0..size).map(client);
        Ok(Self {
            clients: clients.collect::<Result<_>>()?,
            request: request.to_vec(),
        })
    }

    /// Lets all of them ask for a time. How many answers came, and how long it really took.
    pub(crate) fn run(&mut self, span: Duration) -> Result<(u64, Duration)> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).context("making an epoll")?;
        for (place, client) in self.clients.iter_mut().enumerate() {
            client.set_nonblocking(true)?;
            epoll::add(&epoll, &*client, EventData::new_u64(place as u64), EventFlags::IN)?;
        }
        let began = Instant::now();
        for client in &mut self.clients {
            client.write_all(&self.request)?;
        }
        let mut answers = 0;
        let mut under_way = self.clients.len();
        let mut events = Vec::with_capacity(self.clients.len());
        let mut bytes = vec![0; ANSWER_BYTES];
        while under_way > 0 {
            let came = epoll::wait(&epoll, spare_capacity(&mut events), Some(&WAIT))?;
            ensure!(came > 0, "nothing was answered for a second");
            let goes_on = began.elapsed() < span;
            for event in events.drain(..) {
                let client = usize::try_from(event.data.u64()).ok();
                let Some(client) = client.and_then(|place| self.clients.get_mut(place)) else {
                    continue;
                };
                let count = match client.read(&mut bytes) {
                    Ok(count) => count,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                    Err(error) => return Err(error.into()),
                };
                ensure!(count > 0, "a connection was closed");
                // An answer is short; one that is cut just before its last message is waited for.
                if !bytes.get(..count).is_some_and(|bytes| bytes.ends_with(&READY)) {
                    continue;
                }
                answers += 1;
                if goes_on {
                    client.write_all(&self.request)?;
                } else {
                    under_way -= 1;
                }
            }
        }
        Ok((answers, began.elapsed()))
    }
}

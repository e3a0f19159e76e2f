//! The thread that carries the sessions which last, beside its worker.
//!
//! A worker's runtime is for what happens once in a session: its beginning, its end, whatever waits for several things. A
//! session that only relays needs nothing of that. Its sockets leave the runtime for an epoll instance of the carrier's own,
//! and the carrier polls it when one of them is ready: no task is woken, queued and scheduled for a message, and the clock is
//! not read. The session's task stays with the worker, waits for the outcome and does what is to be done at the end.

mod gathering;

use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::JoinHandle;

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use tokio::runtime::Handle;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, error, warn};

use self::gathering::{FOUND_MIN, Gathering};
use crate::counters::Route;
use crate::relay::{Outcome, Relay};
use crate::stream::Stream;
use crate::stream::socket::Socket;

/// Sessions on their way to a carrier. Beyond these they stay where they are.
const ARRIVALS_MAX: usize = 128;
/// What the kernel tells at a time.
const EVENTS_MAX: usize = 256;
/// What the bell's event carries. No session has it: they would need as much memory.
const BELL: u64 = u64::MAX;
/// And what a beat's does.
const BEAT: u64 = u64::MAX - 1;
/// Descriptors of its own.
pub(crate) const CARRIER_FILES: usize = 3;

/// What became of a session that was to be carried.
pub(crate) enum Carried {
    /// It has ended.
    Ended(Box<Relay>, Outcome),
    /// There is no carrier, or too many are on their way to it.
    Stays(Box<Relay>),
    /// It is gone, by a defect or since a socket could not be moved.
    Lost,
}

/// A worker's carrier. Its thread is started for the first session, and ends, with all that it carries, when this is dropped.
pub(crate) struct Carrier {
    index: usize,
    /// Which counters are its own.
    counts_as: usize,
    running: OnceLock<Option<Running>>,
}

struct Running {
    /// Taken only at the end.
    arrivals: Option<mpsc::Sender<Box<Arrival>>>,
    bell: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl Carrier {
    /// For the worker of this number, of so many.
    pub(crate) fn new(index: usize, workers: usize) -> Self {
        Self {
            index,
            counts_as: workers + index,
            running: OnceLock::new(),
        }
    }

    fn running(&self) -> Option<&Running> {
        let start = || match Running::start(self.index, self.counts_as) {
            Ok(running) => Some(running),
            Err(error) => {
                warn!(%error, "no thread to carry sessions: workers do it");
                None
            }
        };
        self.running.get_or_init(start).as_ref()
    }

    /// Carries a session to its end. To be called on the worker's runtime.
    pub(crate) async fn carry(&self, relay: Box<Relay>, route: &Arc<Route>) -> Carried {
        let Some(running) = self.running() else {
            return Carried::Stays(relay);
        };
        let Some(Ok(place)) = running.arrivals.as_ref().map(mpsc::Sender::try_reserve) else {
            return Carried::Stays(relay);
        };
        let Ok(relay) = relay.with(Socket::settle).map(Box::new) else {
            return Carried::Lost;
        };
        let (back, outcome) = oneshot::channel();
        place.send(Box::new(Arrival {
            relay,
            route: Arc::clone(route),
            back,
        }));
        running.bell.ring();
        match outcome.await {
            Ok((relay, Some(outcome))) => Carried::Ended(relay, outcome),
            Ok((relay, None)) => match relay.with(Socket::unsettle) {
                Ok(relay) => Carried::Stays(Box::new(relay)),
                Err(_) => Carried::Lost,
            },
            Err(_) => Carried::Lost,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.arrivals = None;
        self.bell.ring();
        if let Some(thread) = self.thread.take() {
            // It waits for nothing but its bell and its sockets. What it panicked with has been said.
            let _ = thread.join();
        }
    }
}

impl Running {
    fn start(index: usize, counts_as: usize) -> io::Result<Self> {
        let (arrivals, inbox) = mpsc::channel(ARRIVALS_MAX);
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let bell = Arc::new(Bell {
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            rung: AtomicBool::new(false),
            callers: Mutex::default(),
        });
        // Each ring is an edge, so that it never has to be read.
        epoll::add(
            &epoll,
            &bell.event,
            EventData::new_u64(BELL),
            EventFlags::IN | EventFlags::ET,
        )?;
        let gathering = Gathering::new()?;
        let beats = (EventData::new_u64(BEAT), EventFlags::IN | EventFlags::ET);
        epoll::add(&epoll, gathering.timer(), beats.0, beats.1)?;
        let carrying = Carrying {
            epoll,
            bell: Arc::clone(&bell),
            inbox,
            counts_as,
            sessions: Vec::new(),
            free: Vec::new(),
            gathering,
        };
        let runtime = Handle::current();
        let thread = std::thread::Builder::new()
            .name(format!("carrier-{index}"))
            .spawn(move || {
                // The few sessions that wait for a time do so by the worker's timers.
                let _entered = runtime.enter();
                if let Err(error) = carrying.run() {
                    error!(%error, "the sessions that were carried have ended");
                }
            })?;
        Ok(Self {
            arrivals: Some(arrivals),
            bell,
            thread: Some(thread),
        })
    }
}

/// What wakes a carrier.
struct Bell {
    event: OwnedFd,
    /// It has been rung, and not been answered yet.
    rung: AtomicBool,
    /// The places of sessions that were woken.
    callers: Mutex<Vec<usize>>,
}

impl Bell {
    fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            // It fails when it has been rung as often as a counter counts: then it rings.
            let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
        }
    }

    /// Takes those who were woken into an empty list.
    fn answer(&self, callers: &mut Vec<usize>) {
        self.rung.swap(false, Ordering::AcqRel);
        std::mem::swap(
            callers,
            &mut *self.callers.lock().unwrap_or_else(PoisonError::into_inner),
        );
    }
}

/// Who is woken when a session is told something, or its time has come.
struct Caller {
    place: usize,
    bell: Arc<Bell>,
    /// It is among the callers.
    waits: AtomicBool,
}

impl Wake for Caller {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.waits.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut callers = self.bell.callers.lock().unwrap_or_else(PoisonError::into_inner);
        callers.push(self.place);
        drop(callers);
        self.bell.ring();
    }
}

/// A session on its way.
struct Arrival {
    relay: Box<Relay>,
    route: Arc<Route>,
    /// With how it ended; with nothing, when it cannot be carried and is to go on where it was.
    back: oneshot::Sender<(Box<Relay>, Option<Outcome>)>,
}

struct Session {
    arrival: Box<Arrival>,
    caller: Arc<Caller>,
    waker: Waker,
}

/// Why a session is polled.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Because {
    /// A socket is ready.
    Ready,
    /// It was woken, or is new.
    Woken,
}

/// The thread's own.
struct Carrying {
    epoll: OwnedFd,
    bell: Arc<Bell>,
    inbox: mpsc::Receiver<Box<Arrival>>,
    counts_as: usize,
    sessions: Vec<Option<Session>>,
    /// Places in `sessions` without one.
    free: Vec<usize>,
    /// Sessions whose server is listened to by time.
    gathering: Gathering,
}

impl Carrying {
    fn run(mut self) -> io::Result<()> {
        let mut events = [Event {
            flags: EventFlags::empty(),
            data: EventData::new_u64(0),
        }; EVENTS_MAX];
        let mut callers = Vec::new();
        loop {
            let count = match epoll::wait(&self.epoll, &mut events[..], None) {
                Ok(count) => count,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let events = events.get(..count).unwrap_or_default();
            // Before any bytes move: who is to end moves no more. Nobody takes the place of one that ends here before all
            // events have been looked at.
            let rung = events.iter().any(|event| event.data.u64() == BELL);
            if rung {
                self.bell.answer(&mut callers);
                for place in callers.drain(..) {
                    self.poll(place, Because::Woken);
                }
            }
            for event in events {
                self.take_event(*event);
            }
            if events.iter().any(|event| event.data.u64() == BEAT) {
                self.gather();
            }
            if rung && !self.let_in() {
                return Ok(());
            }
        }
    }

    fn take_event(&mut self, event: Event) {
        let data = event.data.u64();
        let Some(place) = usize::try_from(data >> 1).ok().filter(|_| data < BEAT) else {
            return;
        };
        let Some(Some(session)) = self.sessions.get(place) else {
            return;
        };
        let relay = &session.arrival.relay;
        let stream = if data & 1 == 0 { &relay.client } else { &relay.server };
        if let Some(socket) = stream.socket().carried() {
            socket.note(event.flags);
        }
        self.poll(place, Because::Ready);
    }

    /// Has a session move what can be moved.
    fn poll(&mut self, place: usize, because: Because) {
        let Some(Some(session)) = self.sessions.get_mut(place) else {
            return;
        };
        let Arrival { relay, route, .. } = &mut *session.arrival;
        let moved = route.moved(self.counts_as);
        let mut cx = Context::from_waker(&session.waker);
        // A defect ends one session, not all of them.
        let polled = catch_unwind(AssertUnwindSafe(|| match because {
            Because::Ready => relay.poll_moving(&mut cx, moved),
            Because::Woken => {
                session.caller.waits.swap(false, Ordering::AcqRel);
                relay.poll(&mut cx, moved)
            }
        }));
        let outcome = match polled {
            Ok(Poll::Pending) => match self.ask_more(place).and_then(|()| self.begin_gathering(place)) {
                Ok(()) => return,
                Err(broken) => Some(broken),
            },
            Ok(Poll::Ready(outcome)) => Some(outcome),
            Err(_) => None,
        };
        self.end(place, outcome);
    }

    /// Gives a session back with its outcome; one that has none is gone.
    fn end(&mut self, place: usize, outcome: Option<Outcome>) {
        let Some(session) = self.sessions.get_mut(place).and_then(Option::take) else {
            return;
        };
        self.gathering.end(place);
        self.free.push(place);
        if let Some(outcome) = outcome {
            self.give_back(*session.arrival, Some(outcome));
        }
    }

    fn give_back(&self, arrival: Arrival, outcome: Option<Outcome>) {
        let Arrival { relay, back, .. } = arrival;
        for stream in [&relay.client, &relay.server] {
            // It may not have come so far, and its socket goes on for a while, to say goodbye.
            let _ = epoll::delete(&self.epoll, stream.socket());
        }
        // Who waited for it may have been ended with the proxy.
        let _ = back.send((relay, outcome));
    }

    /// Takes those who have arrived; false when nobody will any more.
    fn let_in(&mut self) -> bool {
        loop {
            match self.inbox.try_recv() {
                Ok(arrival) => self.enter(arrival),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn enter(&mut self, arrival: Box<Arrival>) {
        let place = self.free.pop().unwrap_or_else(|| {
            self.sessions.push(None);
            self.sessions.len() - 1
        });
        let watched = self.watch(place, 0, &arrival.relay.client);
        let watched = watched.and_then(|()| self.watch(place, 1, &arrival.relay.server));
        if let Err(error) = watched {
            debug!(%error, "a session cannot be carried, and goes on where it was");
            self.free.push(place);
            return self.give_back(*arrival, None);
        }
        let caller = Arc::new(Caller {
            place,
            bell: Arc::clone(&self.bell),
            waits: AtomicBool::new(false),
        });
        let session = Session {
            waker: Waker::from(Arc::clone(&caller)),
            arrival,
            caller,
        };
        if let Some(free) = self.sessions.get_mut(place) {
            *free = Some(session);
        }
        self.poll(place, Because::Woken);
    }

    /// Asks the kernel for what a session has begun to wait for.
    fn ask_more(&self, place: usize) -> Result<(), Outcome> {
        let Some(Some(session)) = self.sessions.get(place) else {
            return Ok(());
        };
        let relay = &session.arrival.relay;
        let ask = |side, stream: &Stream| match stream.socket().carried() {
            Some(socket) if socket.begins_to_ask() => {
                epoll::modify(&self.epoll, socket, event_data(place, side), socket.interest())
            }
            _ => Ok(()),
        };
        ask(0, &relay.client).map_err(|_| Outcome::ClientBroke)?;
        ask(1, &relay.server).map_err(|_| Outcome::ServerBroke)
    }

    /// Is told of what a server sends no more, while that is much in small pieces.
    fn begin_gathering(&mut self, place: usize) -> Result<(), Outcome> {
        let Some(Some(session)) = self.sessions.get(place) else {
            return Ok(());
        };
        let relay = &session.arrival.relay;
        match relay.server.socket().carried() {
            Some(server) if relay.floods() && server.is_listened_to() && self.gathering.begin(place) => {
                self.listen(place, false)
            }
            _ => Ok(()),
        }
    }

    /// Looks at those who are listened to by time. One at which there is little is listened to as others are.
    fn gather(&mut self) {
        let mut next = 0;
        while let Some(place) = self.gathering.get(next) {
            if self.still_floods(place) {
                next += 1;
            } else {
                self.listen_again(place);
            }
        }
        if !self.gathering.beats_again() {
            while let Some(place) = self.gathering.get(0) {
                self.listen_again(place);
            }
        }
    }

    /// Has a session move what has come, and says whether that was much.
    fn still_floods(&mut self, place: usize) -> bool {
        let flowed = |carrying: &Self| match carrying.sessions.get(place) {
            Some(Some(session)) => session.arrival.relay.flowed(),
            _ => 0,
        };
        let before = flowed(self);
        if let Some(Some(session)) = self.sessions.get(place)
            && let Some(server) = session.arrival.relay.server.socket().carried()
        {
            server.note(EventFlags::IN);
        }
        self.poll(place, Because::Ready);
        flowed(self).saturating_sub(before) >= FOUND_MIN
    }

    fn listen_again(&mut self, place: usize) {
        self.gathering.end(place);
        if let Some(Some(session)) = self.sessions.get_mut(place) {
            session.arrival.relay.ebbs();
        }
        if let Err(broken) = self.listen(place, true) {
            self.end(place, Some(broken));
        }
    }

    /// Asks the kernel to tell of what a server sends, or not to.
    fn listen(&self, place: usize, tells: bool) -> Result<(), Outcome> {
        let Some(Some(session)) = self.sessions.get(place) else {
            return Ok(());
        };
        let Some(server) = session.arrival.relay.server.socket().carried() else {
            return Ok(());
        };
        server.listen(tells);
        epoll::modify(&self.epoll, server, event_data(place, 1), server.interest()).map_err(|_| Outcome::ServerBroke)
    }

    fn watch(&self, place: usize, side: u64, stream: &Stream) -> io::Result<()> {
        let socket = stream.socket().carried().ok_or(io::ErrorKind::InvalidInput)?;
        epoll::add(&self.epoll, socket, event_data(place, side), socket.interest())?;
        Ok(())
    }
}

/// What an event carries: whose it is, and whether it is the client's socket (0) or the server's (1).
const fn event_data(place: usize, side: u64) -> EventData {
    EventData::new_u64(((place as u64) << 1) | side)
}

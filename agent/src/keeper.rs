//! The agent's side of its keeper: requests with answers, and the state of the instance as the keeper tells it.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_keeper::KeeperLink;
use pgherd_keeper::protocol::{ExitKind, Hello, PostmasterSignal, Refusal, Report, Request, RequestKind, Start};
pub use pgherd_keeper::protocol::{WatchdogDriver, WatchdogMode, WatchdogSettings, WatchdogState};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

/// The instance and the agent's own orders, as the keeper last told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Instance {
    /// The postmaster, while it runs.
    pub postmaster: Option<i32>,
    /// Whether any process of PostgreSQL is left.
    pub left: bool,
    /// How the last postmaster ended.
    pub last_exit: Option<ExitKind>,
    /// How many postmasters have ended since this agent began.
    pub exits: u64,
    /// How many postmasters have been started since this agent began.
    pub starts: u64,
    /// The last term that became final.
    pub fenced: Option<u64>,
    /// The last refusal, with the number of refusals so far.
    pub refused: Option<(RequestKind, Refusal)>,
    /// See above.
    pub refusals: u64,
    /// Whether a deadline is in force.
    pub armed: bool,
    /// The term whose deadline is in force.
    pub armed_term: Option<u64>,
    /// Whether the fence is paused. Arming it ends the pause.
    pub paused: bool,
    /// A postmaster in the data directory that the keeper has neither started nor adopted. Nothing is armed beside it.
    pub stranger: Option<i32>,
    /// Whether the postmaster was adopted: how it ends cannot be known.
    pub adopted: bool,
    /// Whether a deadline would be guarded by a watchdog.
    pub watchdog: WatchdogState,
    /// How many times the keeper has answered to how the watchdog is to be used.
    pub watchdog_answers: u64,
    /// The keeper was told to stop.
    pub stopping: bool,
    /// How many times it was told to reload.
    pub reloads: u64,
}

/// Why an order to the keeper failed.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// The keeper said no.
    #[error("the keeper refused: {0:?}")]
    Refused(Refusal),
    /// No answer.
    #[error("the keeper did not do it within {0:?}")]
    Timeout(Duration),
    /// The link is broken.
    #[error("the link to the keeper")]
    Link(#[from] std::io::Error),
    /// The reader has ended.
    #[error("the keeper is gone")]
    Gone,
}

const ANSWER_MAX: Duration = Duration::from_secs(5);

/// A handle on the keeper.
#[derive(Clone)]
pub struct Keeper {
    link: Arc<KeeperLink>,
    state: watch::Receiver<Instance>,
    arming: watch::Receiver<Arming>,
}

/// What the keeper last answered to a deadline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arming {
    /// The term of the last one that it confirmed.
    pub term: u64,
    /// That deadline, or a later one of the same term that it had already.
    pub deadline: Boottime,
    /// How many it has refused.
    pub refusals: u64,
    /// Why it refused the last of those.
    pub refusal: Option<Refusal>,
}

impl Arming {
    /// Whether the keeper will let the term go on until `deadline`.
    #[must_use]
    pub fn confirms(&self, term: u64, deadline: Boottime) -> bool {
        self.term == term && self.deadline >= deadline
    }
}

impl Keeper {
    /// Waits for the keeper's greeting, and starts the thread that reads what it says from then on.
    ///
    /// A thread, because the safe way to wait for a socket of this kind is to block on it; it ends with the link.
    ///
    /// # Errors
    /// When the thread cannot be made, the link breaks, or no greeting comes.
    pub async fn greet(link: KeeperLink) -> Result<(Self, Hello), OrderError> {
        let link = Arc::new(link);
        let (state_tx, mut state) = watch::channel(Instance::default());
        let (hello_tx, hello) = oneshot::channel();
        let (arming_tx, arming) = watch::channel(Arming::default());
        let reader = Reader {
            arming: arming_tx,
            link: Arc::clone(&link),
            state: state_tx,
        };
        std::thread::Builder::new()
            .name("keeper-link".to_owned())
            .spawn(move || reader.run(hello_tx))?;
        let hello = match timeout(ANSWER_MAX, hello).await {
            Ok(Ok(hello)) => hello,
            Ok(Err(_)) => return Err(OrderError::Gone),
            Err(_) => return Err(OrderError::Timeout(ANSWER_MAX)),
        };
        state.mark_unchanged();
        let keeper = Self { link, state, arming };
        Ok((keeper, hello))
    }

    /// Resolves when the keeper is gone.
    pub async fn gone(&self) {
        let mut state = self.state.clone();
        // The sender is dropped when the link ends.
        while state.changed().await.is_ok() {}
    }

    /// The link, for the lease's thread.
    #[must_use]
    pub fn link(&self) -> Arc<KeeperLink> {
        Arc::clone(&self.link)
    }

    /// What the keeper answers to deadlines.
    #[must_use]
    pub fn arming(&self) -> watch::Receiver<Arming> {
        self.arming.clone()
    }

    /// The newest state of the instance, and changes of it.
    #[must_use]
    pub fn instance(&self) -> watch::Receiver<Instance> {
        self.state.clone()
    }

    /// Starts the postmaster; its process exists when this returns.
    ///
    /// # Errors
    /// When the keeper refuses, as it does for a writable start without a deadline ahead.
    pub async fn start(
        &self,
        writable: bool,
        program: PathBuf,
        args: Vec<OsString>,
        env: Vec<(OsString, OsString)>,
    ) -> Result<(), OrderError> {
        let before = self.state.borrow().clone();
        self.link.send(&Request::Start(Start {
            writable,
            program,
            args,
            env,
        }))?;
        self.wait(ANSWER_MAX, RequestKind::Start, &before, |instance| {
            instance.starts > before.starts
        })
        .await
    }

    /// Signals the postmaster.
    ///
    /// # Errors
    /// When the link is broken; a refusal shows in the state of the instance.
    pub fn signal(&self, signal: PostmasterSignal) -> Result<(), OrderError> {
        Ok(self.link.send(&Request::Signal(signal))?)
    }

    /// Ends PostgreSQL whole, without a checkpoint, and waits until nothing of it is left.
    ///
    /// # Errors
    /// When something is left after a while.
    pub async fn end(&self) -> Result<(), OrderError> {
        self.link.send(&Request::End)?;
        self.wait_ended(ANSWER_MAX).await
    }

    /// Waits until nothing of PostgreSQL is left.
    ///
    /// # Errors
    /// When something is left after `limit`.
    pub async fn wait_ended(&self, limit: Duration) -> Result<(), OrderError> {
        let mut state = self.state.clone();
        let ended = state.wait_for(|instance| !instance.left);
        match timeout(limit, ended).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(OrderError::Gone),
            Err(_) => Err(OrderError::Timeout(limit)),
        }
    }

    /// Takes the deadline away. PostgreSQL must have ended.
    ///
    /// # Errors
    /// When the keeper refuses.
    pub async fn disarm(&self) -> Result<(), OrderError> {
        let before = self.state.borrow().clone();
        self.link.send(&Request::Disarm)?;
        self.wait(ANSWER_MAX, RequestKind::Disarm, &before, |instance| !instance.armed)
            .await
    }

    /// Suspends the fence for maintenance: PostgreSQL is left as it is, whatever becomes of agent and keeper. The next
    /// deadline that is armed ends that, so none may be sent meanwhile.
    ///
    /// # Errors
    /// When the keeper refuses, as it does when the fence has begun.
    pub async fn pause(&self) -> Result<(), OrderError> {
        let before = self.state.borrow().clone();
        self.link.send(&Request::Pause)?;
        self.wait(ANSWER_MAX, RequestKind::Pause, &before, |instance| instance.paused)
            .await
    }

    /// Takes the postmaster that somebody else has started for the keeper's own, and says whether it is writable: then a
    /// deadline has to follow, or its end. Returns its number.
    ///
    /// # Errors
    /// When the keeper refuses, for instance because there is none any more.
    pub async fn adopt(&self, writable: bool) -> Result<i32, OrderError> {
        let before = self.state.borrow().clone();
        self.link.send(&Request::Adopt { writable })?;
        self.wait(ANSWER_MAX, RequestKind::Adopt, &before, |instance| instance.adopted)
            .await?;
        self.state.borrow().postmaster.ok_or(OrderError::Gone)
    }

    /// Says how the watchdog is to be used from the next deadline on, and returns whether it can be, as far as is known
    /// without starting it. To be repeated whenever the configuration or the lease's times change.
    ///
    /// # Errors
    /// When the keeper does not answer.
    pub async fn watchdog(&self, settings: WatchdogSettings) -> Result<WatchdogState, OrderError> {
        let before = self.state.borrow().watchdog_answers;
        self.link.send(&Request::Watchdog(settings))?;
        let mut state = self.state.clone();
        let answered = state.wait_for(|instance| instance.watchdog_answers > before);
        match timeout(ANSWER_MAX, answered).await {
            Ok(Ok(instance)) => Ok(instance.watchdog),
            Ok(Err(_)) => Err(OrderError::Gone),
            Err(_) => Err(OrderError::Timeout(ANSWER_MAX)),
        }
    }

    /// Has the keeper remember what the next agent needs.
    pub fn remember(&self, memo: Vec<u8>) {
        if let Err(error) = self.link.send(&Request::Remember { memo }) {
            tracing::warn!(%error, "the keeper did not take the memo");
        }
    }

    /// Tells the keeper that this agent exits on purpose, and with which code the keeper is to follow.
    pub fn leave(&self, code: u8) {
        self.leave_with(code, false);
    }

    /// As `leave`, and says what becomes of PostgreSQL: it may be left behind only where the fence is paused.
    pub fn leave_with(&self, code: u8, keep_postgres: bool) {
        if let Err(error) = self.link.send(&Request::Leave { code, keep_postgres }) {
            tracing::warn!(%error, "the keeper did not hear the farewell");
        }
    }

    async fn wait(
        &self,
        limit: Duration,
        asked: RequestKind,
        before: &Instance,
        done: impl Fn(&Instance) -> bool,
    ) -> Result<(), OrderError> {
        let refusal = |instance: &Instance| match instance.refused {
            Some((what, why)) if instance.refusals > before.refusals && what == asked => Some(why),
            _ => None,
        };
        let mut state = self.state.clone();
        let answered = state.wait_for(|instance| done(instance) || refusal(instance).is_some());
        match timeout(limit, answered).await {
            Ok(Ok(instance)) if done(&instance) => Ok(()),
            Ok(Ok(instance)) => Err(refusal(&instance).map_or(OrderError::Gone, OrderError::Refused)),
            Ok(Err(_)) => Err(OrderError::Gone),
            Err(_) => Err(OrderError::Timeout(limit)),
        }
    }
}

struct Reader {
    link: Arc<KeeperLink>,
    arming: watch::Sender<Arming>,
    state: watch::Sender<Instance>,
}

impl Reader {
    fn run(self, hello: oneshot::Sender<Hello>) {
        let mut hello = Some(hello);
        loop {
            match self.next() {
                Ok(Report::Hello(report)) => {
                    self.state.send_modify(|instance| instance.begin(&report));
                    if let Some(hello) = hello.take() {
                        let _ = hello.send(report); // Whoever asked may have given up.
                    }
                }
                // A renewed deadline is reported each time and changes nothing here: it wakes nobody.
                Ok(report) => {
                    self.note_arming(&report);
                    self.state.send_if_modified(|instance| {
                        let before = instance.clone();
                        instance.fold(report);
                        *instance != before
                    });
                }
                Err(error) => {
                    tracing::error!(%error, "the link to the keeper has ended");
                    return;
                }
            }
        }
    }

    fn note_arming(&self, report: &Report) {
        match report {
            Report::Armed { term, deadline } => self.arming.send_modify(|arming| {
                arming.term = *term;
                arming.deadline = Boottime::from_nanos(deadline.as_nanos());
            }),
            Report::Refused {
                what: RequestKind::Arm,
                why,
            } => self.arming.send_modify(|arming| {
                arming.refusals += 1;
                arming.refusal = Some(*why);
            }),
            _ => {}
        }
    }

    fn next(&self) -> std::io::Result<Report> {
        loop {
            if let Some(report) = self.link.try_recv()? {
                return Ok(report);
            }
            let mut waits = [PollFd::new(&*self.link, PollFlags::IN)];
            // Without end on purpose: the kernel ends this process together with its keeper.
            match poll(&mut waits, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Instance {
    /// Whether a deadline is in force.
    #[must_use]
    pub const fn is_armed(&self) -> bool {
        self.armed_term.is_some()
    }

    fn begin(&mut self, hello: &Hello) {
        self.postmaster = hello.postmaster.map(|pid| pid.as_raw_nonzero().get());
        self.left = hello.instance_left;
        self.arm(hello.armed.map(|(term, _)| term));
        self.paused = hello.paused;
        self.stranger = hello.stranger.map(|pid| pid.as_raw_nonzero().get());
        self.adopted = hello.adopted;
        self.watchdog = hello.watchdog;
        self.fenced = hello.fenced;
        self.stopping = hello.stopping;
    }

    fn arm(&mut self, term: Option<u64>) {
        self.armed = term.is_some();
        self.armed_term = term;
    }

    fn fold(&mut self, report: Report) {
        match report {
            Report::Hello(_) => {}
            Report::Armed { term, .. } => {
                self.arm(Some(term));
                self.paused = false;
            }
            Report::Disarmed => {
                self.arm(None);
                self.paused = false;
            }
            Report::Paused => {
                self.arm(None);
                self.paused = true;
            }
            Report::Started { pid } => {
                self.postmaster = Some(pid.as_raw_nonzero().get());
                self.left = true;
                self.adopted = false;
                self.starts += 1;
            }
            Report::Refused { what, why } => {
                self.refused = Some((what, why));
                self.refusals += 1;
            }
            Report::PostmasterExited { status, .. } => {
                self.postmaster = None;
                self.adopted = false;
                self.last_exit = Some(status);
                self.exits += 1;
            }
            Report::Ended => {
                self.left = false;
                self.postmaster = None;
            }
            Report::Fenced { term } => {
                self.fenced = Some(term);
                self.arm(None);
            }
            Report::Stop => self.stopping = true,
            Report::Reload => self.reloads += 1,
            Report::Watchdog { state } => {
                self.watchdog = state;
                self.watchdog_answers += 1;
            }
            Report::Stranger { pid } => {
                self.stranger = pid.map(|pid| pid.as_raw_nonzero().get());
                self.left |= pid.is_some();
            }
            Report::Adopted { pid } => {
                self.postmaster = Some(pid.as_raw_nonzero().get());
                self.stranger = None;
                self.adopted = true;
                self.left = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_postmaster_is_not_a_dead_instance() {
        let mut instance = Instance::default();
        let pid = rustix::process::Pid::from_raw(7).expect("not zero");
        instance.fold(Report::Started { pid });
        instance.fold(Report::PostmasterExited {
            pid,
            status: ExitKind::Signal(9),
        });
        assert_eq!((instance.postmaster, instance.left), (None, true));
        instance.fold(Report::Ended);
        assert!(!instance.left);
    }

    fn number(raw: i32) -> rustix::process::Pid {
        rustix::process::Pid::from_raw(raw).expect("not zero")
    }

    #[test]
    fn a_pause_lasts_until_something_is_armed_or_disarmed() {
        let mut instance = Instance::default();
        let armed = Report::Armed {
            term: 7,
            deadline: pgherd_keeper::clock::Boottime::from_nanos(1),
        };
        instance.fold(armed.clone());
        assert_eq!(
            (instance.armed, instance.armed_term, instance.paused),
            (true, Some(7), false)
        );
        instance.fold(Report::Paused);
        assert_eq!((instance.is_armed(), instance.paused), (false, true));
        instance.fold(armed);
        assert_eq!((instance.is_armed(), instance.paused), (true, false));
        instance.fold(Report::Paused);
        instance.fold(Report::Disarmed);
        assert_eq!(
            (instance.armed, instance.armed_term, instance.paused),
            (false, None, false)
        );
    }

    #[test]
    fn an_adopted_postmaster_is_a_stranger_no_longer() {
        let mut instance = Instance::default();
        instance.fold(Report::Stranger { pid: Some(number(7)) });
        assert_eq!(
            (instance.stranger, instance.left, instance.postmaster),
            (Some(7), true, None)
        );
        instance.fold(Report::Adopted { pid: number(7) });
        assert_eq!(
            (instance.stranger, instance.adopted, instance.postmaster),
            (None, true, Some(7))
        );
        instance.fold(Report::PostmasterExited {
            pid: number(7),
            status: ExitKind::Unknown,
        });
        assert_eq!(
            (instance.adopted, instance.postmaster, instance.left),
            (false, None, true)
        );
    }
}

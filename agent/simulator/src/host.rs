//! One machine: its clocks, its processes, and the keeper, which rests on the real fence and the real steps of ending.

use std::collections::VecDeque;
use std::time::Duration;

use pgherd_keeper::clock::Boottime as KeeperTime;
use pgherd_keeper::protocol::{ExitKind, PostmasterSignal, Refusal, RequestKind};

use crate::ending::{Departure, Ending, GRACE_MAX, Step, grace_within};
use crate::postgres::Server;
use crate::time::{Clocks, Time};
use pgherd_keeper::fence::{Armed, Fence};

/// What the agent asks of its keeper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Arm(Armed),
    Disarm,
    Pause,
    Start { writable: bool },
    Signal(PostmasterSignal),
    End,
    Remember(Vec<u8>),
    Leave { code: u8, keep_postgres: bool },
    Adopt { writable: bool },
}

/// What the keeper tells the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Report {
    Armed { term: u64, deadline: KeeperTime },
    Disarmed,
    Paused,
    Started(u64),
    Refused(RequestKind, Refusal),
    PostmasterExited(ExitKind),
    Ended,
    Fenced(u64),
    Stop,
    Stranger(Option<u64>),
    Adopted(u64),
}

/// What the sentinel goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    Disarmed,
    Armed(Armed),
    Paused,
}

/// What the keeper wants done that a state cannot do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    /// SIGQUIT to the postmaster.
    Quit,
    /// SIGINT.
    StopFast,
    /// SIGHUP.
    Reload,
    /// The order to promote.
    Promote,
    /// A postmaster has been started.
    Started(u64),
    /// An agent is to be started.
    StartAgent,
    /// A sentinel is to be started.
    StartSentinel,
}

/// The keeper of one member.
pub(crate) struct Keeper {
    pub(crate) fence: Fence,
    pub(crate) word: Word,
    pub(crate) memo: Vec<u8>,
    ending: Option<Ending>,
    postmaster: Option<u64>,
    pub(crate) inbox: VecDeque<Request>,
    pub(crate) outbox: Vec<Report>,
    /// When the next agent is due, while none runs.
    pub(crate) agent_due: Option<Time>,
    /// The same of its sentinel.
    pub(crate) sentinel_due: Option<Time>,
    pub(crate) stopping: bool,
    /// The agent has left on purpose.
    pub(crate) left: Option<u8>,
    deeds: Vec<Deed>,
    /// The postmaster that is none of this keeper's, as the agent was told: one that a keeper before it left in maintenance.
    stranger: Option<u64>,
    /// Whether the agent was told that something is left whose end is not under way.
    pub(crate) left_told: bool,
    /// A planted bug: a term that is final is taken up again.
    pub(crate) forgiving: bool,
}

impl Keeper {
    pub(crate) fn new(memo: Vec<u8>) -> Self {
        Self {
            fence: Fence::new(),
            word: Word::Disarmed,
            memo,
            ending: None,
            postmaster: None,
            inbox: VecDeque::new(),
            outbox: Vec::new(),
            agent_due: None,
            sentinel_due: None,
            stopping: false,
            left: None,
            deeds: Vec::new(),
            stranger: None,
            left_told: false,
            forgiving: false,
        }
    }

    fn publish_word(&mut self) {
        self.word = match self.fence.deadline() {
            Some(armed) if self.forgiving => Word::Armed(Armed {
                deadline: armed.deadline.plus(armed.margin * 4),
                ..armed
            }),
            Some(armed) => Word::Armed(armed),
            None if self.fence.is_paused() => Word::Paused,
            None => Word::Disarmed,
        };
    }

    /// Whether a process of the instance is left, as far as the keeper can tell.
    pub(crate) fn instance_left(&self, server: &Server) -> bool {
        self.ending.is_some() || server.is_left()
    }

    fn begin_ending(&mut self, now: KeeperTime, grace: Duration) {
        if let Some(ending) = &mut self.ending {
            ending.hurry(now, grace);
            return;
        }
        self.ending = Some(if self.postmaster.is_some() {
            self.deeds.push(Deed::Quit);
            Ending::after_quit(now, grace)
        } else {
            Ending::without_postmaster(now)
        });
    }

    fn enforce_fence(&mut self, now: KeeperTime) {
        if self.forgiving
            && self
                .fence
                .armed()
                .is_some_and(|armed| now < armed.deadline.plus(armed.margin * 4))
        {
            return;
        }
        let Some(armed) = self.fence.begin(now) else { return };
        self.begin_ending(now, grace_within(armed.margin));
        self.outbox.push(Report::Fenced(armed.term));
    }

    fn refuse(&mut self, what: RequestKind, why: Refusal) {
        self.outbox.push(Report::Refused(what, why));
    }

    fn handle(&mut self, request: Request, server: &mut Server, now: KeeperTime, run: u64) {
        self.enforce_fence(now);
        match request {
            Request::Arm(_) if self.look_for_stranger(server).is_some() => {
                self.refuse(RequestKind::Arm, Refusal::Stranger);
            }
            Request::Arm(asked) => {
                let left = self.instance_left(server);
                match self.fence.arm(asked, now, || left) {
                    Ok(armed) => {
                        self.publish_word();
                        let (term, deadline) = (armed.term, armed.deadline);
                        self.outbox.push(Report::Armed { term, deadline });
                    }
                    Err(why) => self.refuse(RequestKind::Arm, why),
                }
            }
            Request::Disarm => {
                let left = self.instance_left(server);
                match self.fence.disarm(|| left) {
                    Ok(()) => {
                        self.publish_word();
                        self.outbox.push(Report::Disarmed);
                    }
                    Err(why) => self.refuse(RequestKind::Disarm, why),
                }
            }
            Request::Pause => match self.fence.pause(now) {
                Ok(()) => {
                    self.publish_word();
                    self.outbox.push(Report::Paused);
                }
                Err(why) => self.refuse(RequestKind::Pause, why),
            },
            Request::Start { writable } => self.start(writable, server, now, run),
            Request::Signal(signal) => self.signal(signal, server, now),
            Request::End => self.begin_ending(now, GRACE_MAX),
            Request::Remember(memo) => self.memo = memo,
            Request::Adopt { writable } => self.adopt(writable, server),
            Request::Leave { keep_postgres, .. } if keep_postgres && !self.fence.is_paused() => {
                self.refuse(RequestKind::Leave, Refusal::NotPaused);
            }
            Request::Leave { code, keep_postgres } => {
                self.left = Some(code);
                self.stopping = true;
                if !keep_postgres && self.instance_left(server) {
                    self.begin_ending(now, GRACE_MAX);
                }
            }
        }
    }

    fn start(&mut self, writable: bool, server: &mut Server, now: KeeperTime, run: u64) {
        if self.instance_left(server) {
            return self.refuse(RequestKind::Start, Refusal::InstanceLeft);
        }
        if writable && !self.fence.may_become_writable(now) {
            return self.refuse(RequestKind::Start, Refusal::NotArmed);
        }
        if !server.start(run) {
            return self.refuse(RequestKind::Start, Refusal::System(2));
        }
        self.postmaster = Some(run);
        if writable {
            self.fence.becomes_writable();
        }
        self.deeds.push(Deed::Started(run));
        self.outbox.push(Report::Started(run));
    }

    /// The postmaster that runs although it is none of ours.
    pub(crate) fn stranger(&self, server: &Server) -> Option<u64> {
        let ours = self.postmaster.is_some() || self.ending.is_some();
        server.run.as_ref().filter(|_| !ours).map(|run| run.id)
    }

    fn look_for_stranger(&mut self, server: &Server) -> Option<u64> {
        let stranger = self.stranger(server);
        if stranger != self.stranger {
            self.stranger = stranger;
            self.outbox.push(Report::Stranger(stranger));
            self.left_told |= stranger.is_none();
        }
        self.look_for_what_is_left(server);
        stranger
    }

    fn look_for_what_is_left(&mut self, server: &Server) {
        let looked_after = self.postmaster.is_some() || self.ending.is_some() || self.stranger.is_some();
        if looked_after {
            self.left_told = false;
        } else if self.left_told && !self.instance_left(server) {
            self.left_told = false;
            self.outbox.push(Report::Ended);
        }
    }

    fn adopt(&mut self, writable: bool, server: &Server) {
        if self.postmaster.is_some() || self.ending.is_some() {
            return self.refuse(RequestKind::Adopt, Refusal::InstanceLeft);
        }
        let Some(run) = server.run.as_ref().map(|run| run.id) else {
            self.look_for_stranger(server);
            return self.refuse(RequestKind::Adopt, Refusal::NoPostmaster);
        };
        self.postmaster = Some(run);
        self.fence.instance_adopted(writable);
        self.stranger = None;
        self.outbox.push(Report::Adopted(run));
    }

    fn signal(&mut self, signal: PostmasterSignal, server: &Server, now: KeeperTime) {
        if server.run.is_none() {
            return self.refuse(RequestKind::Signal, Refusal::NoPostmaster);
        }
        match signal {
            PostmasterSignal::Promote if !self.fence.may_become_writable(now) => {
                self.refuse(RequestKind::Signal, Refusal::NotArmed);
            }
            PostmasterSignal::Promote => {
                self.fence.becomes_writable();
                self.deeds.push(Deed::Promote);
            }
            PostmasterSignal::Reload => self.deeds.push(Deed::Reload),
            PostmasterSignal::StopFast => self.deeds.push(Deed::StopFast),
            PostmasterSignal::StopImmediate => self.deeds.push(Deed::Quit),
        }
    }

    /// The agent has died. In a stop no other is started, and what it has left is ended, but in maintenance.
    pub(crate) fn agent_gone(&mut self) {
        if self.stopping && self.left.is_none() {
            let keep_postgres = self.fence.is_paused();
            self.inbox.push_back(Request::Leave { code: 0, keep_postgres });
        }
    }

    /// One turn of the loop: the fence first. `real` is the run's time, for what the kernel does.
    pub(crate) fn turn(&mut self, server: &mut Server, now: KeeperTime, real: Time, next_run: &mut u64) -> Vec<Deed> {
        self.enforce_fence(now);
        while let Some(request) = self.inbox.pop_front() {
            *next_run += 1;
            self.handle(request, server, now, *next_run);
        }
        self.reap(server, now);
        self.go_on_ending(server, now, real);
        self.look_for_stranger(server);
        if self.agent_due.is_some_and(|due| due <= real) && !self.stopping {
            self.agent_due = None;
            self.deeds.push(Deed::StartAgent);
        }
        if self.sentinel_due.take_if(|due| *due <= real).is_some() {
            self.deeds.push(Deed::StartSentinel);
        }
        std::mem::take(&mut self.deeds)
    }

    fn reap(&mut self, server: &mut Server, now: KeeperTime) {
        if self.postmaster.is_none() || self.postmaster == server.run.as_ref().map(|run| run.id) {
            return;
        }
        self.postmaster = None;
        let departure = if server.killed {
            Departure::Killed
        } else {
            Departure::Orderly
        };
        match &mut self.ending {
            Some(ending) => ending.postmaster_died(now, departure),
            None => self.ending = Some(Ending::after_exit(now, departure)),
        }
        let status = if server.killed {
            ExitKind::Signal(9)
        } else {
            ExitKind::Code(0)
        };
        self.outbox.push(Report::PostmasterExited(status));
    }

    fn go_on_ending(&mut self, server: &mut Server, now: KeeperTime, real: Time) {
        let Some(ending) = &mut self.ending else { return };
        let left = match ending.step(now) {
            Step::Wait => true,
            Step::Look => server.is_left(),
            Step::Kill => server.kill_all(real),
        };
        if left || self.postmaster.is_some() {
            return;
        }
        self.ending = None;
        self.fence.instance_ended();
        self.publish_word();
        self.outbox.push(Report::Ended);
    }

    /// When there is something to do that nobody will tell of.
    pub(crate) fn wake_at(&self, clocks: Clocks, now: Time) -> Time {
        let on_clock = |at: KeeperTime| clocks.when(pgherd_cluster::clock::Boottime::from_nanos(at.as_nanos()), now);
        [
            self.fence.wake_at().map(on_clock),
            self.ending.as_ref().map(|ending| on_clock(ending.wake_at())),
            self.agent_due.filter(|_| !self.stopping),
            self.sentinel_due,
            Some(now + Duration::from_secs(1)),
        ]
        .into_iter()
        .flatten()
        .min()
        .unwrap_or(now)
    }

    pub(crate) const fn postmaster(&self) -> Option<u64> {
        self.postmaster
    }
}

/// What a sentinel does now, and when it looks again.
pub(crate) fn guard(word: Word, server: &mut Server, now: KeeperTime, real: Time) -> Duration {
    const READ_INTERVAL: Duration = Duration::from_millis(500);
    const KILL_INTERVAL: Duration = Duration::from_millis(10);
    let Word::Armed(armed) = word else { return READ_INTERVAL };
    let act_at = armed.deadline.minus(armed.margin / 2);
    if now < act_at {
        return act_at.remaining(now).min(READ_INTERVAL);
    }
    if !server.is_left() {
        return READ_INTERVAL;
    }
    server.kill_all(real);
    KILL_INTERVAL
}

/// A sentinel whose keeper is dead ends what is left, unless it was in pause. Says when to look again; nothing when it is
/// done.
pub(crate) fn succeed(word: Word, server: &mut Server, real: Time) -> Option<Duration> {
    if word == Word::Paused || !server.is_left() {
        return None;
    }
    server.kill_all(real);
    Some(Duration::from_millis(10))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::Data;

    fn at(millis: u64) -> KeeperTime {
        KeeperTime::from_nanos(millis * 1_000_000)
    }

    fn server() -> Server {
        Server {
            data: Some(Data::made(7, 1)),
            ..Server::default()
        }
    }

    fn armed(deadline: u64) -> Request {
        Request::Arm(Armed {
            term: 7,
            deadline: at(deadline),
            margin: Duration::from_millis(500),
        })
    }

    /// Turns at `millis` with these requests; gives what the keeper wants done and says.
    fn turn(keeper: &mut Keeper, server: &mut Server, millis: u64, requests: &[Request]) -> (Vec<Deed>, Vec<Report>) {
        keeper.inbox.extend(requests.iter().cloned());
        let mut run = millis;
        let deeds = keeper.turn(server, at(millis), Time::millis(millis), &mut run);
        (deeds, std::mem::take(&mut keeper.outbox))
    }

    const START: Request = Request::Start { writable: true };

    #[test]
    fn nothing_writable_starts_without_a_deadline_ahead() {
        let (mut keeper, mut server) = (Keeper::new(Vec::new()), server());
        let (_, reports) = turn(&mut keeper, &mut server, 10, &[START]);
        assert_eq!(reports, [Report::Refused(RequestKind::Start, Refusal::NotArmed)]);
        let (deeds, _) = turn(&mut keeper, &mut server, 20, &[armed(5000), START]);
        assert!(matches!(deeds[..], [Deed::Started(_)]));
        assert!(server.is_left() && matches!(keeper.word, Word::Armed(_)));
    }

    #[test]
    fn a_deadline_that_passes_ends_what_runs_within_the_margin() {
        let (mut keeper, mut server) = (Keeper::new(Vec::new()), server());
        turn(&mut keeper, &mut server, 20, &[armed(5000), START]);
        let (deeds, reports) = turn(&mut keeper, &mut server, 4500, &[]);
        assert_eq!((deeds, reports), (vec![Deed::Quit], vec![Report::Fenced(7)]));
        turn(&mut keeper, &mut server, 4700, &[]);
        assert!(!server.is_left(), "killed when it did not leave by itself");
        let (_, reports) = turn(&mut keeper, &mut server, 4705, &[]);
        assert!(reports.contains(&Report::Ended), "{reports:?}");
        let (_, reports) = turn(&mut keeper, &mut server, 4800, &[armed(9000)]);
        assert_eq!(reports, [Report::Refused(RequestKind::Arm, Refusal::TermIsFinal)]);
    }

    #[test]
    fn a_dead_postmaster_is_reported_and_its_backends_are_killed() {
        let (mut keeper, mut server) = (Keeper::new(Vec::new()), server());
        turn(&mut keeper, &mut server, 20, &[armed(5000), START]);
        server.come_up(22, 2);
        server.lose_postmaster(Time::millis(4000));
        let (_, reports) = turn(&mut keeper, &mut server, 30, &[]);
        assert_eq!(reports, [Report::PostmasterExited(ExitKind::Signal(9))]);
        let (_, reports) = turn(&mut keeper, &mut server, 40, &[]);
        assert_eq!(reports, [Report::Ended]);
        assert!(!server.is_left());
    }

    #[test]
    fn a_process_that_the_kernel_holds_is_waited_for() {
        let (mut keeper, mut server) = (Keeper::new(Vec::new()), server());
        turn(&mut keeper, &mut server, 20, &[armed(5000), START]);
        server.stuck_until = Time::millis(300);
        turn(&mut keeper, &mut server, 30, &[Request::End]);
        let (_, reports) = turn(&mut keeper, &mut server, 250, &[Request::Disarm]);
        assert_eq!(reports, [Report::Refused(RequestKind::Disarm, Refusal::InstanceLeft)]);
        let mut said = Vec::new();
        for millis in (260..600).step_by(10) {
            said.extend(turn(&mut keeper, &mut server, millis, &[]).1);
        }
        assert!(said.contains(&Report::Ended), "{said:?}");
    }

    #[test]
    fn the_sentinel_acts_in_the_second_half_of_the_margin() {
        let (mut keeper, mut server) = (Keeper::new(Vec::new()), server());
        turn(&mut keeper, &mut server, 20, &[armed(5000), START]);
        let wait = guard(keeper.word, &mut server, at(4500), Time::millis(4500));
        assert_eq!((wait, server.is_left()), (Duration::from_millis(250), true));
        guard(keeper.word, &mut server, at(4750), Time::millis(4750));
        assert!(!server.is_left());
    }

    #[test]
    fn a_dead_keepers_sentinel_spares_what_runs_in_pause() {
        let mut server = server();
        server.start(1);
        assert_eq!(succeed(Word::Paused, &mut server, Time(0)), None);
        assert!(server.is_left());
        assert!(succeed(Word::Disarmed, &mut server, Time(0)).is_some());
        assert!(!server.is_left());
    }
}

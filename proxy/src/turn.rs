//! A client's turn at a member: a place among the sessions that the member may have, and one among those that it starts at
//! a time, each waited for in a queue of its own.

use std::convert::Infallible;
use std::pin::Pin;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use tokio::time::sleep;

use crate::connect::{Connector, Denied, TRY_OTHERS_MAX, gone};
use crate::counters::Counted;
use crate::events::EventKind;
use crate::gate::{Entry, Gate, Pass, Turn};
use crate::refusal;
use crate::route::Target;
use crate::shared::count;

/// A server that takes longer for its first word is slow for another reason than many clients, and must not keep others
/// from theirs.
pub(crate) const STARTUP_MAX: Duration = Duration::from_secs(2);

/// How often a reader that waits at one member looks whether another has room by now.
const LOOK_ELSEWHERE_EVERY: Duration = Duration::from_millis(200);

/// Since when a client waits for what, over all that it tries.
#[derive(Debug)]
pub(crate) struct Waits {
    /// For a session. Whoever came first goes first, in whichever queue.
    since: Boottime,
    /// For a place at a member that is full.
    place: Option<Boottime>,
    /// For its turn to start.
    startup: Option<Boottime>,
    /// How far it has come at the member that it was led to last.
    at: Option<(Target, Stage)>,
}

impl Waits {
    pub(crate) const fn new(since: Boottime) -> Self {
        Self {
            since,
            place: None,
            startup: None,
            at: None,
        }
    }

    /// Where it is this client's turn by now.
    pub(crate) fn called(&mut self) -> Option<&Target> {
        match &mut self.at {
            Some((target, Stage::Queued(turn) | Stage::Placed(_, turn))) => turn.is_called().then_some(&*target),
            Some((_, Stage::In(_))) | None => None,
        }
    }

    /// Gives back what it has and waits for.
    pub(crate) fn leave(&mut self) {
        self.at = None;
    }
}

/// How far a client has come at a member.
#[derive(Debug)]
enum Stage {
    /// It waits for a place.
    Queued(Turn),
    /// It has one, and waits for its turn to start.
    Placed(Place, Turn),
    /// It has both.
    In(Entered),
}

/// What has neither a place nor room in its queue.
#[derive(Clone, Copy, Debug)]
enum Full {
    Places,
    Startups,
}

/// A client's places at a member.
#[derive(Debug)]
pub(crate) struct Entered {
    /// While the session goes on.
    pub(crate) place: Place,
    /// Until the server has said its first word.
    pub(crate) startup: Pass,
}

/// A place among a member's sessions.
#[derive(Debug)]
pub(crate) struct Place {
    _pass: Pass,
    /// An operator's, for whom there was no other.
    _reserved: Option<Counted>,
}

impl Place {
    const fn usual(pass: Pass) -> Self {
        Self {
            _pass: pass,
            _reserved: None,
        }
    }
}

/// Why it was not its turn.
pub(crate) enum NoTurn {
    /// The route leads elsewhere by now.
    Overtaken,
    Denied(Denied),
}

/// What came of waiting for a turn.
enum Waited {
    Granted(Pass),
    /// It is not its turn yet, and there may be a better place to wait at.
    LookElsewhere(Turn),
    /// Its time is over.
    Over,
}

impl Connector<'_> {
    /// Takes places at `target` if they need not be waited for.
    pub(crate) fn enter_at_once(&self, target: &Target, waits: &mut Waits) -> bool {
        let place = self.shared.places.of(&target.member).enter(waits.since, 0);
        let startup = self.shared.startups.of(&target.member).enter(waits.since, 0);
        let (Entry::In(pass), Entry::In(startup)) = (place, startup) else {
            return false;
        };
        let place = Place::usual(pass);
        waits.at = Some((target.clone(), Stage::In(Entered { place, startup })));
        true
    }

    /// Where to wait of `targets`, which are all full: in the first queue that has room. What the client has elsewhere it
    /// keeps until it has as much there, so that looking around never costs it anything. Nothing when all queues are full.
    pub(crate) fn wait_at_one_of<'t>(&self, targets: &'t [Target], waits: &mut Waits) -> Option<&'t Target> {
        let held = waits.at.take().filter(|(target, _)| targets.contains(target));
        for target in targets {
            if held.as_ref().is_some_and(|(at, _)| at == target) {
                break;
            }
            let Ok(stage) = self.join(target, waits.since) else {
                continue;
            };
            let is_less = matches!((&held, &stage), (Some((_, Stage::Placed(..))), Stage::Queued(_)));
            if !is_less {
                waits.at = Some((target.clone(), stage));
                return Some(target);
            }
        }
        waits.at = held;
        let (at, _) = waits.at.as_ref()?;
        targets.iter().find(|target| *target == at)
    }

    /// Comes as far at `target` as is possible without waiting.
    fn join(&self, target: &Target, since: Boottime) -> Result<Stage, Full> {
        let queue = self.shared.config.load().limits.queue;
        let gate = self.shared.places.of(&target.member);
        let place = match gate.enter(since, queue.clients) {
            Entry::In(pass) => Place::usual(pass),
            entry => match (self.place_over(&gate), entry) {
                (Some(place), _) => place,
                (None, Entry::Wait(turn)) => return Ok(Stage::Queued(turn)),
                (None, _) => return Err(Full::Places),
            },
        };
        self.join_startups(target, place, since)
    }

    fn join_startups(&self, target: &Target, place: Place, since: Boottime) -> Result<Stage, Full> {
        let connections = self.shared.config.load().limits.connections;
        match self.shared.startups.of(&target.member).enter(since, connections) {
            Entry::In(startup) => Ok(Stage::In(Entered { place, startup })),
            Entry::Wait(turn) => Ok(Stage::Placed(place, turn)),
            Entry::Full => Err(Full::Startups),
        }
    }

    /// A place beyond the limit, for an operator.
    fn place_over(&self, gate: &Gate) -> Option<Place> {
        let reserved = if self.client_is.has_reserved_place() {
            None
        } else {
            Some(self.shared.reserve(self.client_is.about.who.user.as_deref())?)
        };
        Some(Place {
            _pass: gate.enter_over(),
            _reserved: reserved,
        })
    }

    /// Waits for places at `target`, until `overtaken` or the time for each is over. A reader is overtaken, too, when it is
    /// time to look whether another member has room; it keeps its place in the queue meanwhile.
    pub(crate) async fn turn(
        &self,
        target: &Target,
        waits: &mut Waits,
        mut overtaken: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<Entered, NoTurn> {
        let told = |full| self.refused(target, full, None);
        let mut stage = match waits.at.take() {
            Some((at, stage)) if at == *target => stage,
            _ => self.join(target, waits.since).map_err(told)?,
        };
        loop {
            let (limit, place, turn) = match stage {
                Stage::In(entered) => return Ok(entered),
                Stage::Queued(turn) => (Full::Places, None, turn),
                Stage::Placed(place, turn) => (Full::Startups, Some(place), turn),
            };
            let (began, patience) = self.patience(limit, waits);
            let waited = self.wait(turn, began + patience, overtaken.as_mut()).await?;
            stage = match (waited, place) {
                (Waited::Granted(pass), None) => {
                    let joined = self.join_startups(target, Place::usual(pass), waits.since);
                    joined.map_err(told)?
                }
                (Waited::Granted(startup), Some(place)) => Stage::In(Entered { place, startup }),
                (Waited::LookElsewhere(turn), place) => {
                    let stage = match place {
                        None => Stage::Queued(turn),
                        Some(place) => Stage::Placed(place, turn),
                    };
                    waits.at = Some((target.clone(), stage));
                    return Err(NoTurn::Overtaken);
                }
                (Waited::Over, _) => return Err(self.refused(target, limit, Some(Boottime::now().since(began)))),
            };
        }
    }

    /// Since when this client waits for this, and for how long it may.
    fn patience(&self, limit: Full, waits: &mut Waits) -> (Boottime, Duration) {
        let config = self.shared.config.load();
        let (began, patience) = match limit {
            Full::Places => (&mut waits.place, config.limits.queue.timeout),
            Full::Startups => (&mut waits.startup, config.hold.timeout.max(TRY_OTHERS_MAX)),
        };
        (*began.get_or_insert_with(Boottime::now), patience)
    }

    /// Waits until it is this client's turn, at most until `deadline`.
    async fn wait(
        &self,
        mut turn: Turn,
        deadline: Boottime,
        overtaken: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<Waited, NoTurn> {
        let left = deadline.since(Boottime::now());
        let pause = if self.config.role.is_balanced() {
            left.min(LOOK_ELSEWHERE_EVERY)
        } else {
            left
        };
        tokio::select! {
            biased;
            () = turn.called() => {}
            () = overtaken => return Err(NoTurn::Overtaken),
            () = gone(&self.client) => return Err(NoTurn::Denied(Denied::ClientGone)),
            () = self.cut.cancelled() => return Err(NoTurn::Denied(Denied::Stopping)),
            () = sleep(pause) => {}
        }
        Ok(match turn.pass() {
            Ok(pass) => Waited::Granted(pass),
            Err(turn) if pause < left => Waited::LookElsewhere(turn),
            Err(_) => Waited::Over,
        })
    }

    /// What a client is told that has `waited` in vain, or not at all.
    fn refused(&self, target: &Target, full: Full, waited: Option<Duration>) -> NoTurn {
        let (member, limits) = (&target.member, &self.shared.config.load().limits);
        let (limit, fatal) = match full {
            Full::Places => {
                let crowd = self.shared.places.of(member).crowd();
                ("per_member", refusal::member_full(member, crowd, limits, waited))
            }
            Full::Startups => {
                let crowd = self.shared.startups.of(member).crowd();
                ("startups_per_member", refusal::startups_full(member, crowd, waited))
            }
        };
        count(&self.listener.refused);
        self.shared.limited.count(limit, "");
        self.shared.events.record(EventKind::Limited { limit });
        NoTurn::Denied(Denied::Refused(fatal))
    }
}

/// Gives a place among those that start back, at the latest after a while.
pub(crate) async fn keep_briefly(startup: Pass) -> Infallible {
    sleep(STARTUP_MAX).await;
    drop(startup);
    std::future::pending().await
}

//! A client's turn at a member: a place among the sessions that the member may have, and one among those that it starts at
//! a time, each waited for in a queue of its own.

use std::convert::Infallible;
use std::pin::Pin;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use tokio::time::sleep;

use crate::connect::{Connector, Denied, TRY_OTHERS_MAX, gone};
use crate::counters::Counted;
use crate::events::EventKind;
use crate::gate::{Entry, Pass, Turn};
use crate::refusal;
use crate::route::Target;
use crate::shared::count;
use crate::wire::error_response::Fatal;

/// A server that takes longer for its first word is slow for another reason than many clients, and must not keep others
/// from theirs.
pub(crate) const STARTUP_MAX: Duration = Duration::from_secs(2);

/// Since when a client waits for what, over all that it tries.
#[derive(Debug)]
pub(crate) struct Waits {
    /// For a session. Whoever came first goes first.
    since: Boottime,
    /// For a place at a member that is full.
    place: Option<Boottime>,
    /// For its turn to start.
    startup: Option<Boottime>,
    /// At the member that was just chosen because it had them.
    pub(crate) entered: Option<Entered>,
}

impl Waits {
    pub(crate) const fn new(since: Boottime) -> Self {
        Self {
            since,
            place: None,
            startup: None,
            entered: None,
        }
    }
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

/// Why it was not its turn.
pub(crate) enum NoTurn {
    /// The route leads elsewhere by now.
    Overtaken,
    Denied(Denied),
}

impl Connector<'_> {
    /// Takes places at `member` if they need not be waited for.
    pub(crate) fn enter_at_once(&self, member: &MemberName, waits: &mut Waits) -> bool {
        let place = self.shared.places.of(member).enter(waits.since, 0);
        let startup = self.shared.startups.of(member).enter(waits.since, 0);
        let (Entry::In(pass), Entry::In(startup)) = (place, startup) else {
            return false;
        };
        let place = Place {
            _pass: pass,
            _reserved: None,
        };
        waits.entered = Some(Entered { place, startup });
        true
    }

    /// Waits for places at `target`, until `overtaken` or the time for each is over.
    pub(crate) async fn turn(
        &self,
        target: &Target,
        waits: &mut Waits,
        mut overtaken: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<Entered, NoTurn> {
        if let Some(entered) = waits.entered.take() {
            return Ok(entered);
        }
        let place = self.place(target, waits, overtaken.as_mut()).await?;
        let config = self.shared.config.load_full();
        let gate = self.shared.startups.of(&target.member);
        let startup = match gate.enter(waits.since, config.limits.connections) {
            Entry::In(pass) => pass,
            Entry::Full => return Err(self.refused("startups_per_member", |_| self.no_startup(target, None))),
            Entry::Wait(turn) => {
                let patience = config.hold.timeout.max(TRY_OTHERS_MAX);
                let began = *waits.startup.get_or_insert_with(Boottime::now);
                self.wait(turn, began, patience, overtaken).await?.ok_or_else(|| {
                    let waited = Some(Boottime::now().since(began));
                    self.refused("startups_per_member", |_| self.no_startup(target, waited))
                })?
            }
        };
        Ok(Entered { place, startup })
    }

    async fn place(
        &self,
        target: &Target,
        waits: &mut Waits,
        overtaken: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<Place, NoTurn> {
        let queue = self.shared.config.load().limits.queue;
        let gate = self.shared.places.of(&target.member);
        let usual = |pass| Place {
            _pass: pass,
            _reserved: None,
        };
        let entry = gate.enter(waits.since, queue.clients);
        let turn = match entry {
            Entry::In(pass) => return Ok(usual(pass)),
            Entry::Wait(_) | Entry::Full if self.client_is.has_reserved_place() => {
                return Ok(usual(gate.enter_over()));
            }
            Entry::Wait(turn) => Some(turn),
            Entry::Full => None,
        };
        if let Some(reserved) = self.shared.reserve(self.client_is.who.user.as_deref()) {
            return Ok(Place {
                _pass: gate.enter_over(),
                _reserved: Some(reserved),
            });
        }
        let no_place = |waited| {
            self.refused("per_member", |limits| {
                refusal::member_full(&target.member, gate.crowd(), limits, waited)
            })
        };
        let turn = turn.ok_or_else(|| no_place(None))?;
        let began = *waits.place.get_or_insert_with(Boottime::now);
        let granted = self.wait(turn, began, queue.timeout, overtaken).await?;
        granted
            .map(usual)
            .ok_or_else(|| no_place(Some(Boottime::now().since(began))))
    }

    /// Waits until it is this client's turn; nothing when `patience`, counted from `began`, is over before.
    async fn wait(
        &self,
        turn: Turn,
        began: Boottime,
        patience: Duration,
        overtaken: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<Option<Pass>, NoTurn> {
        let left = (began + patience).since(Boottime::now());
        tokio::select! {
            biased;
            pass = turn.granted() => Ok(Some(pass)),
            () = overtaken => Err(NoTurn::Overtaken),
            () = gone(&self.client) => Err(NoTurn::Denied(Denied::ClientGone)),
            () = self.cut.cancelled() => Err(NoTurn::Denied(Denied::Stopping)),
            () = sleep(left) => Ok(None),
        }
    }

    fn refused(&self, limit: &'static str, fatal: impl FnOnce(&crate::config::LimitsConfig) -> Fatal) -> NoTurn {
        count(&self.listener.refused);
        self.shared.limited.count(limit, "");
        self.shared.events.record(EventKind::Limited { limit });
        NoTurn::Denied(Denied::Refused(fatal(&self.shared.config.load().limits)))
    }

    fn no_startup(&self, target: &Target, waited: Option<Duration>) -> Fatal {
        let crowd = self.shared.startups.of(&target.member).crowd();
        refusal::startups_full(&target.member, crowd, waited)
    }
}

/// Gives a place among those that start back, at the latest after a while.
pub(crate) async fn keep_briefly(startup: Pass) -> Infallible {
    sleep(STARTUP_MAX).await;
    drop(startup);
    std::future::pending().await
}

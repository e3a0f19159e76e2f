//! A client's turn at a member: a place among the sessions that the member may have, waited for in a queue of its own.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use tokio::time::sleep;

use crate::connect::{Connector, gone};
use crate::events::EventKind;
use crate::gate::{Entry, Pass};
use crate::refusal;
use crate::route::Target;
use crate::shared::count;
use crate::wire::error_response::Fatal;

/// Since when a client waits for what, over all that it tries.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waits {
    /// For a session. Whoever came first goes first.
    pub(crate) since: Boottime,
    /// For a place at a member that is full.
    pub(crate) place: Option<Boottime>,
}

impl Waits {
    pub(crate) const fn new(since: Boottime) -> Self {
        Self { since, place: None }
    }
}

/// Why it was not its turn.
pub(crate) enum NoTurn {
    /// The route leads elsewhere by now.
    Overtaken,
    ClientGone,
    Stopping,
    Refused(Fatal),
}

impl Connector<'_> {
    /// Waits for a place at `target`, until `overtaken` or the queue's time is over.
    pub(crate) async fn turn(
        &self,
        target: &Target,
        waits: &mut Waits,
        overtaken: impl Future<Output = ()>,
    ) -> Result<Pass, NoTurn> {
        let queue = self.shared.config.load().limits.queue;
        let gate = self.shared.places.of(&target.member);
        let turn = match gate.enter(waits.since, queue.clients) {
            Entry::In(pass) => return Ok(pass),
            Entry::Wait(turn) => turn,
            Entry::Full => return Err(self.no_place(target, None)),
        };
        let now = Boottime::now();
        let began = *waits.place.get_or_insert(now);
        let patience = (began + queue.timeout).since(now);
        tokio::select! {
            biased;
            pass = turn.granted() => Ok(pass),
            () = overtaken => Err(NoTurn::Overtaken),
            () = gone(&self.client) => Err(NoTurn::ClientGone),
            () = self.cut.cancelled() => Err(NoTurn::Stopping),
            () = sleep(patience) => Err(self.no_place(target, Some(Boottime::now().since(began)))),
        }
    }

    fn no_place(&self, target: &Target, waited: Option<Duration>) -> NoTurn {
        count(&self.listener.refused);
        let limit = "per_member";
        self.shared.limited.count(limit, "");
        self.shared.events.record(EventKind::Limited { limit });
        let limits = &self.shared.config.load().limits;
        let crowd = self.shared.places.of(&target.member).crowd();
        NoTurn::Refused(refusal::member_full(&target.member, crowd, limits, waited))
    }
}

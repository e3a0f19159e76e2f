//! Writes events to etcd, by a task and on connections of its own, and keeps their number bounded.

use std::sync::Arc;
use std::time::Duration;

use pgherd_cluster::etcd::{Budget, Etcd, Op, Txn};
use pgherd_cluster::event::Event;
use pgherd_cluster::key::{Key, Keys};
use pgherd_cluster::source::ViewHandle;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::Journal;

/// How many events one transaction writes at most; etcd takes 128 operations in one.
const BATCH_MAX: usize = 32;
/// How many old ones it deletes.
const DELETED_MAX: usize = 64;
/// For one write.
const WRITE_MAX: Duration = Duration::from_secs(2);
/// After one that failed.
const AGAIN: Duration = Duration::from_secs(2);
/// How many may wait while etcd is away; the oldest are lost then.
const WAITING_MAX: usize = 64;
/// What is left when the agent ends.
const LAST_MAX: Duration = Duration::from_millis(500);

/// What the task needs.
pub struct Keeping {
    /// Connections that nobody else uses.
    pub etcd: Etcd,
    /// The cluster's keys.
    pub keys: Keys,
    /// What is there already.
    pub view: ViewHandle,
    /// To count what is lost.
    pub journal: Journal,
    /// What comes.
    pub queue: mpsc::Receiver<Arc<Event>>,
}

impl Keeping {
    /// Runs until `stop`, and then for a moment longer.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut waiting: Vec<Arc<Event>> = Vec::new();
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                count = self.queue.recv_many(&mut waiting, BATCH_MAX) => if count == 0 { break },
            }
            while !waiting.is_empty() && !stop.is_cancelled() {
                if self.write(&mut waiting).await {
                    continue;
                }
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = sleep(AGAIN) => {}
                }
                while let Ok(event) = self.queue.try_recv() {
                    waiting.push(event);
                }
                let surplus = waiting.len().saturating_sub(WAITING_MAX);
                waiting.drain(..surplus);
                self.journal.lost(surplus);
            }
        }
        while let Ok(event) = self.queue.try_recv() {
            waiting.push(event);
        }
        if !waiting.is_empty() {
            // An agent that cannot say its last word in time ends without it.
            let _ = timeout(LAST_MAX, self.write(&mut waiting)).await;
        }
    }

    /// Writes the first of them, and takes out what was written.
    async fn write(&self, waiting: &mut Vec<Arc<Event>>) -> bool {
        let batch = waiting.len().min(BATCH_MAX);
        let txn = transaction(&self.keys, &self.view, waiting.get(..batch).unwrap_or_default());
        let budget = Budget::new(WRITE_MAX, self.etcd.endpoint_count());
        match self.etcd.txn(&txn, budget).await {
            Ok(_) => {
                waiting.drain(..batch);
                true
            }
            Err(error) => {
                // That etcd is away is said elsewhere.
                tracing::debug!(%error, "writing events");
                false
            }
        }
    }
}

/// What writes these, and deletes the oldest that are too many with them. Two members may delete the same.
fn transaction(keys: &Keys, view: &ViewHandle, events: &[Arc<Event>]) -> Txn {
    let surplus = view.load().events.too_many(events.len());
    let deletes = surplus.into_iter().take(DELETED_MAX);
    let txn = deletes.fold(Txn::new(), |txn, id| txn.then(Op::Delete(keys.of(&Key::Event(id)))));
    events.iter().fold(txn, |txn, event| {
        txn.then(Op::Put {
            key: keys.of(&Key::Event(event.id.clone())),
            value: event.to_json().to_string(),
            lease: 0,
        })
    })
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::event::{EVENTS_KEPT, EventId, Events, Kind};
    use pgherd_cluster::name::Scope;
    use pgherd_cluster::source;
    use pgherd_cluster::view::View;

    use super::*;

    #[test]
    fn what_is_written_makes_room_for_itself() {
        let scope = Scope::new("c").expect("a plain name");
        let keys = Keys::new("service", &scope);
        let event = |at_ms| Event::new(EventId::new(at_ms, "n1"), at_ms, "n1", Kind::Role, "it happened");
        let (publisher, view) = source::channel(scope.clone());
        let kept = u64::try_from(EVENTS_KEPT).expect("small");
        publisher.publish(View {
            events: (0..kept).map(event).collect::<Events>(),
            ..View::empty(scope)
        });
        let new = [Arc::new(event(9000)), Arc::new(event(9001))];
        let txn = transaction(&keys, &view, &new);
        let oldest = |at_ms| Op::Delete(keys.of(&Key::Event(EventId::new(at_ms, "n1"))));
        assert_eq!(txn.then_ops().get(..2), Some([oldest(0), oldest(1)].as_slice()));
        assert_eq!(txn.then_ops().len(), 4);
    }
}

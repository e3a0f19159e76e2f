//! `POST /switchover` and `POST /failover`: Patroni's checks, in its order, with its texts and codes.
//!
//! What is asked and what is allowed is pure; the rest writes the `failover` key and waits until the view shows that
//! the leader key has moved.

mod candidates;
mod order;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use pgherd_cluster::clock::wall_now;
use pgherd_cluster::etcd::{Compare, Op, StoreError, Txn};
use pgherd_cluster::event::Kind;
use pgherd_cluster::key::Key;
use pgherd_cluster::record::FailoverRequest;
use pgherd_cluster::view::{Epoch, View};
use serde_json::{Map, Value};
use tokio::sync::watch;
use tokio::time::timeout;

use self::candidates::anyone_fit;
pub(super) use self::order::Action;
use self::order::Order;
use super::answer::{Answer, error_page, sentence};
use super::schedule::Refusal;
use super::{Api, OUT_OF_TOUCH};
use crate::journal::Draft;

/// Patroni waits for two of its cycles, and for no less than two of these.
const WAIT_MIN: Duration = Duration::from_secs(10);

const NOT_WRITTEN: &str = "failed to write failover key into DCS";

/// Serves one request; `body` is its JSON.
pub(super) async fn serve(api: &Api, action: Action, body: &Map<String, Value>, actor: &str) -> Answer {
    match serve_or_refuse(api, action, body, actor).await {
        Ok(answer) => answer,
        Err(refusal) => sentence(refusal.code, refusal.text),
    }
}

async fn serve_or_refuse(api: &Api, action: Action, body: &Map<String, Value>, actor: &str) -> Result<Answer, Refusal> {
    let facts = api.facts();
    let Some(view) = facts.known_view() else {
        return Err(Refusal::new(503, OUT_OF_TOUCH));
    };
    let now = Timestamp::try_from(wall_now()).unwrap_or(Timestamp::UNIX_EPOCH);
    let order = Order::parse(action, body, facts.is_paused(), now)?;
    if order.scheduled_at.is_none() {
        let considered = order.considered(view)?;
        if let Err(unfit) = anyone_fit(&api.peers, considered).await {
            // Patroni's words, which scripts may look for, and then what they rest on.
            return Err(order.impossible(&format!("no good candidates have been found: {unfit}")));
        }
    }
    // Told before it begins: whoever is sent away by it can be told its name.
    api.journal.say(event(&order, view, actor));
    let written = write(api, &order).await?;
    if order.scheduled_at.is_some() {
        return Ok(sentence(202, format!("{} scheduled", order.action.title())));
    }
    let holder = view.epoch().map(|epoch| epoch.holder.as_str());
    let limit = 2 * view.timing().loop_wait().max(WAIT_MIN);
    let outcome = wait(api.view.subscribe(), holder, written, limit).await;
    let (code, text) = outcome.answer(&order);
    tracing::info!(code, outcome = text, "answered {}", order.action.as_str());
    Ok(sentence(code, text))
}

/// What operators asked for.
fn event(order: &Order, view: &View, actor: &str) -> Draft {
    let from = view.epoch().map(|epoch| epoch.holder.as_str()).unwrap_or("nobody");
    let to = order.candidate.as_deref().unwrap_or("the best candidate");
    let what = format!("{} from {from} to {to}", order.action.as_str());
    let draft = Draft::new(Kind::Operator, what).asked_by(Some(actor.to_owned()));
    match &order.scheduled_at {
        Some(at) => draft.with("scheduled_at", at.clone()),
        // The holding that is to end by it.
        None => draft
            .from(view.epoch().map(Epoch::to_string))
            .to(order.candidate.clone()),
    }
}

/// Writes the request and returns the revision of that.
async fn write(api: &Api, order: &Order) -> Result<i64, Refusal> {
    let request = FailoverRequest {
        leader: order.leader.clone(),
        member: order.candidate.clone(),
        scheduled_at: order.scheduled_at.clone(),
    };
    let mut txn = Txn::new().then(Op::Put {
        key: api.keys.of(&Key::Failover),
        // Three optional texts always serialize.
        value: serde_json::to_string(&request).unwrap_or_default(),
        lease: 0,
    });
    if let (Some(leader), None) = (&order.leader, &order.scheduled_at) {
        // The candidates were asked for a while: what was checked against the view must still hold.
        txn = txn.when(Compare::Value(api.keys.of(&Key::Leader), leader.clone()));
    }
    match api.etcd.txn(&txn, api.budget()).await {
        Ok(outcome) if outcome.succeeded => Ok(outcome.revision),
        Ok(_) => Err(Refusal::new(412, order::LEADER_DIFFERS)),
        Err(error) => {
            tracing::warn!(%error, "writing the failover key");
            Err(Refusal::new(503, NOT_WRITTEN))
        }
    }
}

/// How a hand-over went, as far as the view tells.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    /// Somebody else holds the leader key.
    Moved { to: String },
    /// The request is gone, and the leader key has not moved.
    Dropped,
    /// Neither, for as long as a request waits.
    Unknown,
}

impl Outcome {
    /// What `view` tells of a request that was `written` at this revision while `holder` held the leader key. A holder
    /// that has changed counts first: the new one clears the request.
    fn of(view: &View, holder: Option<&str>, written: i64) -> Option<Self> {
        if let Some(epoch) = view.epoch()
            && Some(epoch.holder.as_str()) != holder
        {
            return Some(Self::Moved {
                to: epoch.holder.to_string(),
            });
        }
        // A view from before the request shows no request either.
        let dropped = view.failover.mod_revision > written && view.failover.value.is_none();
        dropped.then_some(Self::Dropped)
    }

    fn answer(&self, order: &Order) -> (u16, String) {
        match self {
            Self::Moved { to } => match &order.candidate {
                Some(candidate) if candidate != to => (
                    200,
                    format!(
                        "{} over to \"{to}\" instead of \"{candidate}\"",
                        order.action.past_title()
                    ),
                ),
                _ => (200, format!("Successfully {} over to \"{to}\"", order.action.past())),
            },
            Self::Dropped => (503, format!("{} failed", order.action.title())),
            Self::Unknown => (503, format!("{} status unknown", order.action.title())),
        }
    }
}

async fn wait(mut changes: watch::Receiver<Arc<View>>, holder: Option<&str>, written: i64, limit: Duration) -> Outcome {
    let waiting = changes.wait_for(|view| Outcome::of(view, holder, written).is_some());
    match timeout(limit, waiting).await {
        Ok(Ok(view)) => Outcome::of(&view, holder, written).unwrap_or(Outcome::Unknown),
        Ok(Err(_)) | Err(_) => Outcome::Unknown,
    }
}

/// `DELETE /switchover`: takes a scheduled one back.
pub(super) async fn unschedule(api: &Api) -> Answer {
    match unschedule_or_fail(api).await {
        Ok(answer) => answer,
        Err(error) => {
            tracing::warn!(%error, "taking a scheduled switchover back");
            sentence(503, OUT_OF_TOUCH)
        }
    }
}

async fn unschedule_or_fail(api: &Api) -> Result<Answer, StoreError> {
    let key = api.keys.of(&Key::Failover);
    // Read anew: who takes back what was asked for a moment ago must not be told that there is nothing.
    let stored = api.read(&key).await?;
    let request = stored.as_ref().and_then(|entry| FailoverRequest::parse(&entry.value));
    let (
        Some(entry),
        Some(FailoverRequest {
            scheduled_at: Some(_), ..
        }),
    ) = (stored, request)
    else {
        return Ok(sentence(404, "no switchover is scheduled"));
    };
    // Patroni's members never delete this key: an empty request is none.
    let taken_back = Txn::new()
        .when(Compare::ModRevision(key.clone(), entry.mod_revision))
        .then(Op::Put {
            key,
            value: "{}".to_owned(),
            lease: 0,
        });
    let outcome = api.etcd.txn(&taken_back, api.budget()).await?;
    Ok(if outcome.succeeded {
        sentence(200, "scheduled switchover deleted")
    } else {
        error_page(409, "Conflict")
    })
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::source;
    use serde_json::json;

    use super::super::fixtures::{entry, object, scope, view_with};
    use super::*;

    fn order(action: Action, candidate: Option<&str>) -> Order {
        let body = json!({"leader": (action == Action::Switchover).then_some("node1"), "candidate": candidate});
        Order::parse(action, &object(body), false, Timestamp::UNIX_EPOCH).expect("a whole order")
    }

    #[test]
    fn an_outcome_is_told_in_patronis_words() {
        let moved = Outcome::Moved { to: "node2".into() };
        let to = |action, candidate| moved.answer(&order(action, candidate));
        let text = |text: &str| (200, text.to_owned());
        assert_eq!(
            to(Action::Switchover, None),
            text("Successfully switched over to \"node2\"")
        );
        assert_eq!(
            to(Action::Failover, Some("node2")),
            text("Successfully failed over to \"node2\"")
        );
        let other = "Switched over to \"node2\" instead of \"node3\"";
        assert_eq!(to(Action::Switchover, Some("node3")), text(other));
        let other = "Failed over to \"node2\" instead of \"node3\"";
        assert_eq!(to(Action::Failover, Some("node3")), text(other));
        let switchover = order(Action::Switchover, None);
        assert_eq!(Outcome::Dropped.answer(&switchover), (503, "Switchover failed".into()));
        assert_eq!(
            Outcome::Unknown.answer(&switchover),
            (503, "Switchover status unknown".into())
        );
    }

    #[test]
    fn a_view_from_before_the_request_says_nothing() {
        let before = view_with(Some("node1"), json!({}), vec![entry("failover", "{}", 40)]);
        let asked = entry("failover", r#"{"leader":"node1"}"#, 60);
        let during = view_with(Some("node1"), json!({}), vec![asked.clone()]);
        let between = view_with(None, json!({}), vec![asked]);
        let moved = view_with(Some("node2"), json!({}), vec![entry("failover", "{}", 64)]);
        let dropped = view_with(Some("node1"), json!({}), vec![entry("failover", "{}", 61)]);
        let of = |view: &View| Outcome::of(view, Some("node1"), 60);
        assert_eq!(of(&before), None);
        assert_eq!(of(&during), None);
        assert_eq!(of(&between), None);
        assert_eq!(of(&dropped), Some(Outcome::Dropped));
        assert_eq!(of(&moved), Some(Outcome::Moved { to: "node2".into() }));
    }

    #[tokio::test]
    async fn a_wait_ends_with_the_change_and_not_with_the_clock() {
        let (publisher, handle) = source::channel(scope());
        publisher.publish(view_with(Some("node1"), json!({}), vec![]));
        let waiting = wait(handle.subscribe(), Some("node1"), 60, Duration::from_secs(3600));
        let change = async { publisher.publish(view_with(Some("node3"), json!({}), vec![])) };
        let (outcome, ()) = tokio::join!(waiting, change);
        assert_eq!(outcome, Outcome::Moved { to: "node3".into() });
    }

    #[tokio::test]
    async fn a_wait_gives_up_at_its_limit() {
        let (publisher, handle) = source::channel(scope());
        publisher.publish(view_with(Some("node1"), json!({}), vec![]));
        assert_eq!(
            wait(handle.subscribe(), Some("node1"), 60, Duration::ZERO).await,
            Outcome::Unknown
        );
    }
}

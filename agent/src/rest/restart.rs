//! `POST /restart` and `DELETE /restart`: Patroni's words and codes. What is asked is read here; the loop carries it out.

use std::time::Duration;

use jiff::Timestamp;
use pgherd_cluster::clock::wall_now;
use pgherd_cluster::record::Role;
use serde_json::{Map, Value};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::Api;
use super::answer::{Answer, sentence};
use super::schedule::{self, Refusal};
use crate::restart::{Conditions, Order, Restarted, Scheduled};

/// The checkpoint and the stop before the start, beyond which nobody waits for an answer.
const STOP_MAX: Duration = Duration::from_secs(60);
/// How long the loop may take to look at an order.
const ORDER_MAX: Duration = Duration::from_secs(10);

/// A request that makes sense in itself.
#[derive(Clone, Debug, PartialEq)]
struct Asked {
    conditions: Conditions,
    /// How long PostgreSQL may take to start before the answer says that it still does.
    start_max: Option<Duration>,
    at: Option<(Timestamp, Map<String, Value>)>,
}

/// Serves `POST /restart`; `body` may be empty.
pub(super) async fn serve(api: &Api, body: &Map<String, Value>) -> Answer {
    let facts = api.facts();
    let now = Timestamp::try_from(wall_now()).unwrap_or(Timestamp::UNIX_EPOCH);
    let asked = match parse(body, facts.is_paused(), now) {
        Ok(asked) => asked,
        Err(refusal) => return sentence(refusal.code, refusal.text),
    };
    match asked.at {
        Some((at, document)) => schedule_it(api, at, asked.conditions, document).await,
        None => {
            let usual = facts
                .view
                .config
                .value
                .clone()
                .unwrap_or_default()
                .primary_start_timeout();
            let limit = asked.start_max.unwrap_or(usual) + STOP_MAX;
            restart(api, asked.conditions, limit).await
        }
    }
}

async fn restart(api: &Api, conditions: Conditions, limit: Duration) -> Answer {
    let (reply, answer) = oneshot::channel();
    let asking = async {
        api.orders.send(Order::Now { conditions, reply }).await.ok()?;
        answer.await.ok()
    };
    let (code, text) = match timeout(limit, asking).await {
        Ok(Some(Restarted::Done)) => (200, "restarted successfully".to_owned()),
        Ok(Some(Restarted::Refused)) => (503, "restart conditions are not satisfied".to_owned()),
        Ok(Some(Restarted::Busy(with))) => (503, format!("{with} already in progress")),
        Ok(Some(Restarted::Failed) | None) => (503, "restart failed".to_owned()),
        Err(_) => (503, "postgres is still starting".to_owned()),
    };
    tracing::info!(code, outcome = text, "answered a restart");
    sentence(code, text)
}

async fn schedule_it(api: &Api, at: Timestamp, conditions: Conditions, document: Map<String, Value>) -> Answer {
    let (reply, answer) = oneshot::channel();
    let scheduled = Scheduled {
        at,
        conditions,
        document: Value::Object(document),
    };
    match told(api, Order::At { scheduled, reply }, answer).await {
        Some(true) => sentence(202, "Restart scheduled"),
        Some(false) => sentence(409, "Another restart is already scheduled"),
        None => sentence(503, "restart failed"),
    }
}

/// Serves `DELETE /restart`: takes a scheduled one back.
pub(super) async fn unschedule(api: &Api) -> Answer {
    let (reply, answer) = oneshot::channel();
    match told(api, Order::TakeBack { reply }, answer).await {
        Some(true) => sentence(200, "scheduled restart deleted"),
        Some(false) => sentence(404, "no restarts are scheduled"),
        None => sentence(503, "the agent does not answer"),
    }
}

async fn told(api: &Api, order: Order, answer: oneshot::Receiver<bool>) -> Option<bool> {
    let asking = async {
        api.orders.send(order).await.ok()?;
        answer.await.ok()
    };
    timeout(ORDER_MAX, asking).await.ok().flatten()
}

fn parse(body: &Map<String, Value>, paused: bool, now: Timestamp) -> Result<Asked, Refusal> {
    let bad = |text: String| Err(Refusal::new(400, text));
    let mut asked = Asked {
        conditions: Conditions::default(),
        start_max: None,
        at: None,
    };
    for (name, value) in body {
        let text = || value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        match name.as_str() {
            "schedule" if paused => {
                return Err(Refusal::new(500, "Can't schedule restart in the paused state"));
            }
            "schedule" => {
                let (at, stored) = schedule::parse(value.as_str().unwrap_or_default(), "restart", now)?;
                let mut document = body.clone();
                document.insert(name.clone(), stored.into());
                asked.at = Some((at, document));
            }
            "role" => {
                asked.conditions.role = match text().as_str() {
                    "primary" => Some(Role::Primary),
                    "standby_leader" => Some(Role::StandbyLeader),
                    "replica" => Some(Role::Replica),
                    _ => return bad("PostgreSQL role should be either primary, standby_leader, or replica".to_owned()),
                }
            }
            "postgres_version" => asked.conditions.older_than = Some(version_number(&text())?),
            "timeout" => match seconds(&text()) {
                Some(limit) => asked.start_max = Some(limit),
                None => return bad("Timeout should be a positive number of seconds".to_owned()),
            },
            "restart_pending" => asked.conditions.pending = true,
            other => return bad(format!("Unknown filter for the scheduled restart: {other}")),
        }
    }
    Ok(asked)
}

/// `9.5.2` is 90502, `15.3` is 150003.
fn version_number(text: &str) -> Result<u32, Refusal> {
    let parts: Result<Vec<u32>, _> = text.split('.').map(str::parse).collect();
    let Ok(parts) = parts else {
        return Err(Refusal::new(400, format!("Invalid PostgreSQL version: {text}")));
    };
    let number = match parts.as_slice() {
        [major, minor] if *major < 10 => (*major, Some(*minor), 0),
        [major, patch] => (*major, Some(0), *patch),
        [major, minor, patch] => (*major, Some(*minor), *patch),
        _ => (0, None, 0),
    };
    match number {
        (major @ 1..=999, Some(minor @ 0..=99), patch @ 0..=99) => Ok(major * 10_000 + minor * 100 + patch),
        _ => Err(Refusal::new(
            400,
            format!("Invalid PostgreSQL version format: X.Y or X.Y.Z is accepted: {text}"),
        )),
    }
}

/// A number of seconds, or one with a unit as in PostgreSQL's configuration.
fn seconds(text: &str) -> Option<Duration> {
    let text = text.trim();
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let number: u64 = number.parse().ok()?;
    let millis: u64 = match unit.trim() {
        "ms" => 1,
        "" | "s" => 1_000,
        "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    let limit = Duration::from_millis(number.checked_mul(millis)?);
    // Beyond a day nobody waits, and sums of it must not overflow.
    (!limit.is_zero()).then_some(limit.min(Duration::from_secs(86_400)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::fixtures::object;
    use super::*;

    fn now() -> Timestamp {
        "2026-11-21T00:00:00Z".parse().expect("a time")
    }

    #[test]
    fn a_request_is_read_whole() {
        let body =
            object(json!({"role": "replica", "postgres_version": "9.5.2", "timeout": "2min", "restart_pending": 0}));
        let asked = parse(&body, true, now()).expect("a whole request");
        let conditions = Conditions {
            role: Some(Role::Replica),
            older_than: Some(90_502),
            pending: true,
        };
        assert_eq!((asked.conditions, asked.at), (conditions, None));
        assert_eq!(asked.start_max, Some(Duration::from_secs(120)));
        let at = json!({"schedule": "2040-01-01T00:00Z", "postgres_version": "15.3"});
        let asked = parse(&object(at), false, now()).expect("a whole request");
        assert_eq!(asked.conditions.older_than, Some(150_003));
        let (_, document) = asked.at.expect("a schedule");
        assert_eq!(
            Value::Object(document),
            json!({"schedule": "2040-01-01T00:00:00+00:00", "postgres_version": "15.3"})
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_patronis_words() {
        let role = "PostgreSQL role should be either primary, standby_leader, or replica";
        let timeout = "Timeout should be a positive number of seconds";
        let format = "Invalid PostgreSQL version format: X.Y or X.Y.Z is accepted: 15";
        for (body, paused, code, text) in [
            (json!({"role": "leader"}), false, 400, role),
            (json!({"timeout": 0}), false, 400, timeout),
            (json!({"timeout": "1 year"}), false, 400, timeout),
            (json!({"postgres_version": "15"}), false, 400, format),
            (
                json!({"postgres_version": "abc"}),
                false,
                400,
                "Invalid PostgreSQL version: abc",
            ),
            (
                json!({"force": true}),
                false,
                400,
                "Unknown filter for the scheduled restart: force",
            ),
            (
                json!({"schedule": "2020-01-01T00:00Z"}),
                false,
                422,
                "Cannot schedule restart in the past",
            ),
            (
                json!({"schedule": "2040-01-01T00:00"}),
                false,
                400,
                "Timezone information is mandatory for the scheduled restart",
            ),
            (
                json!({"schedule": "2040-01-01T00:00Z"}),
                true,
                500,
                "Can't schedule restart in the paused state",
            ),
        ] {
            let refusal = parse(&object(body.clone()), paused, now()).expect_err("a refusal");
            assert_eq!((refusal.code, refusal.text.as_str()), (code, text), "{body}");
        }
    }
}

//! What operators order beside restarts and hand-overs, and what they look at before and meanwhile: `POST /reinitialize`,
//! `POST /reload`, and of ours `GET /api/v1/forecast` and `GET /api/v1/backups`.

use std::time::Duration;

use serde_json::{Map, Value};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::Api;
use super::answer::{Answer, document, sentence};
use crate::postgres::forecast;
use crate::restart::Order;

/// How long the loop may take to look at an order.
const ORDER_MAX: Duration = Duration::from_secs(10);

const NO_ANSWER: &str = "the agent does not answer";

/// Serves `POST /reinitialize`; `body` may be empty. Copies come from the leader, whether `from_leader` asks for that or not.
pub(super) async fn reinitialize(api: &Api, body: &Map<String, Value>) -> Answer {
    let force = body.get("force").is_some_and(is_true);
    let (reply, answer) = oneshot::channel();
    let asking = async {
        api.orders.send(Order::Reinitialize { force, reply }).await.ok()?;
        answer.await.ok()
    };
    let (code, text) = match timeout(ORDER_MAX, asking).await.ok().flatten() {
        Some(Ok(())) => (200, "reinitialize started".to_owned()),
        Some(Err(why)) => (503, why.to_string()),
        None => (503, NO_ANSWER.to_owned()),
    };
    tracing::info!(code, outcome = text, "answered a reinitialize");
    sentence(code, text)
}

/// As Python takes it: anything but nothing.
fn is_true(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(set) => *set,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// Serves `POST /reload`.
pub(super) async fn reload(api: &Api) -> Answer {
    match timeout(ORDER_MAX, api.orders.send(Order::Reload)).await {
        Ok(Ok(())) => sentence(202, "reload scheduled"),
        Ok(Err(_)) | Err(_) => sentence(503, NO_ANSWER),
    }
}

/// Serves `GET /api/v1/forecast`: what a switchover away from this member would meet.
pub(super) async fn forecast(api: &Api) -> Answer {
    told(forecast::of_a_stop(&api.postgres.load()).await)
}

/// Serves `GET /api/v1/backups`: the copies that are being made of this member's data.
pub(super) async fn backups(api: &Api) -> Answer {
    told(forecast::backups(&api.postgres.load()).await)
}

fn told(found: Result<Value, crate::postgres::ToolError>) -> Answer {
    match found {
        Ok(found) => document(200, &found),
        Err(error) => sentence(503, error.chain()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn force_is_what_python_takes_for_true() {
        for (value, expected) in [
            (json!(true), true),
            (json!(false), false),
            (json!(null), false),
            (json!(1), true),
            (json!(0), false),
            (json!("yes"), true),
            (json!(""), false),
        ] {
            assert_eq!(is_true(&value), expected, "{value}");
        }
    }
}

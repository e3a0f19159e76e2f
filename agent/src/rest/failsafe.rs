//! What a leader that has lost etcd asks of the others: to vouch that they do not bid, and, when it has ended PostgreSQL, to
//! delete its key on its behalf.

use std::time::Duration;

use pgherd_cluster::etcd::{Compare, Op, Txn};
use pgherd_cluster::key::Key;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::view::Epoch;
use serde_json::{Map, Value, json};

use super::answer::{Answer, document, error_page, sentence};
use super::{Api, OUT_OF_TOUCH};
use crate::lease::AskedBy;

/// `POST /failsafe`: Patroni's request and answers. Ours says for how long it asks, and is told for how long it is given.
pub(super) async fn vouch(api: &Api, body: &Map<String, Value>) -> Answer {
    let view = api.view.load_full();
    let config = view.config.value.clone().unwrap_or_default();
    if !config.is_failsafe() {
        return error_page(502, "Bad Gateway");
    }
    let Some(leader) = body
        .get("name")
        .and_then(Value::as_str)
        .and_then(|name| MemberName::new(name).ok())
    else {
        return error_page(400, "Bad Request");
    };
    let asked = body
        .get("pgherd")
        .and_then(|ours| ours.get("lasts_ms"))
        .and_then(Value::as_u64);
    let ttl = view.timing().ttl();
    let lasts = asked.map_or(ttl, Duration::from_millis).min(ttl);
    let says = |field| body.get("pgherd").and_then(|ours| ours.get(field)?.as_i64());
    let holding = AskedBy {
        create_revision: says("create_revision"),
        lease: says("lease"),
    };
    let vouched = api.vouches.vouch(leader.clone(), holding, lasts).await;
    if vouched.is_ok() {
        let slots = body.get("slots").cloned().unwrap_or_default();
        api.slots.hear(serde_json::from_value(slots).unwrap_or_default());
    }
    match vouched {
        Ok(given) if asked.is_some() => {
            let millis = u64::try_from(given.as_millis()).unwrap_or(u64::MAX);
            document(200, &json!({ "pgherd": { "lasts_ms": millis } }))
        }
        // Patroni counts one ttl from this, whatever it is told.
        Ok(given) if given < ttl => sentence(500, "this member can vouch for less than one ttl only"),
        Ok(_) => sentence(200, "Accepted"),
        Err(refusal) => {
            tracing::info!(%leader, %refusal, "did not vouch for a leader that asked");
            sentence(500, refusal.to_string())
        }
    }
}

/// `POST /api/v1/release`: deletes the leader key if it is still the asker's very holding, and takes back what this member
/// has promised to that holding, also when the key has expired by now. Anybody who may ask could have deleted the key by
/// itself, had it reached etcd: it names what only the holder knows.
pub(super) async fn release(api: &Api, body: &Map<String, Value>) -> Answer {
    let name = body
        .get("name")
        .and_then(Value::as_str)
        .and_then(|name| MemberName::new(name).ok());
    let number = |field: &str| body.get(field).and_then(Value::as_i64);
    let (Some(name), Some(create_revision), Some(lease)) = (name, number("create_revision"), number("lease")) else {
        return error_page(400, "Bad Request");
    };
    let holding = Epoch {
        holder: name.clone(),
        create_revision,
    };
    let key = api.keys.of(&Key::Leader);
    let txn = Txn::new()
        .when(Compare::Value(key.clone(), name.to_string()))
        .when(Compare::CreateRevision(key.clone(), create_revision))
        .when(Compare::Lease(key.clone(), lease))
        .then(Op::Delete(key));
    match api.etcd.txn(&txn, api.budget()).await {
        Ok(outcome) if outcome.succeeded => {
            tracing::info!(leader = %name, "deleted the leader key on behalf of its holder, which cannot reach etcd");
            // It was the very holding: what was promised to it is owed to nobody any more.
            api.vouches.withdraw(holding, None).await;
            sentence(200, "released")
        }
        Ok(_) => {
            tracing::info!(leader = %name, "a leader has ended, and its key is gone already: it is vouched for no longer");
            api.vouches.withdraw(holding, Some(lease)).await;
            sentence(409, "the leader key is not this holding any more")
        }
        Err(_) => {
            api.vouches.withdraw(holding, Some(lease)).await;
            sentence(503, OUT_OF_TOUCH)
        }
    }
}

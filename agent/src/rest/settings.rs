//! `PATCH /config` and `PUT /config`: the dynamic configuration, changed.

use pgherd_cluster::etcd::{StoreError, Txn};
use pgherd_cluster::key::Key;
use pgherd_cluster::record::DynamicConfig;
use serde_json::{Map, Value};

use super::answer::{Answer, document, error_page, sentence};
use super::{Api, OUT_OF_TOUCH};

/// Merges `change` into the configuration, unless somebody else changed it meanwhile.
pub(super) async fn patch(api: &Api, change: &Map<String, Value>) -> Answer {
    match patch_or_fail(api, change).await {
        Ok(answer) => answer,
        Err(error) => {
            tracing::warn!(%error, "changing the configuration");
            sentence(503, OUT_OF_TOUCH)
        }
    }
}

async fn patch_or_fail(api: &Api, change: &Map<String, Value>) -> Result<Answer, StoreError> {
    let key = api.keys.of(&Key::Config);
    // Read anew: two changes in a row must not conflict because the view has yet to hear of the first.
    let Some(stored) = api.read(&key).await? else {
        return Ok(error_page(503, "Service Unavailable"));
    };
    let mut merged = DynamicConfig::parse(&stored.value).document().clone();
    if !merge(&mut merged, change) {
        return Ok(document(200, &Value::Object(merged)));
    }
    let merged = Value::Object(merged);
    let value = merged.to_string();
    let changed = Txn::put_over(key, value.clone(), stored.mod_revision);
    let outcome = api.etcd.txn(&changed, api.budget()).await?;
    Ok(if outcome.has_put(&value) {
        document(200, &merged)
    } else {
        error_page(409, "Conflict")
    })
}

/// Replaces the configuration, whatever it was.
pub(super) async fn replace(api: &Api, config: Map<String, Value>) -> Answer {
    let config = Value::Object(config);
    let key = api.keys.of(&Key::Config);
    match api.etcd.put(&key, &config.to_string(), 0, api.budget()).await {
        Ok(()) => document(200, &config),
        Err(error) => {
            tracing::warn!(%error, "writing the configuration");
            error_page(502, "Bad Gateway")
        }
    }
}

/// Patroni's merge: null removes, objects merge, and what reads the same is no change. Returns whether there was one.
fn merge(into: &mut Map<String, Value>, change: &Map<String, Value>) -> bool {
    let mut changed = false;
    for (name, value) in change {
        changed |= match (into.get_mut(name), value) {
            (None, Value::Null) => false,
            (Some(_), Value::Null) => into.shift_remove(name).is_some(),
            (Some(Value::Object(old)), Value::Object(new)) => merge(old, new),
            (Some(old), new) if same_text(old, new) => false,
            (_, new) => into.insert(name.clone(), new.clone()).is_none_or(|old| old != *new),
        };
    }
    changed
}

/// Whether two values read the same, so that `"50"` does not replace 50.
fn same_text(old: &Value, new: &Value) -> bool {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        // Python's words, which Patroni's comparison rests on.
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        other => other.to_string(),
    };
    !new.is_object() && text(old) == text(new)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::fixtures::object;
    use super::*;

    #[test]
    fn a_patch_merges_as_patronis_does() {
        let base = json!({"ttl": 30, "pause": true, "postgresql": {"parameters": {"max_connections": 50, "a": "b"}}});
        for (change, changed, result) in [
            (json!({"ttl": 30}), false, base.clone()),
            (json!({"ttl": "30"}), false, base.clone()),
            (json!({"absent": null}), false, base.clone()),
            (json!({"postgresql": {"parameters": {"a": "b"}}}), false, base.clone()),
            (json!({"pause": null, "postgresql": null}), true, json!({"ttl": 30})),
            (
                json!({"postgresql": {"parameters": {"a": null, "c": 1}}, "ttl": 20}),
                true,
                json!({"ttl": 20, "pause": true, "postgresql": {"parameters": {"max_connections": 50, "c": 1}}}),
            ),
            (
                json!({"ttl": {"x": 1}, "postgresql": 5}),
                true,
                json!({"ttl": {"x": 1}, "pause": true, "postgresql": 5}),
            ),
        ] {
            let mut merged = object(base.clone());
            assert_eq!(merge(&mut merged, &object(change.clone())), changed, "{change}");
            assert_eq!(Value::Object(merged), result, "{change}");
        }
    }
}

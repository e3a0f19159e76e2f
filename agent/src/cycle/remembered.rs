//! The dynamic configuration as it was last seen, kept beside the data as Patroni keeps it, so that an etcd which was emptied
//! while nobody of the cluster ran gets it back.

use std::path::Path;

use pgherd_cluster::record::DynamicConfig;
use serde_json::Value;

use super::Cycle;
use crate::observation::Observation;
use crate::postgres::DataDir;
use crate::postgres::files::write_whole;

/// Patroni's name for it.
const FILE: &str = "patroni.dynamic.json";

const STANDBY_CLUSTER: &str = "standby_cluster";

/// What was kept beside the data of a cluster; nothing where there is none, or nothing that can be read.
pub(super) fn load(data_dir: &Path) -> Option<DynamicConfig> {
    let text = std::fs::read_to_string(data_dir.join(FILE)).ok()?;
    // What lies in a directory without a cluster is of one that is gone.
    if !data_dir.join("PG_VERSION").exists() {
        return None;
    }
    match serde_json::from_str(&text) {
        // A member that was away does not know whether that cluster has been promoted since: what the others wrote would be
        // taken for what went its own way. Whoever has such data waits for one that has taken writes, or for an operator.
        Ok(Value::Object(document)) if document.get(STANDBY_CLUSTER).is_some_and(|section| !section.is_null()) => {
            tracing::warn!(
                "{FILE} in the data directory is of a standby cluster, which may have been promoted: it is passed over"
            );
            None
        }
        Ok(Value::Object(document)) => Some(DynamicConfig::new(document)),
        Ok(_) | Err(_) => {
            tracing::warn!("{FILE} in the data directory is not a map in JSON, and is passed over");
            None
        }
    }
}

impl Cycle {
    /// Keeps the configuration beside the data, when it has changed. Not while a job may change the directory's place.
    pub(super) fn keep_configuration(&mut self, seen: &Observation) {
        if seen.job.is_some() {
            self.upkeep.kept = None; // The data may be other data afterwards.
            return;
        }
        let (Some(config), DataDir::Cluster { .. }) = (&seen.view.config.value, &seen.data) else {
            return;
        };
        let revision = Some(seen.view.config.mod_revision);
        if self.upkeep.kept == revision {
            return;
        }
        let text = Value::Object(config.document().clone()).to_string();
        let path = self.context.config.postgresql.data_dir.join(FILE);
        if let Err(error) = write_whole(&path, &text, 0o600) {
            tracing::warn!("keeping the dynamic configuration: {}", error.chain());
        }
        // A disk that takes no writes is told once for each configuration.
        self.upkeep.kept = revision;
    }

    /// The leader gives an etcd that has lost the configuration, and nothing else, what was last seen.
    pub(super) async fn restore_configuration(&self, seen: &Observation) {
        if seen.view.config.value.is_some() || self.known.last_config.is_none() {
            return;
        }
        match self.write_first_config(false).await {
            Ok(()) => tracing::warn!("etcd had lost the dynamic configuration; wrote the last one that was seen"),
            Err(error) => tracing::warn!("writing the configuration key: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_read_only_beside_a_cluster_and_only_as_a_map() {
        let directory = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).expect("written");
        assert_eq!(load(directory.path()), None);
        write(FILE, r#"{"ttl": 20, "ours": {"kept": true}}"#);
        assert_eq!(load(directory.path()), None, "there is no cluster");
        write("PG_VERSION", "15\n");
        let found = load(directory.path()).expect("a configuration");
        let expected = r#"{"ttl":20,"ours":{"kept":true}}"#;
        assert_eq!(Value::Object(found.document().clone()).to_string(), expected);
        for text in ["[1]", "{\"ttl\": ", "", r#"{"standby_cluster": {"host": "h"}}"#] {
            write(FILE, text);
            assert_eq!(load(directory.path()), None, "{text}");
        }
    }
}

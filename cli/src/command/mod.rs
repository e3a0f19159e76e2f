//! The operator's commands.

pub(crate) mod check;
pub(crate) mod list;
pub(crate) mod rows;
pub(crate) mod switchover;
pub(crate) mod table;

use std::time::Duration;

use pgherd_cluster::etcd::{Budget, Etcd, StoreError};
use pgherd_cluster::view::View;

use crate::config::ClusterConfig;
use crate::failure::Failure;

/// How long an operator waits for etcd before hearing that it does not answer.
const ETCD_TIMEOUT: Duration = Duration::from_secs(5);

/// The cluster as etcd has it now.
///
/// # Errors
/// When etcd does not answer, or refuses us.
pub(crate) async fn read_view(etcd: &Etcd, cluster: &ClusterConfig) -> Result<View, Failure> {
    let keys = cluster.keys();
    let budget = Budget::new(ETCD_TIMEOUT, etcd.endpoint_count());
    let snapshot = etcd
        .list(keys.prefix(), budget)
        .await
        .map_err(|error| store_failure(cluster, &error))?;
    Ok(View::from_entries(
        cluster.scope.clone(),
        &keys,
        snapshot.entries,
        snapshot.revision,
    ))
}

/// What an error of etcd's means to whoever started us.
pub(crate) fn store_failure(cluster: &ClusterConfig, error: &StoreError) -> Failure {
    let section = cluster.etcd_section;
    let user = cluster
        .etcd
        .credentials
        .as_ref()
        .map(|(user, _)| format!("user {user:?}"));
    let user = user.unwrap_or_else(|| "us without a user".to_owned());
    match error {
        StoreError::Auth { what } => Failure::configuration(format!(
            "{section}.username, {section}.password: etcd refuses {user}: {what}; write a user and password that etcd knows"
        )),
        StoreError::Denied { what } => Failure::configuration(format!(
            "{section}.username: etcd denies {user} access: {what}; grant that user a role with read and write on the prefix {}",
            cluster.keys().prefix()
        )),
        _ => Failure::Unavailable(format!("{error} (asked {})", cluster.etcd.endpoints.join(", "))),
    }
}

/// The time now, for people, as UTC.
pub(crate) fn utc_now(format: &str) -> String {
    jiff::Timestamp::try_from(pgherd_cluster::clock::wall_now())
        .map_or_else(|_| String::new(), |now| now.strftime(format).to_string())
}

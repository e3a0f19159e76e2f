//! The operator's commands.

mod answer;
pub(crate) mod check;
mod diff;
mod dsn;
mod dynamic;
mod events;
mod flush;
mod forecast;
mod history;
pub(crate) mod list;
mod members;
mod output;
mod pause;
mod prompt;
mod query;
mod reinit;
mod reload;
mod remove;
mod restart;
mod rolling;
mod rows;
mod site;
mod stall;
mod standby_cluster;
mod switchover;
mod table;
mod timings;
mod version;
mod when;
mod yaml_text;

use std::time::Duration;

use pgherd_cluster::etcd::{Budget, Etcd, StoreError};
use pgherd_cluster::view::View;

use self::site::Scene;
use crate::args::{Operate, Reach, Reaching};
use crate::config::ClusterConfig;
use crate::failure::Failure;

/// How long an operator waits for etcd before hearing that it does not answer.
const ETCD_TIMEOUT: Duration = Duration::from_secs(5);

/// The name that the binary was called by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tool {
    /// Its own: questions only at a terminal, exit codes that tell what to do.
    Pgherd,
    /// Patronictl's: answers may be piped in, and exit codes are 1 and 2.
    Patronictl,
}

/// Runs an operator's command; `before` is what was said before it.
///
/// # Errors
/// Whatever the command ends with.
pub(crate) async fn run<R: Reaching>(command: &Operate<R>, before: &Reach, tool: Tool) -> Result<(), Failure> {
    let at = |reach: &R| Scene {
        reach: reach.or(before).clone(),
        tool,
    };
    match command {
        Operate::List(with) => list::run(&at(&with.reach), &with.args).await,
        Operate::Topology(with) => list::topology(&at(&with.reach), &with.args).await,
        Operate::History(with) => history::run(&at(&with.reach), &with.args).await,
        Operate::Events(with) => events::run(&at(&with.reach), &with.args).await,
        Operate::Switchover(with) => switchover::run(&at(&with.reach), &with.args).await,
        Operate::Failover(with) => switchover::failover(&at(&with.reach), &with.args).await,
        Operate::Restart(with) => restart::run(&at(&with.reach), &with.args).await,
        Operate::Reload(with) => reload::run(&at(&with.reach), &with.args).await,
        Operate::Reinit(with) => reinit::run(&at(&with.reach), &with.args).await,
        Operate::Pause(with) => pause::run(&at(&with.reach), &with.args, pause::Change::Pause).await,
        Operate::Resume(with) => pause::run(&at(&with.reach), &with.args, pause::Change::Resume).await,
        Operate::EditConfig(with) => dynamic::edit(&at(&with.reach), &with.args).await,
        Operate::ShowConfig(with) => dynamic::show(&at(&with.reach), &with.args).await,
        Operate::Query(with) => query::run(&at(&with.reach), &with.args).await,
        Operate::Dsn(with) => dsn::run(&at(&with.reach), &with.args).await,
        Operate::Remove(with) => remove::run(&at(&with.reach), &with.args).await,
        Operate::Flush(with) => flush::run(&at(&with.reach), &with.args).await,
        Operate::Version(with) => version::run(&at(&with.reach), &with.args).await,
        Operate::DemoteCluster(with) => standby_cluster::demote(&at(&with.reach), &with.args).await,
        Operate::PromoteCluster(with) => standby_cluster::promote(&at(&with.reach), &with.args).await,
    }
}

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
        _ => Failure::Unavailable(format!("{error} (asked {})", cluster.etcd.named())),
    }
}

/// The time now, for people, as UTC.
pub(crate) fn utc_now(format: &str) -> String {
    jiff::Timestamp::try_from(pgherd_cluster::clock::wall_now())
        .map_or_else(|_| String::new(), |now| now.strftime(format).to_string())
}

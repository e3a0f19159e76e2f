//! The source of a proxy's view, whichever it is: from the store, from members' agents, or from hosts that are asked by SQL.

use std::pin::Pin;
use std::time::Duration;

use pgherd_cluster::etcd::Etcd;
use pgherd_cluster::source::{AgentsSource, EtcdSource, HostsConfig, HostsSource, SourceHealth, ViewHandle};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::config::ClusterConfig;
use crate::config::proxy::source::SourceSection;
use crate::failure::Failure;

/// How often it is said that the cluster is still waited for.
const TOLD_EVERY: Duration = Duration::from_secs(30);

type Running = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A source that has not begun.
pub(crate) struct ViewSource {
    pub(crate) view: ViewHandle,
    /// The store, where that is where it comes from.
    pub(crate) etcd: Option<Etcd>,
    /// Runs until it is told to stop.
    pub(crate) run: Box<dyn FnOnce(CancellationToken) -> Running + Send>,
}

impl ViewSource {
    /// The one that the configuration asks for.
    ///
    /// # Errors
    /// When a file that it names cannot be used.
    pub(crate) fn new(section: &SourceSection, cluster: &ClusterConfig) -> Result<Self, Failure> {
        let scope = cluster.scope.clone();
        match section {
            SourceSection::Etcd => {
                let etcd = Etcd::new(cluster.etcd.clone());
                let access = cluster.peers.load().map_err(|error| {
                    Failure::configuration(format!("ctl: {error}; write files that this user may read"))
                })?;
                let (source, view) = EtcdSource::with_access(etcd.clone(), cluster.keys(), scope, true, access);
                Ok(Self {
                    view,
                    etcd: Some(etcd),
                    run: Box::new(move |stop| -> Running { Box::pin(source.run(stop)) }),
                })
            }
            SourceSection::Agents { urls, access } => {
                let access = access.load().map_err(|error| {
                    Failure::configuration(format!("ctl: {error}; write files that this user may read"))
                })?;
                let (source, view) = AgentsSource::new(urls.clone(), scope, access);
                Ok(Self {
                    view,
                    etcd: None,
                    run: Box::new(move |stop| -> Running { Box::pin(source.run(stop)) }),
                })
            }
            SourceSection::Static(section) => {
                let config = HostsConfig {
                    hosts: section.hosts.clone(),
                    user: section.user.clone(),
                    database: section.database.clone(),
                    passwords: section.passwords().map_err(Failure::configuration)?,
                    tls: section.tls.clone(),
                };
                let (source, view) = HostsSource::new(config, scope);
                Ok(Self {
                    view,
                    etcd: None,
                    run: Box::new(move |stop| -> Running { Box::pin(source.run(stop)) }),
                })
            }
        }
    }
}

/// Says what is waited for until something is known of the cluster. Never resolves.
pub(crate) async fn tell_waiting(view: ViewHandle) -> Failure {
    let began = Instant::now();
    let mut health = view.health();
    let mut told_at: Option<Instant> = None;
    loop {
        let seen = health.borrow_and_update().clone();
        match seen {
            SourceHealth::Following => break,
            SourceHealth::Failing(error) if told_at.is_none_or(|at| at.elapsed() >= TOLD_EVERY) => {
                let seconds = began.elapsed().as_secs();
                tracing::warn!(
                    "nothing is known of the cluster for {seconds} s: {error}; clients wait, the search goes on"
                );
                told_at = Some(Instant::now());
            }
            SourceHealth::Starting | SourceHealth::Failing(_) => {}
        }
        if let Ok(Err(_)) = timeout(TOLD_EVERY, health.changed()).await {
            break; // The source ends with the process.
        }
    }
    std::future::pending().await
}

//! A proxy reads its configuration again on SIGHUP, and when a file of it has changed, certificates included: it is checked
//! whole, and applied, or refused and the old one kept.

use std::path::PathBuf;

use pgherd_proxy::Reloader;
use tokio::signal::unix::Signal;
use tokio::task::JoinSet;

use crate::config::files::FilesWatch;
use crate::config::proxy::ProxySection;
use crate::config::{ClusterConfig, Document, Source};
use crate::failure::Failure;
use crate::open_files;
use crate::preflight;
use crate::run::{bind_failure, proxy_config};

/// What a running proxy was started with, and what gives it a new configuration.
pub(crate) struct ProxyReload {
    /// The file that was named, if one was: it is looked for again in the same places.
    pub(crate) named: Option<PathBuf>,
    /// Where it was found.
    pub(crate) source: Source,
    /// In force.
    pub(crate) section: ProxySection,
    /// In force until the proxy ends.
    pub(crate) cluster: ClusterConfig,
    /// The proxy's own.
    pub(crate) reloader: Reloader,
}

/// A configuration that was read and found good.
struct Fresh {
    section: ProxySection,
    cluster: ClusterConfig,
    warnings: Vec<String>,
}

impl ProxyReload {
    /// Reads the configuration whenever `hangup` says so or its files change; ends with the process.
    pub(crate) async fn run(mut self, mut hangup: Signal) {
        let mut files = FilesWatch::new(&self.source, &self.section).await;
        loop {
            let cause = tokio::select! {
                told = hangup.recv() => match told {
                    Some(()) => "SIGHUP",
                    None => return,
                },
                () = files.changed() => "the configuration's files have changed",
            };
            // Before they are read.
            let before = FilesWatch::new(&self.source, &self.section).await;
            match self.reload().await {
                Ok(()) => tracing::info!("{cause}: the configuration was read again and is in force"),
                Err(failure) => {
                    self.reloader.note_failure();
                    for finding in failure.to_string().lines() {
                        tracing::error!("{cause}: {finding}");
                    }
                    tracing::error!("{cause}: nothing was changed; the configuration of before stays in force");
                }
            }
            // Those that the new configuration names.
            files = FilesWatch::new(&self.source, &self.section).await.since(before);
        }
    }

    async fn reload(&mut self) -> Result<(), Failure> {
        let (named, before) = (self.named.clone(), self.section.clone());
        // Off the threads that fence sessions: files and names may be slow to read.
        let mut reading = JoinSet::new();
        reading.spawn_blocking(move || read(named, &before));
        let read = reading.join_next().await.and_then(Result::ok);
        let fresh = read.unwrap_or_else(|| Err(Failure::Defect("reading the configuration".to_owned())))?;
        let done = self.reloader.reload(proxy_config(&fresh.section)).await;
        let done = done.map_err(|error| match error {
            pgherd_proxy::ReloadError::Bind(error) => bind_failure(error),
            pgherd_proxy::ReloadError::Stopping => Failure::Unavailable(error.to_string()),
        })?;
        let shortage = open_files::shortage(&fresh.section.limits, open_files::most());
        for warning in fresh.warnings.iter().chain(&shortage) {
            tracing::warn!("{warning}");
        }
        let own = done.at_next_start.iter().map(|key| format!("proxy.{key}"));
        for key in changed(&self.cluster, &fresh.cluster).into_iter().chain(own) {
            tracing::warn!("{key}: cannot change while the proxy runs; restart it for the new value");
        }
        self.section = fresh.section;
        Ok(())
    }
}

/// Everything that a start checks, but for the ports that the proxy has already.
fn read(named: Option<PathBuf>, before: &ProxySection) -> Result<Fresh, Failure> {
    let document = Document::load(named)?;
    document.lint();
    let (section, cluster) = (document.proxy(), document.cluster(None));
    let found = section.zip(cluster);
    if let Some((section, cluster)) = &found {
        let preflight = preflight::proxy_again(section, before, &cluster.etcd.tls);
        let findings = preflight.errors.into_iter().chain(preflight.in_use);
        findings.for_each(|finding| document.error(finding));
    }
    let (section, cluster) = document.finish(found)?;
    Ok(Fresh {
        section,
        cluster,
        warnings: document.warnings(),
    })
}

/// The keys of what a proxy is bound to that differ.
fn changed(before: &ClusterConfig, after: &ClusterConfig) -> Vec<String> {
    let (store, etcd, other) = (after.etcd_section, &after.etcd, &before.etcd);
    let tls = etcd.tls.cacert != other.tls.cacert || etcd.tls.cert != other.tls.cert || etcd.tls.key != other.tls.key;
    let keys = [
        ("scope".to_owned(), before.scope != after.scope),
        ("namespace".to_owned(), before.namespace != after.namespace),
        (format!("{store}.hosts"), etcd.endpoints != other.endpoints),
        (format!("{store}.username"), etcd.credentials != other.credentials),
        (format!("{store}.cacert"), tls),
    ];
    let differ = keys.into_iter().filter(|(_, differs)| *differs);
    differ.map(|(key, _)| key).collect()
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::etcd::EtcdConfig;
    use pgherd_cluster::name::Scope;

    use super::*;

    #[test]
    fn what_a_proxy_is_bound_to_is_told_by_key() {
        let before = ClusterConfig {
            scope: Scope::new("c").expect("a plain name"),
            namespace: "service".to_owned(),
            etcd: EtcdConfig {
                endpoints: vec!["http://10.0.0.1:2379".to_owned()],
                ..EtcdConfig::default()
            },
            etcd_section: "etcd3",
        };
        assert_eq!(changed(&before, &before), Vec::<String>::new());
        let mut after = before.clone();
        after.etcd.endpoints.push("http://10.0.0.2:2379".to_owned());
        after.namespace = "db".to_owned();
        after.etcd.tls.key = Some("key.pem".into());
        assert_eq!(changed(&before, &after), ["namespace", "etcd3.hosts", "etcd3.cacert"]);
    }
}

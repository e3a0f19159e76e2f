//! A proxy reads its configuration again on SIGHUP, and when a file of it has changed, certificates included: it is checked
//! whole, and applied, or refused and the old one kept.

use std::path::PathBuf;

use pgherd_proxy::{ReloadAsked, ReloadRequests, Reloader};
use tokio::signal::unix::Signal;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::files::{self, FilesWatch};
use crate::config::proxy::ProxySection;
use crate::config::{ClusterConfig, Document, Source};
use crate::failure::Failure;
use crate::logging::{Levels, LogConfig};
use crate::open_files;
use crate::preflight;
use crate::run::{bind_failure, proxy_config};
use crate::takeover;

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
    /// Wishes of operators on the console.
    pub(crate) requests: ReloadRequests,
    /// Hears where the next proxy takes this one over.
    pub(crate) takeover: watch::Sender<PathBuf>,
    /// Changes the level of the log.
    pub(crate) levels: Levels,
}

/// A configuration that was read and found good.
struct Fresh {
    section: ProxySection,
    cluster: ClusterConfig,
    /// Where the next proxy takes this one over.
    takeover: PathBuf,
    warnings: Vec<String>,
    log: LogConfig,
}

impl ProxyReload {
    /// Reads the configuration whenever `hangup` says so or its files change; ends with the process.
    pub(crate) async fn run(mut self, mut hangup: Signal) {
        let mut files = FilesWatch::new(self.files()).await;
        loop {
            let mut asked: Option<ReloadAsked> = None;
            let cause = tokio::select! {
                told = hangup.recv() => match told {
                    Some(()) => "SIGHUP",
                    None => return,
                },
                Some(done) = self.requests.recv() => {
                    asked = Some(done);
                    "RELOAD on the console"
                }
                () = files.changed() => "the configuration's files have changed",
            };
            // Before they are read.
            let before = FilesWatch::new(self.files()).await;
            let (reloaded, read) = self.reload().await;
            if let Some(asked) = asked {
                // Who asked may have gone.
                let _ = asked.send(reloaded.as_ref().copied().map_err(ToString::to_string));
            }
            match reloaded {
                Ok(()) => tracing::info!("{cause}: the configuration was read again and is in force"),
                Err(failure) => {
                    self.reloader.note_failure();
                    for finding in failure.to_string().lines() {
                        tracing::error!("{cause}: {finding}");
                    }
                    tracing::error!("{cause}: nothing was changed; the configuration of before stays in force");
                }
            }
            // Those that the configuration in force names, and those of one that was refused: it may lack only one of them.
            let mut paths = self.files();
            paths.extend(read.iter().flat_map(FilesWatch::paths).cloned());
            files = FilesWatch::new(paths).await.since(&before);
            if let Some(read) = read {
                files = files.since(&read);
            }
        }
    }

    /// The files of the configuration in force.
    fn files(&self) -> Vec<PathBuf> {
        [files::own(&self.source), files::named_by(&self.section)].concat()
    }

    /// Reads the configuration and applies it. Also tells of the files that it names, as they were before they were used.
    async fn reload(&mut self) -> (Result<(), Failure>, Option<FilesWatch>) {
        let (named, before) = (self.named.clone(), self.section.clone());
        // Off the threads that fence sessions: files and names may be slow to read.
        let mut reading = JoinSet::new();
        reading.spawn_blocking(move || {
            let mut files = None;
            let read = read(named, &before, &mut files);
            (read, files)
        });
        match reading.join_next().await {
            Some(Ok((Ok(fresh), files))) => (self.apply(fresh).await, files),
            Some(Ok((Err(failure), files))) => (Err(failure), files),
            Some(Err(_)) | None => (Err(Failure::Defect("reading the configuration".to_owned())), None),
        }
    }

    async fn apply(&mut self, fresh: Fresh) -> Result<(), Failure> {
        let done = self.reloader.reload(proxy_config(&fresh.section)).await;
        let done = done.map_err(|error| match error {
            pgherd_proxy::ReloadError::Bind(error) => bind_failure(error),
            pgherd_proxy::ReloadError::Stopping => Failure::Unavailable(error.to_string()),
        })?;
        (self.levels)(&fresh.log)?;
        let shortage = open_files::shortage(&fresh.section, open_files::most());
        for warning in fresh.warnings.iter().chain(&shortage) {
            tracing::warn!("{warning}");
        }
        let own = done.at_next_start.iter().map(|key| format!("proxy.{key}"));
        let source =
            (self.section.source != fresh.section.source).then(|| "proxy.source and what goes with it".to_owned());
        for key in changed(&self.cluster, &fresh.cluster)
            .into_iter()
            .chain(source)
            .chain(own)
        {
            tracing::warn!("{key}: cannot change while the proxy runs; restart it for the new value");
        }
        self.section = fresh.section;
        // Whoever is started by the new configuration looks for this one there.
        self.takeover
            .send_if_modified(|path| std::mem::replace(path, fresh.takeover.clone()) != fresh.takeover);
        Ok(())
    }
}

/// Everything that a start checks, but for the ports that the proxy has already. Before the `files` that the configuration
/// names are used, they are looked at.
fn read(named: Option<PathBuf>, before: &ProxySection, files: &mut Option<FilesWatch>) -> Result<Fresh, Failure> {
    let document = Document::load(named)?;
    let log = document.log();
    document.lint();
    let section = document.proxy();
    let cluster = document.cluster_of(section.as_ref());
    let by_section = section.iter().flat_map(files::named_by);
    let by_cluster = cluster.iter().flat_map(|cluster| {
        let tls = &cluster.etcd.tls;
        [&tls.cacert, &tls.cert, &tls.key].into_iter().flatten().cloned()
    });
    *files = Some(FilesWatch::now(by_section.chain(by_cluster).collect()));
    let found = section.zip(cluster);
    let takeover = takeover::path_in(&document, found.as_ref());
    if let Some((section, cluster)) = &found {
        let preflight = preflight::proxy_again(section, before, &cluster.etcd.tls);
        let findings = preflight.errors.into_iter().chain(preflight.in_use);
        findings.for_each(|finding| document.error(finding));
    }
    let ((section, cluster), takeover) = document.finish(found.zip(takeover))?;
    Ok(Fresh {
        section,
        cluster,
        takeover,
        log,
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
        (format!("{store}.srv"), etcd.discovery != other.discovery),
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
            peers: pgherd_cluster::http::AccessConfig::default(),
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

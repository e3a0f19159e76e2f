//! A running agent's configuration is read again when an operator asks for it, and when a file that holds a secret or a
//! certificate has changed: it is checked whole, and given to the agent, or refused and the old one kept.

use std::path::PathBuf;

use pgherd_agent::config::AgentConfig;
use pgherd_agent::live::{Extent, Fresh, Reload};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::config::Document;
use crate::config::files::FilesWatch;
use crate::failure::Failure;
use crate::logging::{Levels, LogConfig};

/// Reads for a running agent.
pub(crate) struct AgentReload {
    /// The file that was named, if one was: it is looked for again in the same places.
    named: Option<PathBuf>,
    /// What is watched.
    files: Vec<PathBuf>,
    asked: watch::Receiver<u64>,
    fresh: mpsc::Sender<Fresh>,
    levels: Levels,
}

/// A configuration that was read and found good.
struct Read {
    config: AgentConfig,
    log: LogConfig,
    files: Vec<PathBuf>,
    warnings: Vec<String>,
}

impl AgentReload {
    /// Who reads, and what the agent asks and hears it by. `document` and `config` are what the agent begins with.
    pub(crate) fn new(
        named: Option<PathBuf>,
        document: &Document,
        config: &AgentConfig,
        levels: Levels,
    ) -> (Self, Reload) {
        let (asking, asked) = watch::channel(0);
        let (fresh, hearing) = mpsc::channel(1);
        let reader = Self {
            named,
            files: watched(document, config),
            asked,
            fresh,
            levels,
        };
        let reload = Reload {
            asked: asking,
            fresh: hearing,
        };
        (reader, reload)
    }

    /// Reads when there is reason to; ends with the agent.
    pub(crate) async fn run(mut self) {
        let mut files = FilesWatch::new(self.files.clone()).await;
        loop {
            let extent = tokio::select! {
                asked = self.asked.changed() => match asked {
                    Ok(()) => Extent::All,
                    Err(_) => return, // The agent has ended.
                },
                () = files.changed() => Extent::Secrets,
            };
            // Before they are read.
            let before = FilesWatch::new(self.files.clone()).await;
            match self.read(extent).await {
                Ok(read) => {
                    self.files = read.files;
                    for warning in &read.warnings {
                        tracing::warn!("{warning}");
                    }
                    if let (Extent::All, Err(error)) = (extent, (self.levels)(&read.log)) {
                        tracing::error!("{error}");
                    }
                    let fresh = Fresh {
                        config: read.config,
                        extent,
                    };
                    if self.fresh.send(fresh).await.is_err() {
                        return;
                    }
                }
                Err(failure) => {
                    for finding in failure.to_string().lines() {
                        tracing::error!("{finding}");
                    }
                    tracing::error!("nothing was changed; the configuration of before stays in force");
                }
            }
            files = FilesWatch::new(self.files.clone()).await.since(&before);
        }
    }

    /// Off the threads that decide: files may be slow to read.
    async fn read(&self, extent: Extent) -> Result<Read, Failure> {
        let named = self.named.clone();
        let mut reading = JoinSet::new();
        reading.spawn_blocking(move || read(named, extent));
        match reading.join_next().await {
            Some(Ok(read)) => read,
            Some(Err(_)) | None => Err(Failure::Defect("reading the configuration".to_owned())),
        }
    }
}

fn read(named: Option<PathBuf>, extent: Extent) -> Result<Read, Failure> {
    let document = Document::load(named)?;
    let log = document.log();
    if extent == Extent::All {
        document.lint();
    }
    let config = document.finish(document.agent())?;
    let warnings = match extent {
        Extent::All => document.warnings(),
        Extent::Secrets => Vec::new(), // They were said when somebody asked.
    };
    Ok(Read {
        files: watched(&document, &config),
        log,
        warnings,
        config,
    })
}

/// The files with secrets, certificates and keys. Not the configuration itself: an operator says when that counts.
fn watched(document: &Document, config: &AgentConfig) -> Vec<PathBuf> {
    let mut files = document.secret_files().to_vec();
    if let Some(tls) = &config.restapi.tls {
        files.extend([tls.certificate.clone(), tls.key.path.clone()]);
        files.extend(tls.client_ca.clone());
    }
    let peers = &config.restapi.peers;
    files.extend(peers.cacert.clone());
    if let Some((certificate, key)) = &peers.identity {
        files.extend([certificate.clone(), key.path.clone()]);
    }
    files.sort();
    files.dedup();
    files
}

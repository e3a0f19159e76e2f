//! Configuration: a file and the environment into checked types, with every finding told as key, value and fix.

pub(crate) mod agent;
mod environment;
mod etcd;
pub(crate) mod files;
mod known;
mod limits;
mod locate;
mod log;
mod not_yet;
pub(crate) mod operator;
mod postgresql;
pub(crate) mod proxy;
mod rest;
pub(crate) mod runtime_dir;
mod secrets;
mod section;
#[cfg(test)]
mod shipped;
mod value;
mod watchdog;
pub(crate) mod yaml;

use std::ffi::OsString;
use std::path::PathBuf;

use pgherd_agent::config::AgentConfig;
use pgherd_cluster::etcd::EtcdConfig;
use pgherd_cluster::http::AccessConfig;
use pgherd_cluster::key::Keys;
use pgherd_cluster::name::Scope;
use serde_json::{Map, Value};

pub(crate) use self::locate::Source;
use self::proxy::ProxySection;
use self::section::{Findings, Section};
#[cfg(test)]
pub(crate) use self::yaml::parse as parse_yaml;
use crate::failure::Failure;
use crate::logging::LogConfig;

/// Which cluster, and where its store is: what every command needs.
#[derive(Clone, Debug)]
pub(crate) struct ClusterConfig {
    pub(crate) scope: Scope,
    pub(crate) namespace: String,
    pub(crate) etcd: EtcdConfig,
    /// How members' REST interfaces are reached.
    pub(crate) peers: AccessConfig,
    /// The section that etcd's own findings are told under.
    pub(crate) etcd_section: &'static str,
}

impl ClusterConfig {
    /// The keys of this cluster.
    pub(crate) fn keys(&self) -> Keys {
        Keys::new(&self.namespace, &self.scope)
    }

    /// One whose store nobody asks.
    fn without_store(root: &Section<'_>) -> Option<Self> {
        Some(Self {
            scope: Self::read_scope(root, None)?,
            namespace: String::new(),
            etcd: EtcdConfig::default(),
            peers: AccessConfig::default(),
            etcd_section: etcd::section_name(root),
        })
    }

    fn read(root: &Section<'_>, scope: Option<&str>) -> Option<Self> {
        let scope = Self::read_scope(root, scope);
        let namespace = root.text("namespace").unwrap_or_else(|| "service".to_owned());
        let etcd = etcd::read(root);
        Some(Self {
            scope: scope?,
            namespace,
            etcd: etcd?,
            peers: AccessConfig {
                authorization: None, // Nothing that a proxy asks needs it.
                ..rest::peers(root, false)
            },
            etcd_section: etcd::section_name(root),
        })
    }

    fn read_scope(root: &Section<'_>, scope: Option<&str>) -> Option<Scope> {
        let scope = match scope {
            Some(scope) => Some(scope.to_owned()),
            None => root.required_text("scope", "the cluster's name, the same on every member"),
        };
        scope.and_then(|text| {
            Scope::new(text.as_str())
                .map_err(|error| {
                    root.error(
                        "scope",
                        format!("{text:?} cannot be used: {error}; write one such as main"),
                    )
                })
                .ok()
        })
    }
}

/// One configuration, read but not yet asked for anything.
pub(crate) struct Document {
    source: Source,
    tree: Map<String, Value>,
    findings: Findings,
    secret_files: Vec<PathBuf>,
}

impl Document {
    /// Reads the named file, or the one that is found, and puts the environment over it.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    pub(crate) fn load(named: Option<PathBuf>) -> Result<Self, Failure> {
        let variable = |name: &str| -> Option<OsString> { std::env::var_os(name) };
        Self::of_source(locate::choose(named, variable).map_err(Failure::configuration)?)
    }

    fn of_source(source: Source) -> Result<Self, Failure> {
        let variable = |name: &str| -> Option<OsString> { std::env::var_os(name) };
        let mut tree = locate::read(&source, variable).map_err(Failure::configuration)?;
        let findings = Findings::default();
        // A configuration that comes whole in one variable lets no other count, as with Patroni.
        let mut secret_files = Vec::new();
        let whole = source == Source::Environment && variable("PATRONI_CONFIGURATION").is_some();
        if !whole {
            let variables = std::env::vars_os();
            let texts =
                variables.filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
            secret_files = environment::apply(&mut tree, texts, &findings);
        }
        secret_files.extend(secrets::apply(&mut tree, &findings));
        Ok(Self {
            source,
            tree,
            findings,
            secret_files,
        })
    }

    /// Where it came from.
    pub(crate) fn source(&self) -> &Source {
        &self.source
    }

    /// The files that secrets were read from.
    pub(crate) fn secret_files(&self) -> &[PathBuf] {
        &self.secret_files
    }

    /// Whether a section or key has a value.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.root().has(key)
    }

    /// All of it, environment included, secrets too.
    pub(crate) fn tree(&self) -> &Map<String, Value> {
        &self.tree
    }

    fn root(&self) -> Section<'_> {
        Section::root(&self.tree, &self.findings)
    }

    /// Looks for keys that nobody reads or that do nothing yet.
    pub(crate) fn lint(&self) {
        known::report_unknown_keys(&self.root());
        not_yet::report(&self.root());
    }

    /// The cluster, under the name that the operator gave, if any.
    pub(crate) fn cluster(&self, scope: Option<&str>) -> Option<ClusterConfig> {
        ClusterConfig::read(&self.root(), scope)
    }

    /// The cluster of a proxy, which may know it without its store.
    pub(crate) fn cluster_of(&self, proxy: Option<&ProxySection>) -> Option<ClusterConfig> {
        if proxy.is_some_and(|proxy| !proxy.source.needs_store()) {
            ClusterConfig::without_store(&self.root())
        } else {
            self.cluster(None)
        }
    }

    /// Where log lines go.
    pub(crate) fn log(&self) -> LogConfig {
        log::read(&self.root().section("log"))
    }

    /// One member.
    pub(crate) fn agent(&self) -> Option<AgentConfig> {
        let xdg_runtime_dir = || {
            std::env::var_os("XDG_RUNTIME_DIR")
                .filter(|dir| !dir.is_empty())
                .map(PathBuf::from)
        };
        agent::read(&self.root(), self.cluster(None), |member| {
            runtime_dir::default_for(member, xdg_runtime_dir())
        })
    }

    /// The proxy.
    pub(crate) fn proxy(&self) -> Option<ProxySection> {
        proxy::read(&self.root())
    }

    /// Adds an error that only the whole shows, such as one port wanted twice.
    pub(crate) fn error(&self, finding: String) {
        self.findings.error(finding);
    }

    /// What the operator should know.
    pub(crate) fn warnings(&self) -> Vec<String> {
        self.findings.warnings()
    }

    /// What was read, when nothing was wrong with it.
    ///
    /// # Errors
    /// All findings, each with the file in front.
    pub(crate) fn finish<T>(&self, read: Option<T>) -> Result<T, Failure> {
        let errors = self.findings.errors();
        match read {
            Some(read) if errors.is_empty() => Ok(read),
            // A reader that gives nothing has said why; should it not have, this is better than silence.
            _ if errors.is_empty() => Err(Failure::Defect(format!("{}: refused without a reason", self.source))),
            _ => Err(Failure::Configuration(
                errors.iter().map(|error| format!("{}: {error}", self.source)).collect(),
            )),
        }
    }
}

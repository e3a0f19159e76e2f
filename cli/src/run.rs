//! Wires keeper, agent and proxy together. The only file that calls into those crates.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use listenfd::ListenFd;
use pgherd_agent::AgentError;
use pgherd_agent::config::AgentConfig;
use pgherd_cluster::etcd::{Budget, Etcd, StoreError};
use pgherd_cluster::source::{SourceHealth, ViewHandle};
use pgherd_keeper::{KeeperConfig, KeeperError, KeeperLink, KeeperOutcome, LINK_ENV};
use pgherd_proxy::{
    BindError, CARRIED_AFTER, HoldConfig, Inherited, ListenerConfig, Proxy, ProxyConfig, ProxyError, Reloader,
    StatsConfig,
};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::agent_reload::AgentReload;
use crate::command::store_failure;
use crate::config::proxy::{ProxySection, unix};
use crate::config::{ClusterConfig, Document, Source};
use crate::failure::Failure;
use crate::logging::{self, Levels};
use crate::open_files;
use crate::preflight::programs::{self, Search};
use crate::preflight::{self, Preflight};
use crate::reload::ProxyReload;
use crate::source::{ViewSource, tell_waiting};
use crate::takeover::{self, Taken};

/// How long agent and proxy may take to end after SIGTERM: a shutdown checkpoint and the hand-over fit in.
const STOP_TIMEOUT: Duration = Duration::from_secs(120);
/// The agent's own work is little; SQL, REST and etcd are waits.
const AGENT_WORKERS: usize = 2;
/// How long one endpoint of etcd may take to be counted as answering.
const ANSWER_MAX: Duration = Duration::from_millis(700);
/// How long a start waits to hear whether etcd refuses us.
const REFUSAL_MAX: Duration = Duration::from_secs(1);
/// How long a proxy that takes over waits to know the cluster before it says that it serves.
const READY_MAX: Duration = Duration::from_secs(10);
/// How long etcd may take to say so to an agent that has begun.
const FIRST_ANSWER_MAX: Duration = Duration::from_secs(10);

/// What a keeper runs beside the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beside {
    Nothing,
    Proxy,
}

/// Runs a command that lives in the terminal, on one thread.
///
/// # Errors
/// The command's own.
pub(crate) fn in_foreground(command: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    in_foreground_giving(command)
}

/// The same, for a command that comes back with something.
///
/// # Errors
/// The command's own.
pub(crate) fn in_foreground_giving<T>(command: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    runtime(Builder::new_current_thread().enable_all())?.block_on(command)
}

fn runtime(builder: &mut Builder) -> Result<Runtime, Failure> {
    builder
        .build()
        .map_err(|error| Failure::Unavailable(format!("starting a runtime: {error}")))
}

/// `pgherd agent` and `pgherd node`: the keeper, or under it the agent itself.
///
/// # Errors
/// Bad configuration, a machine that is not fit for it, or what keeper and agent end with.
pub(crate) fn member(named: Option<PathBuf>, beside: Beside) -> Result<(), Failure> {
    logging::check_variable()?;
    if std::env::var_os(LINK_ENV).is_some() {
        agent(named)
    } else {
        keeper(named, beside)
    }
}

/// Everything is checked here, once, while nothing runs yet. No runtime and no thread may exist when the keeper begins.
fn keeper(named: Option<PathBuf>, beside: Beside) -> Result<(), Failure> {
    let document = Document::load(named)?;
    logging::start_without_files(&document.log())?;
    document.lint();
    let (config, cluster) = (document.agent(), document.cluster(None));
    let proxy = (beside == Beside::Proxy).then(|| document.proxy()).flatten();
    let _ = takeover::path_in(&document, proxy.clone().zip(cluster.clone()).as_ref());
    if let (Some(config), Some(proxy)) = (&config, &proxy) {
        preflight::clashes(config, proxy)
            .into_iter()
            .for_each(|clash| document.error(clash));
    }
    let (mut config, cluster) = document.finish(config.zip(cluster))?;
    if let Some(finding) = preflight::refuse_root(if beside == Beside::Proxy { "node" } else { "agent" }) {
        return Err(Failure::configuration(finding));
    }
    document
        .warnings()
        .iter()
        .for_each(|warning| tracing::warn!("{warning}"));
    unavailable(preflight::member(&mut config))?;
    if let Some(proxy) = &proxy {
        unavailable(preflight::proxy(proxy, &config.etcd.tls))?;
    }
    if !preflight::runs_already(&config) {
        refuse_wrong_credentials(&cluster)?;
    }
    keeper_ended(pgherd_keeper::run(keeper_config(document.source(), &config, beside)?))
}

/// What a keeper's end means for the process.
///
/// # Errors
/// What the agent left with, or what went wrong in the keeper itself.
pub(crate) fn keeper_ended(ended: Result<KeeperOutcome, KeeperError>) -> Result<(), Failure> {
    match ended.map_err(keeper_failure)? {
        KeeperOutcome::Stopped | KeeperOutcome::AgentLeft { code: 0 } => Ok(()),
        KeeperOutcome::AgentLeft { code } => Err(Failure::Ended(code)),
    }
}

/// A first start with credentials that etcd refuses would wait for ever. Any other trouble with etcd may pass, and is left
/// to the agent. The runtime is gone, with its threads, before the keeper begins.
fn refuse_wrong_credentials(cluster: &ClusterConfig) -> Result<(), Failure> {
    in_foreground(async {
        match refusal(cluster, REFUSAL_MAX).await {
            Some(refused) => Err(refused),
            None => Ok(()),
        }
    })
}

/// Whether etcd refuses us, as far as it answers within `limit`.
async fn refusal(cluster: &ClusterConfig, limit: Duration) -> Option<Failure> {
    let etcd = Etcd::new(cluster.etcd.clone());
    let budget = Budget::new(limit, etcd.endpoint_count());
    match etcd.list(cluster.keys().prefix(), budget).await {
        Err(error @ (StoreError::Auth { .. } | StoreError::Denied { .. })) => Some(store_failure(cluster, &error)),
        Ok(_) | Err(_) => None,
    }
}

fn unavailable(found: Preflight) -> Result<(), Failure> {
    let findings = [found.errors, found.in_use].concat();
    if findings.is_empty() {
        Ok(())
    } else {
        Err(Failure::Unavailable(findings.join("\n")))
    }
}

fn keeper_config(source: &Source, config: &AgentConfig, beside: Beside) -> Result<KeeperConfig, Failure> {
    let own = |error: std::io::Error| Failure::Unavailable(format!("finding this program's own file: {error}"));
    let arguments = |command: &str| -> Result<Vec<OsString>, Failure> {
        let mut arguments = vec![OsString::from(command)];
        if let Source::File(file) = source {
            arguments.extend([
                "--config".into(),
                std::path::absolute(file).map_err(own)?.into_os_string(),
            ]);
        }
        Ok(arguments)
    };
    Ok(KeeperConfig {
        program: std::env::current_exe().map_err(own)?,
        keeper_args: arguments(if beside == Beside::Proxy { "node" } else { "agent" })?,
        agent_args: arguments("agent")?,
        proxy_args: (beside == Beside::Proxy).then(|| arguments("proxy")).transpose()?,
        sentinel_args: vec!["sentinel".into(), config.postgresql.data_dir.clone().into_os_string()],
        data_dir: config.postgresql.data_dir.clone(),
        runtime_dir: config.runtime_dir.clone(),
        stop_timeout: STOP_TIMEOUT,
    })
}

fn keeper_failure(error: KeeperError) -> Failure {
    match error {
        KeeperError::Busy => Failure::TryAgain(format!("{error}; stop that one first, or wait until it has ended")),
        KeeperError::System { source, .. } => {
            Failure::Unavailable(format!("{source} while {doing}", doing = "starting the keeper"))
        }
    }
}

/// The sentinel beside a keeper.
///
/// # Errors
/// When the system refuses what its watch rests on.
pub(crate) fn sentinel(data_dir: &Path) -> Result<(), Failure> {
    let Some(keeper) = pgherd_keeper::keeper_of_sentinel() else {
        return Err(Failure::configuration(
            "a sentinel is started by its keeper, not by hand",
        ));
    };
    pgherd_keeper::run_sentinel(keeper, data_dir).map_err(keeper_failure)
}

/// The agent proper, under its keeper, which has checked the machine.
fn agent(named: Option<PathBuf>) -> Result<(), Failure> {
    let link =
        KeeperLink::from_stdin().map_err(|error| Failure::Unavailable(format!("the link to the keeper: {error}")))?;
    let link = link.ok_or_else(|| Failure::configuration(format!("{LINK_ENV}: set by a keeper only; unset it")))?;
    let document = Document::load(named.clone())?;
    let (_flush, levels) = logging::start(&document.log())?;
    let cluster = document.cluster(None);
    let (mut config, cluster) = document.finish(document.agent().zip(cluster))?;
    let (reader, reload) = AgentReload::new(named, &document, &config, levels);
    let path = std::env::var_os("PATH");
    let search = Search {
        bin_dir: config.postgresql.bin_dir.as_deref(),
        path: path.as_deref(),
        root: Path::new("/"),
    };
    config.postgresql.bin_dir = Some(programs::find(&search).map_err(|missing| Failure::Unavailable(missing.finding))?);
    let runtime = runtime(Builder::new_multi_thread().worker_threads(AGENT_WORKERS).enable_all())?;
    let ended = runtime.block_on(async {
        let mut tasks = JoinSet::new();
        tasks.spawn(tell_refusal(cluster));
        tasks.spawn(reader.run());
        match pgherd_agent::run(config, link, reload).await {
            Ok(0) => Ok(()),
            Ok(code) => Err(Failure::Ended(code)),
            Err(error) => Err(agent_failure(error)),
        }
    });
    // Not waited for: what still runs may hang in a write to a disk that does not answer.
    runtime.shutdown_background();
    ended
}

/// Says once by which key etcd refuses us. The agent goes on: what it keeps running must not fall with a password.
async fn tell_refusal(cluster: ClusterConfig) {
    if let Some(refused) = refusal(&cluster, FIRST_ANSWER_MAX).await {
        tracing::error!("{refused}");
    }
}

fn agent_failure(error: AgentError) -> Failure {
    match error {
        AgentError::Duplicate { .. } => Failure::configuration(format!("name: {error}")),
        AgentError::Io { .. } => Failure::Unavailable(error.to_string()),
        AgentError::Keeper(_) => Failure::TryAgain(error.to_string()),
        AgentError::LeaseThread => Failure::Defect(error.to_string()),
    }
}

/// `pgherd proxy`.
///
/// # Errors
/// Bad configuration, ports that are taken, or what the proxy ends with.
pub(crate) fn proxy(named: Option<PathBuf>, takeover: bool) -> Result<(), Failure> {
    logging::check_variable()?;
    pgherd_proxy::watch_panics();
    // Before any thread begins: it changes this process's environment.
    let activated = activated();
    let document = Document::load(named.clone())?;
    let (_flush, levels) = logging::start(&document.log())?;
    document.lint();
    let section = document.proxy();
    let cluster = document.cluster_of(section.as_ref());
    let found = section.zip(cluster);
    let path = takeover::path_in(&document, found.as_ref());
    let ((section, cluster), path) = document.finish(found.zip(path))?;
    let source = document.source().clone();
    document
        .warnings()
        .iter()
        .for_each(|warning| tracing::warn!("{warning}"));
    let files = open_files::raise();
    tracing::info!("{}", open_files::told(&section, files));
    if let Some(shortage) = open_files::shortage(&section, files) {
        tracing::warn!("{shortage}");
    }
    let (inherited, predecessor) = match takeover.then(|| Taken::from(&path)).transpose() {
        Ok(Some(Some(taken))) => {
            let (inherited, predecessor) = taken.split();
            (inherited, Some(predecessor))
        }
        Ok(Some(None)) => {
            tracing::info!("no proxy listens at {}: nothing is taken over", path.display());
            (activated, None)
        }
        Ok(None) => (activated, None),
        Err(error) => {
            return Err(Failure::Unavailable(format!(
                "taking over by {}: {error}; the running proxy serves on",
                path.display()
            )));
        }
    };
    unavailable(preflight::proxy_with(
        &section,
        &cluster.etcd.tls,
        &inherited.addresses(),
        &inherited.names(),
    ))?;
    // The proxy's workers bring their own threads; this one is for etcd, the page and signals.
    let runtime = runtime(Builder::new_multi_thread().worker_threads(1).enable_all())?;
    let start = ProxyStart {
        named,
        source,
        section,
        cluster,
        inherited,
        predecessor,
        takeover: path,
        levels,
    };
    let ended = runtime.block_on(start.serve());
    // Not waited for: what still runs may read from a disk, or wait for a process, that does not answer.
    runtime.shutdown_background();
    ended
}

/// Sockets that a service manager holds for us, as systemd does for a `.socket` unit.
fn activated() -> Inherited {
    let mut given = ListenFd::from_env();
    let sockets = (0..given.len()).filter_map(|index| {
        let tcp = given.take_tcp_listener(index).ok().flatten().map(OwnedFd::from);
        tcp.or_else(|| given.take_unix_listener(index).ok().flatten().map(OwnedFd::from))
    });
    Inherited::new(sockets.collect())
}

/// Everything that a proxy starts with.
struct ProxyStart {
    named: Option<PathBuf>,
    source: Source,
    section: ProxySection,
    cluster: ClusterConfig,
    inherited: Inherited,
    /// The proxy that these sockets were taken from, which waits to hear that they are served.
    predecessor: Option<UnixStream>,
    /// Where the next one takes over.
    takeover: PathBuf,
    levels: Levels,
}

impl ProxyStart {
    async fn serve(self) -> Result<(), Failure> {
        // Before it says that it listens: nobody's SIGHUP may end it.
        let hangup = listen_for(SignalKind::hangup())?;
        let cluster = self.cluster;
        let ViewSource { view, etcd, run } = ViewSource::new(&self.section.source, &cluster)?;
        let proxy = Proxy::bind_or_inherit(proxy_config(&self.section), view.clone(), self.inherited);
        let proxy = proxy.map_err(bind_failure)?;
        tell_addresses(&proxy, &cluster);
        let mut tasks = JoinSet::new();
        let (stop, end) = (CancellationToken::new(), CancellationToken::new());
        tasks.spawn(stop_on_signal(stop.clone(), end.clone())?);
        let (takeover, takeovers) = watch::channel(self.takeover);
        let reload = ProxyReload {
            named: self.named,
            source: self.source,
            section: self.section,
            cluster: cluster.clone(),
            reloader: proxy.reloader(),
            requests: proxy.reload_requests(),
            takeover,
            levels: self.levels,
        };
        tasks.spawn(reload.run(hangup));
        // Outlives the stop: sessions that drain still rest on warrants.
        let source_stop = CancellationToken::new();
        let _source_stop = source_stop.clone().drop_guard();
        tasks.spawn(run(source_stop));
        if self.predecessor.is_some() && timeout(READY_MAX, knows_the_cluster(&view)).await.is_err() {
            // Before the first client is accepted here.
            return Err(Failure::Unavailable(format!(
                "nothing was heard of the cluster's members in {} s; the running proxy serves on",
                READY_MAX.as_secs()
            )));
        }
        let succession = succeed(self.predecessor, takeovers, proxy.reloader(), stop.clone());
        tokio::select! {
            ended = proxy.run(stop) => ended.map_err(proxy_failure),
            refused = waited_for(&cluster, etcd, &view) => Err(refused),
            failed = succession => Err(failed),
            () = end.cancelled() => {
                tracing::info!("told to stop again: sessions are cut");
                Ok(())
            }
        }
    }
}

fn tell_addresses(proxy: &Proxy, cluster: &ClusterConfig) {
    let addresses = proxy.addresses();
    let ports = |addresses: &[SocketAddr]| {
        addresses
            .iter()
            .map(SocketAddr::to_string)
            .collect::<Vec<_>>()
            .join(", ")
    };
    let clients = [vec![ports(&addresses.listeners.concat())], addresses.unix].concat();
    let clients: Vec<String> = clients.into_iter().filter(|clients| !clients.is_empty()).collect();
    let (clients, page) = (clients.join(", "), ports(&addresses.stats));
    tracing::info!(
        "proxy of cluster {} listens on {clients}; its page is on {page}",
        cluster.scope
    );
}

/// Tells the predecessor that this proxy serves, and from then on is ready for a successor itself.
/// Resolves only when it cannot take over: the predecessor serves on then, and this one has to end.
async fn succeed(
    predecessor: Option<UnixStream>,
    paths: watch::Receiver<PathBuf>,
    reloader: Reloader,
    stop: CancellationToken,
) -> Failure {
    if let Some(stream) = predecessor {
        let mut telling = JoinSet::new();
        telling.spawn_blocking(move || Taken::ready(stream));
        match telling.join_next().await.and_then(Result::ok) {
            Some(Ok(served)) => {
                let said = if served {
                    "took over from the proxy that ran before"
                } else {
                    "the proxy that ran before has ended meanwhile"
                };
                tracing::info!("{said}");
                reloader.set_files_ours(true).await;
            }
            Some(Err(error)) => {
                return Failure::Unavailable(format!(
                    "the proxy that ran before does not hear us: {error}; it serves on"
                ));
            }
            None => return Failure::Defect("telling the proxy that ran before".to_owned()),
        }
    }
    takeover::offer(reloader, stop, paths).await;
    std::future::pending().await
}

/// A proxy that knows of no member routes nobody.
async fn knows_the_cluster(view: &ViewHandle) {
    let (mut health, mut changes) = (view.health(), view.subscribe());
    // Only who publishes views could end these, and that ends with the process.
    let _ = health.wait_for(|health| *health == SourceHealth::Following).await;
    let _ = changes.wait_for(|view| !view.members.is_empty()).await;
}

/// Says what is waited for, as long as it is. Resolves only when etcd refuses us.
async fn waited_for(cluster: &ClusterConfig, etcd: Option<Etcd>, view: &ViewHandle) -> Failure {
    match etcd {
        Some(etcd) => refused_by_etcd(cluster, &etcd, view).await,
        None => tell_waiting(view.clone()).await,
    }
}

/// Until etcd has answered, says each second how much of it does. Resolves only when it refuses us.
async fn refused_by_etcd(cluster: &ClusterConfig, etcd: &Etcd, view: &ViewHandle) -> Failure {
    let mut health = view.health();
    let mut tick = interval(Duration::from_secs(1));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick.tick().await; // The first is at once; a healthy etcd answers before the second.
    loop {
        let seen = health.borrow_and_update().clone();
        let trouble = match seen {
            SourceHealth::Following => return std::future::pending().await,
            SourceHealth::Failing(error @ (StoreError::Auth { .. } | StoreError::Denied { .. })) => {
                return store_failure(cluster, &error);
            }
            SourceHealth::Failing(error) => format!(" ({error})"),
            SourceHealth::Starting => String::new(),
        };
        tokio::select! {
            changed = health.changed() => {
                if changed.is_err() {
                    return Failure::Defect("the source of the view ended".to_owned());
                }
            }
            _ = tick.tick() => {
                let (answering, all) = (etcd.answering(ANSWER_MAX).await, etcd.endpoint_count());
                let quorum = all / 2 + 1;
                tracing::warn!("etcd: {answering} of {all} members answer, quorum needs {quorum}; clients wait{trouble}");
            }
        }
    }
}

fn listen_for(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(|error| Failure::Unavailable(format!("listening for signals: {error}")))
}

/// The first signal lets sessions end by themselves; the second ends them at once.
fn stop_on_signal(stop: CancellationToken, end: CancellationToken) -> Result<impl Future<Output = ()>, Failure> {
    let mut terminate = listen_for(SignalKind::terminate())?;
    let mut interrupt = listen_for(SignalKind::interrupt())?;
    Ok(async move {
        for token in [stop, end] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if !token.is_cancelled() {
                tracing::info!("told to stop; sessions may end by themselves for a while");
            }
            token.cancel();
        }
    })
}

/// In the proxy's own types.
pub(crate) fn proxy_config(section: &ProxySection) -> ProxyConfig {
    let listeners = section.listeners.iter().map(|listener| {
        let mut config = ListenerConfig::new(unix::name(&listener.address), listener.role);
        config.mode = listener.mode;
        config.reads = listener.reads.clone();
        config.tls = listener.tls;
        config.allow = listener.allow.clone();
        config.proxy_protocol = listener.proxy_protocol.clone();
        config
    });
    ProxyConfig {
        listeners: listeners.collect(),
        hold: HoldConfig {
            timeout: section.hold_timeout,
            clients: section.hold_clients,
        },
        limits: section.limits.clone(),
        stats: Some(StatsConfig {
            address: section.stats.to_string(),
        }),
        page_login: section.page.login.clone(),
        page_tls: section.page.tls.clone(),
        compat_metrics: section.page.compat_metrics,
        console: section.console.as_ref().map(|console| console.config.clone()),
        client_tls: section.client_tls.clone(),
        server_tls: section.server_tls.clone(),
        workers: section.workers.unwrap_or_default(),
        carried_after: CARRIED_AFTER,
        application_name: section.application_name.clone(),
        log_sessions: section.log_sessions,
        drain: section.drain,
        zone: section.zone.clone(),
        slow_start: section.slow_start,
    }
}

/// Why a proxy has not got its ports.
pub(crate) fn bind_failure(error: BindError) -> Failure {
    match error {
        BindError::Config(error) => Failure::configuration(format!("proxy: {error}")),
        BindError::Listen { .. } => Failure::Unavailable(format!("proxy: {error}")),
    }
}

fn proxy_failure(error: ProxyError) -> Failure {
    match error {
        ProxyError::Start(_) | ProxyError::Part { .. } => Failure::Unavailable(error.to_string()),
        ProxyError::Defect { .. } => Failure::Defect(error.to_string()),
    }
}

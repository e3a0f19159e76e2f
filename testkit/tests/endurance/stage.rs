//! etcd, the stub server as the leader that it names, and the proxy before it; and clients that cost little themselves.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use pgherd_testkit::address::{self, at};
use pgherd_testkit::process::{self, Daemon, Pid, Signal};
use pgherd_testkit::{Etcd, Site, config, eventually, http, program, yaml};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

pub(crate) const SOON: Duration = Duration::from_secs(30);
/// For one answer of anybody, on a machine that has other work.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// Open files that this process and the proxy would like to have: 10,000 sessions, and each of them twice.
const FILES_WANTED: u64 = 24_000;
/// Clients that the proxy takes, where it may open so many files.
const CONNECTIONS: u64 = 11_000;
/// Open files of a process that are no sessions.
pub(crate) const OTHER_FILES: u64 = 600;
/// What the kernel may keep of each direction at a narrow end, and how it is cut into segments.
const NARROW_BYTES: usize = 16 * 1024;
const SEGMENT_BYTES: u32 = 1400;
/// Source addresses, by their last byte: a port of a client's is not free for a minute after it was closed. Guests and
/// strangers have their own, so that no port is short for those who are to be served.
pub(crate) const GUESTS: Range<u8> = 2..12;
pub(crate) const STRANGERS: Range<u8> = 12..100;
/// Open files of the control plane that are there at one moment and not at the next.
pub(crate) const PASSING_FILES: usize = 3;
/// `ReadyForQuery`, idle.
const READY: [u8; 6] = *b"Z\0\0\0\x05I";

/// Everything. It ends when this is dropped.
pub(crate) struct Stage {
    pub(crate) site: Arc<Site>,
    pub(crate) proxy: Daemon,
    etcd: Etcd,
    proxy_config: Value,
    stub: Option<JoinHandle<Result<()>>>,
    stop: Arc<AtomicBool>,
    next_source: AtomicU32,
    /// Open files that each process may have.
    pub(crate) files: u64,
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(Ok(Err(error))) = self.stub.take().map(JoinHandle::join) {
            eprintln!("the stub: {error:#}");
        }
    }
}

/// How clients come in.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Door {
    Plain,
    Tls,
    Passthrough,
    BehindProxy,
}

impl Stage {
    /// Starts everything, with `over` over the proxy's configuration, and waits until the proxy leads to the stub.
    pub(crate) async fn start(over: Value) -> Result<Self> {
        let files = raise_open_files()?;
        let site = Arc::new(Site::new()?);
        let etcd = Etcd::start(&site, 1).await?;
        let server = at(site.addresses().member(0), address::POSTGRES_PORT);
        write_cluster(&etcd, server, site.addresses().nobody()).await?;
        let listener = TcpListener::bind(server)?;
        // Those that are accepted inherit it.
        narrow(SockRef::from(&listener))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stub = {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || pgherd_stub::serve(&listener, &stop))
        };
        let mut proxy_config = proxy_config(&site, &etcd, files)?;
        config::merge(&mut proxy_config, over);
        let file = site.write_file("proxy.yml", &yaml::write(&proxy_config))?;
        let mut command = site.command(site.reachable(&program::pgherd()?)?);
        command.arg("proxy").arg("--config").arg(file);
        let proxy = site.start("proxy", command)?;
        let stage = Self {
            site,
            proxy,
            etcd,
            proxy_config,
            stub: Some(stub),
            stop,
            next_source: AtomicU32::new(0),
            files,
        };
        eventually("the proxy leads to the stub", SOON, async || {
            Guest::enter(&stage, Door::Plain).await?.ask("select 1").await
        })
        .await?;
        Ok(stage)
    }

    pub(crate) fn door(&self, door: Door) -> SocketAddr {
        let port = match door {
            Door::Plain => 0,
            Door::Tls => 1,
            Door::Passthrough => 2,
            Door::BehindProxy => 3,
        };
        at(self.site.addresses().proxy(0), address::WRITE_PORT + port)
    }

    pub(crate) fn page(&self) -> SocketAddr {
        at(self.site.addresses().proxy(0), address::STATS_PORT)
    }

    /// Another address to come from, again and again.
    fn source(&self, of: &Range<u8>) -> SocketAddr {
        let [one, two, three, _] = self.site.addresses().member(0).octets();
        let nth = self.next_source.fetch_add(1, Ordering::Relaxed) % u32::from(of.end - of.start);
        let host = of.start + u8::try_from(nth).unwrap_or(0);
        SocketAddr::new(IpAddr::V4(Ipv4Addr::new(one, two, three, host)), 0)
    }

    /// Writes the proxy's configuration anew, with `over` over what it began with, and tells it.
    pub(crate) fn reload(&self, over: Value) -> Result<()> {
        let mut config = self.proxy_config.clone();
        config::merge(&mut config, over);
        self.site.write_file("proxy.yml", &yaml::write(&config))?;
        process::signal(self.proxy.pid(), Signal::HUP)
    }

    /// The sum of a metric over the series whose labels contain `label`.
    pub(crate) async fn metric(&self, name: &str, label: &str) -> Result<f64> {
        let text = http::get(self.page(), "/metrics").await?.body;
        let series = text
            .lines()
            .filter(|line| line.starts_with(name) && line.contains(label));
        let values = series.filter(|line| line[name.len()..].starts_with(['{', ' ']));
        let values = values.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        Ok(values.sum())
    }

    /// Waits until nobody is connected, and the proxy has no more than `files` open.
    pub(crate) async fn empties(&self, files: usize) -> Result<Holding> {
        eventually(
            "all connections are gone and nothing is left of them",
            SOON,
            async || {
                let open = self.metric("pgherd_listener_connections", "").await?;
                ensure!(open == 0.0, "{open} connections");
                let sessions = self.metric("pgherd_route_sessions", "").await?;
                ensure!(sessions == 0.0, "{sessions} sessions");
                let holding = self.holding()?;
                ensure!(
                    holding.files <= files.saturating_add(PASSING_FILES),
                    "{} files are open, {files} before",
                    holding.files
                );
                Ok(holding)
            },
        )
        .await
    }

    /// Nothing in the proxy has panicked, and it runs.
    pub(crate) async fn ensure_sound(&mut self) -> Result<()> {
        let panics = self.metric("pgherd_panics_total", "").await?;
        ensure!(panics == 0.0, "{panics} panics: {}", self.proxy.output());
        ensure!(self.proxy.ended()?.is_none(), "the proxy has ended");
        ensure!(self.etcd.leader().await.is_ok(), "etcd does not answer");
        Ok(())
    }

    pub(crate) fn holding(&self) -> Result<Holding> {
        Holding::of(self.proxy.pid())
    }
}

async fn write_cluster(etcd: &Etcd, server: SocketAddr, nobody: Ipv4Addr) -> Result<()> {
    let member = json!({
        "conn_url": format!("postgres://{server}/postgres"),
        "api_url": format!("http://{}/patroni", at(nobody, address::REST_PORT)),
        "state": "running", "role": "primary", "version": "4.1.4", "xlog_location": 67_108_960, "timeline": 1,
    });
    let timing = json!({"ttl": 30, "loop_wait": 10, "retry_timeout": 10});
    for (key, value) in [
        ("initialize", "7710403737510608197".to_owned()),
        ("config", timing.to_string()),
        ("leader", "m1".to_owned()),
        // After it: what a member said before it led proves nothing.
        ("members/m1", member.to_string()),
    ] {
        let key = format!("{}{key}", config::PREFIX);
        etcd.ctl(&["put", &key, &value]).await?.success()?;
    }
    Ok(())
}

fn proxy_config(site: &Site, etcd: &Etcd, files: u64) -> Result<Value> {
    let ip = site.addresses().proxy(0);
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()])?;
    let certificate = site.write_file("proxy.crt", &made.cert.pem())?;
    let key = site.write_file("proxy.key", &made.signing_key.serialize_pem())?;
    fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let listener = |port: u16| json!({"address": at(ip, address::WRITE_PORT + port).to_string(), "role": "write"});
    let mut listeners = [0, 1, 2, 3].map(listener);
    config::merge(&mut listeners[1], json!({"tls": "allow"}));
    config::merge(&mut listeners[2], json!({"tls": "passthrough"}));
    config::merge(&mut listeners[3], json!({"proxy_protocol": "127.0.0.0/8"}));
    Ok(json!({
        "scope": config::SCOPE,
        "etcd3": config::etcd3(&etcd.hosts(), None),
        "proxy": {
            "listeners": listeners,
            "tls": {"certificate": certificate, "private_key": key},
            "stats": {"address": at(ip, address::STATS_PORT).to_string()},
            "takeover": site.dir().join("takeover.sock"),
            "limits": {"connections": CONNECTIONS.min((files - OTHER_FILES) / 2)},
        },
    }))
}

/// Lets this process, and what it starts, open as many files as it may, and more where it may raise that too.
fn raise_open_files() -> Result<u64> {
    let limits = getrlimit(Resource::Nofile);
    let most = limits.maximum.unwrap_or(u64::MAX);
    let wanted = |files: Option<u64>| Rlimit {
        current: files,
        maximum: files,
    };
    if most < FILES_WANTED && setrlimit(Resource::Nofile, wanted(Some(FILES_WANTED))).is_ok() {
        return Ok(FILES_WANTED);
    }
    setrlimit(Resource::Nofile, wanted(limits.maximum)).context("raising the limit of open files")?;
    Ok(most)
}

/// What waits for a thousand readers must not use up the kernel's memory for TCP, which then ends connections by itself. On
/// loopback segments are so large that buffers of ten of them are.
fn narrow(socket: SockRef<'_>) -> Result<()> {
    socket.set_tcp_mss(SEGMENT_BYTES)?;
    socket.set_send_buffer_size(NARROW_BYTES)?;
    socket.set_recv_buffer_size(NARROW_BYTES)?;
    Ok(())
}

/// What a process holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Holding {
    /// Bytes of memory.
    pub(crate) memory: u64,
    /// Open files.
    pub(crate) files: usize,
    /// Threads.
    pub(crate) threads: usize,
}

impl Holding {
    fn of(pid: Pid) -> Result<Self> {
        let directory = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
        let status = fs::read_to_string(directory.join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kibibytes = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        Ok(Self {
            memory: kibibytes.context("no VmRSS")? * 1024,
            files: fs::read_dir(directory.join("fd"))?.count(),
            threads: fs::read_dir(directory.join("task"))?.count(),
        })
    }
}

impl pgherd_testkit::Seen for Holding {}

impl std::fmt::Display for Holding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { memory, files, threads } = self;
        write!(f, "{} KiB, {files} files, {threads} threads", memory / 1024)
    }
}

/// A number from the environment.
pub(crate) fn number(variable: &str, otherwise: u64) -> Result<u64> {
    match std::env::var(variable) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{variable}: {text:?} is no number")),
        Err(_) => Ok(otherwise),
    }
}

/// A message of a client's.
pub(crate) fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    [&[kind][..], &length(4 + body.len()), body].concat()
}

pub(crate) fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes()
}

pub(crate) fn startup() -> Vec<u8> {
    let body = b"\0\x03\0\0user\0postgres\0database\0postgres\0\0";
    [&length(4 + body.len())[..], body].concat()
}

/// A client that owns nothing but its socket.
pub(crate) struct Guest(pub(crate) TcpStream);

impl Guest {
    /// A connection that has said nothing yet.
    pub(crate) async fn connect(stage: &Stage, from: &Range<u8>, door: SocketAddr, is_narrow: bool) -> Result<Self> {
        let socket = TcpSocket::new_v4()?;
        if is_narrow {
            narrow(SockRef::from(&socket))?;
        }
        socket.bind(stage.source(from))?;
        let connecting = timeout(ANSWER_MAX, socket.connect(door));
        let stream = connecting.await.with_context(|| format!("connecting to {door}"))?;
        let stream = stream.with_context(|| format!("connecting to {door}"))?;
        stream.set_nodelay(true)?;
        Ok(Self(stream))
    }

    /// A session whose server is ready.
    pub(crate) async fn enter(stage: &Stage, door: Door) -> Result<Self> {
        Self::enter_with(stage, door, false).await
    }

    pub(crate) async fn enter_with(stage: &Stage, door: Door, is_narrow: bool) -> Result<Self> {
        let mut guest = Self::connect(stage, &GUESTS, stage.door(door), is_narrow).await?;
        guest.0.write_all(&startup()).await?;
        guest.ready().await.context("startup")?;
        Ok(guest)
    }

    pub(crate) async fn ask(&mut self, query: &str) -> Result<()> {
        self.0
            .write_all(&message(b'Q', format!("{query}\0").as_bytes()))
            .await?;
        self.ready().await.context("a query")
    }

    /// Reads until the server is ready.
    pub(crate) async fn ready(&mut self) -> Result<()> {
        let mut answer = Vec::new();
        let mut piece = [0; 1024];
        let reading = async {
            while !answer.ends_with(&READY) {
                let count = self.0.read(&mut piece).await?;
                ensure!(
                    count > 0,
                    "the connection ended within an answer: {}",
                    answer.escape_ascii()
                );
                answer.extend_from_slice(&piece[..count]);
                if answer.first() == Some(&b'E') {
                    bail!("an error: {}", answer.escape_ascii());
                }
            }
            Ok(())
        };
        timeout(ANSWER_MAX, reading).await.context("no answer")?
    }

    /// Ends in order, and waits for the other side to end as well.
    pub(crate) async fn leave(mut self) -> Result<()> {
        self.0.write_all(&message(b'X', b"")).await?;
        self.0.shutdown().await?;
        self.ended().await
    }

    /// Waits for the other side's end, whatever it says before, and in whatever way it ends.
    pub(crate) async fn ended(&mut self) -> Result<()> {
        let mut piece = [0; 4096];
        let reading = async { while matches!(self.0.read(&mut piece).await, Ok(1..)) {} };
        timeout(ANSWER_MAX, reading)
            .await
            .context("the connection does not end")
    }
}

//! A cluster, its servers and its clients, all played by the test.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::http::Access;
use pgherd_cluster::key::Keys;
use pgherd_cluster::name::Scope;
use pgherd_cluster::source::{Proof, ViewHandle, ViewPublisher, channel, channel_with};
use pgherd_cluster::view::{Entry, View};
use pgherd_proxy::{Addresses, Proxy, ProxyConfig, ProxyError, ReloadError, Reloaded, Reloader};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Far more than anything here takes: it only turns a hang into a failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) async fn within<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("not within {PATIENCE:?}: {what}"),
    }
}

/// Waits until `condition` gives something.
pub(crate) async fn until<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let polled = async {
        let mut tick = tokio::time::interval(Duration::from_millis(5));
        loop {
            tick.tick().await;
            if let Some(found) = condition().await {
                return found;
            }
        }
    };
    within(what, polled).await
}

/// The keys of a cluster, and the publisher of the view made of them.
pub(crate) struct Cluster {
    publisher: Arc<ViewPublisher>,
    pub(crate) handle: ViewHandle,
    entries: Vec<Entry>,
    revision: i64,
    confirming: JoinSet<()>,
    /// The agent of every member that has none of its own: it takes connections and says nothing that counts.
    agent: SocketAddr,
    _agent: JoinSet<()>,
}

impl Cluster {
    /// Empty, with the shortest lease that there is, and confirmed all the time.
    pub(crate) fn new() -> Self {
        Self::of(channel(scope()))
    }

    /// The same, known by what members tell of each other.
    pub(crate) fn by_hearsay() -> Self {
        Self::of(channel_with(scope(), Proof::Hearsay, Access::default()))
    }

    /// The same, where members' agents are reached by `access`.
    pub(crate) fn with_access(access: Access) -> Self {
        Self::of(channel_with(scope(), Proof::Store, access))
    }

    fn of((publisher, handle): (ViewPublisher, ViewHandle)) -> Self {
        let (agent, answering) = agent_of_few_words();
        let mut cluster = Self {
            agent,
            _agent: answering,
            publisher: Arc::new(publisher),
            handle,
            entries: Vec::new(),
            revision: 10,
            confirming: JoinSet::new(),
        };
        cluster.put("config", r#"{"ttl":3,"loop_wait":1,"retry_timeout":1}"#.to_owned());
        cluster.keep_confirming();
        cluster
    }

    /// With a lease of `ttl` seconds.
    pub(crate) fn ttl(&mut self, ttl: u32) {
        self.put("config", format!(r#"{{"ttl":{ttl},"loop_wait":1,"retry_timeout":1}}"#));
    }

    pub(crate) fn keep_confirming(&mut self) {
        let publisher = Arc::clone(&self.publisher);
        self.confirming.spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_millis(50));
            loop {
                tick.tick().await;
                publisher.confirm(Boottime::now());
            }
        });
    }

    /// Waits for the first confirmation: before it, clients that may not be held are refused.
    pub(crate) async fn confirmed(&self) {
        until("the view is confirmed", async || self.handle.current_as_of()).await;
    }

    pub(crate) async fn stop_confirming(&mut self) {
        self.confirming.shutdown().await;
    }

    /// Writes a key, to be published with the next change.
    pub(crate) fn put(&mut self, key: &str, value: String) {
        self.revision += 1;
        let key = format!("/service/c/{key}");
        let created = self
            .entries
            .iter()
            .find(|entry| entry.key == key)
            .map(|entry| entry.create_revision);
        self.entries.retain(|entry| entry.key != key);
        self.entries.push(Entry {
            key,
            value,
            create_revision: created.unwrap_or(self.revision),
            mod_revision: self.revision,
            lease: 1,
        });
    }

    fn publish(&self) {
        let scope = scope();
        let keys = Keys::new("service", &scope);
        self.publisher
            .publish(View::from_entries(scope, &keys, self.entries.clone(), self.revision));
    }

    /// Deletes the leader key.
    pub(crate) fn no_leader(&mut self) -> &mut Self {
        self.entries.retain(|entry| entry.key != "/service/c/leader");
        self.revision += 1;
        self.publish();
        self
    }

    /// Gives the leader key to `member` anew.
    pub(crate) fn leader_key(&mut self, member: &str) -> &mut Self {
        self.entries.retain(|entry| entry.key != "/service/c/leader");
        self.put("leader", member.to_owned());
        self.publish();
        self
    }

    /// The lease is another, the holding the same.
    pub(crate) fn rebind_lease(&mut self) -> &mut Self {
        let holder = self
            .entries
            .iter()
            .find(|entry| entry.key == "/service/c/leader")
            .map(|entry| entry.value.clone());
        self.put("leader", holder.expect("somebody leads"));
        self.publish();
        self
    }

    /// Writes a member's record.
    pub(crate) fn record(&mut self, member: &str, address: SocketAddr, role: &str, more: &str) -> &mut Self {
        let value = format!(
            r#"{{"conn_url":"postgres://{address}/postgres","api_url":"http://{}/patroni","state":"running","role":"{role}","pgherd":"0.1.0"{more}}}"#,
            self.agent
        );
        self.put(&format!("members/{member}"), value);
        self.publish();
        self
    }

    /// A leader that says that it is writable.
    pub(crate) fn writable(&mut self, member: &str, address: SocketAddr) -> &mut Self {
        self.leader_key(member).record(member, address, "primary", "")
    }

    /// A writable leader whose agent listens apart from its PostgreSQL.
    pub(crate) fn writable_with_agent(
        &mut self,
        member: &str,
        address: SocketAddr,
        agent: SocketAddr,
        pgherd: bool,
    ) -> &mut Self {
        let pgherd = if pgherd { r#","pgherd":"0.1.0""# } else { "" };
        let value = format!(
            r#"{{"conn_url":"postgres://{address}/postgres","api_url":"http://{agent}/patroni","state":"running","role":"primary"{pgherd}}}"#
        );
        self.leader_key(member).put(&format!("members/{member}"), value);
        self.publish();
        self
    }

    /// Deletes a member's key and the leader key in one change, as the end of their lease does.
    pub(crate) fn lease_ends(&mut self, member: &str) -> &mut Self {
        let gone = ["/service/c/leader".to_owned(), format!("/service/c/members/{member}")];
        self.entries.retain(|entry| !gone.contains(&entry.key));
        self.revision += 1;
        self.publish();
        self
    }

    /// Deletes a member's key.
    pub(crate) fn member_leaves(&mut self, member: &str) -> &mut Self {
        let gone = format!("/service/c/members/{member}");
        self.entries.retain(|entry| entry.key != gone);
        self.revision += 1;
        self.publish();
        self
    }

    /// A replica whose agent listens apart from its PostgreSQL.
    pub(crate) fn replica_with_agent(&mut self, member: &str, address: SocketAddr, agent: SocketAddr) -> &mut Self {
        let value = format!(
            r#"{{"conn_url":"postgres://{address}/postgres","api_url":"http://{agent}/patroni","state":"running","role":"replica","replication_state":"streaming","pgherd":"0.1.0"}}"#
        );
        self.put(&format!("members/{member}"), value);
        self.publish();
        self
    }

    /// Writes how far the leader is.
    pub(crate) fn optime(&mut self, optime: u64) -> &mut Self {
        self.put("status", format!(r#"{{"optime":{optime}}}"#));
        self.publish();
        self
    }

    /// A replica that streams and has replayed so far.
    pub(crate) fn replica_at(&mut self, member: &str, address: SocketAddr, replayed: u64) -> &mut Self {
        let more = format!(r#","replication_state":"streaming","replay_lsn":{replayed}"#);
        self.record(member, address, "replica", &more)
    }

    /// Writes the record of synchronous replication.
    pub(crate) fn sync(&mut self, json: &str) -> &mut Self {
        self.put("sync", json.to_owned());
        self.publish();
        self
    }

    pub(crate) fn replica(&mut self, member: &str, address: SocketAddr) -> &mut Self {
        self.record(member, address, "replica", r#","replication_state":"streaming""#)
    }
}

fn agent_of_few_words() -> (SocketAddr, JoinSet<()>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.set_nonblocking(true).expect("a socket");
    let address = listener.local_addr().expect("bound");
    let listener = TcpListener::from_std(listener).expect("a socket");
    let mut answering = JoinSet::new();
    answering.spawn(async move { while listener.accept().await.is_ok() {} });
    (address, answering)
}

fn scope() -> Scope {
    Scope::new("c").expect("a plain name")
}

/// What carries a session.
pub(crate) trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Io for S {}

/// A session as the server sees it: the startup has been answered.
pub(crate) struct ServerSession<S = TcpStream> {
    pub(crate) startup: Vec<u8>,
    pub(crate) key: Vec<u8>,
    pub(crate) stream: S,
}

/// A server that answers startup messages and then leaves the socket to the test.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    sessions: mpsc::Receiver<ServerSession>,
    cancels: mpsc::Receiver<Vec<u8>>,
    _tasks: JoinSet<()>,
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::with_secret_bytes(4).await
    }

    /// With cancel keys whose secret is this long.
    pub(crate) async fn with_secret_bytes(secret_bytes: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (sessions_tx, sessions) = mpsc::channel(100);
        let (cancels_tx, cancels) = mpsc::channel(100);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut answering = JoinSet::new();
            let mut count = 0_u32;
            while let Ok((stream, _)) = listener.accept().await {
                count += 1;
                let secret = u8::try_from(address.port() % 251).expect("below 251");
                let key = [&count.to_be_bytes()[..], &vec![secret; secret_bytes]].concat();
                answering.spawn(answer(stream, key, sessions_tx.clone(), cancels_tx.clone()));
            }
        });
        Self {
            address,
            sessions,
            cancels,
            _tasks: tasks,
        }
    }

    pub(crate) async fn session(&mut self) -> ServerSession {
        within("a session reaches the server", self.sessions.recv())
            .await
            .expect("the server runs")
    }

    pub(crate) async fn cancel(&mut self) -> Vec<u8> {
        within("a cancel request reaches the server", self.cancels.recv())
            .await
            .expect("the server runs")
    }

    pub(crate) fn has_no_cancel(&mut self) -> bool {
        self.cancels.try_recv().is_err()
    }
}

/// The answer of a server that is there and takes no connections now.
pub(crate) fn starting_up() -> Vec<u8> {
    message(b'E', b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0")
}

/// Takes one connection, reads its startup message, sends `answer` and closes.
pub(crate) async fn turn_away(listener: &TcpListener, answer: &[u8]) -> Vec<u8> {
    let (mut stream, _) = within("a session is asked for", listener.accept())
        .await
        .expect("accepted");
    let startup = read_packet(&mut stream).await.expect("a startup message");
    // Byte by byte: a message may come in any number of pieces.
    for byte in answer {
        stream.write_all(&[*byte]).await.expect("sent");
        tokio::task::yield_now().await;
    }
    startup
}

async fn answer(
    mut stream: TcpStream,
    key: Vec<u8>,
    sessions: mpsc::Sender<ServerSession>,
    cancels: mpsc::Sender<Vec<u8>>,
) {
    let Some(startup) = read_packet(&mut stream).await else {
        return;
    };
    if startup[4..8] == 80_877_102_u32.to_be_bytes() {
        let _ = cancels.send(startup).await;
        return;
    }
    let hello = [message(b'R', &[0; 4]), message(b'K', &key), ready()].concat();
    if stream.write_all(&hello).await.is_ok() {
        let _ = sessions.send(ServerSession { startup, key, stream }).await;
    }
}

pub(crate) async fn read_packet(stream: &mut impl Io) -> Option<Vec<u8>> {
    let total = stream.read_u32().await.ok().filter(|total| *total < 100_000)?;
    let mut packet = total.to_be_bytes().to_vec();
    packet.resize(total as usize, 0);
    stream.read_exact(&mut packet[4..]).await.ok()?;
    Some(packet)
}

/// A message with type, length and body.
pub(crate) fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).expect("a short body");
    [&[kind][..], &length.to_be_bytes(), body].concat()
}

pub(crate) fn ready() -> Vec<u8> {
    message(b'Z', b"I")
}

/// A first packet with a code and a body.
pub(crate) fn packet(code: u32, body: &[u8]) -> Vec<u8> {
    let total = u32::try_from(8 + body.len()).expect("a short body");
    [&total.to_be_bytes()[..], &code.to_be_bytes(), body].concat()
}

pub(crate) fn startup() -> Vec<u8> {
    // Duplicates, order and bytes that are not UTF-8 must all arrive as they are.
    packet(196_608, b"user\0ann\0application_name\0\xff\xfe\0user\0ann\0\0")
}

pub(crate) const SSL_REQUEST: u32 = 80_877_103;
pub(crate) const CANCEL_REQUEST: u32 = 80_877_102;

/// A running proxy.
pub(crate) struct Running {
    pub(crate) addresses: Addresses,
    pub(crate) reloader: Reloader,
    pub(crate) stop: CancellationToken,
    pub(crate) running: JoinSet<Result<(), ProxyError>>,
}

impl Running {
    pub(crate) fn start(config: ProxyConfig, cluster: &Cluster) -> Self {
        let proxy = Proxy::bind(config, cluster.handle.clone()).expect("any free port");
        let addresses = proxy.addresses();
        let reloader = proxy.reloader();
        let stop = CancellationToken::new();
        let mut running = JoinSet::new();
        running.spawn(proxy.run(stop.clone()));
        Self {
            addresses,
            reloader,
            stop,
            running,
        }
    }

    /// A connection to the first listener that has said nothing.
    pub(crate) async fn connect(&self) -> TcpStream {
        self.connect_to(0).await
    }

    pub(crate) async fn connect_to(&self, listener: usize) -> TcpStream {
        TcpStream::connect(self.addresses.listeners[listener][0])
            .await
            .expect("the proxy listens")
    }

    pub(crate) async fn reload(&mut self, config: ProxyConfig) -> Result<Reloaded, ReloadError> {
        let reloaded = within("a reload", self.reloader.reload(config)).await;
        if let Ok(reloaded) = &reloaded {
            self.addresses = reloaded.addresses.clone();
        }
        reloaded
    }

    /// A client that has sent its startup message.
    pub(crate) async fn client(&self) -> TcpStream {
        self.client_of(0).await
    }

    pub(crate) async fn client_of(&self, listener: usize) -> TcpStream {
        let mut stream = self.connect_to(listener).await;
        stream.write_all(&startup()).await.expect("sent");
        stream
    }

    pub(crate) async fn ended(&mut self) -> Result<(), ProxyError> {
        let ended = within("the proxy ends", self.running.join_next()).await;
        ended.expect("it runs").expect("it does not panic")
    }
}

/// Ends a client's connection by a reset: its session ends although its server says nothing.
pub(crate) fn break_off(client: TcpStream) {
    client.set_zero_linger().expect("set");
    drop(client);
}

/// After how many requests a session goes to a carrier.
pub(crate) type CarriedAfter = Option<u8>;

/// Makes two tests of each function: of sessions on their worker's runtime, and of sessions that its carrier has.
macro_rules! anywhere {
    ($($name:ident),* $(,)?) => {
        mod on_the_runtime {
            $(#[tokio::test]
            async fn $name() {
                super::$name(None).await;
            })*
        }
        mod carried {
            $(#[tokio::test]
            async fn $name() {
                super::$name(Some(0)).await;
            })*
        }
    };
}
pub(crate) use anywhere;

/// The same with sessions there.
pub(crate) fn config_there(carried_after: CarriedAfter, listeners: Vec<pgherd_proxy::ListenerConfig>) -> ProxyConfig {
    let mut config = config(listeners);
    config.carried_after = carried_after;
    config
}

/// Small and quick. Sessions go to a carrier as soon as they can.
pub(crate) fn config(listeners: Vec<pgherd_proxy::ListenerConfig>) -> ProxyConfig {
    let mut config = ProxyConfig::new(listeners);
    config.workers = 2;
    config.carried_after = Some(0);
    config.drain = Duration::from_millis(100);
    config
}

pub(crate) fn write_listener() -> pgherd_proxy::ListenerConfig {
    pgherd_proxy::ListenerConfig::write("127.0.0.1:0")
}

pub(crate) fn read_listener() -> pgherd_proxy::ListenerConfig {
    pgherd_proxy::ListenerConfig::read("127.0.0.1:0", None, false)
}

/// Reads the messages of a startup answer; the key that came with it.
pub(crate) async fn expect_hello(stream: &mut impl Io) -> Vec<u8> {
    let mut key = Vec::new();
    loop {
        let (kind, body) = read_message(stream).await.expect("the startup is answered");
        match kind {
            b'K' => key = body,
            b'Z' => return key,
            b'E' => panic!("{}", String::from_utf8_lossy(&body)),
            _ => {}
        }
    }
}

/// One message, or nothing when the connection has ended.
pub(crate) async fn read_message(stream: &mut impl Io) -> Option<(u8, Vec<u8>)> {
    let read = async {
        let kind = stream.read_u8().await.ok()?;
        let length = stream.read_u32().await.ok()?;
        let mut body = vec![0; length as usize - 4];
        stream.read_exact(&mut body).await.ok()?;
        Some((kind, body))
    };
    within("a message arrives", read).await
}

/// The fields of the ErrorResponse that comes next, and the end of the connection after it.
pub(crate) struct Fatal {
    pub(crate) sqlstate: String,
    pub(crate) text: String,
}

pub(crate) async fn expect_fatal(stream: &mut impl Io) -> Fatal {
    let (kind, body) = read_message(stream).await.expect("a last message");
    assert_eq!(kind, b'E');
    let fields: Vec<String> = body
        .split(|byte| *byte == 0)
        .map(|field| String::from_utf8_lossy(field).into_owned())
        .collect();
    assert!(fields.iter().any(|field| field == "SFATAL"));
    let sqlstate = fields
        .iter()
        .find_map(|field| field.strip_prefix('C'))
        .expect("a SQLSTATE")
        .to_owned();
    let mut rest = Vec::new();
    let end = within("the connection ends", stream.read_to_end(&mut rest)).await;
    assert_eq!((end.expect("an orderly end"), rest.len()), (0, 0));
    Fatal {
        sqlstate,
        text: fields.join("\n"),
    }
}

/// The connection ends by a reset, not by an orderly close.
pub(crate) async fn expect_reset(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    let end = within("the connection ends", stream.read_to_end(&mut rest)).await;
    let error = end.expect_err("a reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// The server's side ends, in whatever way.
pub(crate) async fn expect_server_end<S: Io>(session: &mut ServerSession<S>) {
    let mut rest = Vec::new();
    let _ = within("the server's connection ends", session.stream.read_to_end(&mut rest)).await;
}

pub(crate) async fn exchange<S: Io>(client: &mut impl Io, session: &mut ServerSession<S>) {
    let mut got = [0; 5];
    client.write_all(b"there").await.expect("sent");
    within("the server gets it", session.stream.read_exact(&mut got))
        .await
        .expect("received");
    assert_eq!(&got, b"there");
    session.stream.write_all(b"again").await.expect("sent");
    within("the client gets it", client.read_exact(&mut got))
        .await
        .expect("received");
    assert_eq!(&got, b"again");
}

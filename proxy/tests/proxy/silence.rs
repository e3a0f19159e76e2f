//! Replicas that have gone silent, as a host does that froze: connections are taken by nobody, and nothing is refused.

use std::net::SocketAddr;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::fake::*;

/// A member's agent and PostgreSQL, each of which can fall silent and speak again.
struct Host {
    agent: Gate,
    postgres: Gate,
    server: Server,
}

/// Passes connections on to a server while it is open; otherwise they are taken and nothing comes of them.
struct Gate {
    address: SocketAddr,
    open: watch::Sender<bool>,
    connections: watch::Receiver<usize>,
    _tasks: JoinSet<()>,
}

impl Gate {
    async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (open, is_open) = watch::channel(true);
        let (count, connections) = watch::channel(0);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut passing = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                count.send_modify(|count| *count += 1);
                passing.spawn(pass(stream, server, is_open.clone()));
            }
        });
        Self {
            address,
            open,
            connections,
            _tasks: tasks,
        }
    }
}

async fn pass(mut client: TcpStream, server: SocketAddr, mut is_open: watch::Receiver<bool>) {
    if is_open.wait_for(|open| *open).await.is_err() {
        return;
    }
    let mut server = TcpStream::connect(server).await.expect("the server listens");
    let passing = tokio::io::copy_bidirectional(&mut client, &mut server);
    tokio::pin!(passing);
    let shut = async {
        let _ = is_open.wait_for(|open| !*open).await;
    };
    tokio::select! {
        _ = &mut passing => return,
        () = shut => {}
    }
    // What is in the sockets stays there.
    let _ = is_open.wait_for(|open| *open).await;
    let _ = passing.await;
}

impl Host {
    async fn start() -> Self {
        let server = Server::start().await;
        Self {
            agent: Gate::to(server.address).await,
            postgres: Gate::to(server.address).await,
            server,
        }
    }

    fn falls_silent(&self) {
        self.agent.open.send_replace(false);
        self.postgres.open.send_replace(false);
    }

    fn speaks_again(&self) {
        self.agent.open.send_replace(true);
        self.postgres.open.send_replace(true);
    }
}

/// A leader that may be read from as a last resort, a silent host to be, and a reader on it.
async fn with_reader() -> (Server, Host, Cluster, Running, TcpStream, ServerSession) {
    let (leader, mut host) = (Server::start().await, Host::start().await);
    let mut cluster = Cluster::new();
    cluster
        .writable("n1", leader.address)
        .replica_with_agent("n2", host.postgres.address, host.agent.address);
    let mut listener = read_listener();
    listener.reads.fallback_to_leader = true;
    let proxy = Running::start(config(vec![listener]), &cluster);
    cluster.confirmed().await;
    let mut client = proxy.client().await;
    let session = host.server.session().await;
    expect_hello(&mut client).await;
    (leader, host, cluster, proxy, client, session)
}

#[tokio::test]
async fn readers_of_a_silent_replica_are_ended_and_read_elsewhere_until_it_speaks() {
    let (mut leader, mut host, _cluster, proxy, mut idle, _session) = with_reader().await;
    let mut busy = proxy.client().await;
    let _busy_session = host.server.session().await;
    expect_hello(&mut busy).await;
    busy.write_all(&message(b'Q', b"select\0")).await.expect("sent");
    host.falls_silent();
    // It is on its way to the silent one, and is not left there.
    let mut on_its_way = proxy.client().await;
    let fatal = expect_fatal(&mut idle).await;
    assert_eq!(fatal.sqlstate, "57P01");
    assert!(fatal.text.contains("n2 does not answer"), "{}", fatal.text);
    expect_reset(&mut busy).await;
    let mut newcomer = proxy.client().await;
    for reader in [&mut on_its_way, &mut newcomer] {
        leader.session().await;
        expect_hello(reader).await;
    }
    host.speaks_again();
    until("a reader reads from it again", async || {
        let _reader = proxy.client().await;
        let reached = tokio::time::timeout(Duration::from_millis(100), host.server.session()).await;
        reached.ok().map(drop)
    })
    .await;
}

#[tokio::test]
async fn a_pause_of_a_second_and_a_replica_that_only_computes_end_nobody() {
    let (_leader, mut host, _cluster, _proxy, mut client, mut session) = with_reader().await;
    for pause in [100, 1_000, 100] {
        host.falls_silent();
        let silent_at = Boottime::now();
        until("the pause is over", async || {
            (Boottime::now().since(silent_at) >= Duration::from_millis(pause)).then_some(())
        })
        .await;
        host.agent.connections.mark_unchanged();
        host.postgres.connections.mark_unchanged();
        host.speaks_again();
        // Whoever of the two answered last is asked first, and asked alone.
        let asked = async {
            tokio::select! {
                asked = host.agent.connections.changed() => asked,
                asked = host.postgres.connections.changed() => asked,
            }
        };
        within("it is asked again", asked).await.expect("the gate is there");
    }
    client.write_all(&message(b'Q', b"select\0")).await.expect("sent");
    let asked_at = Boottime::now();
    until("it has computed for longer than silence lasts", async || {
        (Boottime::now().since(asked_at) > Duration::from_secs(4)).then_some(())
    })
    .await;
    let mut query = [0; 12];
    within("the query", session.stream.read_exact(&mut query))
        .await
        .expect("received");
    session.stream.write_all(&ready()).await.expect("sent");
    assert_eq!(read_message(&mut client).await, Some((b'Z', b"I".to_vec())));
}

#[tokio::test]
async fn a_replica_of_which_either_the_agent_or_postgresql_answers_is_not_silent() {
    let (_leader, host, _cluster, _proxy, mut client, mut session) = with_reader().await;
    for gate in [&host.agent, &host.postgres] {
        gate.open.send_replace(false);
        let silent_at = Boottime::now();
        until("it would have been noticed", async || {
            (Boottime::now().since(silent_at) > Duration::from_secs(3)).then_some(())
        })
        .await;
        gate.open.send_replace(true);
    }
    exchange(&mut client, &mut session).await;
}

#[tokio::test]
async fn sessions_of_a_silent_replica_whose_key_has_expired_are_ended_too() {
    let (_leader, mut host, mut cluster, _proxy, mut client, _session) = with_reader().await;
    // From then on it is asked where it was.
    let asked = host.agent.connections.wait_for(|count| *count > 0);
    within("it is asked", asked).await.expect("the gate is there");
    cluster.member_leaves("n2");
    host.falls_silent();
    assert!(expect_fatal(&mut client).await.text.contains("n2 does not answer"));
}

#[tokio::test]
async fn nobody_is_asked_while_nobody_reads() {
    let (agent, postgres) = (
        TcpListener::bind("127.0.0.1:0").await.expect("a port"),
        TcpListener::bind("127.0.0.1:0").await.expect("a port"),
    );
    let address = |listener: &TcpListener| listener.local_addr().expect("bound");
    let mut cluster = Cluster::new();
    cluster.replica_with_agent("n2", address(&postgres), address(&agent));
    let proxy = Running::start(config(vec![read_listener()]), &cluster);
    cluster.confirmed().await;
    let asked = tokio::time::timeout(Duration::from_secs(2), async {
        tokio::select! {
            asked = agent.accept() => drop(asked),
            asked = postgres.accept() => drop(asked),
        }
    });
    assert!(asked.await.is_err());
    let _reader = proxy.client().await;
    within("it is asked", agent.accept()).await.expect("accepted");
}

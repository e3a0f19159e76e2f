//! The leader's own agent is asked: the store is silent, or the leader's key is gone.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::fake::*;

#[derive(Default)]
struct Script {
    status: u16,
    body: String,
    /// The request lines that came.
    asked: Vec<String>,
}

/// An agent that answers every question alike.
pub(crate) struct Agent {
    pub(crate) address: SocketAddr,
    script: Arc<Mutex<Script>>,
    _tasks: JoinSet<()>,
}

impl Agent {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let script = Arc::new(Mutex::new(Script::default()));
        let answers = Arc::clone(&script);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(stream.read_u8().await.expect("a whole request"));
                }
                let answer = {
                    let mut script = answers.lock().expect("nobody panicked");
                    let request = String::from_utf8_lossy(&request).into_owned();
                    script.asked.push(request.lines().next().unwrap_or_default().to_owned());
                    format!(
                        "HTTP/1.1 {} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{}",
                        script.status,
                        script.body.len(),
                        script.body
                    )
                };
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        Self {
            address,
            script,
            _tasks: tasks,
        }
    }

    /// Speaks for the holding that `cluster` shows, `later` revisions after it.
    pub(crate) fn says(&self, cluster: &Cluster, status: u16, later: i64, remaining_ms: u64) {
        let view = cluster.handle.load_full();
        let epoch = view.epoch().expect("somebody leads");
        let mut script = self.script.lock().expect("nobody panicked");
        script.status = status;
        script.body = format!(
            r#"{{"name":"n1","epoch":{{"holder":"{}","create_revision":{}}},"remaining_ms":{remaining_ms},"role":"primary","writable":true}}"#,
            epoch.holder,
            epoch.create_revision + later
        );
    }

    pub(crate) fn asked(&self) -> Vec<String> {
        self.script.lock().expect("nobody panicked").asked.clone()
    }
}

async fn silent_for(cluster: &Cluster, duration: Duration) {
    until("the store is silent", async || {
        let confirmed = cluster.handle.current_as_of()?;
        (Boottime::now().since(confirmed) > duration).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_leader_that_vouches_for_itself_keeps_its_sessions_and_gets_new_ones() {
    let (mut server, agent) = (Server::start().await, Agent::start().await);
    let mut cluster = Cluster::new();
    cluster.writable_with_agent("n1", server.address, agent.address, true);
    agent.says(&cluster, 200, 0, 2_500);
    let proxy = Running::start(config(vec![write_listener()]), &cluster);
    let mut idle = proxy.client().await;
    let mut session = server.session().await;
    expect_hello(&mut idle).await;
    cluster.stop_confirming().await;
    // The lease of three seconds is over, and the warrant with it.
    silent_for(&cluster, Duration::from_millis(3_500)).await;
    exchange(&mut idle, &mut session).await;
    let mut late = proxy.client().await;
    let _late = server.session().await;
    expect_hello(&mut late).await;
    assert!(
        agent
            .asked()
            .iter()
            .all(|asked| asked == "GET /api/v1/warrant HTTP/1.1")
    );
    // And when it vouches no longer, they end.
    agent.says(&cluster, 503, 0, 0);
    assert_eq!(expect_fatal(&mut late).await.sqlstate, "57P01");
}

#[tokio::test]
async fn a_held_writer_is_let_in_by_the_leaders_own_word() {
    let (mut server, agent) = (Server::start().await, Agent::start().await);
    let mut cluster = Cluster::new();
    cluster.writable_with_agent("n1", server.address, agent.address, true);
    agent.says(&cluster, 200, 0, 2_500);
    let proxy = Running::start(config(vec![write_listener()]), &cluster);
    cluster.confirmed().await;
    cluster.stop_confirming().await;
    silent_for(&cluster, Duration::from_millis(2_600)).await;
    assert!(agent.asked().is_empty(), "nobody needed to know");
    let mut client = proxy.client().await;
    server.session().await;
    expect_hello(&mut client).await;
}

#[tokio::test]
async fn any_other_answer_leaves_sessions_to_the_stores_last_word() {
    // Not the leader; a later holding; the same one, but over before the next question.
    tokio::join!(
        ends_although_told(503, 0, 2_500),
        ends_although_told(200, 1, 2_500),
        ends_although_told(200, 0, 300),
    );
}

async fn ends_although_told(status: u16, later: i64, remaining_ms: u64) {
    let (mut server, agent) = (Server::start().await, Agent::start().await);
    let mut cluster = Cluster::new();
    // Long enough that the agent is asked well before the warrant lapses.
    cluster.ttl(5);
    cluster.writable_with_agent("n1", server.address, agent.address, true);
    agent.says(&cluster, status, later, remaining_ms);
    let proxy = Running::start(config(vec![write_listener()]), &cluster);
    let mut client = proxy.client().await;
    let mut session = server.session().await;
    expect_hello(&mut client).await;
    cluster.stop_confirming().await;
    until("the agent is asked", async || (!agent.asked().is_empty()).then_some(())).await;
    // Nothing is shortened.
    exchange(&mut client, &mut session).await;
    session.stream.write_all(&ready()).await.expect("sent");
    assert_eq!(read_message(&mut client).await, Some((b'Z', b"I".to_vec())));
    let fatal = expect_fatal(&mut client).await;
    assert_eq!(fatal.sqlstate, "57P01");
    assert!(fatal.text.contains("no longer certain"), "{}", fatal.text);
}

#[tokio::test]
async fn a_leader_of_patronis_is_asked_in_its_own_words() {
    let (mut server, agent) = (Server::start().await, Agent::start().await);
    let mut cluster = Cluster::new();
    cluster.writable_with_agent("n1", server.address, agent.address, false);
    agent.says(&cluster, 200, 0, 0);
    let proxy = Running::start(config(vec![write_listener()]), &cluster);
    let mut client = proxy.client().await;
    let _session = server.session().await;
    expect_hello(&mut client).await;
    cluster.stop_confirming().await;
    let asked = until("the agent is asked", async || agent.asked().pop()).await;
    assert_eq!(asked, "GET /primary HTTP/1.1");
    // It names no holding, so nothing is left of it without the key.
    cluster.lease_ends("n1");
    let fatal = expect_fatal(&mut client).await;
    assert!(fatal.text.contains("nobody leads now"), "{}", fatal.text);
}

/// A cluster whose leader speaks for itself, with a session, once that word is known.
async fn vouched(remaining_ms: u64) -> (Server, Agent, Cluster, Running, TcpStream, ServerSession) {
    let (mut server, agent) = (Server::start().await, Agent::start().await);
    let mut cluster = Cluster::new();
    cluster.writable_with_agent("n1", server.address, agent.address, true);
    agent.says(&cluster, 200, 0, remaining_ms);
    let mut config = config(vec![write_listener()]);
    config.stats = Some(pgherd_proxy::StatsConfig {
        address: "127.0.0.1:0".to_owned(),
    });
    let proxy = Running::start(config, &cluster);
    let mut client = proxy.client().await;
    let session = server.session().await;
    expect_hello(&mut client).await;
    // An answered question is over once the next is asked.
    until("the leader was asked twice", async || {
        (agent.asked().len() > 1).then_some(())
    })
    .await;
    (server, agent, cluster, proxy, client, session)
}

#[tokio::test]
async fn a_leader_whose_lease_has_ended_keeps_its_sessions_and_gets_new_ones_by_its_own_word() {
    let (mut server, agent, mut cluster, proxy, mut client, mut session) = vouched(2_500).await;
    cluster.lease_ends("n1");
    exchange(&mut client, &mut session).await;
    session.stream.write_all(&ready()).await.expect("sent");
    assert_eq!(read_message(&mut client).await, Some((b'Z', b"I".to_vec())));
    let asked = agent.asked().len();
    until("it is asked at once", async || {
        (agent.asked().len() > asked).then_some(())
    })
    .await;
    let mut late = proxy.client().await;
    let _late = server.session().await;
    expect_hello(&mut late).await;
    // For longer than the word that was at hand, and the store's confirmations that nobody holds the key change nothing.
    let gone_at = Boottime::now();
    until("three seconds have passed", async || {
        (Boottime::now().since(gone_at) > Duration::from_secs(3)).then_some(())
    })
    .await;
    exchange(&mut client, &mut session).await;
    session.stream.write_all(&ready()).await.expect("sent");
    assert_eq!(read_message(&mut client).await, Some((b'Z', b"I".to_vec())));
    // And when it has nothing more to say, they end with its last word.
    drop(agent);
    let fatal = expect_fatal(&mut client).await;
    assert!(fatal.text.contains("nobody leads now"), "{}", fatal.text);
}

#[tokio::test]
async fn anothers_key_ends_the_word_of_a_leader_without_a_key_at_once_and_for_good() {
    let (_server, _agent, mut cluster, proxy, mut client, _session) = vouched(2_500).await;
    let mut next = Server::start().await;
    cluster.lease_ends("n1");
    cluster.writable("n2", next.address);
    let fatal = expect_fatal(&mut client).await;
    assert!(fatal.text.contains("n2 leads now"), "{}", fatal.text);
    expect_hello(&mut proxy.client().await).await;
    next.session().await;
    // The first one's word would still stand by its own end.
    cluster.lease_ends("n2");
    let mut held = proxy.client().await;
    let told = tokio::time::timeout(Duration::from_millis(300), read_message(&mut held)).await;
    assert!(told.is_err(), "{told:?}");
}

#[tokio::test]
async fn an_agent_that_denies_to_lead_without_a_key_is_believed_before_its_word_would_end() {
    let (_server, agent, mut cluster, _proxy, mut client, _session) = vouched(20_000).await;
    cluster.ttl(30);
    agent.says(&cluster, 200, 0, 20_000);
    let asked = agent.asked().len();
    until("it has said so", async || {
        (agent.asked().len() > asked + 1).then_some(())
    })
    .await;
    agent.says(&cluster, 503, 0, 0);
    cluster.lease_ends("n1");
    let gone_at = Boottime::now();
    let fatal = expect_fatal(&mut client).await;
    assert!(fatal.text.contains("nobody leads now"), "{}", fatal.text);
    assert!(Boottime::now().since(gone_at) < Duration::from_secs(10));
}

#[tokio::test]
async fn a_key_that_goes_without_a_word_of_its_holding_ends_its_sessions_at_once() {
    // A later holding; one that is over.
    tokio::join!(ends_with_the_key(1, 2_500), ends_with_the_key(0, 0));
}

async fn ends_with_the_key(later: i64, remaining_ms: u64) {
    let (mut server, agent) = (Server::start().await, Agent::start().await);
    let mut cluster = Cluster::new();
    cluster.writable_with_agent("n1", server.address, agent.address, true);
    agent.says(&cluster, 200, later, remaining_ms);
    let proxy = Running::start(config(vec![write_listener()]), &cluster);
    let mut client = proxy.client().await;
    let _session = server.session().await;
    expect_hello(&mut client).await;
    until("the leader was asked twice", async || {
        (agent.asked().len() > 1).then_some(())
    })
    .await;
    cluster.lease_ends("n1");
    assert_eq!(expect_fatal(&mut client).await.sqlstate, "57P01");
}

#[tokio::test]
async fn sessions_go_over_to_the_key_that_their_leader_makes_anew_while_its_word_stands() {
    let (mut server, agent, mut cluster, proxy, mut client, mut session) = vouched(2_500).await;
    cluster.lease_ends("n1");
    exchange(&mut client, &mut session).await;
    session.stream.write_all(&ready()).await.expect("sent");
    assert_eq!(read_message(&mut client).await, Some((b'Z', b"I".to_vec())));
    // Between its key and its record no newcomer is let in.
    cluster.leader_key("n1");
    let mut late = proxy.client().await;
    exchange(&mut client, &mut session).await;
    session.stream.write_all(&ready()).await.expect("sent");
    assert_eq!(read_message(&mut client).await, Some((b'Z', b"I".to_vec())));
    let told = tokio::time::timeout(Duration::from_millis(100), read_message(&mut late)).await;
    assert!(told.is_err(), "{told:?}");
    let (address, agent_address) = (server.address, agent.address);
    cluster.record("n1", address, "primary", "");
    server.session().await;
    expect_hello(&mut late).await;
    // From then on they rest on the new one, which is another when it was ended in between.
    drop((agent, agent_address));
    cluster.no_leader();
    cluster.leader_key("n1");
    assert_eq!(expect_fatal(&mut client).await.sqlstate, "57P01");
}

#[tokio::test]
async fn a_writer_that_came_after_the_key_had_gone_is_let_in_as_soon_as_the_leader_has_spoken() {
    let (mut server, agent) = (Server::start().await, Agent::start().await);
    let mut cluster = Cluster::new();
    cluster.writable_with_agent("n1", server.address, agent.address, true);
    agent.says(&cluster, 200, 0, 2_500);
    let mut config = config(vec![write_listener()]);
    config.stats = Some(pgherd_proxy::StatsConfig {
        address: "127.0.0.1:0".to_owned(),
    });
    let proxy = Running::start(config, &cluster);
    cluster.confirmed().await;
    drop(proxy.client().await); // The proxy has seen who leads.
    server.session().await;
    cluster.lease_ends("n1");
    let mut client = proxy.client().await;
    // It would be refused at the end of its hold.
    server.session().await;
    expect_hello(&mut client).await;
    let page = proxy.addresses.stats[0];
    until("the page says so", async || {
        let mut stream = TcpStream::connect(page).await.ok()?;
        stream
            .write_all(b"GET /stats.json HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        (answer.contains("goes on by its own word") && answer.contains(r#""writable":true"#)).then_some(())
    })
    .await;
}

//! The store is silent, and the leader's own agent is asked.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
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
struct Agent {
    address: SocketAddr,
    script: Arc<Mutex<Script>>,
    _tasks: JoinSet<()>,
}

impl Agent {
    async fn start() -> Self {
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
    fn says(&self, cluster: &Cluster, status: u16, later: i64, remaining_ms: u64) {
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

    fn asked(&self) -> Vec<String> {
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
    assert!(agent.asked().is_empty());
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
}

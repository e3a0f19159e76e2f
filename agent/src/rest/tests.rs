//! The interface over TCP, with a view and a status of the test's making.

use std::net::SocketAddr;

use pgherd_cluster::etcd::EtcdConfig;
use pgherd_cluster::http::{self, Ask};
use pgherd_cluster::record::Address;
use pgherd_cluster::source::{self, ViewPublisher};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::fixtures::{keys, leader_status, replica_status, scope, view};
use super::*;
use crate::config::Credentials;

mod changes;
mod streams;

const LIMIT: Duration = Duration::from_secs(20);

/// A served interface. Whoever holds it publishes; nothing answers refreshes unless told to.
struct Served {
    address: SocketAddr,
    status: watch::Sender<Arc<MemberStatus>>,
    view: ViewPublisher,
    refreshes: mpsc::Receiver<oneshot::Sender<Arc<MemberStatus>>>,
    journal: Journal,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Served {
    /// As node1, which leads, with a store that refuses connections.
    async fn start(credentials: Option<Credentials>) -> Self {
        let (status, status_rx) = watch::channel(Arc::new(leader_status(Boottime::now())));
        let (publisher, handle) = source::channel(scope());
        publisher.publish(view());
        let (refresh, refreshes) = mpsc::channel(4);
        let closed = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let endpoint = format!("http://{}", closed.local_addr().expect("an address"));
        drop(closed);
        let etcd = Etcd::new(EtcdConfig {
            endpoints: vec![endpoint],
            ..EtcdConfig::default()
        });
        let (journal, _) = Journal::new("node1");
        let api = Api::new(ApiParts {
            slots: std::sync::Arc::default(),
            journal: journal.clone(),
            status: status_rx,
            view: handle,
            etcd,
            keys: keys(),
            doors: doors(credentials),
            peers: Peers::default(),
            postgres: nobody(),
            refresh,
            orders: mpsc::channel(1).0,
            vouches: crate::lease::Vouches::nobody(),
            vigil: crate::vigil::Vigil::of_a_sound_member(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, Arc::new(api), stop.clone()));
        Self {
            address,
            status,
            view: publisher,
            refreshes,
            journal,
            stop,
            tasks,
        }
    }

    /// Everything that comes back for one request, until the connection is closed.
    async fn raw(&self, request: &str) -> String {
        let exchange = async {
            let mut stream = TcpStream::connect(self.address).await.expect("it listens");
            stream.write_all(request.as_bytes()).await.expect("it reads");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.expect("it answers in text");
            answer
        };
        timeout(LIMIT, exchange)
            .await
            .expect("the connection is closed after the answer")
    }

    async fn ask(&self, method: &str, path: &str) -> String {
        self.raw(&format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        ))
        .await
    }

    async fn post(&self, method: &str, path: &str, body: &str) -> String {
        let length = body.len();
        self.raw(&format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        ))
        .await
    }
}

/// A PostgreSQL that nobody has started.
fn nobody() -> Arc<ArcSwap<Target>> {
    let address = Address {
        host: "127.0.0.1".to_owned(),
        port: 1,
    };
    let user = Credentials {
        username: "nobody".to_owned(),
        password: None,
    };
    Arc::new(ArcSwap::from_pointee(Target::new(&address, "postgres", &user)))
}

fn doors(credentials: Option<Credentials>) -> Arc<ArcSwap<Doors>> {
    let config = crate::config::RestConfig {
        credentials,
        ..crate::config::tests::agent().restapi
    };
    Arc::new(ArcSwap::from_pointee(Doors::new(&config).expect("no files")))
}

fn status_line(answer: &str) -> &str {
    answer.lines().next().unwrap_or_default()
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").map_or("", |(_, body)| body)
}

/// Serves with the refreshes refused, so that answers come from the last status at once.
async fn started() -> Served {
    let mut served = Served::start(None).await;
    served.refreshes.close();
    served
}

#[tokio::test]
async fn reads_are_answered_with_patronis_codes_and_the_connection_is_closed() {
    let served = started().await;
    for (method, path, code) in [
        ("GET", "/", 200),
        ("GET", "/patroni", 200),
        ("GET", "/primary", 200),
        ("GET", "/replica", 503),
        ("GET", "/nosuch", 503),
        ("GET", "/liveness", 200),
        ("GET", "/readiness?lag=1", 200),
        ("GET", "/cluster", 200),
        ("GET", "/history", 200),
        ("GET", "/config", 200),
        ("GET", "/config/extra", 200),
        ("GET", "/metrics", 200),
        ("GET", "/failsafe", 502),
        ("GET", "/api/v1/warrant", 200),
        ("OPTIONS", "/", 200),
        ("OPTIONS", "/replica", 503),
        ("OPTIONS", "/liveness", 503),
        ("HEAD", "/primary", 200),
        ("HEAD", "/patroni", 503),
        ("POST", "/nosuch", 501),
        ("POST", "/restart", 503),
        ("DELETE", "/restart", 503),
        ("POST", "/switchover", 411),
    ] {
        let answer = served.ask(method, path).await;
        let begin = format!("HTTP/1.1 {code} ");
        assert!(answer.starts_with(&begin), "{method} {path}: {answer}");
        assert!(answer.contains("connection: close\r\n"), "{method} {path}: {answer}");
        let says_why = path == "/restart" || code == 501 || code == 411;
        let empty = method != "GET" && !says_why;
        let empty = empty || path.starts_with("/liveness") || path.starts_with("/readiness");
        assert_eq!(body(&answer).is_empty(), empty, "{method} {path}: {answer}");
    }
}

#[tokio::test]
async fn an_old_client_is_answered_in_its_own_version() {
    let served = started().await;
    let answer = served.raw("OPTIONS / HTTP/1.0\r\n\r\n").await;
    assert_eq!(status_line(&answer), "HTTP/1.0 200 OK");
}

#[tokio::test]
async fn a_connection_is_kept_for_the_next_question_and_every_answer_says_how_long_it_is() {
    let served = started().await;
    let exchange = async {
        let mut stream = TcpStream::connect(served.address).await.expect("it listens");
        let mut answer = Vec::new();
        for request in [
            "GET /patroni",
            "OPTIONS /primary",
            "GET /nosuch",
            "HEAD /replica",
            "GET /metrics",
            "GET /liveness",
        ] {
            let request = format!("{request} HTTP/1.1\r\nhost: x\r\n\r\n");
            stream.write_all(request.as_bytes()).await.expect("it reads");
            answer.clear();
            while !answer.ends_with(b"\r\n\r\n") {
                answer.push(stream.read_u8().await.expect("a head"));
            }
            let head = String::from_utf8_lossy(&answer).into_owned();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            // The answer to HEAD has no body, whatever it says of one.
            let length = length.or(request.starts_with("HEAD").then_some("0"));
            let length: usize = length
                .and_then(|length| length.parse().ok())
                .unwrap_or_else(|| panic!("{head}"));
            assert!(!head.contains("connection: close"), "{head}");
            let mut body = vec![0; length];
            stream.read_exact(&mut body).await.expect("the body");
        }
    };
    timeout(LIMIT, exchange).await.expect("one connection for all");
}

#[tokio::test]
async fn bodies_have_patronis_spacing_and_refusals_its_words() {
    let served = started().await;
    let status = served.ask("GET", "/patroni").await;
    assert!(status.contains("content-type: application/json\r\n"), "{status}");
    assert!(
        body(&status).starts_with(r#"{"state": "running", "postmaster_start_time": "2026"#),
        "{status}"
    );
    let config = served.ask("GET", "/config").await;
    assert_eq!(body(&config), r#"{"ttl": 30, "loop_wait": 10, "retry_timeout": 10}"#);
    let role = served.ask("GET", "/role").await;
    assert_eq!((status_line(&role), body(&role)), ("HTTP/1.1 200 OK", "primary\n"));
    let unsupported = served.ask("POST", "/nosuch").await;
    assert_eq!(status_line(&unsupported), "HTTP/1.1 501 Unsupported method ('POST')");
    let later = served.ask("POST", "/citus").await;
    assert_eq!(status_line(&later), "HTTP/1.1 501 not in this version");
}

#[tokio::test]
async fn unsafe_requests_need_credentials_and_reads_never_do() {
    let credentials = Credentials {
        username: "patroni".into(),
        password: Some("secret".into()),
    };
    let mut served = Served::start(Some(credentials)).await;
    served.refreshes.close();
    let unsafe_ones = [
        ("POST", "/switchover"),
        ("POST", "/failover"),
        ("DELETE", "/switchover"),
        ("PATCH", "/config"),
        ("PUT", "/config"),
        ("POST", "/restart"),
        ("POST", "/reinitialize"),
        ("POST", "/reload"),
        ("POST", "/sigterm"),
        ("GET", "/api/v1/forecast"),
        ("GET", "/api/v1/backups"),
    ];
    for (method, path) in unsafe_ones {
        let answer = served.post(method, path, "{}").await;
        assert!(
            answer.starts_with("HTTP/1.1 401 Unauthorized\r\n"),
            "{method} {path}: {answer}"
        );
        assert!(
            answer.contains("www-authenticate: Basic realm=\"Patroni\"\r\n"),
            "{answer}"
        );
        assert_eq!(body(&answer), "no auth header received");
    }
    let with = |token: &str| {
        format!("DELETE /restart HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Basic {token}\r\n\r\n")
    };
    let wrong = served.raw(&with("cGF0cm9uaTp3cm9uZw==")).await;
    assert_eq!(
        (status_line(&wrong), body(&wrong)),
        ("HTTP/1.1 401 Unauthorized", "not authenticated")
    );
    let right = served.raw(&with("cGF0cm9uaTpzZWNyZXQ=")).await;
    assert_eq!(
        body(&right),
        "the agent does not answer",
        "it was let in, and there is none behind this"
    );
    assert_eq!(
        status_line(&served.ask("POST", "/mpp").await),
        "HTTP/1.1 501 not in this version"
    );
    assert_eq!(status_line(&served.ask("GET", "/patroni").await), "HTTP/1.1 200 OK");
}

#[tokio::test]
async fn a_fresh_observation_is_preferred_and_not_waited_for() {
    let mut served = Served::start(None).await;
    let fresh = async {
        let reply = served.refreshes.recv().await.expect("it asks");
        reply.send(Arc::new(replica_status(Boottime::now()))).expect("it waits");
    };
    let address = Address {
        host: served.address.ip().to_string(),
        port: served.address.port(),
    };
    let (answer, ()) = tokio::join!(http::ask(&address, Ask::get("/role"), LIMIT), fresh);
    assert_eq!(answer.expect("an answer").text(), "replica\n");
    // Now nobody observes: the last status answers.
    let answer = http::ask(&address, Ask::get("/role"), LIMIT).await;
    assert_eq!(answer.expect("an answer").text(), "primary\n");
}

#[tokio::test]
async fn a_warrant_ends_with_the_holding() {
    let served = started().await;
    let answer = served.ask("GET", "/api/v1/warrant").await;
    let warrant: Value = serde_json::from_str(body(&answer)).expect("JSON");
    assert_eq!(warrant["writable"], true);
    assert!(
        (1..=4200).contains(&warrant["remaining_ms"].as_u64().expect("a number")),
        "{warrant}"
    );
    served.status.send_replace(Arc::new(replica_status(Boottime::now())));
    let answer = served.ask("GET", "/api/v1/warrant").await;
    assert_eq!(status_line(&answer), "HTTP/1.1 503 Service Unavailable");
    assert!(body(&answer).contains(r#""remaining_ms": 0"#), "{answer}");
}

#[tokio::test]
async fn an_outage_is_noted_from_its_first_failure_until_it_ends() {
    let (_, status) = watch::channel(Arc::new(leader_status(Boottime::now())));
    let (publisher, handle) = source::channel(scope());
    let api = Api::new(ApiParts {
        slots: std::sync::Arc::default(),
        journal: Journal::new("node1").0,
        status,
        view: handle,
        etcd: Etcd::new(EtcdConfig::default()),
        keys: keys(),
        doors: doors(None),
        peers: Peers::default(),
        postgres: nobody(),
        refresh: mpsc::channel(1).0,
        orders: mpsc::channel(1).0,
        vouches: crate::lease::Vouches::nobody(),
        vigil: crate::vigil::Vigil::of_a_sound_member(),
    });
    let note = async || {
        tokio::select! {
            biased;
            never = api.note_outages() => match never {},
            () = std::future::ready(()) => {}
        }
    };
    note().await;
    assert_eq!(api.facts().failing_since, None);
    api.note_outage(true);
    let began = api.facts().failing_since;
    api.note_outage(true);
    assert!(began.is_some() && api.facts().failing_since == began);
    note().await;
    assert_eq!(api.facts().failing_since, None);
    drop(publisher);
    note().await;
    assert!(api.facts().failing_since.is_some());
}

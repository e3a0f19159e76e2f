//! Members' REST interfaces behind TLS, reached with what `ctl` of a `patroni.yml` says.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use pgherd_cluster::http::{AccessConfig, Ask, Endpoint, HttpError, ask_at};
use pgherd_cluster::name::Scope;
use pgherd_cluster::source::{AgentsSource, SourceHealth};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::certificates::*;
use crate::fake::*;

const LIMIT: Duration = Duration::from_secs(5);
/// As one of our agents tells it.
const VIEW: &str = r#"{"revision":7,"scope":"c","leader":"n1","epoch":{"holder":"n1","create_revision":3},"members":[{"name":"n1","role":"primary","state":"running","conn_url":"postgres://127.0.0.1:1/p","api_url":"https://127.0.0.1:2/patroni","tags":{},"pgherd":"0.1.0","mod_revision":4}],"sync":{},"optime":1,"timing":{"ttl_ms":5000,"loop_wait_ms":1000,"retry_timeout_ms":2000},"pause":false,"failover":null,"age_ms":10,"in_touch":true}"#;

/// An agent that demands a certificate and remembers what it was asked.
struct Agent {
    endpoint: Endpoint,
    asked: Arc<Mutex<Vec<String>>>,
    _tasks: JoinSet<()>,
}

impl Agent {
    async fn start(own: &Files, clients: &Authority) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(clients.own.clone()).expect("a CA");
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider()).build();
        let builder = ServerConfig::builder_with_provider(provider());
        let builder = builder.with_safe_default_protocol_versions().expect("versions");
        let config = builder
            .with_client_cert_verifier(verifier.expect("a CA"))
            .with_single_cert(own.chain(), own.private_key())
            .expect("an identity");
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("https://{}/patroni", listener.local_addr().expect("bound"));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&asked);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    continue;
                };
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    match stream.read_u8().await {
                        Ok(byte) => request.push(byte),
                        Err(_) => break,
                    }
                }
                let request = String::from_utf8_lossy(&request).into_owned();
                // Events are refused, as by one that has enough subscribers.
                let (status, body) = if request.contains("/events") {
                    (503, "")
                } else {
                    (200, VIEW)
                };
                noted.lock().expect("nobody panicked").push(request);
                let head = format!(
                    "HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                    body.len()
                );
                let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
                let _ = stream.shutdown().await;
            }
        });
        Self {
            endpoint: Endpoint::of(&url).expect("a URL"),
            asked,
            _tasks: tasks,
        }
    }
}

#[tokio::test]
async fn an_agent_behind_tls_is_believed_by_its_certificate_and_shown_ours() {
    let (members, strangers) = (Authority::new(), Authority::new());
    let agent = Agent::start(&members.issue("127.0.0.1"), &members).await;
    let ours = members.issue("sidecar");
    let with = |cacert: Option<&Authority>, insecure, identity: bool| AccessConfig {
        cacert: cacert.map(Authority::ca),
        identity: identity.then(|| (ours.certificate.clone(), ours.key.clone().into())),
        insecure,
        authorization: Some("Basic YTpi".to_owned()),
    };
    let ask = async |config: AccessConfig| {
        let access = config.load().expect("files");
        ask_at(&agent.endpoint, Ask::get("/api/v1/view"), LIMIT, &access).await
    };
    let answer = ask(with(Some(&members), false, true)).await.expect("an answer");
    assert_eq!(answer.status, 200);
    let asked = agent.asked.lock().expect("nobody panicked").concat();
    assert!(asked.to_lowercase().contains("authorization: basic ytpi"), "{asked}");
    assert!(ask(with(None, true, true)).await.is_ok(), "insecure believes anybody");
    for refused in [
        with(Some(&strangers), false, true),
        with(Some(&members), false, false),
        with(None, false, true),
    ] {
        assert!(matches!(ask(refused).await, Err(HttpError::Protocol(_))));
    }
    assert!(with(Some(&members), false, true).load().is_ok());
    let missing = AccessConfig {
        cacert: Some("/nowhere/ca.pem".into()),
        ..AccessConfig::default()
    };
    assert!(
        missing
            .load()
            .expect_err("no file")
            .to_string()
            .starts_with("/nowhere/ca.pem")
    );
}

#[tokio::test]
async fn a_self_signed_certificate_of_an_agent_is_its_own_ca_when_it_is_exactly_that() {
    let (members, strangers) = (Authority::new(), Authority::new());
    let (own, other) = (members.self_signed("127.0.0.1"), strangers.self_signed("127.0.0.1"));
    let agent = Agent::start(&own, &members).await;
    let ours = members.issue("sidecar");
    let ask = async |cacert: &Files| {
        let config = AccessConfig {
            cacert: Some(cacert.certificate.clone()),
            identity: Some((ours.certificate.clone(), ours.key.clone().into())),
            ..AccessConfig::default()
        };
        let access = config.load().expect("files");
        ask_at(&agent.endpoint, Ask::get("/api/v1/view"), LIMIT, &access).await
    };
    assert!(ask(&own).await.is_ok());
    let refused = ask(&other).await.expect_err("another's").to_string();
    assert!(refused.contains("certificate"), "{refused}");
}

#[tokio::test]
async fn a_silent_agent_is_left_for_another_and_one_that_takes_no_subscriber_is_asked() {
    let members = Authority::new();
    let agent = Agent::start(&members.issue("127.0.0.1"), &members).await;
    let ours = members.issue("sidecar");
    // It takes connections, and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let silent = Endpoint::of(&silent.local_addr().expect("bound").to_string()).expect("an address");
    let access = AccessConfig {
        cacert: Some(members.ca()),
        identity: Some((ours.certificate.clone(), ours.key.clone().into())),
        ..AccessConfig::default()
    };
    let scope = Scope::new("c").expect("a plain name");
    let urls = vec![silent, agent.endpoint.clone()];
    let (source, view) = AgentsSource::new(urls, scope, access.load().expect("files"));
    let stop = CancellationToken::new();
    let mut running = JoinSet::new();
    running.spawn(source.run(stop.clone()));
    until("the view is there", async || {
        (view.load().revision == 7 && *view.health().borrow() == SourceHealth::Following).then_some(())
    })
    .await;
    assert!(view.load().writable_leader().is_some() && view.current_as_of().is_some());
    stop.cancel();
    within("the source ends", running.join_next()).await;
}

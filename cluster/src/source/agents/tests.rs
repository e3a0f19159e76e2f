//! The source before an agent that is played here.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::view::View;

/// Far more than anything here takes: it only turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(20);

fn scope() -> Scope {
    Scope::new("c").expect("a plain name")
}

/// An agent that follows the store, and whose stream of events has signs of life only until it may tell its view.
struct Agent {
    endpoint: Endpoint,
    may_tell: watch::Sender<bool>,
    /// Signs of life that were sent.
    alive: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

fn document() -> String {
    let view = View {
        revision: 7,
        ..View::empty(scope())
    };
    view_document(&view, Some(Duration::ZERO), true).to_string()
}

impl Agent {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        let (may_tell, tell) = watch::channel(false);
        let alive = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&alive);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut answering = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                answering.spawn(answer(stream, tell.clone(), Arc::clone(&counted)));
            }
        });
        Self {
            endpoint: Endpoint::of(&address).expect("an address"),
            may_tell,
            alive,
            _tasks: tasks,
        }
    }
}

async fn answer(mut stream: TcpStream, mut tell: watch::Receiver<bool>, alive: Arc<AtomicUsize>) {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let Ok(byte) = stream.read_u8().await else { return };
        request.push(byte);
    }
    let document = document();
    if !String::from_utf8_lossy(&request).contains("/events") {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", document.len());
        let _ = stream.write_all(format!("{head}{document}").as_bytes()).await;
        return;
    }
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";
    let mut sent = stream.write_all(head.as_bytes()).await;
    while sent.is_ok() {
        if timeout(Duration::from_millis(20), tell.wait_for(|may| *may))
            .await
            .is_ok()
        {
            let _ = stream.write_all(format!("data: {document}\n\n").as_bytes()).await;
            break;
        }
        sent = stream.write_all(b": alive\n\n").await;
        alive.fetch_add(1, Ordering::SeqCst);
    }
    let _ = stream.read(&mut [0; 1]).await; // Until the source leaves.
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let polled = async {
        let mut tick = tokio::time::interval(Duration::from_millis(5));
        while !condition() {
            tick.tick().await;
        }
    };
    timeout(PATIENCE, polled)
        .await
        .unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"));
}

#[tokio::test]
async fn signs_of_life_confirm_no_view_that_this_agent_has_not_told() {
    let agent = Agent::start().await;
    let (source, handle) = AgentsSource::new(vec![agent.endpoint.clone()], scope(), Access::default());
    let mut running = JoinSet::new();
    running.spawn(source.run(CancellationToken::new()));
    until("signs of life have come", || agent.alive.load(Ordering::SeqCst) > 5).await;
    assert_eq!((handle.current_as_of(), handle.load().revision), (None, 0));
    agent.may_tell.send_replace(true);
    until("its view is there", || handle.load().revision == 7).await;
    until("it is confirmed", || handle.current_as_of().is_some()).await;
    until("it is followed", || {
        *handle.health().borrow() == SourceHealth::Following
    })
    .await;
}

#[test]
fn of_agents_that_have_lost_the_store_one_of_the_other_kind_is_tried_next() {
    let best = |kinds: &[Kind], left: Option<Kind>| kinds.iter().copied().min_by_key(|kind| kind.rank(left));
    let all = [Kind::Patronis, Kind::OutOfTouch, Kind::Ours];
    for left in [None, Some(Kind::Ours), Some(Kind::OutOfTouch), Some(Kind::Patronis)] {
        assert_eq!(best(&all, left), Some(Kind::Ours));
    }
    let lost = [Kind::Patronis, Kind::OutOfTouch];
    assert_eq!(best(&lost, None), Some(Kind::OutOfTouch));
    assert_eq!(best(&lost, Some(Kind::OutOfTouch)), Some(Kind::Patronis));
    assert_eq!(best(&lost, Some(Kind::Patronis)), Some(Kind::OutOfTouch));
    assert_eq!(
        best(&[Kind::OutOfTouch], Some(Kind::OutOfTouch)),
        Some(Kind::OutOfTouch)
    );
}

#[test]
fn what_an_agent_knew_before_it_lost_the_store_replaces_nothing_newer() {
    let at = Boottime::from_nanos;
    assert!(
        is_news(true, at(1), Some(at(5))),
        "a store that was restored counts anew"
    );
    assert!(is_news(false, at(6), Some(at(5))) && is_news(false, at(1), None));
    assert!(!is_news(false, at(5), Some(at(5))) && !is_news(false, at(1), Some(at(5))));
}

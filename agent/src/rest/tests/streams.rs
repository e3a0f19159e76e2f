//! The stream of events.

use pgherd_cluster::event::{Event, EventId, Kind};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};

use super::super::fixtures::view_with;
use super::*;
use crate::journal::Draft;

/// The next event's data, and its id.
async fn next_event(reader: &mut (impl AsyncBufReadExt + Unpin)) -> (i64, Value) {
    let read = async {
        let mut id = 0;
        loop {
            let mut line = String::new();
            assert_ne!(
                reader.read_line(&mut line).await.expect("text"),
                0,
                "the stream has ended"
            );
            if let Some(text) = line.strip_prefix("id: ") {
                id = text.trim().parse().expect("a revision");
            }
            if let Some(text) = line.strip_prefix("data: ") {
                return (id, serde_json::from_str(text).expect("JSON"));
            }
        }
    };
    timeout(LIMIT, read).await.expect("an event")
}

async fn subscribe(served: &Served) -> BufReader<TcpStream> {
    let mut stream = TcpStream::connect(served.address).await.expect("it listens");
    stream
        .write_all(b"GET /api/v1/events HTTP/1.0\r\n\r\n")
        .await
        .expect("it reads");
    BufReader::new(stream)
}

#[tokio::test]
async fn events_begin_with_the_view_and_go_on_with_its_changes() {
    let mut served = started().await;
    let mut reader = subscribe(&served).await;
    let (id, first) = next_event(&mut reader).await;
    assert_eq!((id, &first["leader"]), (50, &json!("node1")));
    let mut changed = view_with(Some("node3"), json!({}), vec![]);
    changed.revision = 51;
    served.view.publish(changed);
    let (id, second) = next_event(&mut reader).await;
    assert_eq!((id, &second["epoch"]["holder"]), (51, &json!("node3")));
    served.stop.cancel();
    let mut rest = String::new();
    timeout(LIMIT, reader.read_to_string(&mut rest))
        .await
        .expect("it ends")
        .expect("in order");
    timeout(LIMIT, served.tasks.join_next())
        .await
        .expect("the server ends too");
}

#[tokio::test]
async fn subscribers_are_bounded_and_leave_room_for_checks() {
    let served = started().await;
    let mut readers = Vec::new();
    for _ in 0..SUBSCRIBERS_MAX {
        let mut reader = subscribe(&served).await;
        next_event(&mut reader).await;
        readers.push(reader);
    }
    let refused = served.ask("GET", "/api/v1/events").await;
    assert_eq!(
        (status_line(&refused), body(&refused)),
        ("HTTP/1.1 503 Service Unavailable", "too many subscribers")
    );
    assert_eq!(status_line(&served.ask("OPTIONS", "/primary").await), "HTTP/1.1 200 OK");
}

#[tokio::test]
async fn the_journal_is_what_this_member_has_told_and_what_etcd_has() {
    let served = started().await;
    let told = Event::new(
        EventId::new(1000, "node3"),
        1000,
        "node3",
        Kind::Role,
        "node3 is a replica now",
    );
    let mut view = view_with(Some("node1"), json!({}), vec![]);
    view.events = [told].into_iter().collect();
    served.view.publish(view.clone());
    served
        .journal
        .say(Draft::new(Kind::Sync, "/sync lists node2, and listed nobody"));
    let answer = served.ask("GET", "/api/v1/journal").await;
    let document: Value = serde_json::from_str(body(&answer)).expect("JSON");
    let by: Vec<&Value> = document["events"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|event| &event["by"])
        .collect();
    assert_eq!(by, ["node3", "node1"]);
    let answer = served.ask("GET", "/api/v1/journal?kind=sync").await;
    let document: Value = serde_json::from_str(body(&answer)).expect("JSON");
    assert_eq!(document["events"].as_array().map(Vec::len), Some(1));
    for wrong in ["kind=weather", "since=yesterday"] {
        let answer = served.ask("GET", &format!("/api/v1/journal?{wrong}")).await;
        assert_eq!(status_line(&answer), "HTTP/1.1 400 Bad Request");
    }
}

#[tokio::test]
async fn a_followed_journal_tells_each_event_once_whoever_told_it_and_however_late() {
    let served = started().await;
    served.journal.say(Draft::new(Kind::Sync, "first"));
    let mut reader = follow(&served).await;
    assert_eq!(next_data(&mut reader).await["what"], "first");
    // By its time it comes before what was sent.
    let late = Event::new(EventId::new(1000, "node3"), 1000, "node3", Kind::Role, "late");
    let mut view = view_with(Some("node1"), json!({}), vec![]);
    view.events = [late].into_iter().collect();
    served.view.publish(view);
    assert_eq!(next_data(&mut reader).await["what"], "late");
    served.journal.say(Draft::new(Kind::Sync, "second"));
    assert_eq!(next_data(&mut reader).await["what"], "second");
}

#[tokio::test]
async fn what_operators_ask_for_is_told_with_who_asked_and_refusals_with_their_reasons() {
    let served = started().await;
    let refused = served
        .post("POST", "/switchover", r#"{"leader": "node9", "candidate": "node2"}"#)
        .await;
    assert!(status_line(&refused).contains("412"), "{refused}");
    let told = served.journal.latest();
    let [event] = &told[..] else { panic!("{told:?}") };
    assert_eq!(event.kind, Kind::Refusal);
    assert!(
        event
            .what
            .contains("a switchover and did not do it: leader name does not match"),
        "{}",
        event.what
    );
    assert_eq!(event.actor.as_deref(), Some("127.0.0.1"));
    let before = told.len();
    served.ask("GET", "/patroni").await;
    assert_eq!(served.journal.latest().len(), before, "reading is no event");
}

async fn follow(served: &Served) -> BufReader<TcpStream> {
    let mut stream = TcpStream::connect(served.address).await.expect("it listens");
    stream
        .write_all(b"GET /api/v1/journal?follow=1 HTTP/1.0\r\n\r\n")
        .await
        .expect("it reads");
    BufReader::new(stream)
}

async fn next_data(reader: &mut (impl AsyncBufReadExt + Unpin)) -> Value {
    let read = async {
        loop {
            let mut line = String::new();
            assert_ne!(
                reader.read_line(&mut line).await.expect("text"),
                0,
                "the stream has ended"
            );
            if let Some(text) = line.strip_prefix("data: ") {
                return serde_json::from_str(text).expect("JSON");
            }
        }
    };
    timeout(LIMIT, read).await.expect("an event")
}

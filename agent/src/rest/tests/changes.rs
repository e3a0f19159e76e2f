//! Requests that change something.

use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};

use super::super::fixtures::{entry, view_with};
use super::*;

#[tokio::test]
async fn bad_bodies_are_refused() {
    let served = started().await;
    let long = format!(r#"{{"leader": "{}"}}"#, "x".repeat(BODY_BYTES_MAX));
    for (body, code) in [("{", 400), ("{}", 400), ("[1]", 400), (long.as_str(), 413)] {
        let answer = http_post(&served, "/switchover", body).await;
        assert_eq!(answer, code, "{}", body.len());
    }
    // A restart needs no body; there is no agent behind this interface.
    for (body, code) in [("", 503), ("{}", 503), ("null", 503), ("[1]", 400), ("{", 400)] {
        assert_eq!(http_post(&served, "/restart", body).await, code, "{body:?}");
    }
}

/// Only the code: a server that refuses a long body may close before all of it was sent.
async fn http_post(served: &Served, path: &str, body: &str) -> u16 {
    let exchange = async {
        let stream = TcpStream::connect(served.address).await.expect("it listens");
        let (read, mut write) = stream.into_split();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut line = String::new();
        let mut reader = BufReader::new(read);
        let (_, read) = tokio::join!(write.write_all(head.as_bytes()), reader.read_line(&mut line));
        read.expect("it answers");
        line.split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .unwrap_or_default()
    };
    timeout(LIMIT, exchange).await.expect("an answer")
}

#[tokio::test]
async fn a_switchover_is_checked_before_anything_is_written() {
    let served = started().await;
    let one_second = json!({"ttl": 3, "loop_wait": 1, "retry_timeout": 1});
    served
        .view
        .publish(view_with(Some("node1"), one_second.clone(), vec![]));
    for (path, request, code, text) in [
        (
            "/failover",
            json!({"leader": "node1"}),
            400,
            "Failover could be performed only to a specific candidate",
        ),
        (
            "/switchover",
            json!({"leader": "node3"}),
            412,
            "leader name does not match",
        ),
        (
            "/switchover",
            json!({"leader": "node1", "candidate": "x"}),
            412,
            "candidate does not exists",
        ),
        (
            "/switchover",
            json!({"leader": "node1", "scheduled_at": "2999-01-01T00:00:00Z"}),
            503,
            "failed to write failover key into DCS",
        ),
    ] {
        let answer = served.post("POST", path, &request.to_string()).await;
        let got = (status_line(&answer).split(' ').nth(1), body(&answer));
        assert_eq!(got, (Some(code.to_string().as_str()), text), "{request}");
    }
}

#[tokio::test]
async fn a_switchover_needs_a_candidate_that_answers() {
    let candidate = started().await;
    let served = started().await;
    let record = |role: &str| {
        let api_url = format!("http://{}/patroni", candidate.address);
        json!({"conn_url": "postgres://127.0.0.1:1/postgres", "api_url": api_url,
            "state": "running", "role": role, "pgherd": "0.1.0"})
    };
    let one_second = json!({"ttl": 3, "loop_wait": 1, "retry_timeout": 1});
    let members = vec![
        entry("members/node2", record("replica"), 47),
        entry("members/node3", record("replica"), 47),
    ];
    served.view.publish(view_with(Some("node1"), one_second, members));
    let request = r#"{"leader": "node1"}"#;
    // It answers and is allowed: the next step is the store, which is not there.
    candidate.status.send_replace(Arc::new(replica_status(Boottime::now())));
    let fit = served.post("POST", "/switchover", request).await;
    assert_eq!(body(&fit), "failed to write failover key into DCS");
    let stopped = MemberStatus {
        server: None,
        ..replica_status(Boottime::now())
    };
    candidate.status.send_replace(Arc::new(stopped));
    let unfit = served.post("POST", "/switchover", request).await;
    assert_eq!(
        body(&unfit),
        "switchover is not possible: no good candidates have been found: node2 is unknown and tells no position in the log, \
         node3 is unknown and tells no position in the log"
    );
}

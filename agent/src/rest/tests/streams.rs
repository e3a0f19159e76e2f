//! The stream of events.

use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};

use super::super::fixtures::view_with;
use super::*;

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

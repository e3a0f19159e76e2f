//! A server for a browser: it says what it was told to.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use pgherd_page::headers::dress;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// A server of few words: whatever is asked for at an address is answered with what is kept under its path.
pub(crate) struct Told {
    pub(crate) address: SocketAddr,
    /// Whole requests, in the order in which they came.
    asked: Arc<Mutex<Vec<String>>>,
    _serving: JoinSet<()>,
}

impl Told {
    pub(crate) async fn serve(answers: BTreeMap<String, String>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let asked = Arc::new(Mutex::new(Vec::new()));
        let mut serving = JoinSet::new();
        let heard = Arc::clone(&asked);
        serving.spawn(async move {
            // What has no length goes on for as long as this does.
            let mut endless = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = vec![0; 16 * 1024];
                let count = stream.read(&mut request).await.unwrap_or(0);
                let request = String::from_utf8_lossy(&request[..count]).into_owned();
                let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
                heard.lock().expect("nobody panicked").push(request);
                let answer = answers.get(&path).or_else(|| answers.get("*"));
                let answer = answer.map_or("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", String::as_str);
                let _ = stream.write_all(answer.as_bytes()).await;
                if !answer.contains("content-length") {
                    endless.push(stream);
                }
            }
        });
        Self {
            address,
            asked,
            _serving: serving,
        }
    }

    /// The requests that begin so.
    pub(crate) fn asked_to(&self, what: &str) -> Vec<String> {
        let asked = self.asked.lock().expect("nobody panicked");
        asked
            .iter()
            .filter(|request| request.starts_with(what))
            .cloned()
            .collect()
    }
}

pub(crate) fn answer(content_type: &'static str, body: &str) -> String {
    let mut headers = hyper::HeaderMap::new();
    dress(&mut headers, content_type);
    let headers: String = headers
        .iter()
        .map(|(name, value)| format!("{name}: {}\r\n", value.to_str().expect("text")))
        .collect();
    format!(
        "HTTP/1.1 200 OK\r\n{headers}connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

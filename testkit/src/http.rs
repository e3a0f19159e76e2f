//! The smallest HTTP client, and on purpose not the product's: it sees exactly what was sent. It asks in HTTP/1.0, so
//! that an answer ends when the connection does.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long an answer may take; a switchover is answered when it is over.
const LIMIT: Duration = Duration::from_secs(60);

/// An answer as it came.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Such as 200.
    pub status: u16,
    /// The header lines, without the status line.
    pub headers: Vec<String>,
    /// All that follows the empty line.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Errors
    /// When it is something else; the text is quoted.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).with_context(|| format!("HTTP {} and not JSON: {:?}", self.status, self.body))
    }
}

/// GET `path`.
///
/// # Errors
/// When there is no HTTP answer.
pub async fn get(address: SocketAddr, path: &str) -> Result<Answer> {
    ask(address, "GET", path, None).await
}

/// Sends one request on a connection of its own, and reads until the other side closes.
///
/// # Errors
/// When there is no HTTP answer.
pub async fn ask(address: SocketAddr, method: &str, path: &str, body: Option<&Value>) -> Result<Answer> {
    let mut request = format!("{method} {path} HTTP/1.0\r\nHost: {address}\r\n");
    let body = body.map(Value::to_string).unwrap_or_default();
    if !body.is_empty() {
        request.push_str(&format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n",
            body.len()
        ));
    }
    request.push_str("\r\n");
    request.push_str(&body);
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await?;
        anyhow::Ok(bytes)
    };
    let asked = || format!("{method} http://{address}{path}");
    let bytes = timeout(LIMIT, exchange)
        .await
        .with_context(asked)?
        .with_context(asked)?;
    parse(&String::from_utf8_lossy(&bytes)).with_context(asked)
}

fn parse(text: &str) -> Result<Answer> {
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        bail!("no HTTP answer: {text:?}")
    };
    let mut lines = head.split("\r\n").map(str::to_owned);
    let status_line = lines.next().unwrap_or_default();
    let status = status_line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.with_context(|| format!("no status line: {status_line:?}"))?;
    Ok(Answer {
        status,
        headers: lines.collect(),
        body: body.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_without_headers_is_read() {
        let answer = parse("HTTP/1.0 503 Service Unavailable\r\n\r\n").unwrap();
        assert_eq!(
            (answer.status, answer.headers.len(), answer.body.as_str()),
            (503, 0, "")
        );
        assert!(parse("").is_err() && parse("HTTP/1.0\r\n\r\n").is_err());
    }
}

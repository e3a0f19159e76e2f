//! The look at a server's first answer, before the client sees anything of it.

use std::io;

use tokio::net::TcpStream;

use crate::wire::first_answer::{FirstAnswer, LOOK_BYTES_MAX, first_answer, needs_a_look};

/// Waits for the server's first word. Only one byte is looked at, and left where it is, unless that begins something which
/// may have to be kept from the client: then the message is taken into `early`, in bounds. May be dropped at any time.
///
/// # Errors
/// When the connection breaks before that.
pub(crate) async fn look(server: &TcpStream, early: &mut Vec<u8>) -> io::Result<FirstAnswer> {
    let mut first = [0; 1];
    if server.peek(&mut first).await? == 0 || !needs_a_look(first[0]) {
        return Ok(FirstAnswer::ForTheClient);
    }
    let mut chunk = [0; LOOK_BYTES_MAX / 4];
    loop {
        server.readable().await?;
        match server.try_read(&mut chunk) {
            Ok(0) => return Ok(FirstAnswer::ForTheClient),
            Ok(count) => early.extend_from_slice(chunk.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        }
        match first_answer(early) {
            FirstAnswer::Incomplete if early.len() < 2 * LOOK_BYTES_MAX => {}
            FirstAnswer::Incomplete => return Ok(FirstAnswer::ForTheClient),
            told => return Ok(told),
        }
    }
}

//! The look at a server's first answer, before the client sees anything of it.

use std::io;

use crate::stream::Stream;
use crate::wire::first_answer::{FirstAnswer, LOOK_BYTES_MAX, first_answer, needs_a_look};

/// Waits for the server's first word. Only one byte is looked at, and left where it is, unless that begins something which
/// may have to be kept from the client: then the message is taken into `early`, in bounds. May be dropped at any time.
///
/// # Errors
/// When the connection breaks before that.
pub(crate) async fn look(server: &mut Stream, early: &mut Vec<u8>) -> io::Result<FirstAnswer> {
    if let Some(socket) = server.plain() {
        let mut first = [0; 1];
        if socket.peek(&mut first).await? == 0 || !needs_a_look(first[0]) {
            return Ok(FirstAnswer::ForTheClient);
        }
    }
    let mut chunk = [0; LOOK_BYTES_MAX / 4];
    loop {
        match server.read(&mut chunk).await? {
            0 => return Ok(FirstAnswer::ForTheClient),
            count => early.extend_from_slice(chunk.get(..count).unwrap_or_default()),
        }
        match first_answer(early) {
            _ if !early.first().copied().is_some_and(needs_a_look) => return Ok(FirstAnswer::ForTheClient),
            FirstAnswer::Incomplete if early.len() < 2 * LOOK_BYTES_MAX => {}
            FirstAnswer::Incomplete => return Ok(FirstAnswer::ForTheClient),
            told => return Ok(told),
        }
    }
}

//! The look at a server's first answer, before the client sees anything of it.

use std::io;

use crate::stream::Stream;
use crate::wire::first_answer::{FirstAnswer, LOOK_BYTES_MAX, first_answer, needs_a_look};
use crate::wire::sasl::{Offered, without_channel_binding};

/// Waits for the server's first word, and takes what has come of it into `early`: the whole message, in bounds, where it may
/// have to be kept from the client. May be dropped at any time.
///
/// # Errors
/// When the connection breaks before that.
pub(crate) async fn look(server: &mut Stream, early: &mut Vec<u8>) -> io::Result<FirstAnswer> {
    let by_tls = server.plain().is_none();
    let mut chunk = [0; LOOK_BYTES_MAX / 4];
    loop {
        match server.read(&mut chunk).await? {
            0 => return Ok(FirstAnswer::ForTheClient),
            count => early.extend_from_slice(chunk.get(..count).unwrap_or_default()),
        }
        let told = match early.first() {
            Some(first) if needs_a_look(*first) => first_answer(early),
            _ => FirstAnswer::ForTheClient,
        };
        let more = match told {
            FirstAnswer::Incomplete => true,
            FirstAnswer::ForTheClient if by_tls => {
                // The client speaks no TLS: it would have nothing to bind to.
                let offered = without_channel_binding(early);
                if let Offered::Less(bytes) = &offered {
                    early.clone_from(bytes);
                }
                offered == Offered::Incomplete
            }
            told => return Ok(told),
        };
        if !more || early.len() >= 2 * LOOK_BYTES_MAX {
            return Ok(FirstAnswer::ForTheClient);
        }
    }
}

//! What a client of the console says, before and after it has logged in.

use bytes::Bytes;

use crate::console::fuzzed;
use crate::wire::console::{Asked, BODY_BYTES_MAX, HEAD_BYTES, decode, head, sasl_initial};

/// Messages one after the other, as the console takes them out of the stream: none is longer than what it may be, and what
/// is read of one does not depend on what follows it.
pub(super) fn messages(input: &[u8]) {
    let mut rest = Bytes::copy_from_slice(input);
    while let Some(first) = rest.first_chunk::<HEAD_BYTES>() {
        let Ok((kind, length)) = head(*first) else { return };
        assert!(length <= BODY_BYTES_MAX, "a message of {length} bytes is taken");
        if rest.len() < HEAD_BYTES + length {
            return;
        }
        let message = rest.split_to(HEAD_BYTES + length);
        let body = message.slice(HEAD_BYTES..);
        let alone = decode(kind, Bytes::copy_from_slice(&body));
        assert_eq!(decode(kind, body), alone);
        match alone {
            Ok(Asked::Query(text) | Asked::Parse { text, .. }) => fuzzed::statements(&text),
            Ok(Asked::Password(word)) => {
                if let Some((_, first)) = sasl_initial(&word) {
                    fuzzed::log_in(&first, &rest);
                }
            }
            Ok(_) => {}
            Err(_) => return,
        }
    }
}

//! The first thing that a server says to a startup message: whether it takes connections at all. Pure and total.

/// The most that is looked at. A longer message is not one of those that are looked for.
pub const LOOK_BYTES_MAX: usize = 4096;
/// A server's sentence is passed on up to here.
const SAID_CHARS_MAX: usize = 300;
/// SQLSTATE `cannot_connect_now`: it is starting up, shutting down or in recovery.
const CANNOT_CONNECT_NOW: &[u8] = b"57P03";
const HEAD_BYTES: usize = 5;

/// What the first bytes of an answer tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FirstAnswer {
    /// Nothing yet: more bytes are needed.
    Incomplete,
    /// It is for the client.
    ForTheClient,
    /// The server takes no connections now, and says why.
    NotNow(String),
}

/// Whether bytes that begin so may have to be kept from the client, so that they must be read whole. An older server tells a
/// newer client which protocol it speaks before it says anything else.
#[must_use]
pub const fn needs_a_look(first: u8) -> bool {
    matches!(first, b'E' | b'v')
}

/// Looks at all that a server has said so far.
#[must_use]
pub fn first_answer(mut bytes: &[u8]) -> FirstAnswer {
    let mut room = LOOK_BYTES_MAX;
    loop {
        let Some(kind) = bytes.first() else {
            return FirstAnswer::Incomplete;
        };
        if !needs_a_look(*kind) {
            return FirstAnswer::ForTheClient;
        }
        let Some((head, rest)) = bytes.split_first_chunk::<HEAD_BYTES>() else {
            return FirstAnswer::Incomplete;
        };
        let [_, length @ ..] = *head;
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        // A server that cannot even start a process answers in the form of an older protocol, without a length.
        let Some(length) = length.checked_sub(4).filter(|length| *length <= room) else {
            return FirstAnswer::ForTheClient;
        };
        let Some((body, after)) = rest.split_at_checked(length) else {
            return FirstAnswer::Incomplete;
        };
        if *kind == b'E' {
            return refusal(body);
        }
        room = room.saturating_sub(length + HEAD_BYTES);
        bytes = after;
    }
}

/// An ErrorResponse's body: a code and a text per field.
fn refusal(body: &[u8]) -> FirstAnswer {
    let field = |code: u8| {
        let mut fields = body.split(|byte| *byte == 0).filter_map(|field| field.split_first());
        fields.find_map(|(first, text)| (*first == code).then_some(text))
    };
    if field(b'C') != Some(CANNOT_CONNECT_NOW) {
        return FirstAnswer::ForTheClient;
    }
    let mut said = String::from_utf8_lossy(field(b'M').unwrap_or_default()).into_owned();
    if let Some(detail) = field(b'D') {
        said = format!("{said} ({})", String::from_utf8_lossy(detail));
    }
    FirstAnswer::NotNow(said.chars().take(SAID_CHARS_MAX).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).expect("a short body");
        [&[kind][..], &length.to_be_bytes(), body].concat()
    }

    fn not_now() -> Vec<u8> {
        message(b'E', b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0")
    }

    #[test]
    fn only_a_server_that_takes_no_connections_now_is_kept_from_the_client() {
        let told = FirstAnswer::NotNow("the database system is starting up".to_owned());
        let detail = FirstAnswer::NotNow("not yet (not consistent)".to_owned());
        let cases = [
            (Vec::new(), FirstAnswer::Incomplete),
            (message(b'R', &[0; 4]), FirstAnswer::ForTheClient),
            (not_now(), told.clone()),
            (message(b'E', b"C57P03\0Mnot yet\0Dnot consistent\0\0"), detail),
            (
                message(b'E', b"SFATAL\0C28000\0Mno entry, not 57P03\0\0"),
                FirstAnswer::ForTheClient,
            ),
            ([message(b'v', &[0; 8]), not_now()].concat(), told),
            (
                [message(b'v', &[0; 8]), message(b'R', &[0; 4])].concat(),
                FirstAnswer::ForTheClient,
            ),
            (message(b'v', &[0; 8]), FirstAnswer::Incomplete),
            (
                b"Ecould not fork new process for connection\0".to_vec(),
                FirstAnswer::ForTheClient,
            ),
            (message(b'E', &[b'M'; LOOK_BYTES_MAX + 1]), FirstAnswer::ForTheClient),
            (b"E\0\0\0\x03".to_vec(), FirstAnswer::ForTheClient),
        ];
        for (bytes, expected) in cases {
            assert_eq!(first_answer(&bytes), expected, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn a_part_of_it_is_incomplete(cut in 0_usize..40) {
            let whole = not_now();
            prop_assert_eq!(first_answer(&whole[..cut.min(whole.len() - 1)]), FirstAnswer::Incomplete);
        }

        #[test]
        fn no_bytes_make_it_panic_or_wait_for_ever(bytes in proptest::collection::vec(any::<u8>(), 0..200), first in prop::sample::select(vec![b'E', b'v', b'R'])) {
            let bytes = [&[first][..], &bytes].concat();
            let _ = first_answer(&bytes);
            let long = [bytes, message(b'v', &[0; 100]).repeat(50)].concat();
            prop_assert!(long.len() < 2 * LOOK_BYTES_MAX);
            prop_assert_ne!(first_answer(&long), FirstAnswer::Incomplete);
        }
    }
}

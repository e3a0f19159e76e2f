//! What a server that is spoken with by TLS offers a client that is not: SCRAM that binds itself to the TLS session. The
//! client would take the offer for that of a stripped connection and give up, although the server takes SCRAM without as
//! well. Pure and total.

use super::first_answer::LOOK_BYTES_MAX;

/// Type, length, and what kind of authentication it is.
const HEAD_BYTES: usize = 9;
/// AuthenticationSASL: <https://www.postgresql.org/docs/18/protocol-message-formats.html>.
const SASL: u32 = 10;
/// How the names of mechanisms end that bind themselves to the channel.
const BOUND: &[u8] = b"-PLUS";

/// What is left of an offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Offered {
    /// More bytes are needed to know.
    Incomplete,
    /// Nothing is to be changed.
    Same,
    /// The bytes to be passed on instead.
    Less(Vec<u8>),
}

/// Looks at all that a server has said so far, and takes out of the first question for authentication what needs TLS. What
/// may come before it is passed over.
#[must_use]
pub fn without_channel_binding(bytes: &[u8]) -> Offered {
    let mut at = 0;
    loop {
        let rest = bytes.get(at..).unwrap_or_default();
        match rest.first() {
            None => return Offered::Incomplete,
            Some(b'R' | b'v' | b'N') => {}
            Some(_) => return Offered::Same,
        }
        let Some((&[kind, length @ ..], _)) = rest.split_first_chunk::<5>() else {
            return Offered::Incomplete;
        };
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if !(4..=LOOK_BYTES_MAX).contains(&length) {
            return Offered::Same;
        }
        let Some((message, after)) = rest.split_at_checked(length + 1) else {
            return Offered::Incomplete;
        };
        if kind == b'R' {
            let before = bytes.get(..at).unwrap_or_default();
            return less(message).map_or(Offered::Same, |message| {
                Offered::Less([before, &message, after].concat())
            });
        }
        at += message.len();
    }
}

/// The same message without the mechanisms that are bound, if it has such and others.
fn less(message: &[u8]) -> Option<Vec<u8>> {
    let (&[_, _, _, _, _, code @ ..], list) = message.split_first_chunk::<HEAD_BYTES>()?;
    if u32::from_be_bytes(code) != SASL {
        return None;
    }
    // Names, each with its end, and an empty one.
    let names = list.strip_suffix(b"\0\0")?.split(|byte| *byte == 0);
    let (bound, free): (Vec<&[u8]>, Vec<&[u8]>) = names.partition(|name| name.ends_with(BOUND));
    // An empty name would end what is left of the list before its end.
    if bound.is_empty() || free.is_empty() || free.contains(&&b""[..]) {
        return None;
    }
    let mut body = code.to_vec();
    for name in free {
        body.extend_from_slice(name);
        body.push(0);
    }
    body.push(0);
    let length = u32::try_from(body.len() + 4).ok()?;
    Some([&b"R"[..], &length.to_be_bytes(), &body].concat())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).expect("a short body");
        [&[kind][..], &length.to_be_bytes(), body].concat()
    }

    fn sasl(names: &[u8]) -> Vec<u8> {
        message(b'R', &[&[0, 0, 0, 10][..], names].concat())
    }

    #[test]
    fn only_what_is_bound_is_taken_out() {
        let both = sasl(b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0");
        let free = sasl(b"SCRAM-SHA-256\0\0");
        let version = message(b'v', &[0; 8]);
        assert_eq!(without_channel_binding(&both), Offered::Less(free.clone()));
        let around = |middle: &[u8]| [&version[..], middle, b"after"].concat();
        assert_eq!(without_channel_binding(&around(&both)), Offered::Less(around(&free)));
        for same in [
            free,
            sasl(b"SCRAM-SHA-256-PLUS\0\0"),
            sasl(b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256"),
            sasl(b"SCRAM-SHA-256-PLUS\0\0SCRAM-SHA-256\0\0"),
            message(b'R', &[0; 4]),
            message(b'R', b""),
            message(b'E', b"C28000\0\0"),
            b"R\0\0\0\x03".to_vec(),
            b"R\xff\xff\xff\xff".to_vec(),
        ] {
            assert_eq!(without_channel_binding(&same), Offered::Same, "{same:?}");
        }
        for cut in 0..both.len() {
            assert_eq!(without_channel_binding(&both[..cut]), Offered::Incomplete);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..100), names in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = without_channel_binding(&sasl(&names));
            let _ = without_channel_binding(&bytes);
            bytes.insert(0, b'R');
            let _ = without_channel_binding(&bytes);
        }
    }
}

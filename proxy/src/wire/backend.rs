//! What the relay needs to know of a server's bytes while it passes them on: the cancel key in the startup answer, and
//! whether the client was just told that the server waits for it. Pure and total.

use bytes::BytesMut;

use super::startup::CancelKey;

/// Type and length.
const HEAD_BYTES: usize = 5;
/// Process id and the longest secret.
const KEY_BYTES_MAX: usize = 260;

/// Walks over the messages of a startup answer, up to the first ReadyForQuery. Keeps a message's head while it is incomplete
/// and the body of BackendKeyData; looks at nothing else.
#[derive(Debug, Default)]
pub struct StartupWatch {
    state: WatchState,
    key: BytesMut,
}

#[derive(Debug)]
enum WatchState {
    /// Some bytes of a head are there.
    Head { bytes: [u8; HEAD_BYTES], have: usize },
    /// In the body of a message of this type.
    Body { kind: u8, left: usize },
    /// The first ReadyForQuery has passed, or what came is not the protocol.
    Over,
}

impl Default for WatchState {
    fn default() -> Self {
        Self::Head {
            bytes: [0; HEAD_BYTES],
            have: 0,
        }
    }
}

impl StartupWatch {
    /// Takes the next bytes from the server. Answers with the cancel key when its last byte is among them.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Option<CancelKey> {
        let mut found = None;
        while !bytes.is_empty() {
            let state = std::mem::replace(&mut self.state, WatchState::Over);
            self.state = match state {
                WatchState::Over => return found,
                WatchState::Head { bytes: mut head, have } => {
                    let (taken, rest) = bytes.split_at(bytes.len().min(HEAD_BYTES - have));
                    if let Some(place) = head.get_mut(have..have + taken.len()) {
                        place.copy_from_slice(taken);
                    }
                    bytes = rest;
                    let have = have + taken.len();
                    if have < HEAD_BYTES {
                        WatchState::Head { bytes: head, have }
                    } else {
                        self.enter(head)
                    }
                }
                WatchState::Body { kind, left } => {
                    let (taken, rest) = bytes.split_at(bytes.len().min(left));
                    bytes = rest;
                    if kind == b'K' {
                        self.key.extend_from_slice(taken);
                    }
                    self.leave_if_done(kind, left - taken.len(), &mut found)
                }
            };
        }
        found
    }

    /// A complete head: what follows it.
    fn enter(&mut self, head: [u8; HEAD_BYTES]) -> WatchState {
        let [kind, length @ ..] = head;
        let body = usize::try_from(u32::from_be_bytes(length))
            .ok()
            .and_then(|length| length.checked_sub(4));
        match body {
            None => WatchState::Over,
            Some(left) if kind == b'K' && left > KEY_BYTES_MAX => WatchState::Over,
            // One that says no status ends the startup all the same.
            Some(0) if kind == b'Z' => WatchState::Over,
            Some(0) => WatchState::default(),
            Some(left) => WatchState::Body { kind, left },
        }
    }

    fn leave_if_done(&mut self, kind: u8, left: usize, found: &mut Option<CancelKey>) -> WatchState {
        if left > 0 {
            return WatchState::Body { kind, left };
        }
        match kind {
            b'Z' => return WatchState::Over,
            // One that is none takes no other's place.
            b'K' => *found = CancelKey::new(&std::mem::take(&mut self.key)).or(found.take()),
            _ => {}
        }
        WatchState::default()
    }

    /// Whether there is nothing left to watch for.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        matches!(self.state, WatchState::Over)
    }

    /// Whether the next byte would begin a message, so that one of ours fits in here.
    #[must_use]
    pub const fn at_boundary(&self) -> bool {
        matches!(self.state, WatchState::Head { have: 0, .. })
    }
}

/// The last six bytes of a stream: as many as a ReadyForQuery has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tail([u8; Self::BYTES]);

impl Tail {
    /// How many they are.
    pub const BYTES: usize = 6;

    /// Moves on over `bytes`.
    pub fn push(&mut self, bytes: &[u8]) {
        if let Some(last) = bytes.last_chunk() {
            self.0 = *last;
            return;
        }
        self.0.rotate_left(bytes.len());
        let kept = self.0.len() - bytes.len();
        if let Some(place) = self.0.get_mut(kept..) {
            place.copy_from_slice(bytes);
        }
    }

    /// Whether these are a ReadyForQuery. Row data can look so by chance; a message boundary is certain only to a reader of
    /// every message.
    #[must_use]
    pub const fn is_ready_for_query(&self) -> bool {
        matches!(self.0, [b'Z', 0, 0, 0, 5, b'I' | b'T' | b'E'])
    }

    /// Whether these are a ReadyForQuery outside a transaction. The same holds.
    #[must_use]
    pub const fn is_idle(&self) -> bool {
        matches!(self.0, [b'Z', 0, 0, 0, 5, b'I'])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).expect("a short body");
        [&[kind][..], &length.to_be_bytes(), body].concat()
    }

    fn answer(key: &[u8]) -> Vec<u8> {
        [
            message(b'R', &[0; 4]),
            message(b'S', b"server_version\x0015\0"),
            message(b'K', key),
            message(b'Z', b"I"),
        ]
        .concat()
    }

    proptest! {
        #[test]
        fn the_key_is_found_however_the_answer_is_cut(secret in proptest::collection::vec(any::<u8>(), 4..=256), cuts in proptest::collection::vec(1_usize..40, 1..300)) {
            let key = [&[0, 0, 1, 2][..], &secret].concat();
            let answer = answer(&key);
            let mut watch = StartupWatch::default();
            let mut found = Vec::new();
            let mut rest = &answer[..];
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at(rest.len().min(*cut));
                found.extend(watch.feed(now));
                rest = later;
            }
            prop_assert_eq!(found, vec![CancelKey::new(&key).expect("a valid key")]);
            prop_assert!(watch.is_over());
        }

        #[test]
        fn no_bytes_make_it_panic_or_grow(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let mut watch = StartupWatch::default();
            for chunk in bytes.chunks(7) {
                let _ = watch.feed(chunk);
                prop_assert!(watch.key.len() <= KEY_BYTES_MAX);
            }
        }

        #[test]
        fn the_tail_is_the_end_of_the_stream(bytes in proptest::collection::vec(any::<u8>(), 6..60), cut in 1_usize..9) {
            let mut tail = Tail::default();
            for chunk in bytes.chunks(cut) {
                tail.push(chunk);
            }
            prop_assert_eq!(tail, Tail(*bytes.last_chunk().expect("six bytes")));
        }
    }

    #[test]
    fn ready_for_query_is_known_with_every_status_and_nothing_else() {
        for (status, ready) in [(b'I', true), (b'T', true), (b'E', true), (b'X', false)] {
            let mut tail = Tail::default();
            tail.push(&message(b'Z', &[status]));
            assert_eq!(tail.is_ready_for_query(), ready);
            assert_eq!(tail.is_idle(), status == b'I');
        }
        let mut tail = Tail::default();
        tail.push(&message(b'Z', b"I"));
        tail.push(b"D");
        assert!(!tail.is_ready_for_query());
    }

    #[test]
    fn a_boundary_is_known_while_the_answer_is_watched() {
        let mut watch = StartupWatch::default();
        assert_eq!(watch.feed(&message(b'R', &[0, 0, 0, 5])), None);
        assert!(watch.at_boundary());
        assert_eq!(watch.feed(b"S"), None);
        assert!(!watch.at_boundary());
    }
}

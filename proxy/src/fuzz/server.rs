//! What servers answer, before the relay looks at nothing any more.

use std::iter;

use bytes::BytesMut;
use pgwire::messages::response::ReadyForQuery;
use pgwire::messages::startup::Authentication;
use pgwire::messages::{DecodeContext, Message};
use tokio::net::UnixStream;

use super::{choice, message, packet, wait};
use crate::look::look;
use crate::stream::Stream;
use crate::stream::socket::Socket;
use crate::wire::backend::{StartupWatch, Tail};
use crate::wire::first_answer::{self, FirstAnswer, LOOK_BYTES_MAX};
use crate::wire::sasl::{Offered, without_channel_binding};
use crate::wire::startup::{CancelKey, FirstPacket};

const CANCEL_REQUEST: u32 = 80_877_102;
/// Process id and secret: <https://www.postgresql.org/docs/18/protocol-message-formats.html>.
const KEY_BYTES: std::ops::RangeInclusive<usize> = 8..=260;
/// More than this is not sent at once: it must fit between two sockets.
const STREAM_BYTES_MAX: usize = 32 * 1024;

/// The cancel keys in a startup answer, however it is cut.
pub(super) fn startup_watch(input: &[u8]) {
    let (piece, answer) = choice(input);
    let (mut at_once, mut in_pieces) = (StartupWatch::default(), StartupWatch::default());
    let pieces: Vec<CancelKey> = answer
        .chunks(piece + 1)
        .filter_map(|piece| in_pieces.feed(piece))
        .collect();
    // One call tells of one key: the last.
    assert_eq!(at_once.feed(answer).as_ref(), walked(answer).last());
    assert_eq!(
        (at_once.is_over(), at_once.at_boundary()),
        (in_pieces.is_over(), in_pieces.at_boundary())
    );
    if piece == 0 {
        assert_eq!(pieces, walked(answer));
    }
    for key in pieces {
        // The client sends it back as it came.
        let sent = walked(answer).into_iter().find(|found| found == &key);
        assert!(sent.is_some_and(|sent| sent.matches(&key)));
    }
}

/// The same, message by message.
fn walked(mut answer: &[u8]) -> Vec<CancelKey> {
    let next = || {
        let (&[kind, length @ ..], rest) = answer.split_first_chunk::<5>()?;
        let length = usize::try_from(u32::from_be_bytes(length)).ok()?.checked_sub(4)?;
        let (body, after) = rest.split_at_checked(length).filter(|_| kind != b'Z')?;
        answer = after;
        Some((kind, body))
    };
    let messages = iter::from_fn(next);
    let known = messages.take_while(|(kind, body)| *kind != b'K' || body.len() <= *KEY_BYTES.end());
    let keys = known.filter(|(kind, body)| *kind == b'K' && body.len() >= *KEY_BYTES.start());
    keys.filter_map(|(_, body)| {
        let key = CancelKey::new(body);
        let request = packet(&[&CANCEL_REQUEST.to_be_bytes()[..], body].concat());
        match FirstPacket::decode(request) {
            Ok(FirstPacket::Cancel { key: read, .. }) => assert_eq!(Some(&read), key.as_ref()),
            other => panic!("a key with which nothing can be cancelled: {other:?}"),
        }
        key
    })
    .collect()
}

/// The last bytes that a client got, by which the fence knows whether it can be spoken to.
pub(super) fn tail(input: &[u8]) {
    let (piece, stream) = choice(input);
    let (mut at_once, mut in_pieces) = (Tail::default(), Tail::default());
    at_once.push(stream);
    stream.chunks(piece + 1).for_each(|piece| in_pieces.push(piece));
    assert_eq!(at_once, in_pieces);
    let ends = stream.last_chunk::<6>();
    let read = ends.map(|end| ReadyForQuery::decode(&mut BytesMut::from(&end[..]), &DecodeContext::default()));
    if at_once.is_ready_for_query() {
        assert!(
            matches!(read, Some(Ok(Some(_)))),
            "the wire crate reads {ends:?} so: {read:?}"
        );
    }
    assert!(at_once.is_ready_for_query() || !at_once.is_idle());
}

/// Whether a server takes connections at all: known as soon as can be, never taken back, and not waited for without end.
fn first_told(input: &[u8]) -> FirstAnswer {
    let (cut, answer) = choice(input);
    let told = first_answer::first_answer(answer);
    let part = answer.get(..cut).unwrap_or(answer);
    match first_answer::first_answer(part) {
        FirstAnswer::Incomplete => {}
        early => assert_eq!(early, told, "after {} bytes", part.len()),
    }
    match &told {
        FirstAnswer::Incomplete => assert!(answer.len() < 2 * LOOK_BYTES_MAX, "it waits without end"),
        FirstAnswer::NotNow(said) => assert!(said.len() < LOOK_BYTES_MAX * 3),
        FirstAnswer::ForTheClient => {}
    }
    told
}

/// As it is told from bytes, and as it is read from a socket: not a byte of it is lost.
pub(super) fn first_answer(input: &[u8]) {
    let told = first_told(input);
    let (_, answer) = choice(input);
    if answer.len() > STREAM_BYTES_MAX {
        return;
    }
    wait(async {
        let Ok((near, far)) = UnixStream::pair() else {
            panic!("no sockets")
        };
        let far = Socket::Unix(far);
        assert!(answer.is_empty() || far.send(answer).is_ok_and(|count| count == answer.len()));
        assert!(far.finish_sending().is_ok());
        let mut server = Stream::Plain(Socket::Unix(near));
        let mut early = Vec::new();
        let Ok(looked) = look(&mut server, &mut early).await else {
            panic!("nothing has broken")
        };
        // A server that goes in the middle of a word is the client's to hear.
        let expected = match told {
            FirstAnswer::Incomplete => FirstAnswer::ForTheClient,
            told => told,
        };
        assert_eq!(looked, expected);
        let mut rest = [0; 4096];
        while let Ok(count @ 1..) = server.read(&mut rest).await {
            early.extend_from_slice(&rest[..count]);
        }
        assert_eq!(early, answer);
    });
}

/// An offer of authentication without what binds itself to TLS: known as soon as can be, and otherwise the same.
pub(super) fn channel_binding(input: &[u8]) {
    let (cut, answer) = choice(input);
    offered(answer, cut);
    // The same bytes as the list of an offer that is well formed around it.
    let list = message(b'R', &[&10_u32.to_be_bytes()[..], answer, b"\0\0"].concat());
    offered(&list, cut);
}

fn offered(answer: &[u8], cut: usize) {
    let told = without_channel_binding(answer);
    let part = answer.get(..cut).unwrap_or(answer);
    match (without_channel_binding(part), &told) {
        (Offered::Incomplete, _) => {}
        (Offered::Same, _) => assert_eq!(told, Offered::Same),
        (Offered::Less(early), Offered::Less(bytes)) => {
            let rest = answer.get(part.len()..).unwrap_or_default();
            assert_eq!([&early, rest].concat(), *bytes);
        }
        (early, told) => panic!("first {early:?}, then {told:?}"),
    }
    let Offered::Less(bytes) = told else { return };
    assert!(bytes.len() < answer.len());
    assert_eq!(without_channel_binding(&bytes), Offered::Same, "once is enough");
    let (Some(before), Some(after)) = (mechanisms(answer), mechanisms(&bytes)) else {
        panic!("the wire crate reads no offer where one was changed")
    };
    let free: Vec<String> = before.into_iter().filter(|name| !name.ends_with("-PLUS")).collect();
    assert!(!free.is_empty() && after == free, "{after:?} of {free:?}");
}

/// What the wire crate reads in the first question for authentication.
fn mechanisms(mut answer: &[u8]) -> Option<Vec<String>> {
    loop {
        let (&[kind, length @ ..], _) = answer.split_first_chunk::<5>()?;
        let length = usize::try_from(u32::from_be_bytes(length)).ok()?;
        let (message, after) = answer.split_at_checked(1 + length)?;
        if kind == b'R' {
            return match Authentication::decode(&mut BytesMut::from(message), &DecodeContext::default()) {
                Ok(Some(Authentication::SASL(names))) => Some(names),
                _ => None,
            };
        }
        answer = after;
    }
}

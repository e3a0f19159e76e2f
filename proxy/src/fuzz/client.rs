//! What clients, and proxies in front of us, send.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use bytes::{Bytes, BytesMut};
use pgwire::messages::cancel::CancelRequest;
use pgwire::messages::response::ErrorResponse;
use pgwire::messages::startup::{GssEncRequest, SslRequest, Startup};
use pgwire::messages::{DecodeContext, Message};
use rustix::net::RecvFlags;
use rustls::pki_types::CertificateDer;
use tokio::net::UnixStream;

use super::{choice, packet, wait};
use crate::admission::Who;
use crate::entrance::read_header;
use crate::handshake::{self, HandshakeError, Offer, Wish};
use crate::label::ApplicationName;
use crate::peer::Peer;
use crate::refusal as told;
use crate::secure::common_name;
use crate::stream::socket::Socket;
use crate::tls::ListenerTls;
use crate::wire::proxy_header::{HEADER_BYTES_MAX, Header, header};
use crate::wire::startup::{
    FirstPacket, NAME_BYTES_MAX, STARTUP_BYTES_MAX, STARTUP_BYTES_MIN, packet_bytes, parameters,
};

/// More than this is not sent at once: it must fit between two sockets.
const STREAM_BYTES_MAX: usize = 32 * 1024;

/// SSLRequest, GSSENCRequest, CancelRequest and StartupMessage: as they come, and as the rest of a packet whose length is
/// right.
pub(super) fn first_packet(input: &[u8]) {
    decoded(&Bytes::copy_from_slice(input));
    decoded(&packet(input));
}

fn decoded(packet: &Bytes) -> Option<FirstPacket> {
    let declared = packet.first_chunk().map(|head| packet_bytes(*head));
    if let Some(Ok(total)) = declared {
        assert!((STARTUP_BYTES_MIN..=STARTUP_BYTES_MAX).contains(&total));
    }
    let decoded = FirstPacket::decode(packet.clone()).ok()?;
    assert_eq!(declared, Some(Ok(packet.len())), "it is as long as it says");
    let cut = packet.slice(..packet.len() - 1);
    assert!(FirstPacket::decode(cut).is_err(), "no part of a packet is one");
    let mut buffer = BytesMut::from(&packet[..]);
    let context = DecodeContext::default();
    match &decoded {
        FirstPacket::Ssl => {
            assert_eq!(packet, &FirstPacket::ssl_request());
            assert!(matches!(SslRequest::decode(&mut buffer, &context), Ok(Some(_))));
        }
        FirstPacket::GssEnc => {
            assert!(matches!(GssEncRequest::decode(&mut buffer, &context), Ok(Some(_))));
        }
        FirstPacket::Cancel { key, bytes } => {
            assert_eq!(bytes, packet);
            assert_eq!(&key.process_id()[..], &packet[8..12]);
            assert!(key.matches(key));
            let Ok(Some(request)) = CancelRequest::decode(&mut buffer, &context) else {
                panic!("the wire crate does not take this cancel request")
            };
            let mut again = BytesMut::new();
            assert!(request.encode(&mut again).is_ok());
            assert_eq!(&again[..], &packet[..], "the wire crate reads the same request");
        }
        FirstPacket::Startup { bytes, .. } => {
            assert_eq!(bytes, packet);
            startup(packet, &mut buffer);
        }
    }
    assert!(buffer.is_empty() || matches!(decoded, FirstPacket::Startup { .. }));
    Some(decoded)
}

/// The parameters are all that is in it, and the wire crate reads the same ones.
fn startup(packet: &Bytes, buffer: &mut BytesMut) {
    let Ok(read) = parameters(packet) else {
        panic!("a startup message without parameters that can be read")
    };
    let texts = read.iter().flat_map(|(name, value)| [name, value]);
    let mut again: Vec<u8> = packet[..STARTUP_BYTES_MIN].to_vec();
    for text in texts {
        again.extend_from_slice(text);
        again.push(0);
    }
    again.push(0);
    assert_eq!(again, packet[..], "written again it is the same");
    let Ok(Some(other)) = Startup::decode(buffer, &DecodeContext::default()) else {
        panic!("the wire crate does not take this startup message")
    };
    let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
    let expected: BTreeMap<String, String> = read.iter().map(|(name, value)| (text(name), text(value))).collect();
    assert_eq!(other.parameters, expected);
}

/// A whole beginning of a connection, through sockets: a PROXY header where one is expected, requests for encryption, and
/// the packet that says what the client came for. What is behind that is handed on.
pub(super) fn opening(input: &[u8]) {
    let (how, stream) = choice(input);
    if stream.len() > STREAM_BYTES_MAX {
        return;
    }
    let tls = match how % 4 {
        0 => ListenerTls::Off,
        1 => ListenerTls::Passthrough,
        2 => ListenerTls::Allow,
        _ => ListenerTls::Require,
    };
    let behind_proxy = how & 4 != 0;
    wait(async {
        let Ok((near, far)) = UnixStream::pair() else {
            panic!("no sockets")
        };
        // All at once, and no more.
        let client = Socket::Unix(far);
        assert!(client.send(stream).is_ok_and(|count| count == stream.len()) || stream.is_empty());
        assert!(client.finish_sending().is_ok());
        let server = Socket::Unix(near);
        if behind_proxy && read_header(&server).await.is_err() {
            return;
        }
        let before = unread(&server);
        let offer = Offer { tls, accept: None };
        let Ok(arrived) = handshake::read(server, offer).await else {
            return;
        };
        let Some(server) = arrived.stream.plain() else {
            panic!("TLS without a certificate")
        };
        let rest = unread(server);
        match arrived.wish {
            Wish::Packet(FirstPacket::Startup { bytes, .. } | FirstPacket::Cancel { bytes, .. }) => {
                let handed_on = [&bytes[..], &arrived.more, &rest].concat();
                assert!(
                    before.ends_with(&handed_on),
                    "what is behind the packet is not handed on"
                );
            }
            Wish::Passthrough(bytes) => {
                assert_eq!(
                    [&bytes[..], &rest].concat(),
                    before[before.len() - rest.len() - bytes.len()..]
                );
            }
            Wish::Packet(packet) => panic!("nobody comes for a {packet:?}"),
            Wish::Refused(why) => {
                let fatal = told::unwelcome(&why);
                assert!(fatal.is_some() || matches!(why, HandshakeError::Malformed(_)), "{why}");
            }
        }
        let answers = unread(&client);
        assert!(
            answers.len() <= 2 && answers.iter().all(|answer| matches!(answer, b'N' | b'S')),
            "{answers:?}"
        );
    });
}

/// What has come and was not taken yet; it stays.
fn unread(socket: &Socket) -> Vec<u8> {
    let mut bytes = vec![0; STREAM_BYTES_MAX + 1];
    let peeked = rustix::net::recv(socket, &mut bytes[..], RecvFlags::PEEK | RecvFlags::DONTWAIT);
    bytes.truncate(peeked.map_or(0, |(_, count)| count));
    bytes
}

/// The name that servers see, written into a startup message with these parameters, and a template of any text.
pub(super) fn application_name(input: &[u8]) {
    const TEMPLATES: [&str; 4] = [
        "{name} via {address}",
        "{address}:{port} {name}",
        "{listener}",
        "{name}{name}{name}{address}{port}",
    ];
    let (how, body) = choice(input);
    let given = TEMPLATES.get(how % TEMPLATES.len()).copied().unwrap_or_default();
    let body = [&Startup::PROTOCOL_VERSION_3_0.to_be_bytes()[..], body].concat();
    written(given, how, &packet(&body));
    let (any, body) = input.split_at(input.len() / 2);
    let body = [&Startup::PROTOCOL_VERSION_3_2.to_be_bytes()[..], body].concat();
    written(&String::from_utf8_lossy(any), how, &packet(&body));
}

fn written(template: &str, how: usize, packet: &Bytes) {
    let (Ok(name), Some(FirstPacket::Startup { user, database, .. })) =
        (template.parse::<ApplicationName>(), decoded(packet))
    else {
        return;
    };
    let peer = match how / 4 % 3 {
        0 => Peer::Unix,
        1 => Peer::Ip(SocketAddr::from(([10, 1, 1, 1], 5))),
        _ => Peer::Ip(SocketAddr::new(IpAddr::from([0xff; 16]), u16::MAX)),
    };
    let whole = name.write(packet, &peer, "db.example.org:5432");
    let Some(FirstPacket::Startup {
        user: user_now,
        database: database_now,
        ..
    }) = decoded(&whole)
    else {
        panic!("it is no startup message any more")
    };
    assert_eq!((user, database), (user_now, database_now));
    let (Ok(before), Ok(after)) = (parameters(packet), parameters(&whole)) else {
        panic!("it could be read")
    };
    if before.iter().any(|(key, _)| key == "replication") {
        assert_eq!(&whole, packet, "standbys are known by their names");
    }
    let is_name = |(key, _): &(Bytes, Bytes)| key == "application_name";
    let at = before.iter().rposition(is_name);
    for (place, pair) in before.iter().enumerate().filter(|(place, _)| Some(*place) != at) {
        assert_eq!(after.get(place), Some(pair), "only the name changes");
    }
    let value = after.iter().rfind(|pair| is_name(pair)).map(|(_, value)| value.len());
    assert!(
        whole == *packet || value.is_some_and(|bytes| bytes <= NAME_BYTES_MAX),
        "{value:?}"
    );
}

/// A PROXY protocol header, read as it comes and byte by byte.
pub(super) fn proxy_header(input: &[u8]) {
    let (how, stream) = choice(input);
    let as_told = taken(stream, usize::MAX);
    assert_eq!(as_told, taken(stream, 1), "byte by byte");
    assert_eq!(as_told, taken(stream, 1 + how), "in pieces of {}", 1 + how);
    if let Some(Taken::Whole(bytes, Some(source))) = as_told {
        let line = stream.starts_with(b"P");
        let again = if line { line_of(source) } else { block_of(source) };
        let read = taken(&again, usize::MAX);
        assert_eq!(read, Some(Taken::Whole(again.len(), Some(source))), "of {bytes} bytes");
    }
}

#[derive(Debug, PartialEq)]
enum Taken {
    Whole(usize, Option<SocketAddr>),
    Refused,
}

/// What a reader makes of a stream that gives at most so many bytes at a time; nothing when the stream ends too early.
fn taken(stream: &[u8], at_a_time: usize) -> Option<Taken> {
    let mut have = 0;
    loop {
        match header(&stream[..have]) {
            Err(_) => return Some(Taken::Refused),
            Ok(Header::Complete(source)) => return Some(Taken::Whole(have, source)),
            Ok(Header::Incomplete(missing)) => {
                assert!(missing > 0 && have + missing <= HEADER_BYTES_MAX);
                let there = stream.len() - have;
                if there == 0 {
                    return None;
                }
                have += missing.min(at_a_time).min(there);
            }
        }
    }
}

/// The line that tells of `source`.
fn line_of(source: SocketAddr) -> Vec<u8> {
    let (family, other) = if source.is_ipv4() {
        (4, "10.0.0.1")
    } else {
        (6, "fd00::1")
    };
    let (ip, port) = (source.ip(), source.port());
    format!("PROXY TCP{family} {ip} {other} {port} 5432\r\n").into_bytes()
}

/// The same in the form of version 2.
fn block_of(source: SocketAddr) -> Vec<u8> {
    let (kind, ip) = match source.ip() {
        IpAddr::V4(ip) => (0x11, ip.octets().to_vec()),
        IpAddr::V6(ip) => (0x21, ip.octets().to_vec()),
    };
    let ports = [source.port().to_be_bytes(), 5432_u16.to_be_bytes()].concat();
    let body = [&ip[..], &ip, &ports].concat();
    let length = u16::try_from(body.len()).unwrap_or_default().to_be_bytes();
    [b"\r\n\r\n\0\r\nQUIT\n\x21".as_slice(), &[kind], &length, &body].concat()
}

/// A certificate of which the handshake has already found that a known authority signed it.
pub(super) fn certificate(input: &[u8]) {
    let _ = common_name(&CertificateDer::from(input));
}

/// What a client is told may hold its own words: they arrive as one field, whatever they are.
pub(super) fn refusal(input: &[u8]) {
    let (user, rest) = input.split_at(input.len() / 2);
    let who = Who {
        user: Some(String::from_utf8_lossy(user).into_owned()),
        database: Some(String::from_utf8_lossy(rest).into_owned()),
        address: None,
    };
    for fatal in [
        told::not_allowed(&who),
        told::not_your_certificate(who.database.as_deref(), who.user.as_deref()),
    ] {
        let bytes = fatal.encode();
        let read = ErrorResponse::decode(&mut BytesMut::from(&bytes[..]), &DecodeContext::default());
        let Ok(Some(read)) = read else {
            panic!("the wire crate does not take what is said")
        };
        let field = |code: u8| {
            read.fields
                .iter()
                .find(|(found, _)| *found == code)
                .map(|(_, text)| text.as_str())
        };
        assert_eq!(field(b'C'), Some(fatal.sqlstate()));
        assert_eq!(field(b'M'), Some(fatal.message().replace('\0', "\u{FFFD}").as_str()));
    }
}

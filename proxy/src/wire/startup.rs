//! The first packets of a connection: SSLRequest, GSSENCRequest, CancelRequest, StartupMessage. Pure and total.

use bytes::{Bytes, BytesMut};
use pgwire::messages::cancel::CancelRequest;
use pgwire::messages::startup::{GssEncRequest, SslRequest, Startup};
use pgwire::messages::{DecodeContext, Message};

/// What PostgreSQL takes, `MAX_STARTUP_PACKET_LENGTH` in `src/include/libpq/pqcomm.h`.
pub const STARTUP_BYTES_MAX: usize = 10_000;
/// The length itself and a code.
pub const STARTUP_BYTES_MIN: usize = 8;
/// The shortest secret in a cancel key, protocol 3.0.
const SECRET_BYTES_MIN: usize = 4;
/// The longest, protocol 3.2: <https://www.postgresql.org/docs/18/protocol-message-formats.html>.
const SECRET_BYTES_MAX: usize = 256;
/// `NAMEDATALEN` less its terminator.
pub const NAME_BYTES_MAX: usize = 63;
/// Length, code and process id.
const CANCEL_HEAD_BYTES: usize = 12;

/// What cancels a query: a process id and a secret, as the server gave them to its client.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct CancelKey(Box<[u8]>);

impl CancelKey {
    /// From process id and secret, or nothing when there are too few or too many bytes.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let secret_bytes = bytes.len().checked_sub(4)?;
        (SECRET_BYTES_MIN..=SECRET_BYTES_MAX)
            .contains(&secret_bytes)
            .then(|| Self(bytes.into()))
    }

    /// The process id, under which keys are found. It is no secret.
    #[must_use]
    pub fn process_id(&self) -> [u8; 4] {
        self.0.first_chunk().copied().unwrap_or_default()
    }

    /// Equality that takes as long for a near miss as for a far one.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        let difference = self.0.iter().zip(other.0.iter()).fold(0, |all, (a, b)| all | (a ^ b));
        self.0.len() == other.0.len() && difference == 0
    }
}

impl std::fmt::Debug for CancelKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "CancelKey(process {}, secret)",
            i32::from_be_bytes(self.process_id())
        )
    }
}

/// A whole first packet. What is forwarded are always the bytes as they came: a decoded and encoded startup message is
/// another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FirstPacket {
    /// The client would like TLS.
    Ssl,
    /// The client would like GSSAPI encryption.
    GssEnc,
    /// Somebody's query is to be cancelled.
    Cancel {
        /// Whose.
        key: CancelKey,
        /// The packet.
        bytes: Bytes,
    },
    /// A session is asked for.
    Startup {
        /// As whom, so far as that is text and no longer than a name can be.
        user: Option<String>,
        /// Where to; the user's own name unless another was given. Nothing for physical replication.
        database: Option<String>,
        /// The packet.
        bytes: Bytes,
    },
}

/// Why a first packet is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A TLS ClientHello without an SSLRequest.
    #[error("direct TLS is not offered here")]
    DirectTls,
    /// Direct TLS whose client did not say that it speaks PostgreSQL's protocol inside it.
    #[error("direct TLS without the ALPN protocol \"postgresql\"")]
    NoAlpn,
    /// No PostgreSQL client writes this length.
    #[error("invalid length of startup packet: {0}")]
    Length(u32),
    /// Only versions 3.x are spoken.
    #[error("unsupported frontend protocol {major}.{minor}: this proxy speaks 3.x")]
    Protocol {
        /// The upper half of the code.
        major: u16,
        /// The lower half.
        minor: u16,
    },
    /// The parameters are not pairs of texts with a terminator.
    #[error("invalid startup packet layout: expected terminator as last byte")]
    Layout,
    /// Neither 4 nor up to 256 bytes of secret.
    #[error("invalid length of cancel request")]
    Cancel,
    /// Bytes that came with an SSLRequest, before its answer, would be taken for part of the encrypted stream.
    #[error("received unencrypted data after SSL request")]
    EarlyData,
    /// A second request of the same kind.
    #[error("repeated encryption request")]
    Repeated,
}

/// Whether this is how a TLS handshake begins: a record of that kind, version 3.x.
#[must_use]
pub const fn begins_tls(header: [u8; 4]) -> bool {
    matches!(header, [0x16, 0x03, ..])
}

/// How long the packet is that starts with `header`, its own four bytes included.
///
/// # Errors
/// When no first packet of PostgreSQL's starts so.
pub fn packet_bytes(header: [u8; 4]) -> Result<usize, Malformed> {
    if begins_tls(header) {
        return Err(Malformed::DirectTls);
    }
    let length = u32::from_be_bytes(header);
    match usize::try_from(length) {
        Ok(total) if (STARTUP_BYTES_MIN..=STARTUP_BYTES_MAX).contains(&total) => Ok(total),
        Ok(_) | Err(_) => Err(Malformed::Length(length)),
    }
}

impl FirstPacket {
    /// The request for TLS.
    #[must_use]
    pub const fn ssl_request() -> Bytes {
        Bytes::from_static(&[0, 0, 0, 8, 4, 210, 22, 47])
    }

    /// Reads exactly one packet of the length that it declares.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn decode(bytes: Bytes) -> Result<Self, Malformed> {
        let header = bytes.first_chunk().copied().ok_or(Malformed::Layout)?;
        if packet_bytes(header)? != bytes.len() {
            return Err(Malformed::Length(u32::from_be_bytes(header)));
        }
        if SslRequest::is_ssl_request_packet(&bytes) {
            return exactly(&bytes, Self::Ssl);
        }
        if GssEncRequest::is_gss_enc_request_packet(&bytes) {
            return exactly(&bytes, Self::GssEnc);
        }
        if CancelRequest::is_cancel_request_packet(&bytes) {
            return decode_cancel(bytes);
        }
        decode_startup(bytes)
    }
}

/// The two requests are their code alone.
fn exactly(bytes: &[u8], packet: FirstPacket) -> Result<FirstPacket, Malformed> {
    if bytes.len() == STARTUP_BYTES_MIN {
        Ok(packet)
    } else {
        Err(Malformed::Layout)
    }
}

fn decode_cancel(bytes: Bytes) -> Result<FirstPacket, Malformed> {
    let secret_bytes = bytes.len().checked_sub(CANCEL_HEAD_BYTES);
    if !secret_bytes.is_some_and(|count| (SECRET_BYTES_MIN..=SECRET_BYTES_MAX).contains(&count)) {
        return Err(Malformed::Cancel);
    }
    // Decoded only as a check: the key is kept as the bytes that came.
    let decoded = CancelRequest::decode(&mut BytesMut::from(&bytes[..]), &DecodeContext::default());
    let key = CancelKey::new(bytes.get(STARTUP_BYTES_MIN..).unwrap_or_default());
    match (decoded, key) {
        (Ok(Some(_)), Some(key)) => Ok(FirstPacket::Cancel { key, bytes }),
        _ => Err(Malformed::Cancel),
    }
}

fn decode_startup(bytes: Bytes) -> Result<FirstPacket, Malformed> {
    let Some(&[_, _, _, _, major_high, major_low, minor_high, minor_low]) = bytes.first_chunk() else {
        return Err(Malformed::Layout);
    };
    let major = u16::from_be_bytes([major_high, major_low]);
    let minor = u16::from_be_bytes([minor_high, minor_low]);
    if major != Startup::PG_PROTOCOL_LATEST {
        return Err(Malformed::Protocol { major, minor });
    }
    if bytes.len() == STARTUP_BYTES_MIN || bytes.last() != Some(&0) {
        return Err(Malformed::Layout);
    }
    let parameters = parameters(&bytes)?;
    // PostgreSQL goes by the last, and by no more of it than a name may have.
    let last = |name: &[u8]| {
        let mut named = parameters.iter().rev().filter(|(key, _)| key == name);
        let (_, value) = named.next()?;
        (!value.is_empty()).then_some(value)
    };
    let text = |value: &Bytes| {
        let cut = value.get(..NAME_BYTES_MAX).unwrap_or(value);
        String::from_utf8_lossy(cut).into_owned()
    };
    let user = last(b"user").map(text);
    let physical = last(b"replication").is_some_and(|value| is_true(value));
    let database = last(b"database").map(text).or_else(|| user.clone());
    Ok(FirstPacket::Startup {
        user,
        database: database.filter(|_| !physical),
        bytes,
    })
}

/// The parameters of a startup message, in their order, as they came.
///
/// # Errors
/// When they are not pairs of texts with a terminator behind them.
pub fn parameters(packet: &Bytes) -> Result<Vec<(Bytes, Bytes)>, Malformed> {
    let mut rest = packet.get(STARTUP_BYTES_MIN..).ok_or(Malformed::Layout)?;
    let mut parameters = Vec::new();
    loop {
        let (name, after) = text(rest).ok_or(Malformed::Layout)?;
        if name.is_empty() {
            return if after.is_empty() {
                Ok(parameters)
            } else {
                Err(Malformed::Layout)
            };
        }
        let (value, after) = text(after).ok_or(Malformed::Layout)?;
        parameters.push((packet.slice_ref(name), packet.slice_ref(value)));
        rest = after;
    }
}

/// The `application_name` of a startup message, so far as it is text and no longer than PostgreSQL keeps it.
#[must_use]
pub fn application_name(packet: &Bytes) -> Option<Box<str>> {
    let parameters = parameters(packet).ok()?;
    let mut named = parameters
        .iter()
        .rev()
        .filter(|(key, _)| key == b"application_name".as_slice());
    let (_, value) = named.next()?;
    let cut = value.get(..NAME_BYTES_MAX).unwrap_or(value);
    (!cut.is_empty()).then(|| String::from_utf8_lossy(cut).into())
}

/// A startup message whose `application_name` is what `write` makes of the one that it has; all else is as it was. Nothing for
/// replication, whose standbys are known by that name, and for a message that would become too long.
pub fn with_application_name(packet: &Bytes, write: impl FnOnce(&[u8]) -> Vec<u8>) -> Option<Bytes> {
    const KEY: &[u8] = b"application_name";
    let mut parameters = parameters(packet).ok()?;
    if parameters.iter().any(|(key, _)| key == b"replication".as_slice()) {
        return None;
    }
    // PostgreSQL goes by the last.
    match parameters.iter_mut().rfind(|(key, _)| key == KEY) {
        Some((_, value)) => *value = write(value).into(),
        None => parameters.push((Bytes::from_static(KEY), write(b"").into())),
    }
    let texts = parameters.iter().flat_map(|(key, value)| [key, value]);
    let total = texts
        .clone()
        .fold(STARTUP_BYTES_MIN + 1, |sum, text| sum + text.len() + 1);
    let length = u32::try_from(total).ok().filter(|_| total <= STARTUP_BYTES_MAX)?;
    let mut written = BytesMut::with_capacity(total);
    written.extend_from_slice(&length.to_be_bytes());
    written.extend_from_slice(packet.get(4..STARTUP_BYTES_MIN)?);
    for text in texts {
        written.extend_from_slice(text);
        written.extend_from_slice(&[0]);
    }
    written.extend_from_slice(&[0]);
    Some(written.freeze())
}

/// What precedes the first NUL, and what follows it.
fn text(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    let (text, after) = bytes.split_at(end);
    Some((text, after.get(1..)?))
}

/// PostgreSQL's yes, in all its words; `database` asks for replication that is of one.
fn is_true(value: &[u8]) -> bool {
    let value = value.to_ascii_lowercase();
    value == b"on" || value == b"1" || b"true".starts_with(&value) || b"yes".starts_with(&value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packet(code: u32, body: &[u8]) -> Bytes {
        let total = u32::try_from(8 + body.len()).expect("a short body");
        [&total.to_be_bytes()[..], &code.to_be_bytes(), body].concat().into()
    }

    #[test]
    fn each_kind_is_known_by_its_code() {
        assert_eq!(FirstPacket::decode(packet(80_877_103, b"")), Ok(FirstPacket::Ssl));
        assert_eq!(packet(80_877_103, b""), FirstPacket::ssl_request());
        assert_eq!(FirstPacket::decode(packet(80_877_104, b"")), Ok(FirstPacket::GssEnc));
        assert_eq!(FirstPacket::decode(packet(80_877_103, b"x")), Err(Malformed::Layout));
        let startup = packet(196_608, b"user\0ann\0database\0d\0\0");
        let expected = FirstPacket::Startup {
            user: Some("ann".to_owned()),
            database: Some("d".to_owned()),
            bytes: startup.clone(),
        };
        assert_eq!(FirstPacket::decode(startup), Ok(expected));
        assert_eq!(
            FirstPacket::decode(packet(131_072, b"")),
            Err(Malformed::Protocol { major: 2, minor: 0 })
        );
    }

    #[test]
    fn a_startup_message_needs_its_terminator() {
        assert_eq!(
            FirstPacket::decode(packet(196_608, b"user\0ann")),
            Err(Malformed::Layout)
        );
        assert_eq!(FirstPacket::decode(packet(196_608, b"")), Err(Malformed::Layout));
    }

    #[test]
    fn user_and_database_are_read_as_postgresql_reads_them() {
        let cases: [(&[u8], Option<&str>, Option<&str>); 8] = [
            (b"user\0ann\0\0", Some("ann"), Some("ann")),
            (b"user\0ann\0database\0\0\0", Some("ann"), Some("ann")),
            (b"user\0ann\0database\0d\0user\0bob\0\0", Some("bob"), Some("d")),
            (b"database\0d\0user\0ann\0\0", Some("ann"), Some("d")),
            (b"user\0ann\0replication\0tr\0\0", Some("ann"), None),
            (b"user\0ann\0replication\0database\0\0", Some("ann"), Some("ann")),
            (b"user\0\xff\0database\0d\0\0", Some("\u{FFFD}"), Some("d")),
            (b"database\0d\0\0", None, Some("d")),
        ];
        for (body, expected_user, expected_database) in cases {
            match FirstPacket::decode(packet(196_608, body)) {
                Ok(FirstPacket::Startup { user, database, .. }) => {
                    assert_eq!(
                        (user.as_deref(), database.as_deref()),
                        (expected_user, expected_database)
                    );
                }
                other => panic!("{other:?}"),
            }
        }
        let long = [b"user\0", &[b'x'; 100][..], b"\0\0"].concat();
        match FirstPacket::decode(packet(196_608, &long)) {
            Ok(FirstPacket::Startup { user, .. }) => assert_eq!(user.map(|user| user.len()), Some(NAME_BYTES_MAX)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nothing_follows_the_terminator_and_every_name_has_a_value() {
        for body in [
            &b"user\0ann\0\0x\0"[..],
            b"user\0\0",
            b"user\0ann\0database\0\0",
            b"\0\0",
        ] {
            assert_eq!(
                FirstPacket::decode(packet(196_608, body)),
                Err(Malformed::Layout),
                "{body:?}"
            );
        }
    }

    #[test]
    fn cancel_keys_of_both_protocols_are_taken_whole() {
        for secret_bytes in [4, 18, 32, 256] {
            let key = vec![7_u8; 4 + secret_bytes];
            let bytes = packet(80_877_102, &key);
            let expected = CancelKey::new(&key).expect("a valid key");
            match FirstPacket::decode(bytes.clone()) {
                Ok(FirstPacket::Cancel { key, bytes: kept }) => {
                    assert!(key.matches(&expected));
                    assert_eq!(kept, bytes);
                }
                other => panic!("{other:?}"),
            }
        }
        for secret_bytes in [0, 3, 257] {
            let bytes = packet(80_877_102, &vec![7_u8; 4 + secret_bytes]);
            assert_eq!(FirstPacket::decode(bytes), Err(Malformed::Cancel));
        }
    }

    #[test]
    fn keys_match_only_whole() {
        let key = |bytes: &[u8]| CancelKey::new(bytes).expect("a valid key");
        assert!(key(b"pid.secret").matches(&key(b"pid.secret")));
        assert!(!key(b"pid.secret").matches(&key(b"pid.secreT")));
        assert!(!key(b"pid.secret").matches(&key(b"pid.secret2")));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = FirstPacket::decode(bytes.into());
        }

        #[test]
        fn no_well_framed_body_makes_it_panic(
            code in prop_oneof![Just(196_608_u32), Just(196_610), Just(80_877_102), Just(80_877_103), Just(80_877_104), any::<u32>()],
            body in proptest::collection::vec(any::<u8>(), 0..400),
        ) {
            match FirstPacket::decode(packet(code, &body)) {
                Ok(FirstPacket::Startup { bytes, .. } | FirstPacket::Cancel { bytes, .. }) => prop_assert_eq!(&bytes[8..], &body),
                Ok(FirstPacket::Ssl | FirstPacket::GssEnc) | Err(_) => {}
            }
        }

        #[test]
        fn parameters_are_what_was_sent(pairs in proptest::collection::vec(("[^\0]{1,9}", "[^\0]{0,9}"), 0..9)) {
            let texts = pairs.iter().flat_map(|(name, value)| [name.as_bytes(), b"\0", value.as_bytes(), b"\0"]);
            let body = [texts.collect::<Vec<_>>().concat(), b"\0".to_vec()].concat();
            let read = parameters(&packet(196_608, &body)).expect("well formed");
            let read: Vec<(String, String)> = read
                .iter()
                .map(|(name, value)| (String::from_utf8_lossy(name).into(), String::from_utf8_lossy(value).into()))
                .collect();
            prop_assert_eq!(read, pairs);
        }

        #[test]
        fn a_length_out_of_bounds_sizes_no_buffer(header: [u8; 4]) {
            if let Ok(total) = packet_bytes(header) {
                prop_assert!((STARTUP_BYTES_MIN..=STARTUP_BYTES_MAX).contains(&total));
            }
        }
    }
}

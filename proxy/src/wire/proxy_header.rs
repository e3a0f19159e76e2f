//! The PROXY protocol's header, versions 1 and 2: who the client of a proxy in front of us is. Pure and total.
//!
//! <https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The longest line of version 1, its end included.
const LINE_BYTES_MAX: usize = 107;
/// The shortest header of all: `PROXY UNKNOWN` and the line's end.
const HEADER_BYTES_MIN: usize = 15;
/// The longest header of version 2 that is taken. Addresses take 216 bytes at most, the rest is for additions, which are not
/// looked at; what is longer does not fit in the smallest segment that every host takes.
pub const HEADER_BYTES_MAX: usize = 536;
const LINE_START: &[u8] = b"PROXY ";
const LINE_END: &[u8] = b"\r\n";
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family and protocol, length.
const HEAD_BYTES: usize = 16;

/// What the first bytes of a connection tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// At least so many more bytes belong to it, and are more than none.
    Incomplete(usize),
    /// All of it is there. The client's address; nothing when the proxy connected for itself, or tells no address.
    Complete(Option<SocketAddr>),
}

/// Why bytes are no header.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    /// They begin otherwise.
    #[error("the connection does not begin with a PROXY protocol header")]
    Absent,
    /// A line that is not as the protocol has it, or too long.
    #[error("a PROXY protocol line that cannot be read")]
    Line,
    /// Another version, command, family or protocol.
    #[error("a PROXY protocol header of a kind that is not known: {0:#04x} {1:#04x}")]
    Kind(u8, u8),
    /// Too short for its addresses, or too long.
    #[error("a PROXY protocol header of an impossible length: {0}")]
    Length(usize),
}

/// Looks at all that has come so far. Whoever reads as many more bytes as are said to be missing reads nothing behind it.
///
/// # Errors
/// As soon as the bytes cannot become a header.
pub fn header(bytes: &[u8]) -> Result<Header, BadHeader> {
    if begins(bytes, SIGNATURE) {
        return version_2(bytes);
    }
    if begins(bytes, LINE_START) {
        return version_1(bytes);
    }
    Err(BadHeader::Absent)
}

/// Whether `bytes` begin with `start`, or are the beginning of it.
fn begins(bytes: &[u8], start: &[u8]) -> bool {
    bytes.iter().zip(start).all(|(byte, expected)| byte == expected)
}

fn version_1(bytes: &[u8]) -> Result<Header, BadHeader> {
    if let Some(missing) = HEADER_BYTES_MIN.checked_sub(bytes.len()).filter(|missing| *missing > 0) {
        // Nothing in a line but its end is a line feed.
        return if bytes.contains(&b'\n') {
            Err(BadHeader::Line)
        } else {
            Ok(Header::Incomplete(missing))
        };
    }
    let Some(line) = bytes.strip_suffix(LINE_END) else {
        let ends = if bytes.ends_with(b"\r") { 1 } else { LINE_END.len() };
        let too_long = bytes.len() + ends > LINE_BYTES_MAX;
        return if too_long || bytes.contains(&b'\n') {
            Err(BadHeader::Line)
        } else {
            Ok(Header::Incomplete(ends))
        };
    };
    let line = std::str::from_utf8(line).map_err(|_| BadHeader::Line)?;
    if bytes.len() > LINE_BYTES_MAX || line.contains(['\r', '\n']) {
        return Err(BadHeader::Line);
    }
    let mut words = line.split(' ').skip(1);
    let source = match words.next() {
        Some("UNKNOWN") => return Ok(Header::Complete(None)), // Whatever follows is to be ignored.
        Some("TCP4") => addresses::<Ipv4Addr>(&mut words),
        Some("TCP6") => addresses::<Ipv6Addr>(&mut words),
        _ => None,
    };
    match (source, words.next()) {
        (Some(source), None) => Ok(Header::Complete(Some(source))),
        _ => Err(BadHeader::Line),
    }
}

/// Source address, destination address, source port, destination port: the source.
fn addresses<'a, A>(words: &mut impl Iterator<Item = &'a str>) -> Option<SocketAddr>
where
    A: std::str::FromStr + Into<IpAddr>,
{
    let source: A = words.next()?.parse().ok()?;
    let _destination: A = words.next()?.parse().ok()?;
    let port = port(words.next()?)?;
    self::port(words.next()?)?;
    Some(SocketAddr::new(source.into(), port))
}

fn port(word: &str) -> Option<u16> {
    let digits = word.bytes().all(|digit| digit.is_ascii_digit());
    let plain = digits && (word == "0" || !word.starts_with('0'));
    plain.then(|| word.parse().ok())?
}

fn version_2(bytes: &[u8]) -> Result<Header, BadHeader> {
    if let Some(missing) = HEAD_BYTES.checked_sub(bytes.len()).filter(|missing| *missing > 0) {
        // As long as it may still be a line, no more than a line has.
        let missing = if bytes.is_empty() { HEADER_BYTES_MIN } else { missing };
        return Ok(Header::Incomplete(missing));
    }
    let Some(&[.., command, kind, high, low]) = bytes.first_chunk::<HEAD_BYTES>() else {
        return Err(BadHeader::Absent);
    };
    let length = usize::from(u16::from_be_bytes([high, low]));
    // Version in the upper half; 0 is the proxy itself, 1 a client of it.
    let is_proxys_own = match command {
        0x20 => true,
        0x21 => false,
        _ => return Err(BadHeader::Kind(command, kind)),
    };
    // Family in the upper half; unspecified, stream or datagram in the lower.
    let needed = match kind {
        0x11 => 12,
        0x21 => 36,
        0x31 => 216,
        // Of the proxy's own connection nothing is of interest, and what is unspecified has no form.
        _ if is_proxys_own => 0,
        0x00 => 0,
        _ => return Err(BadHeader::Kind(command, kind)),
    };
    if HEAD_BYTES + length > HEADER_BYTES_MAX || (!is_proxys_own && length < needed) {
        return Err(BadHeader::Length(length));
    }
    let body = bytes.get(HEAD_BYTES..).unwrap_or_default();
    match length.checked_sub(body.len()) {
        None => return Err(BadHeader::Length(length)), // More was read than was asked for.
        Some(0) => {}
        Some(missing) => return Ok(Header::Incomplete(missing)),
    }
    Ok(Header::Complete(if is_proxys_own { None } else { source(kind, body) }))
}

/// A unix socket of the proxy's host is no address: the client is then where the proxy is.
fn source(kind: u8, body: &[u8]) -> Option<SocketAddr> {
    let port = |at: usize| Some(u16::from_be_bytes(*body.get(at..)?.first_chunk()?));
    match kind {
        0x11 => Some(SocketAddr::new(IpAddr::from(*body.first_chunk::<4>()?), port(8)?)),
        0x21 => Some(SocketAddr::new(IpAddr::from(*body.first_chunk::<16>()?), port(32)?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v2(command: u8, kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).expect("a short body").to_be_bytes();
        [&SIGNATURE[..], &[command, kind], &length, body].concat()
    }

    fn socket(text: &str) -> Option<SocketAddr> {
        Some(text.parse().expect("an address"))
    }

    fn tcp4() -> Vec<u8> {
        v2(0x21, 0x11, &[10, 1, 2, 3, 10, 0, 0, 1, 0x30, 0x39, 0x15, 0x38])
    }

    fn tcp6(additions: usize) -> Vec<u8> {
        let mut body = vec![0; 36 + additions];
        body[..2].copy_from_slice(&[0xfd, 0]);
        body[15] = 9;
        body[32..34].copy_from_slice(&[0x30, 0x39]);
        v2(0x21, 0x21, &body)
    }

    fn good() -> Vec<(Vec<u8>, Option<SocketAddr>)> {
        let line = |text: &str| text.as_bytes().to_vec();
        vec![
            (
                line("PROXY TCP4 10.1.2.3 10.0.0.1 12345 5432\r\n"),
                socket("10.1.2.3:12345"),
            ),
            (line("PROXY TCP6 fd00::9 ::1 12345 5432\r\n"), socket("[fd00::9]:12345")),
            (line("PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n"), socket("0.0.0.0:0")),
            (line("PROXY UNKNOWN\r\n"), None),
            (line("PROXY UNKNOWN ffff:f...f:ffff ffff 65535 65535\r\n"), None),
            (tcp4(), socket("10.1.2.3:12345")),
            (tcp6(0), socket("[fd00::9]:12345")),
            (tcp6(400), socket("[fd00::9]:12345")),
            (v2(0x21, 0x31, &[b'/'; 216]), None),
            (v2(0x20, 0x00, b""), None),
            (v2(0x20, 0x11, &[7; 12]), None),
            (v2(0x20, 0xff, b"whatever"), None),
            (v2(0x21, 0x00, b"unspecified"), None),
        ]
    }

    #[test]
    fn whole_headers_tell_the_client() {
        for (bytes, source) in good() {
            assert_eq!(header(&bytes), Ok(Header::Complete(source)), "{bytes:?}");
        }
    }

    #[test]
    fn a_reader_that_does_as_told_takes_exactly_the_header() {
        for (bytes, source) in good() {
            let stream = [&bytes[..], b"PROXY or anything else\r\n\r\n"].concat();
            let mut taken = 0;
            let told = loop {
                match header(&stream[..taken]).expect("well formed") {
                    Header::Incomplete(missing) => taken += missing,
                    Header::Complete(told) => break told,
                }
            };
            assert_eq!((taken, told), (bytes.len(), source));
        }
    }

    #[test]
    fn what_is_none_is_refused_as_soon_as_it_shows() {
        for bytes in [
            &b"\0\0\0\x08\x04\xd2\x16\x2f"[..],
            b"\0",
            b"proxy ",
            b"PROXX",
            b"PROXY\tTCP4",
            b"PROXY TCP4\n",
            b"PROXY TCP4 10.1.2.3 10.0.0.1 12345\r\n",
            b"PROXY TCP4 10.1.2.3 10.0.0.1 12345 5432 \r\n",
            b"PROXY TCP4 10.1.2.3 10.0.0.1 12345 65536\r\n",
            b"PROXY TCP4 10.1.2.3 10.0.0.1 +2345 5432\r\n",
            b"PROXY TCP4 10.1.2.3 10.0.0.1 02345 5432\r\n",
            b"PROXY TCP4 fd00::9 ::1 12345 5432\r\n",
            b"PROXY TCP6 10.1.2.3 10.0.0.1 1 1\r\n",
            b"PROXY UDP4 10.1.2.3 10.0.0.1 1 1\r\n",
            b"PROXY UNKNOWN\rx\r\n",
            b"\r\n\r\n\0\r\nQUIX",
        ] {
            assert!(header(bytes).is_err(), "{:?}", String::from_utf8_lossy(bytes));
        }
        let long = [b"PROXY UNKNOWN ", &[b'x'; LINE_BYTES_MAX][..]].concat();
        assert_eq!(header(&long[..LINE_BYTES_MAX]), Err(BadHeader::Line));
        for bytes in [
            v2(0x11, 0x11, &[0; 12]),
            v2(0x22, 0x11, &[0; 12]),
            v2(0x21, 0x12, &[0; 12]),
            v2(0x21, 0x41, &[0; 12]),
            v2(0x21, 0x11, &[0; 11]),
            v2(0x21, 0x21, &[0; 35]),
            v2(0x21, 0x31, &[0; 215]),
            v2(0x21, 0x11, &[0; HEADER_BYTES_MAX - 15]),
        ] {
            assert!(header(&bytes[..HEAD_BYTES]).is_err(), "{bytes:?}");
        }
    }

    fn some_header() -> impl Strategy<Value = Vec<u8>> {
        prop::sample::select(good()).prop_map(|(bytes, _)| bytes)
    }

    proptest! {
        #[test]
        fn a_part_is_incomplete_and_asks_for_no_more_than_there_is(whole in some_header(), cut in 0_usize..HEADER_BYTES_MAX) {
            let cut = cut.min(whole.len() - 1);
            match header(&whole[..cut]) {
                Ok(Header::Incomplete(missing)) => prop_assert!((1..=whole.len() - cut).contains(&missing)),
                other => prop_assert!(false, "{other:?} after {cut} of {whole:?}"),
            }
        }

        #[test]
        fn no_bytes_make_it_panic_or_grow(bytes in proptest::collection::vec(any::<u8>(), 0..600), start in prop::sample::select(vec![&b""[..], b"PROXY ", b"PROXY TCP4 ", b"PROXY UNKNOWN", SIGNATURE, b"\r\n\r\n\0\r\nQUIT\n\x21\x11", b"\r\n\r\n\0\r\nQUIT\n\x20"])) {
            let bytes = [start, &bytes].concat();
            for end in 0..=bytes.len() {
                if let Ok(Header::Incomplete(missing)) = header(&bytes[..end]) {
                    prop_assert!(missing > 0 && end + missing <= HEADER_BYTES_MAX);
                }
            }
        }
    }
}

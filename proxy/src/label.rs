//! The `application_name` that servers see: the client's own, with what only the proxy knows. Pure.

use std::str::FromStr;

use bytes::Bytes;

use crate::peer::Peer;
use crate::wire::startup::{NAME_BYTES_MAX, with_application_name};

/// How `application_name` is written: text with placeholders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApplicationName(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    /// What the client calls itself.
    Name,
    Address,
    Port,
    Listener,
}

/// Why a text does not say how a name is written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApplicationNameError {
    /// In braces is something else than a placeholder, or a brace has no other.
    #[error("has {0:?}, which is none of {{name}}, {{address}}, {{port}} and {{listener}}")]
    Placeholder(String),
    /// PostgreSQL would show it as question marks.
    #[error("has characters that PostgreSQL does not take in an application_name; write printable ASCII")]
    Characters,
    /// PostgreSQL cuts what is longer.
    #[error("leaves no room for what it is to show: PostgreSQL keeps {NAME_BYTES_MAX} bytes; write a shorter one")]
    Length,
    /// Nothing would be told.
    #[error("has no placeholder; write one such as \"{{name}} via {{address}}\"")]
    Constant,
}

/// The longest address that is written, and room for some of the client's own name.
const ROOM_BYTES_MIN: usize = 45;

impl FromStr for ApplicationName {
    type Err = ApplicationNameError;

    fn from_str(text: &str) -> Result<Self, ApplicationNameError> {
        if !text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
            return Err(ApplicationNameError::Characters);
        }
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some(brace) = rest.find(['{', '}']) {
            let (before, after) = rest.split_at(brace);
            let end = after.find('}').map_or(after.len(), |end| end + 1);
            let (placeholder, behind) = after.split_at(end);
            parts.extend((!before.is_empty()).then(|| Part::Text(before.to_owned())));
            parts.push(match placeholder {
                "{name}" => Part::Name,
                "{address}" => Part::Address,
                "{port}" => Part::Port,
                "{listener}" => Part::Listener,
                other => return Err(ApplicationNameError::Placeholder(other.to_owned())),
            });
            rest = behind;
        }
        parts.extend((!rest.is_empty()).then(|| Part::Text(rest.to_owned())));
        let texts = parts
            .iter()
            .map(|part| if let Part::Text(text) = part { text.len() } else { 0 });
        if texts.sum::<usize>() + ROOM_BYTES_MIN > NAME_BYTES_MAX {
            return Err(ApplicationNameError::Length);
        }
        if parts.iter().all(|part| matches!(part, Part::Text(_))) {
            return Err(ApplicationNameError::Constant);
        }
        Ok(Self(parts))
    }
}

impl ApplicationName {
    /// The startup message with its name so written, everything else as it came. Replication's keeps its name, by which the
    /// leader knows its standbys, and so does a message that would become too long.
    pub(crate) fn write(&self, startup: &Bytes, peer: &Peer, listener: &str) -> Bytes {
        let written = with_application_name(startup, |name| self.name(name, peer, listener));
        written.unwrap_or_else(|| startup.clone())
    }

    /// Of what is too long, the client's own name is cut.
    fn name(&self, own: &[u8], peer: &Peer, listener: &str) -> Vec<u8> {
        let around = self.fill(b"", peer, listener).len();
        let times = self.0.iter().filter(|part| matches!(part, Part::Name)).count();
        let room = NAME_BYTES_MAX.saturating_sub(around) / times.max(1);
        let mut kept = own.get(..room).unwrap_or(own);
        // Not within a character: the bytes that go on with one have their two upper bits so.
        if kept.len() < own.len() {
            let goes_on = |at: usize| own.get(at).is_some_and(|byte| byte & 0xC0 == 0x80);
            let whole = (0..=kept.len()).rev().find(|at| !goes_on(*at)).unwrap_or_default();
            kept = own.get(..whole).unwrap_or_default();
        }
        let mut filled = self.fill(kept, peer, listener);
        filled.truncate(NAME_BYTES_MAX);
        filled.trim_ascii().to_vec() // A client without a name leaves a space at the edge.
    }

    fn fill(&self, name: &[u8], peer: &Peer, listener: &str) -> Vec<u8> {
        let mut filled = Vec::with_capacity(NAME_BYTES_MAX);
        for part in &self.0 {
            match (part, peer) {
                (Part::Text(text), _) => filled.extend_from_slice(text.as_bytes()),
                (Part::Name, _) => filled.extend_from_slice(name),
                (Part::Listener, _) => filled.extend_from_slice(listener.as_bytes()),
                (Part::Address, Peer::Ip(address)) => {
                    filled.extend_from_slice(address.ip().to_canonical().to_string().as_bytes());
                }
                (Part::Port, Peer::Ip(address)) => filled.extend_from_slice(address.port().to_string().as_bytes()),
                (Part::Address | Part::Port, Peer::Unix) => filled.extend_from_slice(b"local"),
            }
        }
        filled
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::startup::parameters;

    fn packet(body: &[u8]) -> Bytes {
        let total = u32::try_from(8 + body.len()).expect("a short body");
        [&total.to_be_bytes()[..], &196_608_u32.to_be_bytes(), body]
            .concat()
            .into()
    }

    fn written(template: &str, body: &[u8]) -> Vec<u8> {
        let name: ApplicationName = template.parse().expect("a template");
        let peer = Peer::Ip("[::ffff:10.1.1.1]:5".parse().expect("an address"));
        let whole = name.write(&packet(body), &peer, "db:5432");
        assert_eq!(
            u32::from_be_bytes(whole[..4].try_into().expect("four")) as usize,
            whole.len()
        );
        assert_eq!(whole[4..8], 196_608_u32.to_be_bytes());
        whole[8..].to_vec()
    }

    #[test]
    fn the_name_alone_is_written_anew() {
        let via = "{name} via {address}";
        let cases: [(&str, &[u8], &[u8]); 6] = [
            (
                via,
                b"user\0ann\0application_name\0psql\0x\0y\0\0",
                b"user\0ann\0application_name\0psql via 10.1.1.1\0x\0y\0\0",
            ),
            (via, b"user\0ann\0\0", b"user\0ann\0application_name\0via 10.1.1.1\0\0"),
            (
                "{address}:{port} {listener} {name}",
                b"application_name\0\xff\0\0",
                b"application_name\x0010.1.1.1:5 db:5432 \xff\0\0",
            ),
            // The last one counts.
            (
                via,
                b"application_name\0a\0application_name\0b\0\0",
                b"application_name\0a\0application_name\0b via 10.1.1.1\0\0",
            ),
            (
                via,
                b"replication\0true\0application_name\0n2\0\0",
                b"replication\0true\0application_name\0n2\0\0",
            ),
            (
                via,
                b"application_name\0psql\0user\0ann\0user\0\xfe\0\0",
                b"application_name\0psql via 10.1.1.1\0user\0ann\0user\0\xfe\0\0",
            ),
        ];
        for (template, body, expected) in cases {
            assert_eq!(written(template, body), expected, "{}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn a_long_name_is_cut_so_that_the_address_stays() {
        let body = ["application_name\0", &"\u{e4}".repeat(60), "\0\0"].concat();
        let written = written("{name} via {address}", body.as_bytes());
        let name = String::from_utf8(written[17..written.len() - 2].to_vec()).expect("whole characters");
        assert!(
            name.ends_with("\u{e4} via 10.1.1.1") && (NAME_BYTES_MAX - 1..=NAME_BYTES_MAX).contains(&name.len()),
            "{name}"
        );
        // A message that is as long as one may be stays as it is.
        let full = [b"x\0".as_slice(), &[b'y'; 9_987], b"\0\0"].concat();
        assert_eq!(packet(&full).len(), 9_999);
        assert_eq!(super::tests::written("{name} via {address}", &full), full);
    }

    #[test]
    fn a_text_that_is_none_is_told_why() {
        for (text, expected) in [
            ("{name} via {adress}", "has \"{adress}\""),
            ("{name", "has \"{name\""),
            ("name}", "has \"}\""),
            ("via {address} \u{e4}", "printable ASCII"),
            ("somewhere behind the proxy", "leaves no room"),
            ("proxy", "has no placeholder"),
        ] {
            let error = text.parse::<ApplicationName>().expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_all_but_the_name_stays(pairs in proptest::collection::vec(("[a-z]{1,9}|application_name", "[^\0]{0,80}"), 0..9)) {
            let texts = pairs.iter().flat_map(|(name, value)| [name.as_bytes(), b"\0", value.as_bytes(), b"\0"]);
            let body = [texts.collect::<Vec<_>>().concat(), b"\0".to_vec()].concat();
            let before = parameters(&packet(&body)).expect("well formed");
            let after = parameters(&packet(&written("{name} via {address}", &body))).expect("well formed");
            let is_name = |pair: &&(Bytes, Bytes)| pair.0 == "application_name";
            let others = |pairs: &[(Bytes, Bytes)]| pairs.iter().filter(|pair| !is_name(pair)).cloned().collect::<Vec<_>>();
            prop_assert_eq!(others(&before), others(&after));
            let last = after.iter().rfind(is_name).expect("one is written");
            prop_assert!(last.1.ends_with(b"via 10.1.1.1") && last.1.len() <= NAME_BYTES_MAX);
        }
    }
}

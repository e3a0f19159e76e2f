//! The one message that the proxy makes up itself.

use bytes::{Bytes, BytesMut};
use pgwire::messages::Message;
use pgwire::messages::response::ErrorResponse;

/// An ErrorResponse of severity FATAL: the connection ends after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fatal {
    sqlstate: &'static str,
    message: String,
    detail: Option<String>,
    hint: Option<String>,
}

impl Fatal {
    /// With a SQLSTATE and one sentence.
    #[must_use]
    pub fn new(sqlstate: &'static str, message: impl Into<String>) -> Self {
        Self {
            sqlstate,
            message: message.into(),
            detail: None,
            hint: None,
        }
    }

    /// With more to know.
    #[must_use]
    pub fn detail(self, detail: impl Into<String>) -> Self {
        Self {
            detail: Some(detail.into()),
            ..self
        }
    }

    /// With more to know than that.
    #[must_use]
    pub fn more_detail(self, more: &str) -> Self {
        let detail = match self.detail {
            Some(detail) => format!("{detail} {more}"),
            None => more.to_owned(),
        };
        Self {
            detail: Some(detail),
            ..self
        }
    }

    /// With something to do.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self {
            hint: Some(hint.into()),
            ..self
        }
    }

    /// The SQLSTATE.
    #[must_use]
    pub const fn sqlstate(&self) -> &'static str {
        self.sqlstate
    }

    /// The sentence.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The bytes to send. A NUL in a text would end its field early, so none gets through.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let field = |code: u8, text: &str| (code, text.replace('\0', "\u{FFFD}"));
        let mut fields = vec![
            field(b'S', "FATAL"),
            field(b'V', "FATAL"),
            field(b'C', self.sqlstate),
            field(b'M', &self.message),
        ];
        fields.extend(self.detail.as_deref().map(|text| field(b'D', text)));
        fields.extend(self.hint.as_deref().map(|text| field(b'H', text)));
        let mut buffer = BytesMut::new();
        match ErrorResponse::new(fields).encode(&mut buffer) {
            Ok(()) => buffer.freeze(),
            // Without its message the client still sees the connection end.
            Err(_) => Bytes::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Reads the fields back with no help from the code under test.
    fn fields(bytes: &[u8]) -> Vec<(u8, String)> {
        assert_eq!(bytes[0], b'E');
        let length = u32::from_be_bytes(bytes[1..5].try_into().expect("four bytes")) as usize;
        assert_eq!(length + 1, bytes.len());
        let mut rest = &bytes[5..];
        let mut fields = Vec::new();
        while rest[0] != 0 {
            let end = rest.iter().position(|byte| *byte == 0).expect("a terminated field");
            fields.push((rest[0], String::from_utf8(rest[1..end].to_vec()).expect("text")));
            rest = &rest[end + 1..];
        }
        assert_eq!(rest, [0]);
        fields
    }

    proptest! {
        #[test]
        fn any_text_arrives_as_one_field(message in "\\PC*\0?\\PC*", detail in proptest::option::of(".*")) {
            let mut fatal = Fatal::new("57P03", message.clone()).hint("h");
            if let Some(detail) = &detail {
                fatal = fatal.detail(detail.clone());
            }
            let fields = fields(&fatal.encode());
            let codes: Vec<u8> = fields.iter().map(|(code, _)| *code).collect();
            prop_assert_eq!(codes, if detail.is_some() { b"SVCMDH".to_vec() } else { b"SVCMH".to_vec() });
            prop_assert_eq!(&fields[3].1, &message.replace('\0', "\u{FFFD}"));
        }
    }
}

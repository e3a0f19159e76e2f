//! The messages of a session that the proxy serves itself, as its console does. Pure and total.
//!
//! What a client says is read by us, since every byte of it is a stranger's until it has logged in; what it is told is
//! written by the wire crate.

use bytes::{BufMut, Bytes, BytesMut};
use pgwire::messages::Message;
use pgwire::messages::data::{DataRow, FieldDescription, NoData, ParameterDescription, RowDescription};
use pgwire::messages::extendedquery::{BindComplete, CloseComplete, ParseComplete, PortalSuspended};
use pgwire::messages::response::{
    CommandComplete, EmptyQueryResponse, ErrorResponse, NoticeResponse, ReadyForQuery, TransactionStatus,
};
use pgwire::messages::startup::{Authentication, NegotiateProtocolVersion, ParameterStatus};

/// Type and length.
pub const HEAD_BYTES: usize = 5;
/// No command of a console is longer, and no answer in a SCRAM exchange.
pub const BODY_BYTES_MAX: usize = 16 * 1024;
/// The version that is spoken: 3.0.
const PROTOCOL: i32 = 3 << 16;

/// Why a message is not taken. The connection ends: where the next one begins is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadMessage {
    /// Longer than anything that is asked here, or shorter than its own length.
    #[error("invalid message length {0}")]
    Length(u32),
    /// Its body is not what its type says.
    #[error("invalid message layout")]
    Layout,
    /// No client sends it here.
    #[error("invalid message type {0}")]
    Kind(u8),
}

/// What a client says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// A simple query.
    Query(String),
    /// A statement is to be prepared.
    Parse {
        /// Its name; empty for the unnamed one.
        name: String,
        /// What it says.
        text: String,
    },
    /// A prepared statement is to become a portal.
    Bind {
        /// The portal's name.
        portal: String,
        /// The statement's name.
        statement: String,
        /// How many values come with it.
        values: usize,
        /// The formats of the columns: none, one for all, or one for each. 0 is text, 1 binary.
        formats: Vec<i16>,
    },
    /// What a statement or a portal answers is to be told.
    Describe(Of),
    /// A portal is to be run.
    Execute {
        /// Its name.
        portal: String,
        /// So many rows at most; 0 for all.
        rows: usize,
    },
    /// A statement or a portal is to be forgotten.
    Close(Of),
    /// The end of a sequence of the six above.
    Sync,
    /// What is there is to be sent.
    Flush,
    /// The client goes.
    Terminate,
    /// A password, or a word in a SCRAM exchange.
    Password(Bytes),
}

/// What a message is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Of {
    /// The prepared statement of this name.
    Statement(String),
    /// The portal of this name.
    Portal(String),
}

/// The type of a message that starts so, and how long its body is.
///
/// # Errors
/// When it is none that a console takes.
pub fn head(bytes: [u8; HEAD_BYTES]) -> Result<(u8, usize), BadMessage> {
    let [kind, length @ ..] = bytes;
    let length = u32::from_be_bytes(length);
    let body = usize::try_from(length).ok().and_then(|length| length.checked_sub(4));
    match body {
        Some(body) if body <= BODY_BYTES_MAX => Ok((kind, body)),
        _ => Err(BadMessage::Length(length)),
    }
}

/// Reads the body of one message.
///
/// # Errors
/// When it is not one of its type.
pub fn decode(kind: u8, body: Bytes) -> Result<Asked, BadMessage> {
    let mut rest = Rest(&body);
    let asked = match kind {
        b'Q' => Asked::Query(rest.text()?),
        b'P' => {
            let (name, text) = (rest.text()?, rest.text()?);
            let types = rest.count()?;
            rest.skip(types * 4)?;
            Asked::Parse { name, text }
        }
        b'B' => rest.bind()?,
        b'D' => Asked::Describe(rest.of()?),
        b'C' => Asked::Close(rest.of()?),
        b'E' => Asked::Execute {
            portal: rest.text()?,
            rows: rest.rows()?,
        },
        b'S' => Asked::Sync,
        b'H' => Asked::Flush,
        b'X' => Asked::Terminate,
        b'p' => return Ok(Asked::Password(body)),
        other => return Err(BadMessage::Kind(other)),
    };
    if rest.0.is_empty() {
        Ok(asked)
    } else {
        Err(BadMessage::Layout)
    }
}

/// The mechanism and the first word of a SASLInitialResponse; nothing when it is none.
#[must_use]
pub fn sasl_initial(body: &Bytes) -> Option<(String, Bytes)> {
    let mut rest = Rest(body);
    let mechanism = rest.text().ok()?;
    let (length, word) = rest.0.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    (word.len() == length).then(|| (mechanism, body.slice_ref(word)))
}

/// What of a body has not been read.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn text(&mut self) -> Result<String, BadMessage> {
        let end = self.0.iter().position(|byte| *byte == 0).ok_or(BadMessage::Layout)?;
        let (text, rest) = self.0.split_at(end);
        self.0 = rest.get(1..).unwrap_or_default();
        Ok(String::from_utf8_lossy(text).into_owned())
    }

    fn skip(&mut self, count: usize) -> Result<(), BadMessage> {
        self.0 = self.0.get(count..).ok_or(BadMessage::Layout)?;
        Ok(())
    }

    fn number(&mut self) -> Result<i16, BadMessage> {
        let (number, rest) = self.0.split_first_chunk().ok_or(BadMessage::Layout)?;
        self.0 = rest;
        Ok(i16::from_be_bytes(*number))
    }

    fn count(&mut self) -> Result<usize, BadMessage> {
        usize::try_from(self.number()?).map_err(|_| BadMessage::Layout)
    }

    fn length(&mut self) -> Result<i32, BadMessage> {
        let (number, rest) = self.0.split_first_chunk().ok_or(BadMessage::Layout)?;
        self.0 = rest;
        Ok(i32::from_be_bytes(*number))
    }

    /// A negative number of rows is as good as none: all.
    fn rows(&mut self) -> Result<usize, BadMessage> {
        Ok(usize::try_from(self.length()?).unwrap_or(0))
    }

    fn of(&mut self) -> Result<Of, BadMessage> {
        let (kind, rest) = self.0.split_first().ok_or(BadMessage::Layout)?;
        self.0 = rest;
        match kind {
            b'S' => Ok(Of::Statement(self.text()?)),
            b'P' => Ok(Of::Portal(self.text()?)),
            _ => Err(BadMessage::Layout),
        }
    }

    fn bind(&mut self) -> Result<Asked, BadMessage> {
        let (portal, statement) = (self.text()?, self.text()?);
        let formats = self.count()?;
        self.skip(formats * 2)?;
        let values = self.count()?;
        for _ in 0..values {
            // -1 is a NULL, which has no bytes.
            let length = self.length()?;
            self.skip(usize::try_from(length).unwrap_or(0))?;
        }
        let columns = self.count()?;
        let formats = (0..columns).map(|_| self.number()).collect::<Result<_, _>>()?;
        Ok(Asked::Bind {
            portal,
            statement,
            values,
            formats,
        })
    }
}

/// The type of a column, of those that PgBouncer's console has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `text`.
    Text,
    /// `int4`.
    Int4,
    /// `int8`.
    Int8,
    /// `numeric`; only whole numbers are.
    Numeric,
}

impl Kind {
    /// The object id of the type, and its size: `pg_type.dat`.
    const fn type_id(self) -> (u32, i16) {
        match self {
            Self::Text => (25, -1),
            Self::Int4 => (23, 4),
            Self::Int8 => (20, 8),
            Self::Numeric => (1700, -1),
        }
    }
}

/// A column of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
}

/// A value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cell {
    /// NULL.
    Null,
    /// Of a column of text.
    Text(String),
    /// Of one of numbers.
    Number(i64),
}

/// Whether a block of BEGIN and COMMIT is open. There are no transactions here, but drivers ask for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// None is.
    None,
    /// One is.
    Open,
    /// One is, and a command in it has failed.
    Failed,
}

/// Messages on their way to the client.
#[derive(Debug, Default)]
pub struct Answers(BytesMut);

impl Answers {
    /// What there is, which is there no more.
    #[must_use]
    pub fn take(&mut self) -> BytesMut {
        self.0.split()
    }

    /// How many bytes there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Encoding fails only for a message beyond the protocol's bounds, of which there is none here.
    fn put(&mut self, message: &impl Message) {
        let before = self.0.len();
        if message.encode(&mut self.0).is_err() {
            self.0.truncate(before);
        }
    }

    /// SCRAM-SHA-256 is asked for.
    pub fn ask_for_scram(&mut self) {
        self.put(&Authentication::SASL(vec!["SCRAM-SHA-256".to_owned()]));
    }

    /// A word in a SCRAM exchange, or the last one.
    pub fn scram(&mut self, word: String, is_last: bool) {
        let word = Bytes::from(word);
        self.put(&match is_last {
            true => Authentication::SASLFinal(word),
            false => Authentication::SASLContinue(word),
        });
    }

    /// The client is who it says.
    pub fn welcome(&mut self, parameters: &[(&str, &str)]) {
        self.put(&Authentication::Ok);
        for (name, value) in parameters {
            self.put(&ParameterStatus::new((*name).to_owned(), (*value).to_owned()));
        }
    }

    /// Of what the startup message asks for, only protocol 3.0 is spoken, and none of these options is known.
    pub fn speak_three_zero(&mut self, options: Vec<String>) {
        self.put(&NegotiateProtocolVersion::new(PROTOCOL, options));
    }

    /// The next command may come.
    pub fn ready(&mut self, block: Block) {
        self.put(&ReadyForQuery::new(match block {
            Block::None => TransactionStatus::Idle,
            Block::Open => TransactionStatus::Transaction,
            Block::Failed => TransactionStatus::Error,
        }));
    }

    /// A command is done.
    pub fn complete(&mut self, tag: &str) {
        self.put(&CommandComplete::new(tag.to_owned()));
    }

    /// There was no command.
    pub fn empty(&mut self) {
        self.put(&EmptyQueryResponse::new());
    }

    /// A command failed.
    pub fn error(&mut self, sqlstate: &str, message: &str, hint: Option<&str>) {
        let fields = fields("ERROR", sqlstate, message, hint.map(|hint| (b'H', hint)));
        self.put(&ErrorResponse::new(fields));
    }

    /// Something to know.
    pub fn notice(&mut self, message: &str, detail: Option<&str>) {
        let fields = fields("NOTICE", "00000", message, detail.map(|detail| (b'D', detail)));
        self.put(&NoticeResponse::new(fields));
    }

    /// The answers to Parse, Bind and Close.
    pub fn parsed(&mut self) {
        self.put(&ParseComplete::new());
    }

    /// See [`Self::parsed`].
    pub fn bound(&mut self) {
        self.put(&BindComplete::new());
    }

    /// See [`Self::parsed`].
    pub fn closed(&mut self) {
        self.put(&CloseComplete::new());
    }

    /// A portal has more rows than were asked for.
    pub fn suspended(&mut self) {
        self.put(&PortalSuspended::new());
    }

    /// No statement takes values.
    pub fn no_parameters(&mut self) {
        self.put(&ParameterDescription::new(Vec::new()));
    }

    /// The columns of an answer; without any, that there are no rows.
    pub fn columns(&mut self, columns: &[Column], formats: &[i16]) {
        if columns.is_empty() {
            return self.put(&NoData::new());
        }
        let describe = |(index, column): (usize, &Column)| {
            let (type_id, size) = column.kind.type_id();
            FieldDescription::new(
                column.name.to_owned(),
                0,
                0,
                type_id,
                size,
                -1,
                format_of(formats, index),
            )
        };
        self.put(&RowDescription::new(columns.iter().enumerate().map(describe).collect()));
    }

    /// One row.
    pub fn row(&mut self, columns: &[Column], formats: &[i16], cells: &[Cell]) {
        let mut data = BytesMut::new();
        for (index, (column, cell)) in columns.iter().zip(cells).enumerate() {
            let binary = format_of(formats, index) == 1;
            put_cell(&mut data, column.kind, cell, binary);
        }
        let count = i16::try_from(columns.len()).unwrap_or_default();
        self.put(&DataRow::new(data, count));
    }
}

/// None stand for text, one for every column.
fn format_of(formats: &[i16], index: usize) -> i16 {
    match formats {
        [] => 0,
        [all] => *all,
        each => each.get(index).copied().unwrap_or_default(),
    }
}

/// A NUL in a text would end its field early, so none gets through.
fn fields(severity: &str, sqlstate: &str, message: &str, more: Option<(u8, &str)>) -> Vec<(u8, String)> {
    let field = |(code, text): (u8, &str)| (code, text.replace('\0', "\u{FFFD}"));
    let always = [(b'S', severity), (b'V', severity), (b'C', sqlstate), (b'M', message)];
    always.into_iter().chain(more).map(field).collect()
}

fn put_cell(data: &mut BytesMut, kind: Kind, cell: &Cell, binary: bool) {
    let value: Bytes = match cell {
        Cell::Null => {
            data.put_i32(-1);
            return;
        }
        Cell::Text(text) => Bytes::copy_from_slice(text.as_bytes()),
        Cell::Number(number) if binary => match kind {
            Kind::Text => number.to_string().into(),
            Kind::Int4 => Bytes::copy_from_slice(&int4(*number).to_be_bytes()),
            Kind::Int8 => Bytes::copy_from_slice(&number.to_be_bytes()),
            Kind::Numeric => numeric(*number),
        },
        Cell::Number(number) if kind == Kind::Int4 => int4(*number).to_string().into(),
        Cell::Number(number) => number.to_string().into(),
    };
    data.put_i32(i32::try_from(value.len()).unwrap_or(i32::MAX));
    data.extend_from_slice(&value);
}

fn int4(number: i64) -> i32 {
    i32::try_from(number).unwrap_or(if number < 0 { i32::MIN } else { i32::MAX })
}

/// The binary form of `numeric`: digits to the base of 10000, the first weighs most (`numeric_send` in `numeric.c`).
fn numeric(number: i64) -> Bytes {
    let mut digits = Vec::new();
    let mut rest = number.unsigned_abs();
    while rest > 0 {
        digits.push(i16::try_from(rest % 10_000).unwrap_or_default());
        rest /= 10_000;
    }
    let count = i16::try_from(digits.len()).unwrap_or_default();
    let mut bytes = BytesMut::new();
    bytes.put_i16(count);
    bytes.put_i16(if count == 0 { 0 } else { count - 1 });
    bytes.put_u16(if number < 0 { 0x4000 } else { 0 });
    bytes.put_i16(0);
    digits.iter().rev().for_each(|digit| bytes.put_i16(*digit));
    bytes.freeze()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(kind: u8, body in proptest::collection::vec(any::<u8>(), 0..300)) {
            let body = Bytes::from(body);
            let _ = decode(kind, body.clone());
            let _ = sasl_initial(&body);
        }
    }

    #[test]
    fn a_message_is_bounded_before_it_is_read() {
        assert_eq!(head([b'Q', 0, 0, 0, 4]), Ok((b'Q', 0)));
        assert_eq!(head([b'Q', 0, 0, 0, 3]), Err(BadMessage::Length(3)));
        assert_eq!(head([b'Q', 0, 0, 0x40, 4]), Ok((b'Q', BODY_BYTES_MAX)));
        assert_eq!(head([b'Q', 0, 0, 0x40, 5]), Err(BadMessage::Length(0x4005)));
    }

    #[test]
    fn what_drivers_send_is_read() {
        let read = |kind, body: &'static [u8]| decode(kind, Bytes::from_static(body));
        assert_eq!(read(b'Q', b"SHOW POOLS;\0"), Ok(Asked::Query("SHOW POOLS;".to_owned())));
        assert_eq!(read(b'Q', b"SHOW POOLS;\0more"), Err(BadMessage::Layout));
        assert_eq!(read(b'Q', b"SHOW POOLS;"), Err(BadMessage::Layout));
        let (name, text) = ("s".to_owned(), "SHOW STATS".to_owned());
        assert_eq!(
            read(b'P', b"s\0SHOW STATS\0\0\x01\0\0\0\x17"),
            Ok(Asked::Parse { name, text })
        );
        let bound = read(b'B', b"\0s\0\0\x01\0\x01\0\x02\xff\xff\xff\xff\0\0\0\x01x\0\x01\0\x01");
        let bind = Asked::Bind {
            portal: String::new(),
            statement: "s".to_owned(),
            values: 2,
            formats: vec![1],
        };
        assert_eq!(bound, Ok(bind));
        assert_eq!(
            read(b'B', b"\0s\0\0\0\0\x01\x7f\xff\xff\xff\0\0"),
            Err(BadMessage::Layout)
        );
        assert_eq!(read(b'D', b"Ss\0"), Ok(Asked::Describe(Of::Statement("s".to_owned()))));
        let (portal, rows) = (String::new(), 0);
        assert_eq!(read(b'E', b"\0\xff\xff\xff\xff"), Ok(Asked::Execute { portal, rows }));
        assert_eq!(read(b'd', b""), Err(BadMessage::Kind(b'd')));
    }

    #[test]
    fn numbers_are_written_as_their_column_says() {
        let row = |kind, number, format| {
            let mut answers = Answers::default();
            let column = Column { name: "n", kind };
            answers.row(&[column], &[format], &[Cell::Number(number)]);
            // Type, length, number of columns, length of the value.
            answers.take().split_off(11).to_vec()
        };
        assert_eq!(row(Kind::Numeric, 123_456_789, 0), b"123456789");
        assert_eq!(row(Kind::Int4, i64::MAX, 0), b"2147483647");
        assert_eq!(row(Kind::Int4, 7, 1), [0, 0, 0, 7]);
        assert_eq!(row(Kind::Int8, 7, 1), [0, 0, 0, 0, 0, 0, 0, 7]);
        // 1 2345 6789 to the base of 10000.
        assert_eq!(
            row(Kind::Numeric, 123_456_789, 1),
            [0, 3, 0, 2, 0, 0, 0, 0, 0, 1, 0x09, 0x29, 0x1a, 0x85]
        );
        assert_eq!(row(Kind::Numeric, 0, 1), [0; 8]);
    }
}

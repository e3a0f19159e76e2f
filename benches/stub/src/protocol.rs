//! The few messages that are needed. Answers are bytes that never change.

/// What a query's text asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// One row.
    Row,
    /// Many rows.
    Bulk { mebibytes: usize, row: usize, write: usize },
    /// To take what the client sends.
    CopyIn,
    /// Nothing.
    Done,
}

const WRITE_LARGE: usize = 256 * 1024;
const WRITE_LIKE_POSTGRES: usize = 8 * 1024;
const ROW_BYTES: usize = 1000;
const ROW_BYTES_MAX: usize = 128 * 1024;

/// Reads a query's text, without its final zero.
pub(crate) fn request(text: &[u8]) -> Request {
    let starts = |word: &str| {
        text.get(..word.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(word.as_bytes()))
    };
    if starts("select") {
        return Request::Row;
    }
    if starts("bulk") {
        let write = if starts("bulk8k") {
            WRITE_LIKE_POSTGRES
        } else {
            WRITE_LARGE
        };
        let text = String::from_utf8_lossy(text);
        let mut numbers = text
            .split_whitespace()
            .skip(1)
            .map(|word| word.trim_end_matches(';').parse().ok());
        let mebibytes = numbers.next().flatten().unwrap_or(1);
        let row = numbers.next().flatten().unwrap_or(ROW_BYTES).clamp(1, ROW_BYTES_MAX);
        return Request::Bulk { mebibytes, row, write };
    }
    if starts("copy") && text.to_ascii_lowercase().ends_with(b"from stdin") {
        return Request::CopyIn;
    }
    Request::Done
}

/// A message of the protocol after startup.
fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend_from_slice(&length(body.len() + 4));
    bytes.extend_from_slice(body);
    bytes
}

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes()
}

/// A row of one column of `size` bytes.
pub(crate) fn row(size: usize) -> Vec<u8> {
    let mut body = vec![0, 1];
    body.extend_from_slice(&length(size));
    body.resize(body.len() + size, b'x');
    message(b'D', &body)
}

/// The answers that are given again and again.
pub(crate) struct Answers {
    pub(crate) welcome: Vec<u8>,
    pub(crate) ready: Vec<u8>,
    pub(crate) parsed: Vec<u8>,
    pub(crate) bound: Vec<u8>,
    pub(crate) closed: Vec<u8>,
    pub(crate) no_parameters: Vec<u8>,
    pub(crate) columns: Vec<u8>,
    pub(crate) no_columns: Vec<u8>,
    pub(crate) one: Vec<u8>,
    pub(crate) selected: Vec<u8>,
    pub(crate) done: Vec<u8>,
    pub(crate) send_copy: Vec<u8>,
    pub(crate) copied: Vec<u8>,
    pub(crate) copy_failed: Vec<u8>,
}

impl Answers {
    pub(crate) fn new() -> Self {
        // One column of type text, whose binary form is its text form, so that either may be asked for.
        let mut columns = b"\x00\x01one\0".to_vec();
        columns.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 25, 255, 255, 255, 255, 255, 255, 0, 0]);
        let mut welcome = message(b'R', &[0; 4]);
        for setting in [
            "server_version\x0015.0\0",
            "client_encoding\0UTF8\0",
            "server_encoding\0UTF8\0",
            "standard_conforming_strings\0on\0",
            "DateStyle\0ISO, MDY\0",
            "TimeZone\0UTC\0",
            "integer_datetimes\0on\0",
        ] {
            welcome.extend_from_slice(&message(b'S', setting.as_bytes()));
        }
        welcome.extend_from_slice(&message(b'K', &[0, 0, 0, 7, 0, 0, 0, 7]));
        let ready = message(b'Z', b"I");
        welcome.extend_from_slice(&ready);
        Self {
            welcome,
            ready,
            parsed: message(b'1', b""),
            bound: message(b'2', b""),
            closed: message(b'3', b""),
            no_parameters: message(b't', &[0, 0]),
            columns: message(b'T', &columns),
            no_columns: message(b'n', b""),
            one: message(b'D', &[0, 1, 0, 0, 0, 1, b'1']),
            selected: message(b'C', b"SELECT 1\0"),
            done: message(b'C', b"SET\0"),
            send_copy: message(b'G', &[0, 0, 1, 0, 0]),
            copied: message(b'C', b"COPY 1\0"),
            copy_failed: message(b'E', b"SERROR\0C57014\0Mthe client ended the copy\0\0"),
        }
    }
}

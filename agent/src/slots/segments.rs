//! The log that a copied slot begins in. A clone has it from the clone's own beginning only; the leader keeps what the slot
//! needs, and so it can be had there.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use crate::postgres::ToolError;
use crate::postgres::programs::file_error;
use crate::postgres::sql::{Target, ask_in_order};

/// More than this is not fetched: the slot is copied once its consumer has come further.
const SEGMENTS_MAX: u32 = 16;
/// How much is asked for at once.
const PART_BYTES: u64 = 1 << 20;
const PART_MAX: Duration = Duration::from_secs(5);
const DIR: &str = "pg_wal";

/// A file of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    timeline: u32,
    number: u64,
    /// The size of each.
    bytes: u64,
}

impl Segment {
    /// By its file's name: eight hexadecimal digits each of its timeline, of the position's upper half, and of its number in
    /// that.
    pub(super) fn named(name: &str, bytes: u64) -> Option<Self> {
        let part = |at: usize| u32::from_str_radix(name.get(at..at + 8)?, 16).ok();
        let per_half = (1_u64 << 32).checked_div(bytes)?;
        let number = u64::from(part(8)?) * per_half + u64::from(part(16)?);
        let timeline = part(0)?;
        (name.len() == 24).then_some(Self {
            timeline,
            number,
            bytes,
        })
    }

    fn next(&self) -> Self {
        let number = self.number + 1;
        Self { number, ..self.clone() }
    }
}

impl fmt::Display for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_half = (1_u64 << 32) / self.bytes;
        let (half, number) = (self.number / per_half, self.number % per_half);
        write!(f, "{:08X}{half:08X}{number:08X}", self.timeline)
    }
}

/// The segments from `first` on that are not here, up to the first that is; nothing when they are too many.
pub(super) fn missing(data_dir: &Path, first: &Segment) -> Option<Vec<Segment>> {
    let mut here: Vec<String> = Vec::new();
    for entry in fs::read_dir(data_dir.join(DIR)).ok()?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        // The timeline of a position may have another number here.
        here.extend(name.get(8..).filter(|_| name.len() == 24).map(str::to_owned));
    }
    let mut lacks = Vec::new();
    let mut segment = first.clone();
    while !here.iter().any(|name| segment.to_string().get(8..) == Some(name)) {
        if lacks.len() >= SEGMENTS_MAX as usize {
            return None;
        }
        let next = segment.next();
        lacks.push(std::mem::replace(&mut segment, next));
    }
    Some(lacks)
}

/// Copies one from the leader, whole or not at all.
pub(super) async fn fetch(target: &Target, data_dir: &Path, segment: &Segment) -> Result<(), ToolError> {
    let name = segment.to_string();
    let part =
        |at: u64| format!("SELECT encode(pg_read_binary_file('pg_wal/{name}', {at}, {PART_BYTES}, true), 'hex')");
    let parts: Vec<String> = (0..segment.bytes.div_ceil(PART_BYTES))
        .map(|n| part(n * PART_BYTES))
        .collect();
    let what = "fetching the log of a logical slot";
    let rows = ask_in_order(target, what, &parts, PART_MAX).await?;
    let mut content = Vec::new();
    for row in rows {
        content.extend(
            row.first()
                .and_then(Option::as_deref)
                .and_then(bytes)
                .unwrap_or_default(),
        );
    }
    if content.len() as u64 != segment.bytes {
        return Err(ToolError::Unexpected {
            program: "the leader".to_owned(),
            what: format!("{} bytes of {name}, which has {}", content.len(), segment.bytes),
        });
    }
    let dir = data_dir.join(DIR);
    let path = dir.join(&name);
    write(&dir.join("pgherd.part"), &path, &content).map_err(file_error("keeping the log of a logical slot", &path))
}

fn write(part: &Path, path: &Path, content: &[u8]) -> io::Result<()> {
    if part.exists() {
        fs::remove_file(part)?;
    }
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(part)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(part, path)
}

/// What PostgreSQL has written in hexadecimal.
pub(super) fn bytes(hex: &str) -> Option<Vec<u8>> {
    let pairs = hex.as_bytes().chunks(2);
    pairs
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn segments_are_named_as_postgresql_names_them() {
        let name = "0000000200000001000000FF";
        let segment = Segment::named(name, 16 * MIB).expect("a name");
        assert_eq!(segment.to_string(), name);
        assert_eq!(segment.next().to_string(), "000000020000000200000000");
        let larger = Segment::named("000000020000000100000003", 1 << 30).expect("a name");
        assert_eq!(larger.next().to_string(), "000000020000000200000000");
        for odd in ["", "00000002000000010000000", "0000000200000001000000FG"] {
            assert_eq!(Segment::named(odd, 16 * MIB), None, "{odd}");
        }
        assert_eq!(Segment::named(name, 0), None);
    }

    #[test]
    fn what_lies_before_the_first_segment_here_is_missing() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir(dir.path().join(DIR)).expect("made");
        let first = Segment::named("000000020000000000000003", 16 * MIB).expect("a name");
        assert_eq!(missing(dir.path(), &first), None, "none is here");
        fs::write(dir.path().join(DIR).join("000000010000000000000005"), "").expect("written");
        let names = |first: &Segment| {
            let missing = missing(dir.path(), first).expect("few");
            missing.iter().map(Segment::to_string).collect::<Vec<_>>()
        };
        assert_eq!(names(&first), ["000000020000000000000003", "000000020000000000000004"]);
        assert_eq!(names(&first.next().next()), Vec::<String>::new());
    }

    #[test]
    fn bytes_come_as_hexadecimal() {
        assert_eq!(bytes("00a1ff"), Some(vec![0, 0xA1, 0xFF]));
        assert_eq!(bytes("0g"), None);
    }
}

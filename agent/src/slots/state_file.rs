//! Copies of logical slots as files. PostgreSQL reads what is in `pg_replslot` when it starts, and never again.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use crate::postgres::ToolError;
use crate::postgres::programs::file_error;

/// `SLOT_MAGIC` of `src/backend/replication/slot.c`.
const MAGIC: u32 = 0x0105_1CA1;
/// Magic, checksum, version and length come before what the length counts.
const HEADER_BYTES: usize = 16;
/// The checksum covers what follows it.
const CHECKED_FROM: usize = 8;
/// A slot's state takes some two hundred bytes.
const STATE_BYTES_MAX: usize = 8 << 10;
const DIR: &str = "pg_replslot";

/// The state files of slots, by name.
pub type Copies = BTreeMap<String, Vec<u8>>;

/// Whether PostgreSQL would take these bytes for a slot's state. With others in that place it does not start at all.
#[must_use]
pub fn is_whole(state: &[u8]) -> bool {
    let word = |at: usize| {
        let bytes = state.get(at..at + 4)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    let (magic, checksum, length) = (word(0), word(4), word(12));
    let body = u32::try_from(state.len().saturating_sub(HEADER_BYTES)).ok();
    let checked = state.get(CHECKED_FROM..).map(crc32c);
    state.len() > HEADER_BYTES
        && state.len() <= STATE_BYTES_MAX
        && magic == Some(MAGIC)
        && length == body
        && checksum == checked
}

/// CRC-32C, as PostgreSQL computes it.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        let shifted = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0x82F6_3B78 } else { crc >> 1 };
        (0..8).fold(crc ^ u32::from(*byte), shifted)
    };
    !bytes.iter().fold(u32::MAX, step)
}

/// How many slots lie in a data directory.
#[must_use]
pub fn count(data_dir: &Path) -> usize {
    fs::read_dir(data_dir.join(DIR)).map_or(0, |entries| entries.flatten().count())
}

/// Puts the copies in their places while no PostgreSQL runs there, and says which; a slot that is there already stays.
///
/// # Errors
/// When one cannot be written; what is half written PostgreSQL removes when it starts.
pub fn place(data_dir: &Path, copies: Copies) -> Result<Vec<String>, ToolError> {
    let mut placed = Vec::new();
    for (name, state) in copies {
        let dir = data_dir.join(DIR).join(&name);
        if dir.exists() {
            continue;
        }
        // What ends in `.tmp` counts for nothing until it is renamed.
        let part = data_dir.join(DIR).join(format!("{name}.tmp"));
        write(&part, &state)
            .and_then(|()| fs::rename(&part, &dir))
            .and_then(|()| File::open(data_dir.join(DIR))?.sync_all())
            .map_err(file_error("copying a logical slot", &dir))?;
        placed.push(name);
    }
    Ok(placed)
}

fn write(dir: &Path, state: &[u8]) -> io::Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir)?;
    }
    fs::create_dir(dir)?;
    let mut file = File::create_new(dir.join("state"))?;
    file.write_all(state)?;
    file.sync_all()?;
    File::open(dir)?.sync_all()
}

/// Takes copies back that PostgreSQL did not start with.
///
/// # Errors
/// When one cannot be removed.
pub fn take_back(data_dir: &Path, placed: &[String]) -> Result<(), ToolError> {
    for name in placed {
        let dir = data_dir.join(DIR).join(name);
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(file_error("taking a copied slot back", &dir))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A state as PostgreSQL would write it.
    fn state() -> Vec<u8> {
        let body = [7_u8; 184];
        let mut state = MAGIC.to_ne_bytes().to_vec();
        state.extend([0; 4]);
        state.extend(3_u32.to_ne_bytes());
        state.extend(u32::try_from(body.len()).expect("small").to_ne_bytes());
        state.extend(body);
        let checksum = crc32c(&state[CHECKED_FROM..]);
        state[4..8].copy_from_slice(&checksum.to_ne_bytes());
        state
    }

    #[test]
    fn the_checksum_is_the_known_one() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn what_is_torn_or_altered_is_not_placed() {
        let whole = state();
        assert!(is_whole(&whole));
        assert!(!is_whole(&whole[..whole.len() - 1]));
        for at in [0, 4, 8, 12, 100] {
            let mut altered = whole.clone();
            altered[at] ^= 1;
            assert!(!is_whole(&altered), "byte {at}");
        }
        assert!(!is_whole(&[]));
    }

    #[test]
    fn copies_are_placed_beside_what_is_there_and_can_be_taken_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let slots = dir.path().join(DIR);
        fs::create_dir_all(slots.join("there")).expect("made");
        fs::create_dir_all(slots.join("new.tmp")).expect("made");
        let copies = Copies::from([("there".to_owned(), state()), ("new".to_owned(), state())]);
        let placed = place(dir.path(), copies).expect("placed");
        assert_eq!(placed, ["new"]);
        assert_eq!(fs::read(slots.join("new/state")).expect("written"), state());
        assert!(!slots.join("there/state").exists() && !slots.join("new.tmp").exists());
        assert_eq!(count(dir.path()), 2);
        take_back(dir.path(), &placed).expect("taken back");
        assert!(!slots.join("new").exists());
    }
}

//! Names of events: short enough to be told to a client, sorted by time, and the teller's own.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Crockford's: no letter looks like a digit, and the order is that of ASCII.
const DIGITS: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
/// Milliseconds since 1970 in so many digits reach beyond the year 3000.
const TIME_DIGITS: usize = 9;
/// Who tells it: twenty bits of a hash.
const TELLER_DIGITS: usize = 4;

/// The name of an event: when, and by whom, such as `1m7tkqx2p-7f3d`. Sorts by time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventId(String);

impl EventId {
    /// The name of what `teller` tells at this time, in milliseconds since 1970.
    #[must_use]
    pub fn new(at_ms: u64, teller: &str) -> Self {
        let mut text = String::with_capacity(TIME_DIGITS + 1 + TELLER_DIGITS);
        write_digits(&mut text, at_ms, TIME_DIGITS);
        text.push('-');
        write_digits(&mut text, hash(teller), TELLER_DIGITS);
        Self(text)
    }

    /// Checks a text and wraps it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (time, teller) = text.split_once('-')?;
        let is_digits = |part: &str, count| part.len() == count && part.bytes().all(|byte| DIGITS.contains(&byte));
        let well = is_digits(time, TIME_DIGITS) && is_digits(teller, TELLER_DIGITS);
        well.then(|| Self(text.to_owned()))
    }

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn write_digits(text: &mut String, number: u64, count: usize) {
    for place in (0..count).rev() {
        let digit = usize::try_from(number >> (5 * place) & 31).unwrap_or_default();
        text.push(DIGITS.get(digit).copied().map_or('0', char::from));
    }
}

/// FNV-1a, folded to what is written of it.
fn hash(text: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325, step);
    hash ^ (hash >> 20) ^ (hash >> 40)
}

/// Gives out the names of one teller's events: never the same twice, and in order, also while its clock is set back.
#[derive(Debug)]
pub struct Ids {
    teller: String,
    last_ms: AtomicU64,
}

impl Ids {
    /// Of this teller.
    #[must_use]
    pub fn new(teller: &str) -> Self {
        Self {
            teller: teller.to_owned(),
            last_ms: AtomicU64::new(0),
        }
    }

    /// The next name, for something that happens at this time, in milliseconds since 1970.
    pub fn next(&self, at_ms: u64) -> EventId {
        let after = |last: u64| Some(at_ms.max(last + 1));
        let before = self.last_ms.fetch_update(Ordering::AcqRel, Ordering::Acquire, after);
        let last = before.unwrap_or_default();
        EventId::new(at_ms.max(last + 1), &self.teller)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_by_time_and_are_read_back() {
        let (early, late) = (
            EventId::new(1_795_218_269_498, "n9"),
            EventId::new(1_795_218_269_499, "n1"),
        );
        assert!(early < late, "{early} {late}");
        assert_eq!(EventId::parse(late.as_str()), Some(late.clone()));
        assert_eq!(late.as_str().len(), 14);
        for wrong in ["", "1m7tkqx2p", "1m7tkqx2p-7f3", "1M7TKQX2P-7F3D", "1m7tkqx2p-7f3/"] {
            assert_eq!(EventId::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn nobody_gives_a_name_twice_even_if_its_clock_stands_still_or_goes_back() {
        let ids = Ids::new("n1");
        let given: Vec<EventId> = [1000, 1000, 900, 1002, 1001].map(|at| ids.next(at)).to_vec();
        assert!(given.is_sorted_by(|one, next| one < next), "{given:?}");
        assert_ne!(EventId::new(5, "n1"), EventId::new(5, "n2"));
    }
}

//! Bytes that are almost right: a seed and a number make the same ones of the same inputs everywhere, always.

/// SplitMix64: <https://prng.di.unimi.it/splitmix64.c>.
pub(super) struct Draws(u64);

impl Draws {
    /// Draws for the input of this number.
    pub(super) const fn new(seed: u64, number: u64) -> Self {
        Self(seed ^ number.wrapping_mul(0xD134_2543_DE82_EF95))
    }

    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`; 0 when there is none.
    pub(super) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(end.max(1)).unwrap_or(1)).unwrap_or(0)
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        from.get(self.below(from.len()))
    }
}

/// Longer ones show nothing that shorter ones do not.
const BYTES_MAX: usize = 12_000;
/// Where parsers count from and to.
const NUMBERS: [u32; 14] = [
    0,
    1,
    3,
    4,
    5,
    7,
    8,
    255,
    256,
    10_000,
    10_001,
    0x7fff_ffff,
    0x8000_0000,
    u32::MAX,
];
const WORDS: [&[u8]; 24] = [
    b"\0",
    b"\0\0",
    b"\r\n",
    b"\n",
    b" ",
    b"user\0",
    b"database\0",
    b"replication\0true\0",
    b"application_name\0",
    b"\0\x03\0\0",
    b"\0\x03\0\x02",
    b"\x04\xd2\x16\x2e",
    b"\0\0\0\x08\x04\xd2\x16\x2f",
    b"\0\0\0\x08\x04\xd2\x16\x30",
    b"Z\0\0\0\x05I",
    b"-PLUS\0",
    b"SCRAM-SHA-256\0",
    b"C57P03\0",
    b"PROXY TCP4 ",
    b"\r\n\r\n\0\r\nQUIT\n",
    b"<z>",
    b"18446744073709551615",
    b"4294967295",
    b"null",
];

/// One of `inputs`, changed in up to four places.
pub(super) fn mutated(inputs: &[Vec<u8>], draws: &mut Draws) -> Vec<u8> {
    let mut bytes = draws.pick(inputs).cloned().unwrap_or_default();
    for _ in 0..=draws.below(4) {
        change(&mut bytes, inputs, draws);
    }
    bytes.truncate(BYTES_MAX);
    bytes
}

fn change(bytes: &mut Vec<u8>, inputs: &[Vec<u8>], draws: &mut Draws) {
    let at = draws.below(bytes.len() + 1);
    let to = at + draws.below((bytes.len() - at).min(64) + 1);
    match draws.below(9) {
        0 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << draws.below(8);
            }
        }
        1 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = draws.byte();
            }
        }
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(at..to)),
        4 => {
            let again = bytes[at..to].repeat(1 + draws.below(8));
            bytes.splice(at..at, again);
        }
        5 => {
            let number = draws.pick(&NUMBERS).copied().unwrap_or_default();
            if let Some(place) = bytes.get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
                *place = number.to_be_bytes();
            }
        }
        6 => {
            let word = draws.pick(&WORDS).copied().unwrap_or_default();
            let end = if draws.below(2) == 0 { at } else { to };
            bytes.splice(at..end, word.iter().copied());
        }
        7 => {
            let other = draws.pick(inputs).cloned().unwrap_or_default();
            let from = draws.below(other.len() + 1);
            bytes.truncate(at);
            bytes.extend_from_slice(&other[from..]);
        }
        _ => {
            let more: Vec<u8> = (0..draws.below(32)).map(|_| draws.byte()).collect();
            bytes.splice(at..at, more);
        }
    }
}

#[test]
fn the_same_seed_and_number_make_the_same_bytes_and_others_do_not() {
    let inputs = [b"user\0ann\0\0".to_vec(), b"PROXY UNKNOWN\r\n".to_vec()];
    let made = |seed, number| mutated(&inputs, &mut Draws::new(seed, number));
    assert!((0..100).all(|number| made(7, number) == made(7, number)));
    assert!((0..100).any(|number| made(7, number) != made(8, number)));
    let all: std::collections::BTreeSet<Vec<u8>> = (0..1000).map(|number| made(7, number)).collect();
    assert!(all.len() > 800, "{}", all.len());
}

//! Random numbers for choices between equals. Nothing that must be unpredictable rests on them.

use std::hash::{BuildHasher, Hasher, RandomState};

/// Two random numbers.
pub(crate) fn draws() -> [u64; 2] {
    // Each state has keys of its own, seeded by the system.
    [(); 2].map(|()| RandomState::new().build_hasher().finish())
}

//! The two system calls by which Linux sets and tells a watchdog's timeout.
//!
//! There is no safe way: rustix and nix make an unsafe function of every ioctl that they do not name themselves, and
//! /sys shows the timeout without letting anybody change it. These are the only unsafe lines of the keeper.
#![expect(unsafe_code, reason = "an ioctl of a driver can be made by an unsafe function only")]

use std::ffi::c_int;
use std::os::fd::AsFd;

use rustix::io;
use rustix::ioctl::{Getter, Opcode, Updater, ioctl, opcode};

/// `_IOWR('W', 6, int)`
const WDIOC_SETTIMEOUT: Opcode = opcode::read_write::<c_int>(b'W', 6);
/// `_IOR('W', 7, int)`
const WDIOC_GETTIMEOUT: Opcode = opcode::read::<c_int>(b'W', 7);

/// Asks for a timeout in seconds, and returns the one that the driver has chosen.
pub(super) fn set_timeout(device: impl AsFd, seconds: c_int) -> io::Result<c_int> {
    let mut value = seconds;
    // SAFETY: by its number this request reads one int through the pointer and writes one, and `value` is that int, which
    // lives until the call has returned. A file of another kind refuses a number that it does not know.
    unsafe { ioctl(device, Updater::<WDIOC_SETTIMEOUT, c_int>::new(&mut value)) }?;
    Ok(value)
}

/// The timeout in seconds.
pub(super) fn timeout(device: impl AsFd) -> io::Result<c_int> {
    // SAFETY: by its number this request writes one int through the pointer, and the getter has room for it.
    unsafe { ioctl(device, Getter::<WDIOC_GETTIMEOUT, c_int>::new()) }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn the_numbers_are_those_of_the_kernel() {
        // As linux/watchdog.h has them on all machines but those where an ioctl's number has its direction elsewhere.
        if cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
            assert_eq!((WDIOC_SETTIMEOUT, WDIOC_GETTIMEOUT), (0xC004_5706, 0x8004_5707));
        }
    }

    #[test]
    fn a_file_that_is_no_watchdog_says_so() {
        let file = tempfile::tempfile().expect("a file for the test");
        assert_eq!(set_timeout(&file, 25), Err(Errno::NOTTY));
        assert_eq!(timeout(&file), Err(Errno::NOTTY));
    }
}

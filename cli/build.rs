//! How the program is linked.

use std::env;
use std::process::Command;

/// The first C library that reads packed relocations; an older one refuses to start a program that has them.
const PACKED_SINCE: (u32, u32) = (2, 36);

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // All of the list is read at each start, and stays in memory: packed it is a fiftieth.
    if target_is_this_machine() && glibc().is_some_and(|version| version >= PACKED_SINCE) {
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}

fn target_is_this_machine() -> bool {
    env::var("TARGET")
        .is_ok_and(|target| target.ends_with("-linux-gnu") && env::var("HOST").is_ok_and(|host| host == target))
}

/// The version of this machine's C library: `glibc 2.36`.
fn glibc() -> Option<(u32, u32)> {
    let told = Command::new("getconf").arg("GNU_LIBC_VERSION").output().ok()?;
    let told = String::from_utf8(told.stdout).ok()?;
    let (major, minor) = told.trim().strip_prefix("glibc ")?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

//! The kept inputs, and mutations of them: always the same ones, since a change is not to be refused for what it has not
//! done. What is new is found by `make fuzz`, or with a seed or a time.
//!
//! | variable | meaning |
//! |---|---|
//! | `PGHERD_FUZZ_SECONDS` | how long each target is given mutated inputs; so many inputs unless set |
//! | `PGHERD_FUZZ_SEED` | with which seed; always the same unless set, or drawn where a time is |
//! | `PGHERD_FUZZ_NUMBER` | only the input of this number, as a failure has printed it |

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::mutation::{Draws, mutated};
use super::{TARGETS, Target};
use crate::draw::draws;

/// Mutated inputs for each target of a run without a time.
const INPUTS: u64 = 5_000;
/// Seed of a run without a time.
const SEED: u64 = 1;
/// For those, on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn corpus(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name)
}

fn kept(name: &str) -> Vec<(String, Vec<u8>)> {
    let directory = fs::read_dir(corpus(name)).expect("each target has a directory of inputs");
    let mut inputs: Vec<(String, Vec<u8>)> = directory
        .map(|entry| entry.expect("an entry").path())
        .map(|path| (path.display().to_string(), fs::read(&path).expect("an input")))
        .collect();
    inputs.sort();
    inputs
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable}: {text:?} is no number")),
    )
}

/// Gives an input to a target; if it panics, says how to see that again.
fn give(target: Target, input: &[u8], which: impl FnOnce() -> String) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(input))) {
        eprintln!("{}: b\"{}\"", which(), input.escape_ascii());
        resume_unwind(panic);
    }
}

fn fuzz(name: &str) {
    let (_, target) = TARGETS.iter().find(|(found, _)| *found == name).expect("a target");
    let kept = kept(name);
    assert!(!kept.is_empty(), "nothing is kept in {}", corpus(name).display());
    for (file, input) in &kept {
        give(*target, input, || file.clone());
    }
    let inputs: Vec<Vec<u8>> = kept.into_iter().map(|(_, input)| input).collect();
    let seconds = number("PGHERD_FUZZ_SECONDS").map(Duration::from_secs);
    let seed = number("PGHERD_FUZZ_SEED").unwrap_or_else(|| seconds.map_or(SEED, |_| draws()[0]));
    let until = Instant::now() + seconds.unwrap_or(PATIENCE);
    let numbers = match (number("PGHERD_FUZZ_NUMBER"), seconds) {
        (Some(number), _) => number..number + 1,
        (None, None) => 0..INPUTS,
        (None, Some(_)) => 0..u64::MAX,
    };
    let mut given = 0;
    for number in numbers.take_while(|_| Instant::now() < until) {
        let input = mutated(&inputs, &mut Draws::new(seed, number));
        give(*target, &input, || {
            format!(
                "PGHERD_FUZZ_SEED={seed} PGHERD_FUZZ_NUMBER={number} cargo test -p pgherd-proxy fuzz::tests::{name}"
            )
        });
        given += 1;
    }
    println!(
        "{name}: {} kept inputs, {given} mutated ones, seed {seed}",
        inputs.len()
    );
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                fuzz(stringify!($name));
            }
        )*

        #[test]
        fn every_target_has_a_test_and_a_fuzz_program() {
            let tested = [$(stringify!($name)),*];
            assert_eq!(TARGETS.map(|(name, _)| name), tested);
            let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/Cargo.toml");
            let manifest = fs::read_to_string(manifest).expect("a manifest");
            for name in tested {
                assert!(manifest.contains(&format!("\nname = \"{name}\"\n")), "{name}");
            }
        }
    };
}

targets! {
    first_packet
    opening
    opening_tls
    application_name
    proxy_header
    certificate
    refusal
    startup_watch
    tail
    first_answer
    channel_binding
    view
    agent
    page
    console
}

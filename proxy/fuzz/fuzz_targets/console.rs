#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| pgherd_proxy::fuzz::run("console", input));

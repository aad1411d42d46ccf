#![no_main]
//! config.json: what it says of an architecture.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::config(bytes));

#![no_main]
//! The entries of a coordinator's log.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::envelopes(bytes));

#![no_main]
//! Join tokens.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::join_token(bytes));

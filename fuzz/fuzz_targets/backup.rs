#![no_main]
//! A backup file.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::backup(bytes));

#![no_main]
//! A snapshot of the cluster's state.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::snapshot(bytes));

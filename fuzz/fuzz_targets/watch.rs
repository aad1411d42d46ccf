#![no_main]
//! Batches of a watch, as a gateway follows them.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::watch(bytes));

#![no_main]
//! One stream of the data plane.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::frames(bytes));

#![no_main]
//! Indexes of sharded weights.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::weight_index(bytes));

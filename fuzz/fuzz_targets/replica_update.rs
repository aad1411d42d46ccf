#![no_main]
//! A worker's words about a replica.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::replica_update(bytes));

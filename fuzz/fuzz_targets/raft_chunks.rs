#![no_main]
//! A coordinator's snapshot on the wire.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::raft_chunks(bytes));

#![no_main]
//! A coordinator's data directory: log and snapshot.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::raft_folder(bytes));

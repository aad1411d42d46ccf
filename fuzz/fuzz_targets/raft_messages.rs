#![no_main]
//! Messages between coordinators, stepped by a member.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::raft_messages(bytes));

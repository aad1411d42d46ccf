#![no_main]
//! Answers of a coordinator.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::coordinator_reply(bytes));

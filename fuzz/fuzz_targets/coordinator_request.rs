#![no_main]
//! Requests to a coordinator.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::coordinator_request(bytes));

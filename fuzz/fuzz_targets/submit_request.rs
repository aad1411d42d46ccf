#![no_main]
//! Requests from gateway to worker.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::submit_request(bytes));

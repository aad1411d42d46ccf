#![no_main]
//! Bodies of completion requests.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::completion_request(bytes));

#![no_main]
//! Bodies of chat requests.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::chat_request(bytes));

#![no_main]
//! Chat templates, compiled and rendered.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::chat_template(bytes));

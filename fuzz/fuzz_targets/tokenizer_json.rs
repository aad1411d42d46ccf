#![no_main]
//! `tokenizer.json`.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::tokenizer_json(bytes));

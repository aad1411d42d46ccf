#![no_main]
//! The text part of a model, as workers send it.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::portable_text(bytes));

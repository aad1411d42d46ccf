#![no_main]
//! GGUF files: header, metadata, tensor directory.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::gguf(bytes));

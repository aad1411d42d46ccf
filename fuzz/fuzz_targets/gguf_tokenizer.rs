#![no_main]
//! Tokenizers in GGUF metadata.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::gguf_tokenizer(bytes));

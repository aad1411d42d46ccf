#![no_main]
//! SentencePiece model files (`tokenizer.model`).

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::sentencepiece(bytes));

#![no_main]
//! `vocab.json` and `merges.txt`, with a zero byte between them.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::vocab_merges(bytes));

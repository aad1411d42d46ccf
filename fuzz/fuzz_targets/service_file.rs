#![no_main]
//! ModelService documents.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::service_file(bytes));

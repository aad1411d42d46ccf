#![no_main]
//! Headers of safetensors files.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::safetensors(bytes));

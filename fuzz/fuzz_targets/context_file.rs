#![no_main]
//! Context files of `forgectl`.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::context_file(bytes));

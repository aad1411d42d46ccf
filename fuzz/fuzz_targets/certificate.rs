#![no_main]
//! Certificates, and the answer to a joining process.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::certificate(bytes));

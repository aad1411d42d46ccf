#![no_main]
//! Configuration files of coordinators, workers and gateways.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::process_config(bytes));
